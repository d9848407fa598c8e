"""Retries of failed writes: while a disk is full, read-only or unmounted, a run reports it, continues and writes later.

The run fails only if its last state still cannot be written after `--save_patience`.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from util.checkpoint.files import list_checkpoints
from util.errors import RunFailed, UserError
from util.parallel import watchdog
from util.parallel.distributed import from_main_process, is_main_process

FIRST, LONGEST = 5.0, 300.0  # seconds until the next attempt: doubled after each failure, up to LONGEST


class SaveFailed(Exception):
    """A file could not be written. Raised on all ranks together, with the reason."""


def reason(error: BaseException) -> str:
    """Return why a write failed: the message of the operating system, or else the first line of the error."""
    return getattr(error, "strerror", None) or str(error).strip().splitlines()[0]


def on_main_process(write: Callable[[], object]) -> None:
    """Call `write()` on the main process. Raises SaveFailed on every rank when it fails with an OSError."""
    failure = from_main_process(lambda: _failure_of(write))
    if failure:
        raise SaveFailed(failure)


def _failure_of(write) -> str:
    try:
        write()
    except OSError as error:
        return reason(error)
    return ""


def restore_folder(folder: Path) -> None:
    """Create a folder that has been deleted. A missing parent is not created: then a disk is probably unmounted, and
    its contents will return."""
    if not folder.is_dir() and folder.parent.is_dir():
        folder.mkdir()
        print(f"note: {folder} had been deleted and was created again")


class GrowingFile:
    """A file to which whole pieces (lines, records) are appended. Pieces that cannot be written wait in memory, and a
    partly written piece is removed."""

    def __init__(self, path: str | Path):
        self.path, self.waiting, self._failing = Path(path), b"", False

    def add(self, piece: bytes) -> None:
        """Keep a piece for the next write."""
        self.waiting += piece

    def append(self, piece: bytes = b"") -> None:
        """Write the piece and all waiting ones. If that fails, keep them and print a note."""
        self.add(piece)
        try:
            self.write()
        except OSError as error:
            if not self._failing:
                print(f"note: {self.path} cannot be written ({reason(error)}): writing will be retried")
            self._failing = True

    def write(self) -> None:
        """Write the waiting pieces. Raises OSError."""
        if not self.waiting:
            return
        restore_folder(self.path.parent)
        end = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "ab") as file:
                file.write(self.waiting)
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, end)
            raise
        self.waiting, self._failing = b"", False


class LateFile:
    """A file that is replaced from time to time. When writing fails, a copy of its content waits in memory."""

    def __init__(self, path: str | Path, write: Callable[[Path, object], None]):
        self.path, self._write, self._content = Path(path), write, None

    def put(self, content: dict) -> None:
        """Replace the file. If that fails, keep a copy of the content and print a note. Main process only."""
        self._content = content
        try:
            self.write()
        except OSError as error:
            self._content = _copied(content)
            print(f"note: {self.path} cannot be written ({reason(error)}): retrying with the next checkpoint")

    def write(self) -> None:
        """Write the waiting content, if there is any. Raises OSError."""
        if self._content is not None:
            self._write(self.path, self._content)
            self._content = None


def _copied(value):
    """Return a copy on the CPU that training does not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


class Saver:
    """Decides when to retry a checkpoint that could not be written. During the run: after 5, 10, 20 … seconds, with the
    state at that time. At the end of the run: again and again, until `patience` minutes have passed.

    `files` are written before every checkpoint, so that no checkpoint is ahead of its log.
    """

    def __init__(self, folder: str, patience: float):
        self.folder, self.patience = Path(folder), 60 * patience
        self.files: list[GrowingFile | LateFile] = []
        self._failures, self._next = 0, math.inf

    @property
    def due(self) -> bool:
        """Whether it is time to retry."""
        return time.monotonic() >= self._next

    def save(self, write: Callable[[], None], last: bool = False) -> None:
        """Write a checkpoint by `write()`, which must raise SaveFailed on all ranks when it fails. All ranks must call
        this. Raises RunFailed when the `last` checkpoint cannot be written."""
        if last:
            self._insist("the last state", lambda: self._attempt(write), SaveFailed)
            return
        try:
            self._attempt(write)
        except SaveFailed as error:
            delay = _delay(self._failures)
            self._failures, self._next = self._failures + 1, time.monotonic() + delay
            print(
                f"no checkpoint could be written to {self.folder} ({error}): the run continues and retries in "
                f"{delay:g} s; {self._newest()}",
                flush=True,
            )

    def _attempt(self, write) -> None:
        on_main_process(self._prepare)
        write()
        if self._failures:
            print(f"checkpoints can be written to {self.folder} again", flush=True)
        self._failures, self._next = 0, math.inf

    def _prepare(self) -> None:
        restore_folder(self.folder)
        for file in self.files:
            file.write()

    def insist(self, what: str, write: Callable[[], object]) -> None:
        """Call `write()`, which writes `what`, on the main process at the end of a run, and retry it like the last
        checkpoint."""
        if is_main_process():
            self._insist(what, lambda: _with_os_errors(write), OSError)

    def _insist(self, what: str, attempt, failure: type[Exception]) -> None:
        # The delays are summed instead of reading the clock: all ranks must give up at the same attempt.
        waited, failures = 0.0, 0
        while True:
            try:
                attempt()
                return
            except failure as error:
                if waited >= self.patience:
                    raise RunFailed(
                        f"{what} cannot be written to {self.folder} ({reason(error)}) after {waited / 60:.2g} minutes "
                        f"of retries (--save_patience); {self._newest()}"
                    ) from error
                delay = min(_delay(failures), self.patience - waited)
                print(
                    f"{what} cannot be written to {self.folder} ({reason(error)}): the next attempt is in {delay:g} s",
                    flush=True,
                )
            watchdog.progress()
            time.sleep(delay)
            waited, failures = waited + delay, failures + 1

    def _newest(self) -> str:
        checkpoints = list_checkpoints(self.folder)
        return f"the last checkpoint is {checkpoints[0].name}" if checkpoints else "there is no checkpoint yet"


def _delay(failures: int) -> float:
    return min(FIRST * 2 ** min(failures, 30), LONGEST)


def _with_os_errors(write) -> None:
    """Call `write()`, and raise the OSError behind a UserError instead of it."""
    try:
        write()
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
