"""Two gloo processes: a fault on one stops both, and gradients are sent once per step."""

import re

from helpers.launch import SMALL, ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FLAGS = f"{SMALL} --batch_size 4 --accum_iter 3 --epochs 1 --warmup_epochs 0 --num_workers 0 --vis_freq 0 --device cpu"


def rank_lines(output):
    return sorted(set(re.findall(r"rank \d: .*", output)))


def test_non_finite_on_one_rank_stops_both(image_folder, tmp_path):
    """Micro-batch 4 is in the second window (step 1); rank 0, whose own loss is finite, reports the same."""
    flags = f"nan {FLAGS} --data_path {image_folder} --output_dir {tmp_path}"
    lines = rank_lines(ranks("helpers.rank_script", flags, 2))
    assert len(lines) == 2
    assert all("train/pixels became non-finite at step 1" in line for line in lines)
    assert not list(tmp_path.glob("*.pth"))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert "flags/text_summary" in events.Tags()["tensors"]  # queued events were written


def test_a_metric_of_one_rank(image_folder, tmp_path):
    """Both ranks name the metric at the next reading, before they would reduce tensors of different lengths."""
    flags = f"metric {FLAGS} --print_freq 1 --data_path {image_folder} --output_dir {tmp_path}"
    lines = rank_lines(ranks("helpers.rank_script", flags, 2))
    assert len(lines) == 2
    assert all("the metric 'odd' was logged on rank 1 and not on rank 0" in line for line in lines)


def test_one_communication_per_step(image_folder, tmp_path):
    """12 micro-batches on each rank in windows of 3: four steps, four times the first bucket."""
    flags = f"count {FLAGS} --data_path {image_folder} --output_dir {tmp_path}"
    lines = rank_lines(ranks("helpers.rank_script", flags, 2))
    assert [line.split(",")[0] for line in lines] == ["rank 0: 4 first buckets", "rank 1: 4 first buckets"]
