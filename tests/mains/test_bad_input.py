"""Refusals that depend on an existing folder or on the machine, valid flags that must pass, and real commands."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers.launch import ROOT
from helpers.refusals import LAUNCHERS, MAINS, assert_names, call, command, listing, refusal

# --- the folder of another run


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize("other", MAINS)
def test_the_folder_of_another_run_is_refused(program, other, refusal_dir, capsys):
    line = refusal(capsys, program, "", refusal_dir, "--output_dir", f"{{dir}}/{other}")
    assert_names(line, f"--output_dir {refusal_dir / other} | --resume | --overwrite")


@pytest.mark.parametrize(
    "left",
    [
        "log.txt",
        "args.json",
        "checkpoint-3-7.pth",
        ".checkpoint-0.pth.tmp",
        "events.out.tfevents.1.host",
        "encoder.safetensors",
        "probe.json",
    ],
)
def test_one_file_of_another_run_is_enough(left, refusal_dir, tmp_path, capsys):
    (tmp_path / left).write_text("of another run\n")
    assert left in refusal(capsys, "pretrain", "", refusal_dir, "--output_dir", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_cached_probe_respects_another_run(refusal_dir, capsys):
    assert "--output_dir" in refusal(
        capsys, "linprobe", "--cache_features", refusal_dir, "--output_dir", "{dir}/pretrain"
    )


def test_overwrite_deletes_the_run_and_nothing_else(refusal_dir, tmp_path):
    shutil.copytree(refusal_dir / "pretrain", tmp_path / "run")
    for stale in ("checkpoint-7.pth", "checkpoint-7-3.pth"):
        shutil.copy(refusal_dir / "pretrain/checkpoint-0.pth", tmp_path / "run" / stale)
    for kept in ("notes.txt", "checkpoint-mine.pth", "checkpoint-0.pth.backup"):
        (tmp_path / "run" / kept).write_text("mine\n")
    call(
        "pretrain",
        command("pretrain", refusal_dir, "--output_dir", f"{tmp_path}/run", "--overwrite"),
        refusal_dir / "here",
    )
    events = {path.name for path in (tmp_path / "run").glob("events*")}
    assert len(events) == 2 and len([name for name in events if name.endswith(".hparams")]) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} - events == {
        "notes.txt",
        "checkpoint-mine.pth",
        "checkpoint-0.pth.backup",
        "log.txt",
        "args.json",
        "checkpoint-0.pth",
        "encoder.safetensors",
        "results.jsonl",
    }
    assert (tmp_path / "run/log.txt").read_text().count("\n") == 1


def test_a_folder_that_cannot_be_written(refusal_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permissions do not stop root
    assert "--output_dir" in refusal(capsys, "pretrain", "", refusal_dir, "--output_dir", str(tmp_path))
    assert not list(tmp_path.iterdir())


# --- the machine


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda(program, device, refusal_dir, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(
        capsys, program, f"--device {device}", refusal_dir, "--output_dir", f"{{dir}}/{program}", "--overwrite"
    )
    assert_names(line, f"--device {device} | --device cpu")


def test_a_gpu_that_is_not_there(refusal_dir, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = refusal(capsys, "pretrain", "--device cuda:7", refusal_dir, "--output_dir", "{dir}/pretrain", "--overwrite")
    assert_names(line, "--device cuda:7 | 1 GPU")


# --- valid flags

ACCEPTED = {
    "labels that only look like numbers": "--dataset filelist --train_list {dir}/lists/odd.txt",
    "resume with nothing to resume": "--resume auto",
    "overwrite with nothing to overwrite": "--overwrite",
}


@pytest.mark.parametrize("flags", ACCEPTED.values(), ids=ACCEPTED)
def test_is_accepted(flags, refusal_dir, tmp_path):
    call(
        "pretrain",
        command("pretrain", refusal_dir, *flags.split(), "--output_dir", f"{tmp_path}/new"),
        refusal_dir / "here",
    )
    assert (tmp_path / "new/encoder.safetensors").is_file()


def test_resuming_with_a_flag_at_the_models_own_value_is_accepted(refusal_dir, tmp_path):
    flags = ["--resume", "{dir}/pretrain/checkpoint-0.pth", "--patch_size", "4", "--output_dir", f"{tmp_path}/new"]
    call("pretrain", command("pretrain", refusal_dir, *flags), refusal_dir / "here")


# --- real commands


def clean_environment(**variables) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def run_command(argv: list[str], folder: Path, seconds: float = 120) -> subprocess.CompletedProcess:
    """Run a command, and end all its descendants with it."""
    process = subprocess.Popen(
        argv,
        cwd=folder,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, error = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(argv, process.returncode, out, error)


COMMANDS = {
    "pretrain": ("--resume auto --mask_ratio 0.99", "--mask_ratio"),
    "finetune": ("--overwrite --dataset digits --finetune {dir}/files/truncated.pth", "files/truncated.pth"),
    "linprobe": ("", "--output_dir | --overwrite"),
}


@pytest.mark.parametrize("program", COMMANDS)
def test_a_real_command(program, refusal_dir):
    flags, names = COMMANDS[program]
    argv = command(program, refusal_dir, "--output_dir", f"{{dir}}/{program}", *flags.split())
    before = listing(refusal_dir)
    done = run_command([sys.executable, str(ROOT / f"main_{program}.py"), *argv], refusal_dir / "here")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"main_{program}.py: error: "), done.stderr
    assert_names(done.stderr, names)
    assert listing(refusal_dir) == before


WRAPPER = """
import os, runpy, sys
sys.argv = ["main_pretrain.py", *sys.argv[1:], "--mask_ratio", ["0.75", "0.5"][int(os.environ["RANK"])]]
runpy.run_path(os.path.join(os.environ["PYTHONPATH"], sys.argv[0]), run_name="__main__")
"""


def test_ranks_that_disagree(refusal_dir, tmp_path):
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER)
    argv = command("pretrain", refusal_dir, "--output_dir", "{dir}/pretrain", "--overwrite", "--timeout_s", "60")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    before = listing(refusal_dir)
    done = run_command([*launcher, str(wrapper), *argv], refusal_dir / "here", seconds=100)
    assert done.returncode != 0
    output = [line for line in done.stderr.splitlines() if "main_pretrain.py: error: " in line]
    assert 1 <= len(output) <= 2, done.stderr
    for line in output:  # the launcher may have ended the other rank before it wrote its line
        assert_names(line, "--mask_ratio is 0.75 on rank 0 and 0.5 on rank 1")
    assert "exitcode  : 2" in done.stderr, done.stderr
    assert listing(refusal_dir) == before
