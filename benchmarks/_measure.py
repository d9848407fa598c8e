"""Variants of a training step, timed in one run; peak memory of each is measured in a separate process."""

import argparse
import contextlib
import io
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main_pretrain  # noqa: E402
from methods import METHODS, Pretrainer, enabled_methods  # noqa: E402
from models_mae import build_model  # noqa: E402
from util.compute.precision import NativeScalerWithGradNormCount, autocast, choose_amp_dtype  # noqa: E402
from util.parallel.distributed import choose_device  # noqa: E402


class Variant:
    """Training steps with `flags` on images on the device: forward pass, backward pass, AdamW, updates of methods."""

    def __init__(self, flags: str, options):
        self.args = main_pretrain.get_args_parser().parse_args(
            f"--model {options.model} --norm_pix_loss --epochs 4 --mask_ratio {options.mask_ratio} "
            f"--amp_dtype {options.amp_dtype} {flags}".split()
        )
        self.device = choose_device(options.device)
        torch.manual_seed(0)
        model = self.network(options)
        self.imgs = torch.randn(options.batch_size, 3, *model.patch_embed.img_size, device=self.device)
        self.methods = [method(self.args, model) for method in enabled_methods(self.args, METHODS)]
        self.prepare()
        self.pretrainer = Pretrainer(model, self.methods, steps=1000).to(self.device).train()
        self.pretrainer.before_epoch(1)
        groups = param_groups_weight_decay(self.pretrainer, 0.05)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
        self.pretrainer.attach(self.optimizer)
        self.dtype = choose_amp_dtype(options.amp_dtype, self.device)
        self.scaler = NativeScalerWithGradNormCount(self.dtype is torch.float16, self.device)
        self.ratio, self.count = options.mask_ratio, 0
        self.clock = time.process_time if options.cpu_time else time.perf_counter

    def network(self, options):
        return build_model(options.model, norm_pix_loss=True)

    def prepare(self) -> None:
        """Prepare a variant before its pretrainer is made; a hook for subclasses."""

    def step(self) -> float:
        """Return the seconds of one step."""
        self.wait()
        began = self.clock()
        self.train_step()
        self.wait()
        return self.clock() - began

    def train_step(self) -> None:
        with autocast(self.device, self.dtype):
            loss = sum(self.pretrainer(self.imgs, mask_ratio=self.ratio).values())
        self.scaler(loss, self.optimizer, parameters=self.pretrainer.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        self.pretrainer.after_update(self.imgs, self.count, self.scaler.applied)
        self.pretrainer.metrics()
        self.count += 1

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def peak_memory(make, steps: int) -> float:
    """Return the peak memory of `steps` steps in this process in MiB, with weights, gradients, optimizer and teachers.
    On a GPU it is that of the allocator, on a CPU the increase of resident memory."""
    before = _resident("VmRSS")
    variant = quietly(make)
    # The first batch includes the sanity check of a pretrained teacher.
    quietly(lambda: [variant.step() for _ in range(steps)])
    if variant.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        quietly(lambda: [variant.step() for _ in range(steps)])
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    quietly(lambda: [variant.step() for _ in range(steps)])
    return _resident("VmHWM") - before


def _resident(what: str) -> float:
    """Return VmRSS (current) or VmHWM (peak) of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def quietly(call):
    with contextlib.redirect_stdout(io.StringIO()):
        return call()


def measured(names: list[str], make, options, argv: list[str], memory_steps: int) -> tuple[dict, dict]:
    """Return by variant the seconds of a step in each round, and the peak memory in MiB. `make(name)` makes a
    variant."""
    memory = {}
    for name in names:
        command = [sys.executable, sys.argv[0], *argv, "--memory_of", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    variants = {name: quietly(lambda name=name: make(name)) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(options.rounds + 1):  # the first round warms up
        for name, variant in variants.items():
            seconds = quietly(lambda variant=variant: [variant.step() for _ in range(options.steps)])
            if round_:
                times[name].append(statistics.mean(seconds) if memory_steps > 2 else statistics.median(seconds))
    return times, memory


def clocked(options) -> str:
    return " (processor time)" * options.cpu_time


def report(options, times: dict, memory: dict) -> None:
    """Print the table: ratios of medians to the first variant, and quartiles of the ratios per round."""
    first = next(iter(times))
    rows = {}
    for name in times:
        ratios = sorted(own / plain for own, plain in zip(times[name], times[first]))
        rows[name] = {
            "images_per_s": options.batch_size / statistics.median(times[name]),
            "time": statistics.median(times[name]) / statistics.median(times[first]),
            "quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
            "memory_mib": memory[name],
            "memory": memory[name] / memory[first],
        }
    dtype = str(choose_amp_dtype(options.amp_dtype, choose_device(options.device))).split(".")[-1]
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else platform.processor() or "CPU"
    print(
        f"{options.model}, batch {options.batch_size}, mask ratio {options.mask_ratio}, {dtype},"
        f" {torch.get_num_threads()} threads{clocked(options)}, {device}, torch {torch.__version__},"
        f" {options.rounds} rounds\n"
    )
    print("| variant | images/s | time of MAE's | quartiles | peak memory, MiB | of MAE's |\n|---|---|---|---|---|---|")
    for name, row in rows.items():
        low, high = row["quartiles"]
        print(
            f"| {name} | {row['images_per_s']:.0f} | {row['time']:.2f} | {low:.2f} to {high:.2f} | "
            f"{row['memory_mib']:.0f} | {row['memory']:.2f} |"
        )
    if options.out:
        Path(options.out).write_text(json.dumps({"options": vars(options), "rows": rows}, indent=2) + "\n")


def parser(description: str, rounds: int, steps: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", default="mae_deit_tiny_patch4")
    made.add_argument("--batch_size", type=int, default=128)
    made.add_argument("--mask_ratio", type=float, default=0.75)
    add_timing_flags(made, rounds, steps)
    made.add_argument("--out", default="", help="JSON file for the numbers")
    made.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    return made


def add_timing_flags(made: argparse.ArgumentParser, rounds: int, steps: int) -> None:
    """Add the flags of how, how often and where steps are timed."""
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--steps", type=int, default=steps, help="steps of a variant in each round")
    made.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    made.add_argument(
        "--cpu_time",
        action="store_true",
        help="measure processor time of this process instead of wall time, for a busy machine",
    )
    made.add_argument("--device", default="cpu")
    made.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
