"""What each method costs beside plain MAE: time and peak memory of a training step, all variants in one run.

python benchmarks/methods.py                                    ViT-Tiny at 32 px, the paper's decoder for it
python benchmarks/methods.py --model mae_vit_base_patch16 --batch_size 64 --teacher mae_vit_large_patch16 --device cuda

Steps are forward, backward, AdamW and the methods' own updates on images that are already on the device, in rounds that
visit every variant; the table shows ratios of medians to plain MAE and their spread (quartiles of the ratio per round).
Bootstrapped methods are timed in their feature stage. Memory: on a GPU the allocator's peak, on a CPU that of the
process's resident memory over its level before the model was made, each variant in a process of its own.
"""

import argparse
import contextlib
import io
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main_pretrain  # noqa: E402
from methods import METHODS, Pretrainer, enabled_methods  # noqa: E402
from models_mae import build_model  # noqa: E402
from util.amp import NativeScalerWithGradNormCount, autocast, choose_amp_dtype  # noqa: E402
from util.distributed import choose_device  # noqa: E402
from util.errors import user_errors  # noqa: E402

PARTS = {
    "mae_k": "--mae_k 1",
    "ema_mae": "--ema_mae --wse 1",
    "rc_mae": "--rc_mae",
    "dmae": "--dmae_teacher {teacher}",
}
VARIANTS = [
    "mae", "mae_k", "ema_mae", "rc_mae", "dmae",
    "mae_k+rc_mae", "mae_k+dmae", "ema_mae+rc_mae", "ema_mae+dmae", "rc_mae+dmae",
]  # fmt: skip


class Variant:
    """A training step of one combination of methods, in the state it spends most of its run in."""

    def __init__(self, name: str, options, teacher: str):
        flags = " ".join(PARTS[part] for part in name.split("+") if part in PARTS).format(teacher=teacher)
        args = main_pretrain.get_args_parser().parse_args(
            f"--model {options.model} --norm_pix_loss --epochs 4 --mask_ratio {options.mask_ratio} {flags}".split()
        )
        device = choose_device(options.device)
        torch.manual_seed(0)
        model = build_model(options.model, norm_pix_loss=True)
        methods = [method(args, model) for method in enabled_methods(args, METHODS)]
        self.pretrainer = Pretrainer(model, methods, steps=1000).to(device).train()
        self.pretrainer.before_epoch(1)
        groups = param_groups_weight_decay(self.pretrainer, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.dtype, self.device = choose_amp_dtype(options.amp_dtype, device), device
        self.scaler = NativeScalerWithGradNormCount(self.dtype is torch.float16, device)
        self.imgs = torch.randn(options.batch_size, 3, *model.patch_embed.img_size, device=device)
        self.ratio, self.count = options.mask_ratio, 0

    def step(self) -> float:
        """Seconds of one step."""
        self._wait()
        began = time.perf_counter()
        with autocast(self.device, self.dtype):
            loss, _, _ = self.pretrainer(self.imgs, mask_ratio=self.ratio)
        self.scaler(loss, self.optimizer, parameters=self.pretrainer.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        self.pretrainer.after_update(self.imgs, self.count, self.scaler.applied)
        self._wait()
        self.count += 1
        return time.perf_counter() - began

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def make_teacher(options, folder: str) -> str:
    path = f"{folder}/teacher.pth"
    name = options.teacher or options.model
    torch.save({"model": build_model(name).state_dict(), "args": {"model": name}}, path)
    return path


def peak_memory(name: str, options, teacher: str) -> float:
    """MiB at the peak of two steps, weights, gradients, optimizer and teachers included, in this process."""
    before = _resident("VmRSS")
    variant = quietly(lambda: Variant(name, options, teacher))
    quietly(variant.step)  # the first batch also introduces a pretrained teacher, as a whole
    if variant.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        quietly(lambda: [variant.step() for _ in range(2)])
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    quietly(lambda: [variant.step() for _ in range(2)])
    return _resident("VmHWM") - before


def _resident(what: str) -> float:
    """VmRSS, now, or VmHWM, the peak: MiB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def quietly(call):
    with contextlib.redirect_stdout(io.StringIO()):
        return call()


def memory_apart(name: str, argv: list[str], teacher: str) -> float:
    command = [sys.executable, __file__, *argv, "--memory_of", name, "--teacher_file", teacher]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main(options, argv: list[str]) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(peak_memory(options.memory_of, options, options.teacher_file))
        return
    names = ["mae"] + [name for name in options.only or VARIANTS if name != "mae"]
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_teacher(options, folder)
        memory = {name: memory_apart(name, argv, teacher) for name in names}
        variants = {name: quietly(lambda name=name: Variant(name, options, teacher)) for name in names}
        times: dict[str, list[float]] = {name: [] for name in names}
        for round_ in range(options.rounds + 1):  # the first one warms up
            for name, variant in variants.items():
                seconds = quietly(lambda variant=variant: [variant.step() for _ in range(options.steps)])
                if round_:
                    times[name].append(statistics.median(seconds))
    report(options, names, times, memory)


def report(options, names, times, memory) -> None:
    base = times["mae"]
    rows = {}
    for name in names:
        ratios = sorted(own / plain for own, plain in zip(times[name], base))
        rows[name] = {
            "images_per_s": options.batch_size / statistics.median(times[name]),
            "time": statistics.median(times[name]) / statistics.median(base),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "memory_mib": memory[name],
            "memory": memory[name] / memory["mae"],
        }
    dtype = str(choose_amp_dtype(options.amp_dtype, choose_device(options.device))).split(".")[-1]
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    print(
        f"{options.model}, batch {options.batch_size}, mask ratio {options.mask_ratio}, {dtype},"
        f" {torch.get_num_threads()} threads, {device}, torch {torch.__version__}, {options.rounds} rounds\n"
    )
    print("| variant | images/s | time of MAE's | quartiles | peak memory, MiB | of MAE's |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        low, high = row["quartiles"]
        print(f"| {name} | {row['images_per_s']:.0f} | {row['time']:.2f} | {low:.2f} to {high:.2f} | "
              f"{row['memory_mib']:.0f} | {row['memory']:.2f} |")  # fmt: skip
    if options.out:
        Path(options.out).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=2) + "\n")


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="mae_deit_tiny_patch4")
    parser.add_argument("--teacher", default="", help="model of DMAE's teacher (default: the student's)")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=2, help="steps of a variant in each round")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--only", nargs="*", choices=VARIANTS, help="these variants, beside mae")
    parser.add_argument("--out", default="", help="JSON file for the numbers")
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--teacher_file", default="", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    with user_errors("methods.py"):
        main(get_args_parser().parse_args(), sys.argv[1:])
