"""Runs that end inside an epoch: number of steps, end of the schedules, exact resumption."""

import argparse
import json
from math import ceil

import pytest
import torch
from helpers.launch import SMALL, checkpoint, log_rows, same_tensors, scalars

import main_finetune
import main_linprobe
import main_pretrain
from methods.rcmae import momentum_at
from util.errors import UserError
from util.lr_sched import learning_rate
from util.training.run_length import run_length

# 96 training images in batches of 8: 12 batches, 6 steps an epoch.
BASE = "--batch_size 8 --accum_iter 2 --num_workers 0 --device cpu --amp_dtype fp32 --print_freq 1 --save_freq 1"
PRETRAIN = f"{SMALL} {BASE} --warmup_epochs 0.5 --lr 1e-3 --min_lr 1e-5 --vis_freq 0"
FINETUNE = f"--model vit_micro_patch4 --input_size 16 {BASE} --warmup_epochs 0.5 --lr 1e-3 --min_lr 1e-5 --aug rrc"
MAINS = {"pretrain": (main_pretrain, PRETRAIN), "finetune": (main_finetune, FINETUNE)}


def start(task, flags):
    main, base = MAINS[task]
    return main.main(main.get_args_parser().parse_args(f"{base} {flags}".split()))


@pytest.mark.parametrize(
    "epochs,max_steps,accum,batches,steps,end",
    [
        (0.1, None, 1, 97, 10, 10 / 97),  # 9.7 batches
        (0.1, None, 4, 97, 3, 12 / 97),  # 10 batches, up to the end of a window
        (2.5, None, 1, 10, 25, 2.5),
        (0.001, None, 1, 97, 1, 1 / 97),  # one step at least
        (0.999, None, 1, 97, 97, 1),
        (3, None, 4, 97, 75, 3),  # 24 windows and a short one
        (3, 75, 4, 97, 75, 3),
        (3, 74, 4, 97, 74, 2 + 96 / 97),
        (50, 7, 1, 5, 7, 1.4),
        (50, 1, 4, 5, 1, 0.8),
    ],
)
def test_steps_and_end(epochs, max_steps, accum, batches, steps, end):
    for _ in range(2):  # the second call takes its own result
        length, epochs = run_length(batches, accum, epochs, max_steps)
        assert length == steps
        assert epochs == pytest.approx(end, rel=1e-15)  # one division
    assert steps <= ceil(end) * ceil(batches / accum)


@pytest.mark.parametrize("task", MAINS)
@pytest.mark.parametrize("length,steps", [("--epochs 1.5", 9), ("--max_steps 8", 8)])
def test_schedule_ends_with_the_run(task, length, steps, image_folder, tmp_path):
    """TensorBoard has a point for every step; the last rate is that of the cosine one step before its end."""
    start(task, f"--data_path {image_folder} {length} --output_dir {tmp_path}")
    rates = scalars(tmp_path, "train/lr")
    assert len(rates) == steps
    flags = argparse.Namespace(lr=1e-3, min_lr=1e-5, warmup_epochs=0.5, epochs=steps / 6)
    expected = [learning_rate(step / 6, flags) for step in range(steps)]
    assert [rate for _, rate in rates] == pytest.approx(expected, rel=1e-6)  # events hold float32
    state = checkpoint(tmp_path, f"checkpoint-1-{2 * (steps - 6)}.pth")
    assert state["step"] == steps and state["origin"]["images_seen"] == 16 * steps
    assert log_rows(tmp_path)[-1]["step"] == steps
    entered = json.loads((tmp_path / "results.jsonl").read_text())
    assert entered["images_seen"] == 16 * steps
    if task == "finetune":
        assert "eval/acc1" in entered["metrics"]


