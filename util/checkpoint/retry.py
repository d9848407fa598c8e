"""A disk that is full, read-only or away for a while: the run says so, goes on, and writes later what it could not.

It fails only when its last state can still not be written after `--save_patience`.
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

FIRST, LONGEST = 5.0, 300.0  # seconds until the next attempt: doubled after each that failed, up to the longest


class SaveFailed(Exception):
    """Something could not be written: raised on all ranks together, with the reason."""


def reason(error: BaseException) -> str:
    """Why a write failed, in the system's words."""
    return getattr(error, "strerror", None) or str(error).strip().splitlines()[0]


def everywhere(write: Callable[[], object]) -> None:
    """`write()` by the main process; SaveFailed on every rank when that meets an OSError."""
    failure = from_main_process(lambda: _failure_of(write))
    if failure:
        raise SaveFailed(failure)


def _failure_of(write) -> str:
    try:
        write()
    except OSError as error:
        return reason(error)
    return ""


def remake(folder: Path) -> None:
    """Make a folder that has vanished again, but not what lay above it: an unmounted disk comes back by itself."""
    if not folder.is_dir() and folder.parent.is_dir():
        folder.mkdir()
        print(f"note: {folder} was gone and is made again")


class GrowingFile:
    """A file to which whole pieces (lines, records) are appended. What cannot be written waits in memory, and a piece
    that was cut off is taken back."""

    def __init__(self, path: str | Path):
        self.path, self.waiting, self._failing = Path(path), b"", False

    def add(self, piece: bytes) -> None:
        """To be written next time."""
        self.waiting += piece

    def append(self, piece: bytes = b"") -> None:
        """Write it and all that waits, if that is possible now."""
        self.add(piece)
        try:
            self.write()
        except OSError as error:
            if not self._failing:
                print(f"note: {self.path} cannot be written ({reason(error)}): it will be, as soon as that works")
            self._failing = True

    def write(self) -> None:
        """Write what waits, or raise OSError."""
        if not self.waiting:
            return
        remake(self.path.parent)
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
    """A file that is replaced now and then. When that fails, a copy of its content waits in memory."""

    def __init__(self, path: str | Path, write: Callable[[Path, object], None]):
        self.path, self._write, self._content = Path(path), write, None

    def put(self, content: dict) -> None:
        """Replace it, if that is possible now. Main process only."""
        self._content = content
        try:
            self.write()
        except OSError as error:
            self._content = _copied(content)
            print(f"note: {self.path} cannot be written ({reason(error)}): it will be, with the next checkpoint")

    def write(self) -> None:
        """Write what waits, or raise OSError."""
        if self._content is not None:
            self._write(self.path, self._content)
            self._content = None


def _copied(value):
    """On the CPU, and not what training will change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    return {key: _copied(item) for key, item in value.items()} if isinstance(value, dict) else value


class Saver:
    """Decides when a checkpoint that could not be written is tried again: while the run goes on, after 5, 10, 20 …
    seconds, and with the state of then; at the end of the run, until `patience` minutes are over.

    `files` are written before every checkpoint, so that none is ever ahead of its log.
    """

    def __init__(self, folder: str, patience: float):
        self.folder, self.patience = Path(folder), 60 * patience
        self.files: list[GrowingFile | LateFile] = []
        self._failures, self._next = 0, math.inf

    @property
    def due(self) -> bool:
        """Whether it is time to try again."""
        return time.monotonic() >= self._next

    def save(self, write: Callable[[], None], last: bool = False) -> None:
        """`write()` a checkpoint; all ranks must call it, and it must fail on all by SaveFailed. RunFailed when it is
        the `last` and cannot be written."""
        if last:
            self._insist("the last state", lambda: self._attempt(write), SaveFailed)
            return
        try:
            self._attempt(write)
        except SaveFailed as error:
            delay = _delay(self._failures)
            self._failures, self._next = self._failures + 1, time.monotonic() + delay
            print(
                f"no checkpoint could be written to {self.folder} ({error}): the run goes on and tries again in "
                f"{delay:g} s; {self._newest()}",
                flush=True,
            )

    def _attempt(self, write) -> None:
        everywhere(self._prepare)
        write()
        if self._failures:
            print(f"checkpoints can be written to {self.folder} again", flush=True)
        self._failures, self._next = 0, math.inf

    def _prepare(self) -> None:
        remake(self.folder)
        for file in self.files:
            file.write()

    def insist(self, what: str, write: Callable[[], object]) -> None:
        """`write()` by the main process at the end of a run, tried again like the last checkpoint."""
        if is_main_process():
            self._insist(what, lambda: _with_os_errors(write), OSError)

    def _insist(self, what: str, attempt, failure: type[Exception]) -> None:
        # Counted in delays and not by the clock: all ranks must agree when to give up.
        waited, failures = 0.0, 0
        while True:
            try:
                attempt()
                return
            except failure as error:
                if waited >= self.patience:
                    raise RunFailed(
                        f"{what} cannot be written to {self.folder} ({reason(error)}), after {waited / 60:.2g} minutes "
                        f"of trying (--save_patience); {self._newest()}"
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
        found = list_checkpoints(self.folder)
        return f"{found[0].name} is the last good one" if found else "there is none yet"


def _delay(failures: int) -> float:
    return min(FIRST * 2 ** min(failures, 30), LONGEST)


def _with_os_errors(write) -> None:
    """UserErrors that say what the system said are the system's again."""
    try:
        write()
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise
