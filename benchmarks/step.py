"""Gain of each optimisation of the training step: the textbook step, with one optimisation after the other added.

python benchmarks/step.py                                ViT-Tiny/4 at 32 px on the CPU, bf16 where it is fast
python benchmarks/step.py --model mae_vit_base_patch16 --batch_size 64 --device cuda
python benchmarks/step.py --compile                      with a row for compiled blocks (a minute or more to compile)

Every variant has the same weights, images and masks, and the script exits with an error when a loss differs by more
than rounding. Rounds visit every variant; the table has ratios of medians, and quartiles of the ratios per round.
"""

import sys

import _measure
import torch
from plain import plain

from util.compute.kernels import attention_is_fused, compile_networks
from util.errors import user_errors

# Name: (attention, pieces of the step, compiled).
VARIANTS = {
    "by the book": ("fused", (), False),
    "+ attention chosen": ("auto", (), False),
    "+ visible patches embedded alone": ("auto", ("embed",), False),
    "+ decoder in shuffled order": ("auto", ("embed", "order"), False),
    "+ removed patches predicted alone": ("auto", ("embed", "order", "removed"), False),
    "+ last decoder block for them alone": ("auto", ("embed", "order", "removed", "last"), False),
    "+ blocks compiled": ("auto", ("embed", "order", "removed", "last"), True),
}


class Step(_measure.Variant):
    def __init__(self, name: str, options):
        self.name = name
        super().__init__("", options)
        attention, pieces, compiled = VARIANTS[name]
        model = plain(self.pretrainer.model, *pieces)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = attention_is_fused(attention, self.device, self.dtype)
        if compiled:
            compile_networks(model)
        generator = torch.Generator().manual_seed(0)
        self.noise = torch.rand(len(self.imgs), model.patch_embed.num_patches, generator=generator).to(self.device)
        self.first_loss = None

    def train_step(self) -> None:
        with _measure.autocast(self.device, self.dtype):
            loss = sum(self.pretrainer(self.imgs, mask_ratio=self.ratio, noise=self.noise).values())
        self.first_loss = loss.detach() if self.first_loss is None else self.first_loss
        self.scaler(loss, self.optimizer, parameters=self.pretrainer.parameters())
        self.optimizer.zero_grad(set_to_none=True)


def main(options, argv: list[str]) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    made = {}

    def make(name: str) -> Step:
        made[name] = Step(name, options)
        return made[name]

    if options.memory_of:
        print(_measure.peak_memory(lambda: make(options.memory_of), steps=2))
        return
    names = [name for name in VARIANTS if options.compile or "compiled" not in name]
    times, memory = _measure.measured(names, make, options, argv, memory_steps=2)
    _measure.report(options, times, memory)
    losses = {name: step.first_loss.item() for name, step in made.items()}
    spread = max(losses.values()) / min(losses.values()) - 1
    print(f"\nlosses of the first step differ by {spread:.1e}")
    if spread > (1e-5 if made[names[0]].dtype is torch.float32 else 5e-3):
        sys.exit(f"error: more than rounding: {losses}")


def get_args_parser():
    parser = _measure.parser(__doc__.split("\n")[0], rounds=8, steps=1)
    parser.add_argument("--compile", action="store_true", help="with a row for compiled blocks")
    return parser


if __name__ == "__main__":
    with user_errors("step.py"):
        main(get_args_parser().parse_args(), sys.argv[1:])
