"""Ctrl-C as real processes see it: a run saves, everything else ends with one line; a second one ends at once."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.forked import Forked
from helpers.launch import DIGITS, ROOT, checkpoint, finish, kill_when, launch, log_rows, same_tensors

RUN = DIGITS.replace("--batch_size 64", "--batch_size 32") + " --num_workers 1 --save_steps 3 --save_freq 1"
STOPPING = "stopping after this step; press Ctrl-C again to end at once"


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_saves_and_resumes_bit_identically(tmp_path, monkeypatch, processes):
    """SIGINT to the whole group, workers included, twice within milliseconds: from the terminal and from torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    flags = RUN.replace("--batch_size 32", f"--batch_size {64 // processes}")
    finish(Forked("main_pretrain", f"{flags} --output_dir {tmp_path}/whole", processes))
    run = f"{flags} --output_dir {tmp_path}/parts"
    process = Forked("main_pretrain", run, processes)
    kill_when(process, (tmp_path / "parts/checkpoint-0-3.pth").exists, number=signal.SIGINT)
    time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    assert output.count(STOPPING) == 1 and "Traceback" not in output
    assert "stopped by SIGINT" in output and "--resume auto continues exactly there" in output
    finish(Forked("main_pretrain", f"{run} --resume auto", processes))
    ours, theirs = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("parts", "whole"))
    for key in ("model", "optimizer", "epoch", "step", "rng"):
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")


SLOW = """
import sys, time
sys.path[:0] = [{root!r}]
import main_pretrain
import engine_pretrain
from util.errors import user_errors
take = engine_pretrain.Run.{method}
def slow(self, *args, **named):
    if self.step >= 4:
        print("slow", flush=True)
        time.sleep(60)
    return take(self, *args, **named)
engine_pretrain.Run.{method} = slow
with user_errors("main_pretrain.py"):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args({flags!r}.split()))
"""


def started(code, until):
    """Run Python code in a process group of its own; return it and what it printed before a line with `until`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    return process, wait_for(process, until)


def wait_for(process, text):
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} is not in\n{''.join(lines)}")


@pytest.mark.parametrize("method,work", [("optimizer_step", "this step"), ("finish_epoch", "this epoch's evaluation")])
def test_the_second_one_ends_at_once(tmp_path, method, work):
    """In a step of a minute, and in an evaluation: nothing that was written is lost, no worker is left."""
    process, _ = started(SLOW.format(root=str(ROOT), method=method, flags=f"{RUN} --output_dir {tmp_path}"), "slow")
    os.killpg(process.pid, signal.SIGINT)
    wait_for(process, f"stopping after {work}; press Ctrl-C again to end at once")
    time.sleep(0.3)
    began = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process, code=130)
    assert time.monotonic() - began < 10 and "Traceback" not in output and "ended at once" in output
    assert [path.name for path in tmp_path.glob("checkpoint-*")] and not list(tmp_path.glob(".*tmp"))
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # the system needs a moment to remove a killed worker
            os.killpg(process.pid, 0)
            time.sleep(0.05)


TOOL = """
import sys, time
sys.path[:0] = [{root!r}]
import {module} as command
from util.errors import user_errors
def slow(*args, **named):
    print("loading", flush=True)
    time.sleep(60)
command.{function} = slow
with user_errors("command.py"):
    command.main(command.get_args_parser().parse_args({flags!r}.split()))
"""


@pytest.mark.parametrize(
    "module,function,flags",
    [
        ("main_finetune", "read_splits", f"{RUN} --model vit_micro_patch4".split("--decoder")[0]),
        ("tools.knn", "judging.labelled_splits", "random --dataset digits --model vit_micro_patch4 --input_size 16"),
    ],
)
def test_one_line_while_a_command_loads(module, function, flags):
    code = TOOL.format(root=str(ROOT), module=module, function=function, flags=flags.replace("mae_vit", "vit"))
    process, _ = started(code, "loading")
    os.killpg(process.pid, signal.SIGINT)
    assert finish(process, code=130).strip() == "command.py: interrupted by Ctrl-C"


def test_one_line_while_torch_is_imported():
    """Only the first import of the command is then in effect."""
    process = launch("main_pretrain.py", "--help")
    maps = f"/proc/{process.pid}/maps"
    kill_when(process, lambda: "libtorch_cpu" in open(maps).read(), number=signal.SIGINT)  # noqa: SIM115
    output = finish(process, code=130)
    assert "interrupted by Ctrl-C" in output and "Traceback" not in output


def test_torchrun_saves_and_reports_no_failed_rank(tmp_path):
    """The terminal sends SIGINT to torchrun and the ranks, and torchrun forwards it to the ranks."""
    flags = RUN.replace("--batch_size 32", "--batch_size 32 --epochs 20").replace("--epochs 2 ", "")
    run = launch("main_pretrain.py", f"{flags} --output_dir {tmp_path}", 2)
    kill_when(run, (tmp_path / "checkpoint-0-3.pth").exists, number=signal.SIGINT)
    output, _ = run.communicate(timeout=120)
    assert "stopped by SIGINT" in output and "KeyboardInterrupt" not in output and "ended at once" not in output
    assert "forcefully exiting" not in output
