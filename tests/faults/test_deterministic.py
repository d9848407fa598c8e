"""`--deterministic`: two runs of every method give the same bits, and only deterministic algorithms run."""

import os

import pytest
import torch
from helpers.inject import CLASSIFIER, FLAGS, after_step, dense, finetune, pretrain
from helpers.launch import checkpoint, log_rows, same_tensors, scalars

import main_linprobe

METHODS = {
    "plain": "",
    "fp16": "--amp_dtype fp16",
    "mae_k": "--mae_k 1",
    "ema_mae": "--ema_mae --wse 1 --ema_update step",
    "rc_mae": "--rc_mae",
    "dmae": "--dmae_teacher {teacher}",
    "mlo_mae": "--mlo_mae --mlo_labels same --mlo_batch_size 8",
}
SHORT = FLAGS.replace("--save_steps 1", "--save_steps 0") + " --deterministic"


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """Restore the process-wide switches for the next test."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # on a CPU, sums over several threads could differ
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def assert_same_bits(one, other, name: str) -> None:
    ours, theirs = checkpoint(one, name), checkpoint(other, name)
    for key in ours.keys() - {"args", "origin", "data"}:  # paths and times
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(one) == log_rows(other)
    assert scalars(one, "train/loss") == scalars(other, "train/loss")


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_are_the_same(image_folder, tmp_path, method):
    flags = f"{SHORT} --aug mae --data_path {image_folder}"
    if method == "dmae":
        pretrain(f"{flags} --epochs 1 --output_dir {tmp_path}/teacher")
    for name in ("one", "other"):
        torch.manual_seed(sum(map(ord, name)))  # earlier random numbers of the process must not matter
        method_flags = METHODS[method].format(teacher=f"{tmp_path}/teacher/checkpoint-0.pth")
        pretrain(f"{flags} {method_flags} --output_dir {tmp_path}/{name}")
    assert_same_bits(tmp_path / "one", tmp_path / "other", "checkpoint-1.pth")


def test_fine_tuning_and_probing(image_folder, tmp_path):
    """With all augmentations that draw random numbers, and with the optimizer of the probe."""
    mixed = "--mixup 0.8 --cutmix 1.0 --drop_path 0.3 --deterministic --data_path"
    for name in ("one", "other"):
        finetune(f"{CLASSIFIER} {mixed} {image_folder} --output_dir {tmp_path}/{name}")
        probe = f"{CLASSIFIER} --deterministic --data_path {image_folder} --output_dir {tmp_path}/probe-{name}"
        main_linprobe.main(main_linprobe.get_args_parser().parse_args(probe.split()))
    assert_same_bits(tmp_path / "one", tmp_path / "other", "checkpoint-1.pth")
    assert_same_bits(tmp_path / "probe-one", tmp_path / "probe-other", "checkpoint-1.pth")


@pytest.mark.parametrize("name", ["segment", "detect"])
def test_dense_runs(name, tmp_path):
    """With drop path and dropout, and the proposals that a detector draws."""
    for run in ("one", "other"):
        torch.manual_seed(sum(map(ord, run)))
        dense(name, f"--drop_path 0.3 --epochs 1 --save_steps 0 --deterministic --output_dir {tmp_path}/{run}")
    assert_same_bits(tmp_path / "one", tmp_path / "other", "checkpoint-0.pth")


def test_switches_of_the_flag(image_folder, tmp_path, monkeypatch):
    """Checked in the middle of a run: an operation without a deterministic algorithm raises only with the flag."""
    seen = []

    def check(_run):
        seen.append((torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
        seen.append(torch.backends.cudnn.deterministic)

    after_step(monkeypatch, 1, check)
    pretrain(f"{SHORT.replace('--deterministic', '')} --epochs 1 --data_path {image_folder} --output_dir {tmp_path}/no")
    pretrain(f"{SHORT} --epochs 1 --data_path {image_folder} --output_dir {tmp_path}/yes")
    assert seen == [(False, None), False, (True, ":4096:8"), True]
    with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.empty(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
