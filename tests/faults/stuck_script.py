"""A main for `launch.started_ranks`: one pretraining in which rank 1 stands still in its third step, while it waits for
images, computes, is stopped as a whole, or for a second only (`images FLAGS…`, `step`, `process`, `second`).
"""

import os
import signal
import time
from types import SimpleNamespace

import main_pretrain
from methods import Pretrainer
from util.loading import Loader

FOREVER = 1000


def in_step(number: int, act) -> None:
    calls, original = [0], Pretrainer.after_update

    def after_update(self, *args):
        calls[0] += 1
        if calls[0] == number:
            act()
        return original(self, *args)

    Pretrainer.after_update = after_update


def in_batch(number: int, act) -> None:
    original = Loader.entered

    def entered(self, iterator):
        for place, batch in enumerate(original(self, iterator)):
            if place == number:
                act()
            yield batch

    Loader.entered = entered


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def main(words):
    kind = words[0]
    if os.environ["RANK"] == "1":
        if kind == "images":
            in_batch(2, lambda: time.sleep(FOREVER))
        elif kind == "second":
            in_batch(2, lambda: time.sleep(1))
        elif kind == "step":
            in_step(3, lambda: time.sleep(FOREVER))
        else:
            in_step(3, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(words[1:]))
