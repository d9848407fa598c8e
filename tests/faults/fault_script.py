"""A main for `launch.ranks`: one pretraining with a fault on one of two ranks after step 3 (`KIND FLAGS…`).

full: rank 0's disk, until step 8. weight, gradient: NaN or Inf in one element on rank 1. teacher: NaN in rank 1's
DMAE teacher. Prints lines that start with "rank R:".
"""

import os
import sys
from types import SimpleNamespace

import pytest
from faults import FullDisk, after_step, poison

import main_pretrain
from util.errors import RunFailed, leave
from util.run import Run

RANK = int(os.environ["RANK"])


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def say(text):
    sys.stdout.write(f"rank {RANK}: {text}\n")
    sys.stdout.flush()


def fault(kind: str, run: Run) -> None:
    last = list(run.model.parameters())[-1]
    if kind == "weight":
        poison(last)
    elif kind == "gradient":
        last.register_hook(lambda gradient: gradient * float("inf"))
    elif kind == "teacher":
        poison(next(run.methods["dmae"].networks_aside()[0].parameters()))


def main(words):
    kind, patch = words[0], pytest.MonkeyPatch()
    if kind == "full":
        disk = FullDisk(patch)
        after_step(patch, 3, lambda _: setattr(disk, "full", RANK == 0))
        after_step(patch, 8, lambda _: setattr(disk, "full", False))
    elif RANK == 1:
        after_step(patch, 3, lambda run: fault(kind, run))
    original = Run.close
    patch.setattr(Run, "close", lambda self: (say(f"ended at step {self.step}"), original(self)))
    try:
        main_pretrain.main(main_pretrain.get_args_parser().parse_args(words[1:]))
    except RunFailed as error:
        say(str(error))
        leave(0)
