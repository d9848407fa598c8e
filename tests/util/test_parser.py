"""Suggestions for mistyped flags and values, in mains, methods and tools; `--help` of every script."""

import runpy
import shlex
import subprocess
import sys

import pytest
from helpers.launch import ROOT, command_module

from util.architectures import ENCODERS, look_up
from util.errors import UserError

PYTHON = sorted([*ROOT.glob("main_*.py"), *ROOT.glob("submitit_*.py"), *ROOT.glob("tools/[a-z]*.py")])
PYTHON += sorted((ROOT / "scripts").rglob("*.py"))
SHELL = sorted(path for path in (ROOT / "scripts").rglob("*.sh") if not path.name.startswith("_"))


@pytest.mark.parametrize(
    "command,flags,flag",
    [
        ("main_pretrain", "--mask_ration 0.5", "--mask_ratio"),
        ("main_pretrain", "--mask-ratio 0.5", "--mask_ratio"),
        ("main_pretrain", "--mask-ratio=0.5", "--mask_ratio"),
        ("main_pretrain", "-mask_ratio 0.5", "--mask_ratio"),
        ("main_pretrain", "--Batch_Size 8", "--batch_size"),
        ("main_pretrain", "--mlo_label same", "--mlo_labels"),
        ("main_pretrain", "--dmae-teacher x.pth", "--dmae_teacher"),
        ("main_pretrain", "--norm_pix", "--norm_pix_loss"),
        ("main_finetune", "--layerdecay 1", "--layer_decay"),
        ("main_linprobe", "--cache-features", "--cache_features"),
        ("knn", "random --data-path x", "--data_path"),
        ("export", "x.pth --to timm --outt y", "--out"),
        ("main_pretrain", "--aug croop", "crop"),
        ("main_pretrain", "--decoder Cross", "cross"),
        ("knn", "random --pool average", "avg"),
    ],
)
def test_did_you_mean(command, flags, flag, capsys):
    with pytest.raises(SystemExit) as left:
        command_module(command).get_args_parser().parse_args(shlex.split(flags))
    assert left.value.code == 2
    message = capsys.readouterr().err
    assert f"did you mean {flag}?" in message and message.count("\n") == 1


def test_nothing_is_suggested_for_nonsense(capsys):
    with pytest.raises(SystemExit):
        command_module("main_pretrain").get_args_parser().parse_args(["--zzzzqqq"])
    message = capsys.readouterr().err
    assert "--zzzzqqq" in message and "did you mean" not in message


def test_models_and_data_sets():
    with pytest.raises(UserError, match=r"did you mean vit_base_patch16\?"):
        look_up(ENCODERS, "vit_base_patch_16")
    main = command_module("main_finetune")
    args = main.get_args_parser().parse_args("--dataset cifar-10 --output_dir= --model vit_micro_patch4".split())
    with pytest.raises(UserError, match=r"did you mean cifar10\?"):
        main.main(args)


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.stem)
def test_help_of_python(path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)  # as Python does for a script
    for flag in ("--help", "-h"):
        monkeypatch.setattr(sys, "argv", [str(path), flag])
        with pytest.raises(SystemExit) as left:
            runpy.run_path(str(path), run_name="__main__")
        assert not left.value.code and "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("path", SHELL, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_of_shell_scripts(path, tmp_path):
    """Without a Python environment, and without a file written."""
    environment = {"PATH": "/usr/bin:/bin", "VENV": str(tmp_path / "none")}
    for words in (["--help"], ["-h"], ["OUT", "--data", "DIR", "--help"]):
        done = subprocess.run(
            ["bash", str(path), *words], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert f"bash {path.relative_to(ROOT)}" in done.stdout and "shellcheck" not in done.stdout
        assert not list(tmp_path.iterdir())
