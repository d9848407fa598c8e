"""Errors that end the program with one line on stderr instead of a traceback: mistakes of the user (exit code 2) and
failed runs (1)."""

import atexit
import os
import re
import sys
from contextlib import contextmanager

from util.interrupts import interruptible
from util.memory import memory_failure


class UserError(ValueError):
    """A mistake in a flag or a file. The message names it and says what to do."""


class MissingSplit(UserError):
    """A data set without the split that is asked for, where another one may do."""


class RunFailed(RuntimeError):
    """A run that cannot continue although its flags are right, because of a non-finite loss, say. Exit code 1."""


MORE_SHARED_MEMORY = (
    "give a container more shared memory (docker run --shm-size=16g or --ipc=host; Kubernetes: an emptyDir with "
    "medium: Memory at /dev/shm), or give --num_workers 0"
)
# (pattern of the message, what it means) of the RuntimeErrors by which torch reports the end of a data worker
_WORKER_FAILURES = [
    (
        r"Bus error|shared memory|</?torch_\d+_\d+.*(No space left|Success \(0\))",
        f"a data worker found no room for a batch in shared memory (/dev/shm): {MORE_SHARED_MEMORY}, fewer workers or "
        "a smaller --batch_size",
    ),
    (
        r"ancdata|[Tt]oo many open files",
        "the data workers need more open files than the system allows: raise the limit (ulimit -n 65536) or lower "
        "--num_workers",
    ),
    (
        r"DataLoader worker .* killed by signal: Killed",
        "a data worker was killed, probably because the memory of this machine or container is full: lower "
        "--num_workers or --batch_size",
    ),
    (
        r"DataLoader worker .*(killed by signal: [\w ]+|exited unexpectedly)",
        "a data worker ended ({0}), often because memory or /dev/shm is full: give fewer --num_workers, or "
        "--num_workers 0 to see the cause",
    ),
]


def worker_failure(error: Exception) -> RunFailed | None:
    """Return the failure of data workers that torch reports by `error`, None if it is another error. torch raises such
    an error at any point of the main process, not only where it waits for a batch."""
    if not isinstance(error, RuntimeError) or isinstance(error, RunFailed):
        return None
    messages, cause = [], error
    while cause is not None:  # the signal that ended a worker is in the cause of torch's error
        messages.append(str(cause))
        cause = cause.__cause__
    for pattern, meaning in _WORKER_FAILURES:
        found = next(filter(None, (re.search(pattern, message) for message in reversed(messages))), None)
        if found:
            return RunFailed(meaning.format(*found.groups()))
    return None


def _failure(error: Exception) -> RunFailed | None:
    """Return the failure of data workers or of memory that `error` reports, None if it is another error."""
    full = memory_failure(error)
    return RunFailed(full) if full else worker_failure(error)


@contextmanager
def user_errors(program: str):
    """Turn a `UserError` (exit code 2), `RunFailed`, failure of a data worker or full memory (1) and Ctrl-C (130) into
    one line on stderr; other exceptions keep their traceback."""
    with interruptible(program, leave):
        try:
            yield
        except (UserError, RuntimeError, MemoryError, OSError) as caught:
            error = caught if isinstance(caught, (UserError, RunFailed)) else _failure(caught)
            if error is None:
                raise
            # All ranks check the same flags. Ranks other than 0 add their number: the fault may be on their node only.
            rank = os.environ.get("RANK", "0")
            prefix = "" if rank == "0" else f"[rank {rank}] "
            sys.stderr.write(f"{prefix}{program}: error: {error}\n")  # `print` is silent on other ranks than 0
            sys.stderr.flush()
            leave(2 if isinstance(error, UserError) else 1)


def leave(code: int) -> None:
    """End the process with this exit code after a failure, regardless of the other ranks.

    A failed rank cannot leave its process group properly, since the others may be waiting in a collective. A group that
    exists until the interpreter exits may abort there (`std::terminate`, exit code -6).
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        sys.exit(code)
    atexit._run_exitfuncs()  # closes the event file, stops the data workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
