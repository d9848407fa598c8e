"""A run that is killed repeatedly, and the checks of its files: for the tests and for soak.py."""

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

from helpers.forked import Forked
from helpers.launch import DIGITS, checkpoint, launch, log_rows, same_tensors
from util.checkpoint.files import BEST, SCORES, list_checkpoints
from util.checkpoint.resume import is_whole

SAVE_STEPS = 3
COMMON = f"--accum_iter 2 --num_workers 1 --save_steps {SAVE_STEPS} --save_freq 1 --print_freq 1 --device cpu"
# 11 steps of two micro-batches an epoch; the kNN evaluation is at the end of each.
PRETRAIN = f"main_pretrain {DIGITS} {COMMON} --knn_freq 1 --knn_images 200"
# 5 steps of two micro-batches an epoch, with random numbers in the network and in the data. In fp32, since `auto` is
# bf16 on some CPUs, which changes nothing here and is slower.
SCENES = "--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 40 4 --input_size 32 --batch_size 4"
SCENES += f" --model vit_micro_patch4 --head_width 16 --drop_path 0.2 --lr 1e-3 --epochs 2 --amp_dtype fp32 {COMMON}"
RUNS = {  # the main and its flags
    "mae": PRETRAIN,
    "maek": f"{PRETRAIN} --mae_k 1",
    "rcmae": f"{PRETRAIN} --rc_mae",
    "mlo": f"{PRETRAIN} --mlo_mae --mlo_labels same --mlo_hidden 16",
    "segment": f"main_segment {SCENES} --rel_pos",
    "detect": f"main_detect {SCENES} --patch_size 8 --window 3 --score_thresh 0",
}
# How often each moment comes in a whole run.
EVENTS = {"step": 22, "accumulation": 22, "write": 8, "rename": 8, "evaluation": 2, "worker": 2800, "results": 1}
DENSE_EVENTS = {"step": 10, "accumulation": 10, "write": 6, "rename": 6, "evaluation": 8, "worker": 80, "results": 1}


def events_of(name: str) -> dict[str, int]:
    """Return how often each moment comes in the run of this name."""
    return DENSE_EVENTS if name in ("segment", "detect") else EVENTS


class Broken(AssertionError):
    """Something was lost."""


class Killed:
    """The run `name` of `RUNS` by `processes` ranks in `folder`, started as a command by `launch` (`command`) or
    forked."""

    def __init__(self, folder: Path, name: str = "mae", processes: int = 1, command: bool = True):
        self.folder, self.processes, self.kills, self.command = folder, processes, 0, command
        self.main, _, flags = RUNS[name].partition(" ")
        flags = re.sub(r"--batch_size (\d+)", lambda size: f"--batch_size {int(size[1]) // processes}", flags)
        self.flags = f"{flags} --resume auto --output_dir {folder}"
        self.steps = folder.parent / f"{folder.name}.steps"

    def start(self, where: str = "step", number: int = 0, rank: int = 0, seconds: float = 300) -> tuple[int, str]:
        """Run until it is killed or ends, and return exit code and output. Raises Broken when the content of a file
        does not match its name, or when more steps are repeated than lie between two checkpoints."""
        before = self._done()
        words = f"{self.main} {where} {number} {rank} {self.steps} {self.flags}"
        if self.command:
            process = launch("tests/helpers/killed.py", words, self.processes)
        else:
            process = Forked("helpers.killed", words, self.processes)
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise Broken(f"hangs after a kill at {where} {number} of rank {rank}") from None
        self.kills += process.returncode != 0
        self._check_files()
        after = self._done()[len(before) :]
        again = before[-1] - after[0] + 1 if before and after else 0
        if again > SAVE_STEPS:
            raise Broken(f"{again} steps were done again after a kill at {where} {number}: {before[-1]} to {after[0]}")
        return process.returncode, output

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
        """Raise Broken unless the result equals that of the undisturbed run bit for bit."""
        ours, theirs = (checkpoint(run.folder, "checkpoint-1.pth") for run in (self, reference))
        for key in ("model", "optimizer", "methods", "step", "rng"):
            if not same_tensors(ours[key], theirs[key]):
                raise Broken(f"{key} is not as in the undisturbed run")
        # A kill during the evaluation or after the rename may write an epoch's line twice, or change its time.
        if log_rows(self.folder) != log_rows(reference.folder):
            raise Broken("log.txt is not as in the undisturbed run")
        self._check_results(reference)

    def _check_results(self, reference: "Killed") -> None:
        """Raise Broken unless the files of the results are there, and have the same numbers."""
        rows, expected = (
            [json.loads(line)["metrics"] for line in run._lines("results.jsonl")] for run in (self, reference)
        )
        if rows != expected or len(rows) != 1:
            raise Broken("results.jsonl is not as in the undisturbed run")
        for path in reference.folder.glob("*"):
            ours = self.folder / path.name
            if path.suffix in (".pth", ".json", ".png", ".safetensors") and not ours.is_file():
                raise Broken(f"{path.name} is missing")
            if path.name == SCORES:
                result, theirs = (json.loads(each.read_text()) for each in (ours, path))
                if any(result[key] != theirs[key] for key in ("result", "details", "epoch")):
                    raise Broken(f"{SCORES} is not as in the undisturbed run")
            if path.name == BEST and not same_tensors(
                *(checkpoint(f, BEST)["model"] for f in (path.parent, self.folder))
            ):
                raise Broken(f"{BEST} is not as in the undisturbed run")

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.steps.unlink(missing_ok=True)
