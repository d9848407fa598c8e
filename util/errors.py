"""What a user did wrong, said in one sentence on stderr, with exit code 2 and no traceback."""

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
        print(f"{where}{program}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
