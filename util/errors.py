"""What a user did wrong, said in one sentence on stderr, with exit code 2 and no traceback."""

import atexit
import os
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a flag or a file. The message names it and says what would be right."""


class RunFailed(RuntimeError):
    """A run that cannot go on, though the flags were right: a non-finite loss, say. One sentence, exit code 1."""


@contextmanager
def user_errors(program: str):
    """Turn a `UserError` (exit code 2) or `RunFailed` (1) into one line on stderr; bugs keep their traceback."""
    try:
        yield
    except (UserError, RunFailed) as error:
        # Every rank checks the same flags; the ranks beside 0 say who they are, in case only their node is wrong.
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        sys.stderr.write(f"{where}{program}: error: {error}\n")  # `print` is silent on the ranks beside 0
        sys.stderr.flush()
        leave(2 if isinstance(error, UserError) else 1)


def leave(code: int) -> None:
    """End the process with this exit code after a failure, whatever the other ranks are doing.

    A rank that fails cannot take leave of its process group, since the others may be waiting inside a collective;
    and a group that lives until the interpreter is torn down can abort there (`std::terminate`, exit code -6).
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        sys.exit(code)
    atexit._run_exitfuncs()  # closes the event file, ends the loader's workers
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
