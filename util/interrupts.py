"""Ctrl-C (SIGINT): one line and exit code 130 instead of a traceback, and the second one ends the process at once.

A training run finishes its step and saves first (`util.parallel.signals`). This module imports only the standard
library, and the commands import it before anything else: Ctrl-C then needs no traceback while torch is imported either.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

EXIT_CODE = 130  # of a command that Ctrl-C ended, as in shells

_last_press = float("-inf")  # time of the last Ctrl-C that was counted
_command = 0  # pid of the process inside `interruptible`, 0 outside
_pressed = False  # whether Ctrl-C has interrupted that block


def new_press() -> bool:
    """Count a SIGINT. Return False if it is the last Ctrl-C again: a terminal sends SIGINT to all processes of a group,
    and torchrun forwards its own to the same ranks some milliseconds later."""
    global _last_press
    now = time.monotonic()
    if now - _last_press < (1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.25):
        return False
    _last_press = now
    return True


def write_line(text: str) -> None:
    """Write a line to stderr, on rank 0 only. Safe in a signal handler, where `sys.stderr` may be in use."""
    if os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            before = "\n" if os.isatty(2) else ""  # the line has ^C or a progress bar
            os.write(2, f"{before}{text}\n".encode())


def end_now() -> None:
    """End a command at once, without what Python does at exit. Outside a command (in a notebook, say) raise
    KeyboardInterrupt instead."""
    if _command != os.getpid():
        raise KeyboardInterrupt
    for worker in multiprocessing.active_children():  # data workers ignore SIGINT
        worker.kill()
    for stream in (sys.stdout, sys.stderr):
        with suppress(RuntimeError, OSError, ValueError):  # in use, or closed
            stream.flush()
    os._exit(EXIT_CODE)


def _handle(_number, _frame) -> None:
    """Raise KeyboardInterrupt at the first Ctrl-C, end at the second."""
    global _pressed
    if os.getpid() != _command or not new_press():  # a data worker that has just been forked: its parent ends it
        return
    if _pressed:
        end_now()
    _pressed = True
    raise KeyboardInterrupt


@contextmanager
def interruptible(program: str, leave: Callable[[int], object] = sys.exit) -> Iterator[None]:
    """Make this process a command: Ctrl-C ends the block with one line and `leave(130)`, a second one ends the process
    at once. Outside the main thread, signals keep their effect."""
    global _command, _pressed
    before, command = None, _command
    if threading.current_thread() is threading.main_thread():
        before, _command, _pressed = signal.signal(signal.SIGINT, _handle), os.getpid(), False
    try:
        yield
    except KeyboardInterrupt:
        write_line(f"{program}: interrupted by Ctrl-C")
        leave(EXIT_CODE)
    finally:
        # Soon after a Ctrl-C the handler stays until the process ends: torchrun may still forward the same one.
        if before is not None and time.monotonic() - _last_press > 5:
            signal.signal(signal.SIGINT, before)
            _command = command


def run_command(words: Sequence[str], **options) -> int:
    """Run a command in this process group and return its exit code. Ctrl-C reaches the command as well, and raises
    KeyboardInterrupt here only after it has ended, since it may be saving."""
    process = subprocess.Popen(words, **options)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def _without_traceback(error_type, error, traceback) -> None:
    """The excepthook: Ctrl-C outside `interruptible`, while the command is imported."""
    if issubclass(error_type, KeyboardInterrupt):
        write_line(f"{os.path.basename(sys.argv[0])}: interrupted by Ctrl-C")
        os._exit(EXIT_CODE)
    _excepthook(error_type, error, traceback)


_excepthook = sys.excepthook
sys.excepthook = _without_traceback
