"""Errors that end the program with one line on stderr instead of a traceback: mistakes of the user (exit code 2) and
failed runs (1)."""

import atexit
import os
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a flag or a file. The message names it and says what to do."""


class RunFailed(RuntimeError):
    """A run that cannot continue although its flags are right, because of a non-finite loss, say. Exit code 1."""


@contextmanager
def user_errors(program: str):
    """Turn a `UserError` (exit code 2) or `RunFailed` (1) into one line on stderr; other exceptions keep their
    traceback."""
    try:
        yield
    except (UserError, RunFailed) as error:
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