@pytest.mark.parametrize(
    "method", ["--rc_mae", "--u_mae", "--mlo_mae --mlo_labels same --mlo_val_fraction 0.25 --mlo_hidden 8"]
)
def test_steps_of_a_method_without_a_schedule_in_epochs(method, image_folder, tmp_path):
    """`--max_steps` trains as the fraction of epochs that it stands for: 8 steps are 1 epoch of 6 and a third."""
    flags = f"{method} --data_path {image_folder}"
    if "mlo" in method:  # without the held-out images there are 9 batches: 5 steps an epoch, the last one of one batch
        lengths = "--max_steps 8", f"--epochs {1 + 6 / 9}"
    else:
        lengths = "--max_steps 8", f"--epochs {1 + 4 / 12}"
    for name, length in zip(("steps", "epochs"), lengths):
        start("pretrain", f"{flags} {length} --output_dir {tmp_path}/{name}")
    (one,), (two,) = ((tmp_path / name).glob("checkpoint-1-*.pth") for name in ("steps", "epochs"))
    ours, theirs = checkpoint(one.parent, one.name), checkpoint(two.parent, two.name)
    assert ours["step"] == 8 and one.name == two.name
    for key in ("model", "methods", "optimizer"):
        assert same_tensors(ours[key], theirs[key]), key
    if "rc_mae" in method:  # the momentum's cosine ends with the run
        assert scalars(one.parent, "train/teacher_momentum")[-1][1] == pytest.approx(momentum_at(7, 8, 0.996))


@pytest.mark.parametrize("task", MAINS)
def test_resume_is_exact(task, image_folder, tmp_path):
    """A run resumes from the end of the first epoch, and again at its end, where nothing is left to train."""
    flags = f"--data_path {image_folder} --epochs 1.5 --output_dir {tmp_path}"
    start(task, flags)
    end = tmp_path / "checkpoint-1-6.pth"
    whole, rows = checkpoint(tmp_path, end.name), log_rows(tmp_path)
    end.unlink()
    start(task, f"{flags} --resume auto")
    state = checkpoint(tmp_path, end.name)
    for key in ("model", "optimizer", "step", "rng"):
        assert same_tensors(state[key], whole[key]), key
    assert log_rows(tmp_path) == rows
    entered = (tmp_path / "results.jsonl").read_text()
    start(task, f"{flags} --resume auto")
    assert log_rows(tmp_path) == rows and (tmp_path / "results.jsonl").read_text() == entered


def test_a_finished_run_can_be_extended(image_folder, tmp_path):
    """With a constant learning rate, half an epoch followed by the other half equals one epoch."""
    flags = f"--data_path {image_folder} --warmup_epochs 0 --min_lr 1e-3"
    start("pretrain", f"{flags} --epochs 1 --output_dir {tmp_path / 'one'}")
    start("pretrain", f"{flags} --epochs 0.5 --output_dir {tmp_path / 'two'}")
    assert (tmp_path / "two" / "encoder.safetensors").exists()
    start("pretrain", f"{flags} --epochs 1 --output_dir {tmp_path / 'two'} --resume auto")
    one, two = (checkpoint(tmp_path / name, "checkpoint-0.pth") for name in ("one", "two"))
    assert same_tensors(one["model"], two["model"]) and same_tensors(
        one["optimizer"]["state"], two["optimizer"]["state"]
    )
    assert log_rows(tmp_path / "one") == log_rows(tmp_path / "two")


@pytest.mark.parametrize(
    "main,flags,words",
    [
        (main_pretrain, "--max_steps 5 --rc_mae --mae_k 2", "the schedule of --mae_k is in epochs"),
        (main_pretrain, "--max_steps 5 --ema_mae", "the schedule of --ema_mae is in epochs"),
        (
            main_pretrain,
            "--max_steps 5 --mlo_mae --mlo_labels same --mlo_warmup_epochs 1",
            "the schedule of --mlo_mae is in epochs",
        ),
        (main_pretrain, "--max_steps 0", "--max_steps 0 must be positive"),
        (main_pretrain, "--epochs inf", "--epochs inf is not finite"),
        (main_linprobe, "--cache_features --epochs 1.5", "whole --epochs"),
        (main_linprobe, "--cache_features --max_steps 9", "whole --epochs"),
        (main_finetune, "--max_steps 6 --start_epoch 2", "--start_epoch 2 leaves none of the 1 epochs"),
    ],
)
def test_refusals(main, flags, words, image_folder, tmp_path):
    base = FINETUNE if main is main_finetune else "--device cpu"
    args = main.get_args_parser().parse_args(
        f"{base} --data_path {image_folder} --output_dir {tmp_path} {flags}".split()
    )
    with pytest.raises(UserError, match=words):
        main.main(args)
    assert not torch.distributed.is_initialized() and not list(tmp_path.iterdir())
