"""The other ranks name a hanging rank before they abort; a slow rank does not end the run."""

import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from helpers.forked import Forked
from helpers.launch import SMALL, ranks

from util.parallel.watchdog import describe, slow_reader

FLAGS = f"{SMALL} --batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0 --vis_freq 0 --device cpu --save_freq 9"


DENSE = "--dataset scenes --scene_size 32 --scene_count 16 2 --input_size 32 --model vit_micro_patch4 --head_width 16"
DENSE += " --head_norm layer --batch_size 2 --epochs 1 --num_workers 0 --device cpu"


@pytest.mark.parametrize(
    "main, case, rank, message",
    [
        ("main_pretrain", "images", 0, "rank 0 has been waiting for images for "),
        ("main_pretrain", "step", 1, "rank 1 has been in step 2 for "),
        ("main_pretrain", "process", 1, "rank 1 has not answered for "),
        # Rank 0 holds the store, so then the store does not answer.
        ("main_pretrain", "process", 0, "rank 0, which hosts the store of the process group, does not answer"),
        ("main_segment", "step", 1, "rank 1 has been in step 2 for "),
        ("main_detect", "images", 1, "rank 1 has been waiting for images for "),
    ],
)
def test_the_hanging_rank_is_named(main, case, rank, message, image_folder, tmp_path):
    """The ranks wait for each other in every step, so the other rank is at most one step ahead."""
    data = f"{FLAGS} --data_path {image_folder}" if main == "main_pretrain" else DENSE
    flags = f"{main} {case} {rank} {data} --output_dir {tmp_path} --timeout_s 6"
    run = Forked("helpers.stuck_script", flags, 2)
    began = time.monotonic()
    run.ranks[1 - rank].join(90)
    seconds, code = time.monotonic() - began, run.ranks[1 - rank].exitcode
    os.killpg(run.pid, signal.SIGKILL)
    output, _ = run.communicate()
    assert code == 1, output
    assert [line for line in complaints(output) if line.startswith(f"[rank {1 - rank}]") and message in line], output
    assert "(--timeout_s 6)" in output
    assert seconds < 60  # timeout of 6 s, 2 to 6 s for two checks, and the start beside other tests


def complaints(output: str) -> list[str]:
    return [line for line in output.splitlines() if "error:" in line]


def test_a_slow_rank_is_named_and_not_aborted(image_folder, tmp_path):
    flags = f"main_pretrain moment 1 {FLAGS} --data_path {image_folder} --output_dir {tmp_path} --timeout_s 60"
    output = ranks("helpers.stuck_script", flags, 2)
    assert re.search(r"note: rank 1 waited \d+ of ", output) and not complaints(output), output


@pytest.mark.parametrize("case", ["start", "end"])
def test_no_healthy_run_is_aborted(case, image_folder, tmp_path):
    """Waits of twice the timeout: for the first images on all ranks, and on rank 0 after the other rank has ended."""
    flags = f"main_pretrain {case} 0 {FLAGS} --data_path {image_folder} --output_dir {tmp_path} --timeout_s 3"
    assert not complaints(ranks("helpers.stuck_script", flags, 2))
    assert (tmp_path / "encoder.safetensors").is_file() and (tmp_path / "results.jsonl").is_file()


def post(number=5, step=7, task="", seconds=0.0, ended=False):
    return {"number": number, "step": step, "task": task, "for": seconds, "ended": ended}


@pytest.mark.parametrize(
    "after, message",
    [
        # Rank 2 is behind by its step number; ranks 0 and 1 wait for it.
        ([post(), post(), post(4, 6, seconds=99)], "rank 2 has not answered for 3 s: stopped, or its node failed"),
        (
            [post(seconds=50), post(task="reading", seconds=60), post(seconds=50)],
            "rank 1 has been reading for 60 s, in step 7",
        ),
        # A rank that has only just begun to read is not the one that the others wait for.
        (
            [post(step=6, seconds=40), post(task="reading", seconds=2), post(seconds=50)],
            "rank 0 has been in step 6 for 40 s, while others are in step 7",
        ),
        (
            [post(step=6, seconds=40), post(step=6, seconds=41), post(seconds=50)],
            "ranks 0, 1 have been in step 6 for 40 s, while others are in step 7",
        ),
        # All ranks are in one step: a collective hangs, which torch reports.
        ([post(seconds=50), post(seconds=50), post(seconds=50)], ""),
        # No rank ahead has waited for that long.
        ([post(step=6, seconds=40), post(seconds=1), post(seconds=2)], ""),
        # A rank that has ended posts nothing more.
        ([post(step=9, seconds=40), post(4, 9, seconds=40, ended=True), post(step=9)], ""),
        # The rank is behind but makes progress.
        ([post(step=6, seconds=1), post(seconds=50), post(seconds=50)], ""),
    ],
)
def test_blocking_rank(after, message):
    before = [post(number=4) for _ in after]
    assert describe(before, after, timeout=30, silence=3)[1] == message


def test_many_ranks_are_not_all_listed():
    before, after = [post(number=4) for _ in range(32)], [post(number=4) for _ in range(20)] + [post()] * 12
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and others have" in describe(before, after, 30, 3)[1]


@pytest.mark.parametrize(
    "waited, slow", [([1, 30, 2, 1], True), ([30, 31, 30, 29], False), ([0.1, 0.4, 0.1, 0.1], False), ([20], False)]
)
def test_which_reader_is_slow(waited, slow):
    """A reader is slow above a tenth of an epoch of 100 s and twice the median; one process is never slow."""
    output = slow_reader(waited, 100)
    assert output.startswith("rank 1 waited 30 of 100 s for images, the others 1 s") if slow else output == ""
