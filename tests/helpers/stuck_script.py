"""A main in which a rank hangs in its third step (`MAIN CASE RANK FLAGS…`).

images: it waits for images. step: it computes. process: the whole process is stopped. moment: it hangs for two seconds
only. Two cases are healthy: all ranks wait long for their first images (start), or rank 0 works on after the others
have ended (end).
"""

import importlib
import os
import signal
import time
from types import SimpleNamespace

from util.data.loader import Loader
from util.report.ledger import Record
from util.training.run import Run

FOREVER = 1000


def in_step(number: int, act) -> None:
    calls, original = [0], Run.optimizer_step

    def optimizer_step(self):
        calls[0] += 1
        if calls[0] == number:
            act()
        return original(self)

    Run.optimizer_step = optimizer_step


def in_batch(number: int, act) -> None:
    original = Loader.skip_to_start

    def skip_to_start(self, iterator):
        for index, batch in enumerate(original(self, iterator)):
            if index == number:
                act()
            yield batch

    Loader.skip_to_start = skip_to_start


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def at_the_end(act) -> None:
    original = Record.finish
    Record.finish = lambda *args: act() or original(*args)


def main(words):
    main, case, rank = importlib.import_module(words[0]), words[1], words[2]
    if case == "start":
        in_batch(0, lambda: time.sleep(6))
    elif os.environ["RANK"] == rank:
        if case == "images":
            in_batch(2, lambda: time.sleep(FOREVER))
        elif case == "moment":
            in_batch(2, lambda: time.sleep(2))
        elif case == "step":
            in_step(3, lambda: time.sleep(FOREVER))
        elif case == "process":
            in_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        elif case == "end":
            at_the_end(lambda: time.sleep(6))
    main.main(main.get_args_parser().parse_args(words[3:]))
