"""A run that was killed or stopped resumes bit-identically."""

import argparse
import os
import random
import signal
import time

import psutil
import pytest
import torch
from helpers.forked import Forked
from helpers.inject import stop_at
from helpers.launch import DIGITS, SMALL, checkpoint, finish, kill_when, launch, log_rows, same_tensors, scalars

import main_detect
import main_finetune
import main_pretrain
import main_segment
import util.training.run
from util.checkpoint.files import list_checkpoints
from util.checkpoint.resume import find_resume
from util.checkpoint.save import Retention, save_checkpoint
from util.compute.precision import NativeScalerWithGradNormCount

STEPS = 22  # 1437 digits in batches of 64


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def reference(request, tmp_path_factory):
    """(number of processes, flags, folder) of an undisturbed run."""
    processes = request.param
    flags = DIGITS.replace("--batch_size 64", f"--batch_size {64 // processes}")
    flags += " --num_workers 1 --save_steps 3 --save_freq 1 --print_freq 1"
    folder = tmp_path_factory.mktemp("reference")
    finish(Forked("main_pretrain", f"{flags} --output_dir {folder}", processes))
    return processes, flags, folder


def assert_same_run(folder, reference):
    ours, theirs = checkpoint(folder, "checkpoint-1.pth"), checkpoint(reference, "checkpoint-1.pth")
    for key in ("model", "optimizer", "epoch", "step", "scaler", "rng"):
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(folder) == log_rows(reference)
    assert scalars(folder, "train/loss") == scalars(reference, "train/loss")


def test_killed_three_times(reference, tmp_path):
    """SIGKILL inside the first epoch, around its end, and inside the second, each after a short random delay."""
    processes, flags, undisturbed = reference
    if processes == 1:
        pytest.skip("tests/faults/test_kills.py does it at more places")
    run = f"{flags} --output_dir {tmp_path} --resume auto"
    moments = [
        lambda: (tmp_path / "checkpoint-0-6.pth").exists(),
        lambda: (tmp_path / ".checkpoint-0.pth.tmp").exists() or (tmp_path / "checkpoint-0.pth").exists(),
        lambda: list(tmp_path.glob("checkpoint-1-*.pth")) or (tmp_path / "checkpoint-1.pth").exists(),
    ]
    for moment in moments:
        kill_when_later(Forked("main_pretrain", run, processes), moment)
    output = finish(Forked("main_pretrain", run, processes))
    assert "resumed" in output
    assert_same_run(tmp_path, undisturbed)


