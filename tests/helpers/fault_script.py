"""A main for `launch.ranks`: a pretraining with a fault on one of two ranks after step 3 (`FAULT FLAGS…`).

full: rank 0's disk is full until step 8. share: rank 1 cannot write its part of the --fsdp folders until then. weight,
gradient: NaN or Inf in one element on rank 1. teacher: NaN in rank 1's DMAE teacher. Output lines start with "rank R:".
"""

import os
import sys
from types import SimpleNamespace

import pytest

import main_pretrain
import util.checkpoint.sharded
from helpers.inject import FULL, FullDisk, after_step, poison
from util.errors import RunFailed, leave
from util.training.run import Run

RANK = int(os.environ["RANK"])


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def say(text):
    sys.stdout.write(f"rank {RANK}: {text}\n")
    sys.stdout.flush()


def no_space(*_):
    raise FULL


def fault(fault_name: str, run: Run) -> None:
    last = list(run.saved_model.parameters())[-1]
    if fault_name == "weight":
        poison(last)
    elif fault_name == "gradient":
        last.register_hook(lambda gradient: gradient * float("inf"))
    elif fault_name == "teacher":
        poison(next(run.methods["dmae"].external_networks()[0].parameters()))


def main(words):
    fault_name, patch = words[0], pytest.MonkeyPatch()
    if fault_name == "full":
        disk = FullDisk(patch)
        after_step(patch, 3, lambda _: setattr(disk, "full", RANK == 0))
        after_step(patch, 8, lambda _: setattr(disk, "full", False))
    elif fault_name == "share":
        writer, write_data = (
            util.checkpoint.sharded.FileSystemWriter,
            util.checkpoint.sharded.FileSystemWriter.write_data,
        )
        after_step(patch, 3, lambda _: RANK and setattr(writer, "write_data", no_space))
        after_step(patch, 8, lambda _: setattr(writer, "write_data", write_data))
    elif RANK == 1:
        after_step(patch, 3, lambda run: fault(fault_name, run))
    close = Run.close
    patch.setattr(Run, "close", lambda self: (say(f"ended at step {self.step}"), close(self)))
    try:
        main_pretrain.main(main_pretrain.get_args_parser().parse_args(words[1:]))
    except RunFailed as error:
        say(str(error))
        leave(0)
