"""Cost of learned masks relative to plain MAE: time and peak memory of a training step, and the time of its parts.

python benchmarks/mlo.py                                          ViT-Tiny at 32 px
python benchmarks/mlo.py --model mae_vit_base_patch16 --batch_size 64 --device cuda

The hypergradient unrolls two steps (--mlo_unroll 2), and the masking network moves in every or every fifth window, so a
round is the mean of ten steps of every variant. `naive` computes the hypergradient in every window from a graph through
the unrolled steps that is differentiated twice (benchmarks/unrolled.py). Labelled batches have the same size.
"""

import sys
from collections import defaultdict
from types import SimpleNamespace

import _measure
import torch

from benchmarks.unrolled import unrolled
from methods.mlo import labelled_task
from util.errors import user_errors

VARIANTS = {
    "mae": "",
    "fd, every 1": "--mlo_hypergrad fd",
    "fd, every 5": "--mlo_hypergrad fd --mlo_update_every 5",
    "jvp, every 1": "--mlo_hypergrad jvp",
    "jvp, every 5": "--mlo_hypergrad jvp --mlo_update_every 5",
    "solve, every 1": "--mlo_stage2 solve",
    "solve, every 5": "--mlo_stage2 solve --mlo_update_every 5",
    "naive, every 1": "--mlo_hypergrad fd",
}
CYCLE = 10  # steps: a multiple of the windows of every variant


class RandomTask(labelled_task.Classification):
    """Random images with random labels of ten classes: the cost of a real task without reading images."""

    def __init__(self, imgs, pool="avg"):
        self.pool, self.classes, self.held_out = pool, 10, [0]
        self.batch = SimpleNamespace(
            image=imgs, bad=torch.zeros(1), target=torch.randint(10, (len(imgs),), device=imgs.device)
        )

    def batches(self, every):
        return self, self


class MLOVariant(_measure.Variant):
    """One way to compute the hypergradient; `parts` collects the seconds of its parts."""

    def __init__(self, name: str, options):
        flags = VARIANTS[name] and f"--mlo_mae --mlo_labels same {VARIANTS[name]}"
        self.naive, self.parts = name.startswith("naive"), defaultdict(float)
        super().__init__(flags, options)

    def prepare(self) -> None:
        if not self.methods:
            return
        (method,) = self.methods
        method.set_task(task := RandomTask(self.imgs))
        method._draw = lambda stage: task.batch
        if self.naive:  # replaces stage III and everything after it
            method.batches = [SimpleNamespace(batch=lambda _: task.batch)] * 2
            method.stage2.paths = lambda *_: ({}, {"direct": {}})
            method._update_mask_net = self.move_naively

    def watch_parts(self) -> None:
        (method,) = self.methods
        self.timed(method.stage2, "update", "stage II: a step of the head")
        self.timed(method.stage2, "paths", "stage III: gradient, and through the head")
        self.timed(method, "hypergradient", "derivatives along it, gradient of the masking network")

    def move_naively(self, model, imgs, paths) -> None:
        (method,) = self.methods
        unrolled(self.pretrainer, method, [step.batches[0].imgs for step in method.window], self.ratio)

    def timed(self, owner, name: str, part: str) -> None:
        original = getattr(owner, name)

        def call(*args):
            self.wait()
            began = self.clock()
            result = original(*args)
            self.wait()
            self.parts[part] += self.clock() - began
            return result

        setattr(owner, name, call)


def breakdown(variant: MLOVariant, plain: float) -> None:
    """Print the time of the parts of one cycle per step, as multiples of a MAE step."""
    variant.watch_parts()
    total = sum(variant.step() for _ in range(CYCLE)) / CYCLE
    print("\n| part of `fd, every 1` | time, of a MAE step |\n|---|---|")
    for part, seconds in variant.parts.items():
        print(f"| {part} | {seconds / CYCLE / plain:.2f} |")
    rest = total - sum(variant.parts.values()) / CYCLE
    print(f"| stage I: choosing, reconstructing, AdamW | {rest / plain:.2f} |")


def main(options, argv: list[str]) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(_measure.peak_memory(lambda: MLOVariant(options.memory_of, options), steps=CYCLE))
        return
    names = ["mae"] + [name for name in options.only or VARIANTS if name != "mae"]
    made = {}

    def make(name):
        made[name] = MLOVariant(name, options)
        return made[name]

    times, memory = _measure.measured(names, make, options, argv, memory_steps=CYCLE)
    _measure.report(options, times, memory)
    if "fd, every 1" in made:
        breakdown(made["fd, every 1"], sorted(times["mae"])[len(times["mae"]) // 2])


def get_args_parser():
    parser = _measure.parser(__doc__.split("\n")[0], rounds=5, steps=CYCLE)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="variants to measure besides mae")
    return parser


if __name__ == "__main__":
    with user_errors("mlo.py"):
        main(get_args_parser().parse_args(), sys.argv[1:])