def kill_when_later(process, moment):
    kill_when(process, moment, number=0)
    time.sleep(random.random() * 0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def is_rank(process) -> bool:
    return any(word.endswith("main_pretrain.py") for word in process.cmdline())


def test_elastic_restart(reference, tmp_path):
    """One rank is killed; torchrun restarts both, and the run resumes bit-identically."""
    processes, flags, undisturbed = reference
    if processes == 1:
        pytest.skip("there is no launcher that could restart it")
    run = launch("main_pretrain.py", f"{flags} --output_dir {tmp_path} --resume auto", processes, restarts=1)
    kill_when(run, (tmp_path / "checkpoint-0-6.pth").exists, number=0)
    next(rank for rank in psutil.Process(run.pid).children() if is_rank(rank)).kill()
    output = finish(run)
    assert "nothing to resume" in output and "resumed" in output
    assert_same_run(tmp_path, undisturbed)


def test_signal_saves_and_exits_zero(reference, tmp_path):
    """One process: SIGTERM to the whole group, workers included. Two: SIGUSR1 to one rank stops both together."""
    processes, flags, undisturbed = reference
    number = signal.SIGTERM if processes == 1 else signal.SIGUSR1
    run = f"{flags} --output_dir {tmp_path}"
    process = Forked("main_pretrain", run, processes)
    moment = (tmp_path / "checkpoint-0-3.pth").exists
    kill_when(process, moment, number=0)
    if processes == 1:
        os.killpg(process.pid, number)
    else:
        os.kill(process.ranks[1].pid, number)
    output = finish(process)
    assert "--resume auto continues exactly there" in output
    finish(Forked("main_pretrain", f"{run} --resume auto", processes))
    assert_same_run(tmp_path, undisturbed)


def pretrain(flags):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


# Six steps an epoch.
SCENES = "--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 24 2 --batch_size 4 --head_width 16"
RANDOM = {
    main_finetune: "--data_path {images} --batch_size 16 --warmup_epochs 1 --mixup 0.8 --cutmix 1.0 --blr 0.01",
    main_segment: f"{SCENES} --lr 1e-3",
    main_detect: f"{SCENES} --lr 1e-3 --detector faster --window 2",
}


@pytest.mark.parametrize(
    "main, step",
    [(main_finetune, 1), (main_finetune, 6), (main_finetune, 8), (main_segment, 6), (main_detect, 8)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_supervised_runs_resume_with_their_random_numbers(tmp_path, monkeypatch, image_folder, main, step):
    """Mixup, drop path, dropout, crops and proposals continue: stopped after the first step, at the end of an epoch, in
    the second."""
    flags = f"{RANDOM[main].format(images=image_folder)} --model vit_micro_patch4 --input_size 16 --epochs 2 "
    flags += "--num_workers 0 --drop_path 0.3 --device cpu --amp_dtype fp32 "
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def start(flags):
        main.main(main.get_args_parser().parse_args(flags.split()))

    start(f"{flags} --output_dir {whole}")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        start(f"{flags} --output_dir {parts}")
    assert not (parts / "checkpoint-1.pth").exists() and not (parts / "scores.json").exists()
    start(f"{flags} --output_dir {parts} --resume auto")
    assert same_tensors(checkpoint(parts, "checkpoint-1.pth")["model"], checkpoint(whole, "checkpoint-1.pth")["model"])
    assert log_rows(parts) == log_rows(whole)


def test_auto_skips_damaged_files(tmp_path, capsys):
    for epoch in (0, 1, 2):
        save_checkpoint(tmp_path, epoch, 0, {"model": {"w": torch.randn(10000)}, "epoch": epoch})
    damaged = (tmp_path / "checkpoint-2.pth").read_bytes()
    (tmp_path / "checkpoint-2.pth").write_bytes(damaged[: len(damaged) // 2])
    flipped = bytearray((tmp_path / "checkpoint-1.pth").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF  # inside the tensor
    (tmp_path / "checkpoint-1.pth").write_bytes(flipped)
    assert find_resume("auto", str(tmp_path)) == tmp_path / "checkpoint-0.pth"
    output = capsys.readouterr().out
    assert "checkpoint-2.pth" in output and "checkpoint-1.pth" in output


def test_other_batch_flags_after_a_stop(tmp_path, monkeypatch, image_folder):
    """Stopped after micro-batch 5 of 12, resumed in windows of 4: the run goes back to the beginning of a window. Steps
    are numbered by their position in the run, three windows an epoch, whatever was done before the stop."""
    flags = f"{DIGITS.replace('--dataset digits', '')} --data_path {image_folder} --num_workers 0 --print_freq 1 "
    flags = flags.replace("--batch_size 64", "--batch_size 8") + f"--output_dir {tmp_path} "
    with monkeypatch.context() as patch:
        stop_at(patch, 5)
        pretrain(flags)
    windows, adjust = [], util.training.run.adjust_learning_rate
    monkeypatch.setattr(util.training.run, "adjust_learning_rate", lambda *args: windows.append(1) or adjust(*args))
    pretrain(f"{flags} --accum_iter 4 --resume auto")
    assert len(windows) == 2 + 3
    assert checkpoint(tmp_path, "checkpoint-1.pth")["step"] == 2 * 3
    assert [row["epoch"] for row in log_rows(tmp_path)] == [0, 1]


def test_resuming_an_earlier_file_abandons_the_later_ones(tmp_path, image_folder):
    flags = f"{DIGITS.replace('--dataset digits', '')} --data_path {image_folder} --num_workers 0 --save_freq 1 "
    flags = flags.replace("--epochs 2", "--epochs 3").replace("--batch_size 64", "--batch_size 32")
    pretrain(f"{flags} --output_dir {tmp_path}")
    before = checkpoint(tmp_path, "checkpoint-2.pth")
    pretrain(f"{flags} --output_dir {tmp_path} --resume {tmp_path}/checkpoint-0.pth")
    assert {path.name for path in tmp_path.glob("*.abandoned")} == {
        "checkpoint-1.pth.abandoned",
        "checkpoint-2.pth.abandoned",
        "encoder.safetensors.abandoned",
    }
    assert same_tensors(checkpoint(tmp_path, "checkpoint-2.pth")["model"], before["model"])


def test_an_official_checkpoint_can_be_resumed(tmp_path, image_folder):
    """Its optimizer state is of a torch that counted steps in Python numbers and had no fused AdamW; its flags are a
    Namespace; it has no data position, random states or methods."""
    flags = f"{DIGITS.replace('--dataset digits', '')} --data_path {image_folder} --num_workers 0 --save_freq 1 "
    flags = flags.replace("--batch_size 64", "--batch_size 32")
    pretrain(f"{flags} --output_dir {tmp_path}/ours")
    state = checkpoint(tmp_path / "ours", "checkpoint-0.pth")
    for group in state["optimizer"]["param_groups"]:
        for name in ("fused", "foreach", "capturable", "maximize", "differentiable", "decoupled_weight_decay"):
            group.pop(name, None)
    for values in state["optimizer"]["state"].values():
        values["step"] = int(values["step"])
    official = {key: state[key] for key in ("model", "optimizer", "epoch", "scaler")}
    official["args"] = argparse.Namespace(**state["args"])
    torch.save(official, tmp_path / "official.pth")
    pretrain(f"{flags} --output_dir {tmp_path}/on --resume {tmp_path}/official.pth")
    on, whole = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("on", "ours"))
    assert same_tensors(on["model"], whole["model"]) and same_tensors(on["optimizer"], whole["optimizer"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_official_code_loads_the_scaler(tmp_path, dtype):
    """Its scaler is always enabled, and then refuses an empty state. One that has never scaled starts as a new one."""
    pretrain(f"{DIGITS} --epochs 1 --num_workers 0 --amp_dtype {dtype} --output_dir {tmp_path}")
    state = checkpoint(tmp_path, "checkpoint-0.pth")["scaler"]
    scaler, fresh = (torch.amp.GradScaler("cpu", enabled=True) for _ in range(2))
    scaler.load_state_dict(state)
    assert scaler.state_dict() == fresh.state_dict() == state


@pytest.mark.parametrize("old", [{}, None])
@pytest.mark.parametrize("enabled", [True, False])
def test_an_empty_scaler_of_an_older_checkpoint(old, enabled):
    scaler = NativeScalerWithGradNormCount(enabled=enabled, device="cpu")
    before = scaler.state_dict()
    scaler.load_state_dict(old)
    assert scaler.state_dict() == before


def test_auto_with_nothing_to_resume(tmp_path, capsys):
    assert find_resume("auto", str(tmp_path)) is None
    assert "starting a new run" in capsys.readouterr().out


def test_keep(tmp_path):
    """The newest `keep` files of epochs stay; files inside an epoch stay until a later one is complete."""
    for epoch, batch in ((0, 0), (1, 4), (1, 8), (1, 0), (2, 0), (3, 4)):
        save_checkpoint(tmp_path, epoch, batch, {"epoch": epoch}, Retention(keep=2))
    left = [path.name for path in list_checkpoints(tmp_path)]
    assert left == ["checkpoint-3-4.pth", "checkpoint-2.pth", "checkpoint-1.pth"]


def test_checkpoint_layout(tmp_path):
    """The parts that other code relies on: file names, keys, plain types, the tensor names of the official code."""
    pretrain(f"{DIGITS} --epochs 1 --num_workers 0 --output_dir {tmp_path}")
    state = checkpoint(tmp_path, "checkpoint-0.pth")
    assert set(state) == {"model", "optimizer", "epoch", "step", "scaler", "args", "methods", "rng", "origin", "data"}
    assert state["epoch"] == 0 and state["step"] == STEPS
    assert isinstance(state["args"], dict) and state["args"]["model"] == "mae_vit_micro_patch4"
    assert {
        "cls_token",
        "mask_token",
        "pos_embed",
        "decoder_pos_embed",
        "patch_embed.proj.weight",
        "norm.bias",
        "blocks.0.attn.qkv.weight",
        "decoder_embed.weight",
        "decoder_blocks.0.mlp.fc2.bias",
        "decoder_norm.weight",
        "decoder_pred.bias",
    } <= set(state["model"])
    assert (tmp_path / "encoder.safetensors").exists()


def test_save_steps_at_the_end_of_an_epoch(image_folder, tmp_path, monkeypatch):
    """Six steps an epoch: a checkpoint that is due after the last one is written there, and deleted after the next one
    unless --save_freq keeps it; --keep does not count it."""
    files, finish_epoch = [], util.training.run.Run.finish_epoch

    def finish(run, row):
        finish_epoch(run, row)
        files.append({path.name for path in tmp_path.glob("checkpoint-*")})

    monkeypatch.setattr(util.training.run.Run, "finish_epoch", finish)
    flags = (
        f"{SMALL} --data_path {image_folder} --aug none --num_workers 0 --batch_size 16 --warmup_epochs 0 --device cpu"
    )
    pretrain(f"{flags} --vis_freq 0 --epochs 4 --save_freq 20 --save_steps 2 --keep 2 --output_dir {tmp_path}")
    epochs = [{0}, {0, 1}, {0, 2}, {0, 3}]
    assert files == [{f"checkpoint-{epoch}.pth" for epoch in kept} for kept in epochs]
