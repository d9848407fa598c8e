"""A main that kills itself: `killed.py MAIN WHERE N RANK STEPS FLAGS…`. The N-th time that rank RANK reaches

    step          the end of an optimizer step
    accumulation  a micro-batch inside a window
    write         a write of a checkpoint, when half of it is on disk
    rename        a rename of a checkpoint: before it (N even) or after it (N odd)
    evaluation    an evaluation: pretraining's by nearest neighbours, or one image of a dense one
    worker        an image, in a data worker
    results       the end of the last epoch: the results of the run are not written yet

the process sends itself SIGKILL; never when N is 0. Rank 0 appends the number of each step to the file STEPS.
"""

import importlib
import io
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).resolve().parent.parent.parent)]

import torch  # noqa: E402

import engine_dense  # noqa: E402
import main_pretrain  # noqa: E402
import util.checkpoint.atomic  # noqa: E402
from util.data.samples import KeyedDataset  # noqa: E402
from util.errors import user_errors  # noqa: E402
from util.training.run import Run  # noqa: E402

WHERE = ("step", "accumulation", "write", "rename", "evaluation", "worker", "results")
EVALUATIONS = {  # the function that each main calls in an evaluation
    "main_pretrain": (main_pretrain, "knn_accuracy"),
    "main_segment": (engine_dense.Segmentation, "predict"),
    "main_detect": (engine_dense.Detection, "truth"),
}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    """A counter whose `now()` returns True at the N-th call."""

    def __init__(self, number: int):
        self.left = number

    def now(self) -> bool:
        self.left -= 1
        return self.left == 0


def before(owner, name: str, act) -> None:
    """Call `act(*args)` at the beginning of every call of a method of `owner`."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        act(*args)
        return original(*args, **kwargs)

    setattr(owner, name, call)


def after(owner, name: str, act) -> None:
    """Call `act(*args)` at the end of every call of a method of `owner`."""
    original = getattr(owner, name)

    def call(*args, **kwargs):
        result = original(*args, **kwargs)
        act(*args)
        return result

    setattr(owner, name, call)


def half_written(path, write) -> None:
    whole = io.BytesIO()
    write(whole)
    with open(path.with_name(f".{path.name}.tmp"), "wb") as file:
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        os.fsync(file.fileno())
    kill()


def arrange(main: str, where: str, number: int) -> None:
    due = Countdown(number)
    if where == "step":
        before(Run, "finish_step", lambda *_: due.now() and kill())
    elif where == "accumulation":
        before(Run, "backward", lambda run, losses, batch: not batch.is_last_of_window and due.now() and kill())
    elif where == "write":
        before(util.checkpoint.atomic, "write_atomically", lambda *args: due.now() and half_written(*args))
    elif where == "rename":
        original = os.replace

        def replace(old, new):
            ours = "checkpoint-" in str(new) and due.now()
            if ours and number % 2 == 0:
                kill()
            original(old, new)
            if ours:
                kill()

        os.replace = replace
    elif where == "evaluation":
        before(*EVALUATIONS[main], lambda *_: due.now() and kill())
    elif where == "worker":
        before(KeyedDataset, "__getitem__", lambda *_: torch.utils.data.get_worker_info() and due.now() and kill())
    elif where == "results":
        after(Run, "finish_epoch", lambda run, _: run.ended and due.now() and kill())


def record_steps(path: str) -> None:
    def append(run, *_):
        with open(path, "a") as file:
            file.write(f"{run.step}\n")

    before(Run, "finish_step", append)


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def main(words):
    name, where, number, rank, steps = *words[:2], int(words[2]), *words[3:5]
    here = os.environ.get("RANK", "0")
    if number and here == rank:
        arrange(name, where, number)
    if here == "0":
        record_steps(steps)
    module = importlib.import_module(name)
    with user_errors(f"{name}.py"):
        module.main(module.get_args_parser().parse_args(words[5:]))


if __name__ == "__main__":
    main(sys.argv[1:])
