"""Names the rank that all others wait for. Each process says, in the store of the process group, where it is and since
when; a thread of each looks on. torch ends a collective that takes too long as well, but cannot say whom it waits for.
"""

import contextlib
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta

READING = "waiting for images"


class Watchdog:
    """Ends this process with exit code 1 and a sentence when it has waited `timeout` seconds for another rank.

    `step` is the optimizer step that this process is in; `task` is what it does alone, waiting for nobody (reading
    images), or "" where it may be inside a collective. So whoever reads is waited for, else whoever is a step behind;
    and a process whose thread no longer writes has been stopped, or its node is gone.
    """

    def __init__(self, store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.interval = min(timeout / 10, 30.0)
        self.step, self.task, self.since = 0, "", time.monotonic()
        self._number, self._ended = 0, threading.Event()
        self._post()

    def start(self) -> None:
        """Every rank must have been made before any is started."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Nobody waits for this process any more: what it does now, or leaves to rank 0, is no standing still."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._post()

    def moved(self, step: int | None = None, task: str = "") -> None:
        """This process has come to another place."""
        self.step = self.step if step is None else step
        self.task, self.since = task, time.monotonic()

    def _post(self) -> None:
        self._number += 1
        here = {"number": self._number, "step": self.step, "task": self.task, "for": time.monotonic() - self.since}
        self.store.set(f"rank {self.rank}", json.dumps(here | {"ended": self._ended.is_set()}))

    def _posts(self) -> list[dict] | None:
        """What every rank wrote last; None when the store does not answer. It is asked by another thread: torch waits
        without end for a store whose process is stopped, whatever its timeout is."""
        found = []

        def ask():
            with contextlib.suppress(RuntimeError):
                found.extend(self.store.multi_get([f"rank {rank}" for rank in range(self.world)]))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        asking.join(3 * self.interval)
        return [json.loads(post) for post in found] or None

    def _pause(self, intervals: int) -> None:
        """Wait, and go on saying where this process is."""
        for _ in range(intervals):
            self._ended.wait(self.interval)
            self._post()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            with contextlib.suppress(RuntimeError):  # whoever holds the store is gone: torch says so
                self._post()
                # A process that reads waits for nobody, however long it takes.
                if not self.task and time.monotonic() - self.since >= self.timeout:
                    self._judge(self.since)

    def _judge(self, since: float) -> None:
        before = after = self._posts()
        if before:
            self._pause(3)
            after = self._posts()
        if not after:
            ranks, said = [0], "rank 0, which holds the processes' meeting place, does not answer"
        else:
            ranks, said = describe(before, after, self.timeout, 3 * self.interval)
        if self.rank in ranks:
            # Those who wait speak first: the end of the one that stands still would end them with less to say.
            self._pause(5)
        if ranks and since == self.since and not self._ended.is_set():
            sys.stderr.write(f"[rank {self.rank}] error: {said} (--timeout_s {self.timeout:g})\n")  # print is silenced
            sys.stderr.flush()
            os._exit(1)  # the main thread is inside a collective and stays there


def describe(before: list[dict], after: list[dict], timeout: float, silence: float) -> tuple[list[int], str]:
    """From what the ranks said twice, `silence` seconds apart: whom they wait for, and in words; nobody and "" when
    that cannot be told, and torch's own timeouts have to do."""
    living = {rank: post for rank, post in enumerate(after) if not post["ended"]}
    silent = [rank for rank, post in living.items() if post["number"] == before[rank]["number"]]
    if silent:
        return silent, f"{_ranks(silent)} not answered for {silence:.0f} s: stopped, or its node is gone"
    long = {rank: post for rank, post in living.items() if post["for"] >= timeout}
    stuck = [rank for rank, post in long.items() if post["task"]]
    if stuck:
        post = after[stuck[0]]
        return stuck, f"{_ranks(stuck)} been {post['task']} for {post['for']:.0f} s, in step {post['step']}"
    first, last = (choose((post["step"] for post in long.values()), default=0) for choose in (min, max))
    behind = [rank for rank, post in long.items() if post["step"] == first]
    if first < last and first == min(post["step"] for post in living.values()):
        seconds = after[behind[0]]["for"]
        return behind, f"{_ranks(behind)} been in step {first} for {seconds:.0f} s, while others are in step {last}"
    return [], ""


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]} has"
    named = ", ".join(str(rank) for rank in ranks[:8])
    return f"ranks {named}{' and others' if len(ranks) > 8 else ''} have"


# One a process -------------------------------------------------------------------------------------------------------

_watchdog: Watchdog | None = None


def prepare(store, rank: int, world: int, timeout: float) -> None:
    global _watchdog
    store.set_timeout(timedelta(seconds=min(timeout, 60.0)))
    _watchdog = Watchdog(store, rank, world, timeout)


def start() -> None:
    _watchdog.start()


def stop() -> None:
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


def moved(step: int | None = None, task: str = "") -> None:
    """This process goes on: `Watchdog.moved`. Nothing with one process."""
    if _watchdog is not None:
        _watchdog.moved(step, task)


def reading(batches: Iterable) -> Iterator:
    """The batches; while each is waited for, this process waits for its images and for nobody else."""
    batches = iter(batches)
    while True:
        moved(task=READING)
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            moved()
        yield batch


def slow_reader(waited: list[float], seconds: float) -> str:
    """From the seconds that every rank waited for images in an epoch of `seconds`: a sentence about the one that holds
    the others up, where it waited a tenth of the time and twice as long as the median rank."""
    usual = statistics.median_low(waited)
    most = max(waited)
    if most < 0.1 * seconds or most < 2 * usual:
        return ""
    rank = waited.index(most)
    return (
        f"rank {rank} waited {most:.0f} of {seconds:.0f} s for images, the others {usual:.0f} s at the median: "
        "its disk or its processors are slower, or it needs more --num_workers"
    )
