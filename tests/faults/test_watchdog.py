"""A rank that stands still is named by the others within the time they wait; one that is only slow is let be."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from forked import Forked
from launch import SMALL, ranks

from util.watchdog import describe, slow_reader

FLAGS = f"{SMALL} --batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0 --vis_freq 0 --device cpu --save_freq 9"


@pytest.mark.parametrize(
    "kind, said",
    [
        ("images", "rank 1 has been waiting for images for "),
        ("step", "rank 1 has been in step 2 for "),
        ("process", "rank 1 has not answered for "),
    ],
)
def test_the_rank_that_stands_still_is_named(kind, said, image_folder, tmp_path):
    """The two wait for each other in every step, so that the other one cannot get ahead by more than one."""
    flags = f"{kind} {FLAGS} --data_path {image_folder} --output_dir {tmp_path} --timeout_s 6"
    run = Forked("stuck_script", flags, 2)
    began = time.monotonic()
    run.ranks[0].join(60)
    seconds, code = time.monotonic() - began, run.ranks[0].exitcode
    os.killpg(run.pid, signal.SIGKILL)
    output, _ = run.communicate()
    assert code == 1, output
    (line,) = [line for line in outputs_of(output) if line.startswith("[rank 0]")]
    assert said in line and "(--timeout_s 6)" in line
    assert seconds < 40  # 6 to wait, 2 to look twice, and the start beside other tests


def outputs_of(output: str) -> list[str]:
    return [line for line in output.splitlines() if "error:" in line]


def test_a_slow_rank_is_waited_for_and_named(image_folder, tmp_path):
    flags = f"second {FLAGS} --data_path {image_folder} --output_dir {tmp_path} --timeout_s 60"
    output = ranks("stuck_script", flags, 2)
    assert "note: rank 1 waited 1 of " in output and not outputs_of(output)


def post(number=5, step=7, task="", seconds=0.0):
    return {"number": number, "step": step, "task": task, "for": seconds}


@pytest.mark.parametrize(
    "after, said",
    [
        # The step of rank 2 says where it stands; what ranks 0 and 1 do is wait for it.
        ([post(), post(), post(4, 6, seconds=99)], "rank 2 has not answered for 3 s: stopped, or its node is gone"),
        ([post(seconds=50), post(task="reading", seconds=60), post(seconds=50)],
         "rank 1 has been reading for 60 s, in step 7"),
        # A rank that reads and has only begun to is not what the others wait for.
        ([post(step=6, seconds=40), post(task="reading", seconds=2), post(seconds=50)],
         "rank 0 has been in step 6 for 40 s, while others are in step 7"),
        ([post(step=6, seconds=40), post(step=6, seconds=41), post(seconds=50)],
         "ranks 0, 1 have been in step 6 for 40 s, while others are in step 7"),
        # All in one step: a collective that does not end, which is torch's to say.
        ([post(seconds=50), post(seconds=50), post(seconds=50)], ""),
        # Behind, but moving.
        ([post(step=6, seconds=1), post(seconds=50), post(seconds=50)], ""),
    ],
)  # fmt: skip
def test_who_is_waited_for(after, said):
    before = [post(number=4) for _ in after]
    assert describe(before, after, timeout=30, silence=3)[1] == said


def test_many_ranks_are_not_all_listed():
    before, after = [post(number=4) for _ in range(32)], [post(number=4) for _ in range(20)] + [post()] * 12
    assert "ranks 0, 1, 2, 3, 4, 5, 6, 7 and others have" in describe(before, after, 30, 3)[1]


@pytest.mark.parametrize(
    "waited, found", [([1, 30, 2, 1], True), ([30, 31, 30, 29], False), ([0.1, 0.4, 0.1, 0.1], False), ([20], False)]
)
def test_which_reader_is_slow(waited, found):
    """A tenth of an epoch of 100 s, and twice the median; one process is nobody's brake."""
    said = slow_reader(waited, 100)
    assert said.startswith("rank 1 waited 30 of 100 s for images, the others 1 s") if found else said == ""
