"""scripts/gpu_check.sh: its commands parse, and stages are stopped, continued and recorded."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.launch import ROOT
from helpers.parsers import parser_of

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_check
from gpu_check import Job, Setting

from util.errors import UserError


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_command_is_one(tmp_path, rehearse):
    """A checkpoint that a command reads is written by one before it."""
    (tmp_path / "cifar/train").mkdir(parents=True)
    setting, names, written = Setting(tmp_path, str(tmp_path / "cifar"), rehearse), set(), set()
    for stage in gpu_check.STAGES.values():
        assert stage.__doc__
        for job in stage(setting):
            assert job.name not in names
            names.add(job.name)
            program, script, *flags = job.command
            if program == "bash":
                assert (ROOT / script).is_file()
                continue
            if script == "-m":
                continue
            args = parser_of(str((ROOT / script).relative_to(ROOT))).parse_args(flags)
            if getattr(args, "finetune", ""):
                assert args.finetune in written
            if "main_pretrain" in script:
                written.add(f"{args.output_dir}/checkpoint-{int(args.epochs) - 1}.pth")


def test_stages_are_continued(tmp_path, monkeypatch, capsys):
    """A job that is done is not repeated; one that failed or ran out of time is."""
    counter = (
        "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    )

    def counting(name, then=""):
        return Job(name, [sys.executable, "-c", f"{counter}; {then}", str(tmp_path / name)], (tmp_path / "r.json",))

    def stage(setting):
        yield counting("good")
        yield counting("slow", "import time; time.sleep(60)")
        yield counting("bad", "sys.exit('why it failed')")

    (tmp_path / "r.json").write_text('{"rows": {"mae": 1}}')
    monkeypatch.setitem(gpu_check.STAGES, "steps", stage)
    monkeypatch.setattr(gpu_check, "run", lambda job, log, seconds, run=gpu_check.run: run(job, log, min(seconds, 3)))
    args = gpu_check.get_args_parser().parse_args([str(tmp_path), "--rehearse", "--stage", "steps"])
    assert [gpu_check.main(args), gpu_check.main(args)] == [1, 1]
    assert [(tmp_path / name).read_text() for name in ("good", "slow", "bad")] == ["x", "xx", "xx"]
    written = json.loads((tmp_path / "steps.json").read_text())
    good, slow, bad = written["jobs"]
    assert written["device"] == "cpu" and good["results"] == {"r.json": {"rows": {"mae": 1}}} and good["rc"] == 0
    assert slow["rc"] is None and slow["timed_out"] and 3 <= slow["seconds"] < 30
    assert bad["rc"] == 1 and bad["tail"] == ["why it failed"] and "why it failed" in capsys.readouterr().out
    args.minutes = 0
    assert gpu_check.main(args) == 1 and "the time is over before 'slow'" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "flags, message",
    [
        ("", "--data (missing) must be the folder of CIFAR-10 for:"),
        ("--stage steps", "there is no GPU: give --rehearse"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    args = gpu_check.get_args_parser().parse_args([str(tmp_path), *flags.split()])
    with pytest.raises(UserError) as refused:
        gpu_check.main(args)
    assert message in str(refused.value)


def test_the_script_lists_its_commands(tmp_path):
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), str(tmp_path / "new"), "--rehearse", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    listed = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert done.returncode == 0 and listed == gpu_check.STAGES.keys() and not (tmp_path / "new").exists()
