"""A run that is killed again and again, and what must hold of it: for the tests and for soak.py."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

from helpers.forked import Forked
from helpers.launch import DIGITS, checkpoint, launch, log_rows, same_tensors
from util.checkpoint.files import list_checkpoints
from util.checkpoint.resume import is_whole

SAVE_STEPS = 3
# 11 steps of two micro-batches an epoch; the kNN evaluation is at the end of each.
FLAGS = DIGITS.replace("--batch_size 64", "--batch_size 64 --accum_iter 2")
FLAGS += f" --num_workers 1 --save_steps {SAVE_STEPS} --save_freq 1 --print_freq 1 --knn_freq 1 --knn_images 200"
EVENTS = {"step": 22, "accumulation": 22, "write": 8, "rename": 8, "evaluation": 2, "worker": 2800}  # in a whole run
METHODS = {
    "mae": "",
    "maek": "--mae_k 1",
    "rcmae": "--rc_mae",
    "mlo": "--mlo_mae --mlo_labels same --mlo_hidden 16",
}


class Broken(AssertionError):
    """Something was lost."""


class Killed:
    """One run in `folder`, of `flags`, with `processes` ranks, started by `launch` (`command`) or forked."""

    def __init__(self, folder: Path, flags: str = "", processes: int = 1, command: bool = True):
        self.folder, self.processes, self.kills, self.command = folder, processes, 0, command
        batch = FLAGS.replace("--batch_size 64", f"--batch_size {64 // processes}")
        self.flags = f"{batch} {flags} --resume auto --output_dir {folder}"
        self.steps = folder.parent / f"{folder.name}.steps"

    def start(self, where: str = "step", number: int = 0, rank: int = 0, seconds: float = 300) -> tuple[int, str]:
        """Run until it is killed or ends -> exit code, what it said. Broken when a file is not what its name says, or
        when more was done again than a checkpoint is apart from the next."""
        before = self._done()
        words = f"{where} {number} {rank} {self.steps} {self.flags}"
        if self.command:
            process = launch("tests/helpers/killed.py", words, self.processes)
        else:
            process = Forked("helpers.killed", words, self.processes)
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Broken(f"hangs after a kill at {where} {number} of rank {rank}") from None
        self.kills += process.returncode != 0
        self._check_files()
        after = self._done()[len(before) :]
        again = before[-1] - after[0] + 1 if before and after else 0
        if again > SAVE_STEPS:
            raise Broken(f"{again} steps were done again after a kill at {where} {number}: {before[-1]} to {after[0]}")
        return process.returncode, said

    def _done(self) -> list[int]:
        return [int(line) for line in self.steps.read_text().split()] if self.steps.exists() else []

    def _check_files(self) -> None:
        for path in list_checkpoints(self.folder) if self.folder.exists() else []:
            if not is_whole(path):
                raise Broken(f"{path.name} is not whole")
        for line in self._lines("log.txt") + self._lines("results.jsonl"):
            json.loads(line)

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def check_end(self, reference: "Killed") -> None:
        """Broken when it did not end as the undisturbed run did, bit for bit."""
        ours, theirs = (checkpoint(run.folder, "checkpoint-1.pth") for run in (self, reference))
        for key in ("model", "optimizer", "methods", "step", "rng"):
            if not same_tensors(ours[key], theirs[key]):
                raise Broken(f"{key} is not as in the undisturbed run")
        # A kill during the evaluation or after the rename may leave the line of an epoch twice, or its time other.
        if log_rows(self.folder) != log_rows(reference.folder):
            raise Broken("log.txt is not as in the undisturbed run")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.steps.unlink(missing_ok=True)
