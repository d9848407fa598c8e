"""The watchdog: names the hanging rank and aborts.

Every process writes its current step and task, with a time, to the store of the process group; a thread of every
process reads them. torch also aborts collectives that take too long, but cannot name the rank that they wait for.
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
    """Aborts this process with exit code 1 and a message when it has waited `timeout` seconds for another rank.

    `step` is the optimizer step of this process. `task` is work that it does without other ranks (reading images), or
    "" when it may be inside a collective. The hanging rank is one that reads, else one that is a step behind. A process
    whose watchdog thread no longer writes was stopped, or its node failed.
    """

    def __init__(self, store, rank: int, world: int, timeout: float):
        self.store, self.rank, self.world, self.timeout = store, rank, world, timeout
        self.interval = min(timeout / 10, 30.0)
        self.step, self.task, self.since = 0, "", time.monotonic()
        self._number, self._ended = 0, threading.Event()
        self._post()

    def start(self) -> None:
        """Start the thread. The watchdogs of all ranks must exist before any is started."""
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        """Declare this process finished: the other ranks no longer wait for it."""
        self._ended.set()
        with contextlib.suppress(RuntimeError):
            self._post()

    def progress(self, step: int | None = None, task: str = "") -> None:
        """Record progress of this process: its step, its task, and the time."""
        self.step = self.step if step is None else step
        self.task, self.since = task, time.monotonic()

    def _post(self) -> None:
        self._number += 1
        status = {"number": self._number, "step": self.step, "task": self.task, "for": time.monotonic() - self.since}
        self.store.set(f"rank {self.rank}", json.dumps(status | {"ended": self._ended.is_set()}))

    def _posts(self) -> list[dict] | None:
        """Return what every rank wrote last; None if the store does not answer. A separate thread asks the store: torch
        waits forever for a store whose process is stopped, regardless of the timeout."""
        posts = []

        def query():
            with contextlib.suppress(RuntimeError):
                posts.extend(self.store.multi_get([f"rank {rank}" for rank in range(self.world)]))

        thread = threading.Thread(target=query, daemon=True)
        thread.start()
        thread.join(3 * self.interval)
        return [json.loads(post) for post in posts] or None

    def _pause(self, intervals: int) -> None:
        """Wait for so many intervals, and keep writing the status of this process."""
        for _ in range(intervals):
            self._ended.wait(self.interval)
            self._post()

    def _watch(self) -> None:
        while not self._ended.wait(self.interval):
            with contextlib.suppress(RuntimeError):  # the host of the store is gone: torch reports it
                self._post()
                # A process that reads does not wait for other ranks, however long it takes.
                if not self.task and time.monotonic() - self.since >= self.timeout:
                    self._abort_if_hanging(self.since)

    def _abort_if_hanging(self, since: float) -> None:
        before = after = self._posts()
        if before:
            self._pause(3)
            after = self._posts()
        if not before or not after:
            ranks, message = [0], "rank 0, which hosts the store of the process group, does not answer"
        else:
            ranks, message = describe(before, after, self.timeout, 3 * self.interval)
        if self.rank in ranks:
            # The waiting ranks abort first: if the hanging one did, they would end without this message.
            self._pause(5)
        if ranks and since == self.since and not self._ended.is_set():
            sys.stderr.write(
                f"[rank {self.rank}] error: {message} (--timeout_s {self.timeout:g})\n"
            )  # print is silenced
            sys.stderr.flush()
            os._exit(1)  # the main thread is inside a collective and stays there


def describe(before: list[dict], after: list[dict], timeout: float, silence: float) -> tuple[list[int], str]:
    """Return the hanging ranks and a message about them, from the statuses of all ranks at two times `silence` seconds
    apart; ([], "") if they cannot be determined, and torch's timeouts have to abort."""
    living = {rank: post for rank, post in enumerate(after) if not post["ended"]}
    silent = [rank for rank, post in living.items() if post["number"] == before[rank]["number"]]
    if silent:
        return silent, f"{_ranks(silent)} not answered for {silence:.0f} s: stopped, or its node failed"
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


# One per process -----------------------------------------------------------------------------------------------------

_watchdog: Watchdog | None = None


def prepare(store, rank: int, world: int, timeout: float) -> None:
    global _watchdog
    store.set_timeout(timedelta(seconds=min(timeout, 60.0)))
    _watchdog = Watchdog(store, rank, world, timeout)


def start() -> None:
    assert _watchdog is not None, "start before prepare"
    _watchdog.start()


def stop() -> None:
    global _watchdog
    if _watchdog is not None:
        _watchdog.stop()
        _watchdog = None


def progress(step: int | None = None, task: str = "") -> None:
    """Record progress of this process (`Watchdog.progress`). Does nothing with one process."""
    if _watchdog is not None:
        _watchdog.progress(step, task)


def reading(batches: Iterable) -> Iterator:
    """Yield the batches; while waiting for one, this process counts as reading images, not as waiting for other
    ranks."""
    batches = iter(batches)
    while True:
        progress(task=READING)
        try:
            batch = next(batches)
        except StopIteration:
            return
        finally:
            progress()
        yield batch


def slow_reader(waited: list[float], seconds: float) -> str:
    """Return a message about the rank that slows the others down, from the seconds that every rank waited for images in
    an epoch of `seconds`; "" if none waited a tenth of the time and twice as long as the median rank."""
    median = statistics.median_low(waited)
    most = max(waited)
    if most < 0.1 * seconds or most < 2 * median:
        return ""
    rank = waited.index(most)
    return (
        f"rank {rank} waited {most:.0f} of {seconds:.0f} s for images, the others {median:.0f} s (median): "
        "its disk or CPU is slower, or it needs more --num_workers"
    )
