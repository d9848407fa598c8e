"""Starting the mains the way users do, and reading what they leave behind."""

import contextlib
import importlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent

# The smallest autoencoder that has everything: 16 patches, two encoder blocks' worth of width, one decoder block.
SMALL = "--model mae_vit_micro_patch4 --input_size 16 --decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2"
DIGITS = f"--dataset digits {SMALL} --batch_size 64 --epochs 2 --warmup_epochs 1 --vis_freq 0 --device cpu"


def command(main: str, flags: str, processes: int = 1, restarts: int = 0) -> list[str]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--max_restarts={restarts}"]
    return [*launcher, str(ROOT / main), *flags.split()]


def launch(main: str, flags: str, processes: int = 1, restarts: int = 0, **options) -> subprocess.Popen:
    """In a process group of its own, with one thread per process: the machine may have only two cores."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(main, flags, processes, restarts), env=env, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options,
    )  # fmt: skip


def ranks(main: str, flags: str, processes: int, seconds: float = 180) -> str:
    """What `finish(launch(...))` gives where the launcher is not what is tested: processes forked from one that has
    imported everything, which takes most of a launch. Returns what they wrote."""
    with started_ranks(main, flags, processes) as (made, outputs):
        deadline = time.monotonic() + seconds
        for process in made:
            process.join(max(0.1, deadline - time.monotonic()))
        codes, output = [process.exitcode for process in made], "".join(path.read_text() for path in outputs)
    assert codes == [0] * processes, f"{codes}\n{output}"
    return output


@contextlib.contextmanager
def started_ranks(main: str, flags: str, processes: int):
    """The processes and the files that they write into; what still runs afterwards is killed."""
    os.environ["PYTHONPATH"] = str(ROOT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main_pretrain"])
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        made = [context.Process(target=_rank, args=(main, flags, rank, processes, port, f"{folder}/{rank}"))
                for rank in range(processes)]  # fmt: skip
        for process in made:
            process.start()
        try:
            yield made, [Path(f"{folder}/{rank}") for rank in range(processes)]
        finally:
            for process in made:
                process.kill()


def _rank(main: str, flags: str, rank: int, processes: int, port: int, output: str) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115  until the process ends
    torch.set_num_threads(1)
    code = 1
    try:
        module = importlib.import_module(main)
        module.main(module.get_args_parser().parse_args(flags.split()))
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)  # gloo may abort while the interpreter is torn down


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 180) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, output
    return output


def kill_when(process: subprocess.Popen, happened, number=signal.SIGKILL) -> None:
    """Send a signal to the whole group as soon as `happened()`."""
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never got there"
        time.sleep(0.002)
    os.killpg(process.pid, number)


def checkpoint(folder: Path, name: str) -> dict:
    return torch.load(folder / name, weights_only=True)


def largest_difference(one: dict, other: dict) -> float:
    return max((one[key] - other[key]).abs().max().item() for key in one)


def same_tensors(one, other) -> bool:
    """Equal bit for bit, through nested dicts and lists."""
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
    """(x, value) of one TensorBoard series, over all event files of the folder."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]
