"""Folder names with shell commands in them: every script passes them on unchanged and executes nothing."""

import os
import shlex
import subprocess
import sys

import pytest
from helpers.launch import ROOT

import main_pretrain
from util.parallel import slurm

HOSTILE = "a b; touch pwned1 $(touch pwned2) `touch pwned3` 'x \"y *?[z] --list & | #"
# Writes the files that mains and tools write; every call is a line of $CALLS with quoted words.
STAND_IN = r"""#!/bin/bash
if [ "$1" = -c ]; then echo 7; exit; fi
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
previous=
for word in "$@"; do
    case $previous in
        --output_dir) folder=$word ;; --out) file=$word ;; --epochs) epochs=$word ;;
        --config) recipe=$(sed -n 's/^epochs: *//p' "$word") ;;
    esac
    previous=$word
done
epochs=${epochs:-$recipe}
if [ -n "$folder" ]; then
    mkdir -p "$folder"
    touch "$folder/results.jsonl" "$folder/encoder.safetensors" "$folder/probe.json" "$folder/probe.pth"
    touch "$folder/checkpoint-$((${epochs%.*} - 1)).pth" "$folder/checkpoint-2.pth"
fi
if [ -n "$file" ]; then mkdir -p "$(dirname "$file")"; touch "$file" "$(dirname "$file")/results.jsonl"; fi
"""
STUDY = ["{out}", "--data", "{data}"]
FLAGS = ["--data_path", "{data}", "--output_dir", "{out}"]
SMALL = [*STUDY, "--cpu_small"]
# Script, its arguments, and the least number of commands that it starts.
SCRIPTS = {
    "mae/pretrain": (FLAGS, 1),
    "mae/finetune": ([*FLAGS, "--finetune", "{out}/x.pth"], 1),
    "mae/linprobe": ([*FLAGS, "--finetune", "{out}/x.pth"], 1),
    "mae/slurm": (["pretrain", *FLAGS], 1),
    "mae/cifar10_study": (["{data}", "{out}"], 10),
    "bootstrap_mae/sweep": ([*STUDY, "--only", "mae k10"], 9),
    "dmae/sweep": ([*STUDY, "--only", "mask75 dmae75"], 9),
    "rc_mae/sweep": ([*STUDY, "--only", "mae same"], 12),
    "mlo_mae/sweep": ([*STUDY, "--only", "mae mlo"], 9),
    "mlo_mae/cifar10_study": ([*STUDY, "--only", "mae mlo"], 9),
    "mlo_mae/continued": ([*STUDY, "--only", "none mlo"], 4),
    "mlo_mae/equal_time": ([*STUDY, "--only", "mlo"], 6),
    "mlo_mae/segmentation_guided": (STUDY, 5),
    "cifar10_methods_study": ([*STUDY, "--only", "mae dmae"], 10),
    "cifar10_representation_study": (STUDY, 10),
    "maws/sweep": (SMALL, 10),
    "maws/scaling": (SMALL, 10),
    **{
        name: ([*FLAGS, "--finetune", "{out}/x.pth"], 1)
        for name in ("segment/mae_ade20k", "segment/mlo_ade20k", "segment/linear_ade20k")
        + ("detect/benchmarking_coco", "detect/benchmarking_coco_25ep", "detect/vitdet_coco", "detect/voc07")
    },
    "reproduce": (["bootstrap_mae", "{out}", "--budget", "paper", "--data", "{data}", "--only", "mae"], 6),
    "lit_tiny_imagenet": ([*STUDY, "--text_model", "{data}"], 5),
    "quickstart": (FLAGS, 1),
    "soak": (["--out", "{out}/soak.json"], 1),
    "test": (["{out}/x.py"], 1),
    "test_matrix": (["{out}/x.py"], 1),
}


@pytest.fixture
def folders(tmp_path):
    """Folders of these names, one of them an image folder, and an environment in which python is the stand-in."""
    out, data, venv = (tmp_path / f"{name} {HOSTILE}" for name in ("out", "data", "venv"))
    for split in ("train", "val"):
        for name in "airplane automobile bird cat deer dog frog horse ship truck".split():
            (data / split / name).mkdir(parents=True)
        for number in range(2):
            (data / split / "cat" / f"{number} {HOSTILE}.png").touch()
    (venv / "bin").mkdir(parents=True)
    for name in ("python", "ruff", "basedpyright"):
        (venv / "bin" / name).write_text(STAND_IN)
        (venv / "bin" / name).chmod(0o755)
    for name in ("requirements.txt", "requirements-dev.txt"):  # the requirements count as installed
        (venv / f".installed-{name}").write_bytes((ROOT / name).read_bytes())
    (tmp_path / "cwd").mkdir()
    environment = {"PYTHON": str(venv / "bin" / "python"), "VENV": str(venv), "CALLS": str(tmp_path / "calls")}
    (venv / "newest-3.11").symlink_to(venv)
    environment |= {"VENVS": str(venv), "CASES": "newest-3.11"}
    environment |= {"TEACHER": str(out / "teacher.pth"), "START": str(out / "start.pth"), "GPUS": "1", "SEEDS": "0"}
    return out, data, {**os.environ, **environment}


@pytest.mark.parametrize(("name", "processes"), [*((name, "1") for name in SCRIPTS), ("mae/pretrain", "2")])
def test_names_are_passed_unchanged(tmp_path, folders, name, processes):
    out, data, environment = folders
    arguments, least = SCRIPTS[name]
    words = [word.format(out=out, data=data) for word in arguments]
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / f"{name}.sh"), *words],
        env=environment | {"GPUS": processes},
        cwd=tmp_path / "cwd",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(tmp_path.rglob("pwned*"))
    assert not list((tmp_path / "cwd").iterdir())
    calls = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) >= least
    given = {word for call in calls for word in call}
    assert all(word.startswith((str(out), str(data))) for word in given if "touch" in word)
    assert not given & set(HOSTILE.split())
    assert any(word.startswith(str(out)) for word in given)
    if "{data}" in arguments and not name.startswith(("cifar10_", "maws", "mlo_mae/cifar10")):  # which link it into OUT
        assert str(data) in given
    made = {path.name for path in tmp_path.iterdir()}
    assert made <= {out.name, data.name, f"venv {HOSTILE}", "cwd", "calls"}


def test_slurm(tmp_path, monkeypatch):
    """The batch file of submitit, run by a stand-in for the scheduler, starts this Python with the folder as one
    word."""
    folder, bin, calls = tmp_path / f"jobs {HOSTILE.replace('%', '')}", tmp_path / "bin", tmp_path / "calls"
    bin.mkdir()
    scripts = {
        "sbatch": f'cd {tmp_path} && bash "${{@: -1}}" > /dev/null; echo "Submitted batch job 17"',
        "squeue": "true",
    }
    scripts["srun"] = f"printf '%q ' \"$@\" >> {calls}; echo >> {calls}"
    for name, text in scripts.items():
        (bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(bin), prepend=":")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.chdir(tmp_path)
    parser = main_pretrain.get_args_parser()
    slurm.launch(main_pretrain.main, parser, ["--job_dir", str(folder), "--data_path", str(folder / "data")])
    assert not list(tmp_path.rglob("pwned*"))
    (call,) = [shlex.split(line) for line in calls.read_text().splitlines()]
    assert sys.executable in call and str(folder) in call
