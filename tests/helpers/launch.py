"""Start the mains as users do, and read the files they write."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.forked import Forked

ROOT = Path(__file__).resolve().parent.parent.parent

# The smallest autoencoder with all parts: 16 patches, the micro encoder, one decoder block.
SMALL = "--model mae_vit_micro_patch4 --input_size 16 --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2"
DIGITS = f"--dataset digits {SMALL} --batch_size 64 --epochs 2 --warmup_epochs 1 --vis_freq 0 --device cpu"


def command_module(name: str):
    """The module of a main ("main_pretrain") or of a command in tools/ ("knn")."""
    return importlib.import_module(name if name.startswith(("main_", "submitit_")) else f"tools.{name}")


def command(main: str, flags: str, processes: int = 1, restarts: int = 0) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max_restarts={restarts}"]
    return [*launcher, str(ROOT / main), *flags.split()]


def launch(main: str, flags: str, processes: int = 1, restarts: int = 0, **options) -> subprocess.Popen:
    """Start a main in its own process group, with one thread per process: the machine may have only two cores."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(main, flags, processes, restarts),
        env=env,
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )


def ranks(main: str, flags: str, processes: int, seconds: float = 180) -> str:
    """Run a main on several ranks without a launcher (see `forked`), and return their output."""
    return finish(Forked(main, flags, processes), seconds=seconds)


def finish(process: subprocess.Popen | Forked, code: int = 0, seconds: float = 180) -> str:
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hangs after\n{process.communicate()[0]}") from None
    assert process.returncode == code, output
    return output


def kill_when(process: subprocess.Popen | Forked, happened, number=signal.SIGKILL) -> None:
    """Send a signal to the whole process group as soon as `happened()` is true."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run ended before the condition was met"
        time.sleep(0.002)
    os.killpg(process.pid, number)


def checkpoint(folder: Path, name: str) -> dict:
    return torch.load(folder / name, weights_only=True)


def largest_difference(one: dict, other: dict) -> float:
    return max((one[key] - other[key]).abs().max().item() for key in one)


def same_tensors(one, other) -> bool:
    """Return whether nested dicts and lists of tensors are equal bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_tensors(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same_tensors(a, b) for a, b in zip(one, other))
    return one == other


def log_rows(folder: Path, without=("seconds",)) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return the (x, value) pairs of one TensorBoard series over all event files of the folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]
