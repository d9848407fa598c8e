"""Full memory ends a command with one sentence that names the flags that help."""

import shlex

import pytest
import torch
from helpers.launch import command_module

import engine_pretrain
from util.errors import user_errors

RUN = "--dataset digits --model {model} --input_size 16 --batch_size 64 --epochs 2 --warmup_epochs 0 --num_workers 1 "
RUN += "--device cpu --save_freq 1 --output_dir {out}"


def fill(kind: str):
    if kind == "cpu":
        torch.empty(10**16)  # torch itself raises: more than an address space
    if kind == "numpy":
        raise MemoryError("Unable to allocate 3.00 TiB for an array")
    if kind == "fork":
        raise OSError(12, "Cannot allocate memory")
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 15 GiB")


def run(name: str, flags: str, capsys) -> str:
    """Run a command in this process; return its only line on stderr."""
    module = command_module(name)
    with pytest.raises(SystemExit) as left, user_errors(f"{name}.py"):
        module.main(module.get_args_parser().parse_args(shlex.split(flags)))
    assert left.value.code == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("kind", ["cpu", "numpy", "fork", "cuda"])
def test_pretraining_in_its_second_epoch(tmp_path, capsys, monkeypatch, kind):
    """The checkpoint of the first epoch stays, and is named."""
    step = engine_pretrain.Run.optimizer_step
    monkeypatch.setattr(engine_pretrain.Run, "optimizer_step", lambda run: fill(kind) if run.epoch else step(run))
    line = run("main_pretrain", RUN.format(model="mae_vit_micro_patch4", out=tmp_path), capsys)
    assert f"the memory of {'the GPU' if kind == 'cuda' else 'this machine'} is full" in line
    assert "lower --batch_size (now 64) and raise --accum_iter" in line
    assert "--grad_checkpoint" in line and "--fsdp" in line
    assert ("--num_workers (now 1)" in line) == (kind != "cuda")
    assert "2.50 GiB" in line if kind == "cuda" else True
    assert f"The checkpoints in {tmp_path} are complete: --resume auto" in line
    assert torch.load(tmp_path / "checkpoint-0.pth", weights_only=True)["epoch"] == 0


def test_only_flags_of_the_command_are_named(tmp_path, capsys, monkeypatch):
    """A frozen encoder needs no gradients, and a tool neither accumulates nor resumes."""
    module = command_module("knn")
    monkeypatch.setattr(module.judging.Judged, "features", lambda *_: fill("cuda"))
    flags = "random --dataset digits --model vit_micro_patch4 --input_size 16 --batch_size 64 --device cpu"
    line = run("knn", flags, capsys)
    assert "lower --batch_size (now 64)" in line
    assert not any(flag in line for flag in ("accum_iter", "grad_checkpoint", "fsdp", "resume"))


def test_other_errors_keep_their_traceback():
    for error in (RuntimeError("shapes differ"), OSError(2, "No such file"), KeyError("x")):
        with pytest.raises(type(error)), user_errors("main_pretrain.py"):
            raise error
