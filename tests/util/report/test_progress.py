"""What the terminal shows: epochs of all, time left of the whole run, 80 columns, each number once."""

import re

import pytest
from helpers.launch import SMALL

import main_finetune
import main_pretrain
from util.report.log import duration, in_lines
from util.training.reporting import _shown, _speeds


def test_durations():
    assert [duration(seconds) for seconds in (5, 3725, 86_399, 273_145)] == [
        "0:00:05",
        "1:02:05",
        "23:59:59",
        "3 d 03:52:25",
    ]


def test_lines_are_broken_between_values():
    values = [f"metric_{i} 0.1234" for i in range(9)]
    lines = in_lines("epoch 199/200:", values).split("\n")
    assert max(map(len, lines)) <= 80 and all(line.startswith("    ") for line in lines[1:])
    assert re.findall(r"metric_\d 0\.1234", "\n".join(lines)) == values
    assert in_lines("epoch 1/2:", ["x" * 90]).count("\n") == 1  # a long value has a line of its own


def test_the_longest_progress_line_fits():
    rates = {"data_wait_percent": 3.0, "images_per_s": 123456.0, "mfu_percent": 52.0}
    line = "  ".join(["epoch 1600/1600", "1234/5004", *_speeds(0.41234, 1.5e-4, rates), "left 123:59:59"])
    assert len(line) <= 90  # with MFU, which a flag adds
    del rates["mfu_percent"]
    line = "  ".join(["epoch 800/800", "123/5004", *_speeds(0.41234, 1.5e-4, rates), "left 23:59:59"])
    assert len(line) <= 80
    assert "waits 40%" in _speeds(1, 1, {"data_wait_percent": 40.0, "images_per_s": 1.0})


@pytest.mark.parametrize(
    "main, flags", [(main_pretrain, f"{SMALL} --vis_freq 0"), (main_finetune, "--model vit_micro_patch4")]
)
def test_a_run_counts_to_its_end(main, flags, tmp_path, capsys):
    words = f"{flags} --dataset digits --input_size 16 --batch_size 359 --epochs 2.5 --warmup_epochs 0 --print_freq 2"
    words += f" --num_workers 0 --device cpu --output_dir {tmp_path}"
    main.main(main.get_args_parser().parse_args(words.split()))
    lines = capsys.readouterr().out.splitlines()
    progress = [line for line in lines if "img/s" in line]
    assert [re.match(r"epoch (\d)/3  (\d)/(\d)  loss [\d.]+  ", line).groups() for line in progress] == [
        *[("1", "2", "4"), ("1", "4", "4"), ("2", "2", "4"), ("2", "4", "4"), ("3", "2", "2")]
    ]
    assert progress[-1].endswith("left 0:00:00") and max(map(len, progress)) <= 80
    (ended,) = [line for line in lines if line.startswith("epoch 3/3:")]
    assert len(re.findall(r" loss ", ended)) == 1 and "pixels" not in ended  # the same number as the loss


def test_only_the_single_term_of_a_loss_is_hidden():
    """A gradient norm that happens to equal the loss, 0 for one class, is still shown."""
    means = {"loss": 0.0, "grad_norm": 0.0, "pixels": 0.0}
    assert _shown(means, ["pixels"], {}) == ["loss 0", "grad_norm 0"]
    assert _shown(means, [], {"eval/acc1": 100.0}) == ["loss 0", "grad_norm 0", "pixels 0", "eval/acc1 100"]
    two = {"loss": 1.0, "pixels": 1.0, "consistency": 0.0}
    assert _shown(two, ["pixels", "consistency"], {}) == ["loss 1", "pixels 1", "consistency 0"]
