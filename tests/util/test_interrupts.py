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
DENSE = "--dataset scenes --scene_size 32 --scene_count 40 3 --input_size 32 --batch_size 4 --model vit_micro_patch4"
DENSE += " --head_width 16 --epochs 2 --num_workers 1 --save_steps 3 --device cpu --amp_dtype fp32"
DETECT = f"{DENSE} --patch_size 8 --window 3 --detector faster"
STOPPING = "stopping after this step; press Ctrl-C again to end at once"


@pytest.mark.parametrize("main, processes", [("main_pretrain", 1), ("main_pretrain", 2), ("main_detect", 1)])
def test_a_run_saves_and_resumes_bit_identically(tmp_path, monkeypatch, main, processes):
    """SIGINT to the whole group, workers included, twice within milliseconds: from the terminal and from torchrun."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    flags = RUN.replace("--batch_size 32", f"--batch_size {64 // processes}") if main == "main_pretrain" else DETECT
    finish(Forked(main, f"{flags} --output_dir {tmp_path}/whole", processes))
    run = f"{flags} --output_dir {tmp_path}/parts"
    process = Forked(main, run, processes)
    kill_when(process, (tmp_path / "parts/checkpoint-0-3.pth").exists, number=signal.SIGINT)
    time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output = finish(process)
    assert output.count(STOPPING) == 1 and "Traceback" not in output
    assert "stopped by SIGINT" in output and "--resume auto continues exactly there" in output
    finish(Forked(main, f"{run} --resume auto", processes))
    ours, theirs = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("parts", "whole"))
    for key in ("model", "optimizer", "epoch", "step", "rng"):
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")


SLOW = """
import sys, time
sys.path[:0] = [{root!r}]
import {main} as main
from {module} import {owner}
from util.errors import user_errors
take, calls = {owner}.{method}, []
def slow(self, *args, **named):
    calls.append(1)
    if len(calls) > {number}:
        print("slow", flush=True)
        time.sleep(60)
    return take(self, *args, **named)
{owner}.{method} = slow
with user_errors("main.py"):
    main.main(main.get_args_parser().parse_args({flags!r}.split()))
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


PRETRAIN = {"main": "main_pretrain", "module": "util.training.run", "owner": "Run", "flags": RUN}
SEGMENT = {"main": "main_segment", "module": "engine_dense", "owner": "Segmentation", "flags": DENSE}


@pytest.mark.parametrize(
    "names, method, number, work",
    [
        (PRETRAIN, "optimizer_step", 4, "this step"),
        (PRETRAIN, "finish_epoch", 0, "this epoch's evaluation"),
        (SEGMENT, "predict", 1, "this epoch's evaluation"),
    ],
    ids=["step", "end of an epoch", "image of an evaluation"],
)
def test_the_second_one_ends_at_once(tmp_path, names, method, number, work):
    """In a step of a minute, and in an evaluation: nothing that was written is lost, no worker is left."""
    names = {**names, "flags": f"{names['flags']} --output_dir {tmp_path}"}
    process, _ = started(SLOW.format(root=str(ROOT), method=method, number=number, **names), "slow")
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
