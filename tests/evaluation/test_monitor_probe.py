"""`--probe_freq`: the accuracy of the command that judges the same checkpoint, and a training that stays the same."""

import pytest
import torch
from helpers.launch import DIGITS, checkpoint, log_rows, ranks, same_tensors

import main_linprobe
import main_pretrain
from evaluation.monitor import Monitor

FLAGS = f"{DIGITS} --num_workers 0 --amp_dtype fp32".replace("--batch_size 64", "--batch_size 256")


def pretrain(flags: str) -> None:
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(f"{FLAGS} {flags}".split()))


@pytest.fixture
def probed(tmp_path):
    pretrain(f"--probe_freq 1 --knn_freq 2 --save_freq 1 --output_dir {tmp_path}/probed")
    return tmp_path / "probed"


def test_flags_of_the_judging_command():
    parsed = main_linprobe.get_args_parser().parse_args(["--cache_features"])
    assert vars(Monitor.PROBE).items() <= vars(parsed).items()


def test_number_of_the_judging_command(probed, tmp_path):
    """`main_linprobe.py --cache_features` on each checkpoint, in an epoch with kNN and in one without."""
    rows = log_rows(probed)
    assert ["eval/knn20_acc1" in row for row in rows] == [False, True]
    for epoch, row in enumerate(rows):
        flags = f"--finetune {probed}/checkpoint-{epoch}.pth --dataset digits --cache_features --device cpu"
        flags += f" --num_workers 0 --amp_dtype fp32 --output_dir {tmp_path}/{epoch}"
        result = main_linprobe.main(main_linprobe.get_args_parser().parse_args(flags.split()))
        # The sum of a pass over another number of images may differ in its last bit: at most one of 360 images.
        assert row["eval/probe_acc1"] == pytest.approx(result["eval/acc1"], abs=0.3)
    assert rows[-1]["eval/probe_acc1"] > 30  # chance: 10


def test_training_and_knn_stay_the_same(probed, tmp_path):
    """Bit for bit, and also in a run that is resumed after its first epoch."""
    pretrain(f"--knn_freq 2 --save_freq 1 --output_dir {tmp_path}/plain")
    one, other = (checkpoint(folder, "checkpoint-1.pth") for folder in (probed, tmp_path / "plain"))
    assert all(same_tensors(one[name], other[name]) for name in ("model", "optimizer"))
    assert log_rows(probed)[1]["eval/knn20_acc1"] == log_rows(tmp_path / "plain")[1]["eval/knn20_acc1"]
    rows = log_rows(probed)
    pretrain(f"--probe_freq 1 --knn_freq 2 --resume {probed}/checkpoint-0.pth --output_dir {probed}")
    assert log_rows(probed) == rows
    assert same_tensors(checkpoint(probed, "checkpoint-1.pth")["model"], one["model"])


def test_two_processes(tmp_path):
    """A learning rate of 0 keeps the weights equal bit for bit."""
    flags = f"{FLAGS} --probe_freq 2 --knn_images 120 --epochs 1 --warmup_epochs 0 --lr 0 --output_dir {tmp_path}"
    for processes in (1, 2):
        ranks("main_pretrain", f"{flags}/{processes} --batch_size {128 // processes}", processes)
    one, two = (log_rows(tmp_path / str(processes))[-1]["eval/probe_acc1"] for processes in (1, 2))
    assert one == pytest.approx(two, abs=0.9)  # one of 120 images: batches of another size round otherwise


def test_too_few_images(image_folder, tmp_path, capsys):
    pretrain(f"--dataset imagefolder --data_path {image_folder} --batch_size 8 --probe_freq 2 --knn_images 1 "
             f"--output_dir {tmp_path}/run")  # fmt: skip
    assert "no accuracy of the probe, because 1 training images are too few" in capsys.readouterr().out
    assert torch.isfinite(torch.tensor(log_rows(tmp_path / "run")[-1]["train/loss"]))
