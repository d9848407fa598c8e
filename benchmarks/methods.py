"""Cost of each method relative to plain MAE: time and peak memory of a training step, all variants in one run.

python benchmarks/methods.py                                    ViT-Tiny at 32 px, the paper's decoder for it
python benchmarks/methods.py --model mae_vit_base_patch16 --batch_size 64 --teacher mae_vit_large_patch16 --device cuda

Steps are forward pass, backward pass, AdamW and the methods' updates on images on the device, in rounds that visit
every variant. The table has ratios of medians to plain MAE, and quartiles of the ratios per round. Bootstrapped methods
are timed in their feature stage. For MLO-MAE see benchmarks/mlo.py."""

import sys
import tempfile

import _measure
import torch

from models_mae import build_model
from util.errors import user_errors

PARTS = {
    "mae_k": "--mae_k 1",
    "ema_mae": "--ema_mae --wse 1",
    "rc_mae": "--rc_mae",
    "dmae": "--dmae_teacher {teacher}",
    "u_mae": "--u_mae",
    "block": "--mask block",
    "grid": "--mask grid",
    "hpm": "--hpm --hpm_start 0.5",
    "automae": "--automae",
    "attmask": "--attmask high",
}
VARIANTS = [
    "mae",
    "mae_k",
    "ema_mae",
    "rc_mae",
    "dmae",
    "u_mae",
    "block",
    "grid",
    "hpm",
    "automae",
    "attmask",
    "mae_k+rc_mae",
    "mae_k+dmae",
    "ema_mae+rc_mae",
    "ema_mae+dmae",
    "rc_mae+dmae",
]


def make_teacher(options, folder: str) -> str:
    path = f"{folder}/teacher.pth"
    name = options.teacher or options.model
    torch.save({"model": build_model(name).state_dict(), "args": {"model": name}}, path)
    return path


def main(options, argv: list[str]) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(options, folder)

        def make(name: str) -> _measure.Variant:
            flags = " ".join(PARTS[part] for part in name.split("+") if part in PARTS).format(teacher=teacher)
            return _measure.Variant(flags, options)

        if options.memory_of:
            print(_measure.peak_memory(lambda: make(options.memory_of), steps=2))
            return
        names = ["mae"] + [name for name in options.only or VARIANTS if name != "mae"]
        times, memory = _measure.measured(names, make, options, argv, memory_steps=2)
    _measure.report(options, times, memory)


def get_args_parser():
    parser = _measure.parser(__doc__.split("\n")[0], rounds=10, steps=2)
    parser.add_argument("--teacher", default="", help="model of DMAE's teacher (default: the student's)")
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="variants to measure besides mae")
    return parser


if __name__ == "__main__":
    with user_errors("methods.py"):
        main(get_args_parser().parse_args(), sys.argv[1:])
