"""The papers' sweeps, with a stand-in for python that only leaves behind what the mains leave behind."""

import os
import shlex
import subprocess

import pytest
from launch import ROOT

import main_finetune
import main_linprobe
import main_pretrain
from methods import METHODS, enabled_methods

STAND_IN = r"""#!/bin/bash
main=$(basename "$1"); shift
printf '%q ' "$main" "$@" >> "$CALLS"; echo >> "$CALLS"
previous=
for word in "$@"; do
    case $previous in --output_dir) folder=$word ;; --out) file=$word ;; --epochs) epochs=$word ;; esac
    previous=$word
done
[ -z "$folder" ] || mkdir -p "$folder"
case $main in
    main_pretrain.py) touch "$folder/encoder.safetensors" ;;
    main_linprobe.py) touch "$folder/probe.json" "$folder/checkpoint-$((epochs - 1)).pth" ;;
    main_finetune.py) [ -e "$STOP" ] || touch "$folder/checkpoint-$((epochs - 1)).pth" ;;  # exit 0 all the same
    knn.py) touch "$file" ;;
esac
"""


@pytest.fixture
def sweep(tmp_path):
    """-> start(name, *arguments): exit status, what it says, the commands it started."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def start(name, *arguments, **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {
            **os.environ,
            "PYTHON": str(stand_in),
            "CALLS": str(calls),
            "STOP": str(tmp_path / "stop"),
            **environment,
        }
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / name / "sweep.sh"), *arguments], env=env, capture_output=True, text=True
        )
        return (
            done.returncode,
            done.stdout + done.stderr,
            [shlex.split(line) for line in calls.read_text().splitlines()],
        )

    return start


def test_stopped_and_started_again(sweep, tmp_path):
    """A main that was stopped exits with 0 too: its run is not taken for finished. What is finished is not redone."""
    out = str(tmp_path / "out")
    flags = (out, "--cpu_small", "--only", "mae k10")
    (tmp_path / "stop").touch()
    code, said, calls = sweep("bootstrap_mae", *flags)
    assert code == 1 and "stopped before" in said and "start the sweep again" in said
    assert [call[0] for call in calls] == ["main_pretrain.py", "main_linprobe.py", "knn.py", "main_finetune.py"]
    (tmp_path / "stop").unlink()
    code, said, calls = sweep("bootstrap_mae", *flags)
    assert code == 0, said
    names = [call[0] for call in calls]
    assert names == ["main_finetune.py"] + [
        "main_pretrain.py", "main_linprobe.py", "knn.py", "main_finetune.py", "collect.py",
    ]  # fmt: skip
    assert all("--resume" in call for call in calls if call[0] in ("main_pretrain.py", "main_finetune.py"))
    assert [call[0] for call in sweep("bootstrap_mae", *flags)[2]] == ["collect.py"]


RUNS = {
    "bootstrap_mae": "mae scratch k1 k2 k4 k5 k10 k20 wse0 wse5 wse20 wse50 wse20-tau0.1 wse20-tau0.3",
    "rc_mae": "mae same different constant",
    "dmae": "scratch mask75 mask50 mask90 depth1 width128 three-augment dmae75 dmae90",
    "mlo_mae": "mae mlo unroll1 unroll5 mae-patch4 patch4 mae-patch8 patch8 ratio60 ratio80 ratio90 every5 blo "
    "finetuned curriculum",
}
# Runs that --cpu_small leaves out, and those it has in their place.
NOT_SMALL = {"bootstrap_mae": {"wse50"}, "mlo_mae": {"mae-patch4", "patch4"}}
ONLY_SMALL = {"mlo_mae": {"mae-patch2", "patch2"}}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("small", [False, True], ids=["paper", "small"])
def test_every_command_is_legal(sweep, tmp_path, name, small):
    """All runs of the paper are there, and the mains understand what they are started with."""
    where = ["--cpu_small"] if small else ["--data", str(tmp_path)]
    code, said, calls = sweep(name, str(tmp_path / "out"), *where, TEACHER="teacher.pth", GPUS="1")
    assert code == 0, said
    parsers = {"main_pretrain.py": main_pretrain, "main_finetune.py": main_finetune, "main_linprobe.py": main_linprobe}
    pretrained, seen = set(), set()
    for main, *flags in calls:
        if main not in parsers:
            continue
        args = parsers[main].get_args_parser().parse_args(flags)
        run = args.output_dir.split("/")[-1].removesuffix("-seed0")
        seen.add(run)
        assert not (getattr(args, "cache_features", False) and args.resume)  # which the probe refuses
        if main == "main_pretrain.py" and run != "teacher":
            pretrained.add(run)
            enabled_methods(args, METHODS)
            if not small:
                effective = args.batch_size * args.accum_iter
                assert (effective, args.epochs) == {
                    "bootstrap_mae": (512, 200), "rc_mae": (4096, 1600), "dmae": (128, 500),
                    "mlo_mae": (128, 200),
                }[name]  # fmt: skip
    expected = set(RUNS[name].split())
    if small:
        expected = expected - NOT_SMALL.get(name, set()) | ONLY_SMALL.get(name, set())
    assert pretrained == expected - {"scratch"}
    tuned = {run.removeprefix("finetune-") for run in seen if run.startswith("finetune-")}
    assert tuned == expected | ({"same-ema", "different-ema", "constant-ema"} if name == "rc_mae" else set())


def test_more_processes_keep_the_papers_batch(sweep, tmp_path):
    for name, effective in (("bootstrap_mae", 512), ("rc_mae", 4096), ("dmae", 128), ("mlo_mae", 128)):
        run = "mask75" if name == "dmae" else "mae"
        calls = sweep(name, str(tmp_path / name), "--data", str(tmp_path), "--only", run, GPUS="4")[2]
        flags = next(call for call in calls if any("main_pretrain.py" in word for word in call))
        start = next(i for i, word in enumerate(flags) if "main_pretrain.py" in word)
        args = main_pretrain.get_args_parser().parse_args(flags[start + 1 :])
        assert 4 * args.batch_size * args.accum_iter == effective


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "usage:"),
        (("OUT",), "--data DIR is needed"),
        (("OUT", "--cpu_small", "--only", "k3"), "--only k3 is no run"),
    ],
)
def test_mistakes(sweep, arguments, message):
    code, said, calls = sweep("bootstrap_mae", *arguments)
    assert code == 2 and message in said and not calls


def test_dmae_without_a_teacher(sweep, tmp_path):
    code, said, calls = sweep(
        "dmae", str(tmp_path / "out"), "--data", str(tmp_path), "--only", "mask75 dmae75", TEACHER=""
    )
    assert code == 0 and "name its teacher" in said
    assert not any("--dmae_teacher" in call for call in calls)


@pytest.mark.parametrize("setting,batch,epochs", [("cifar100", 128, 200), ("imagenet", 256, 50)])
def test_other_settings_of_learned_masks(sweep, tmp_path, setting, batch, epochs):
    where = ("--data", str(tmp_path), "--only", "mlo")
    code, said, calls = sweep("mlo_mae", str(tmp_path / "out"), *where, SET=setting, GPUS="1")
    assert code == 0, said
    args = main_pretrain.get_args_parser().parse_args(calls[0][1:])
    main_pretrain.check(args)
    assert (args.batch_size, args.epochs, args.mlo_unroll) == (batch, epochs, 1 if setting == "imagenet" else 2)
