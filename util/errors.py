"""What a user did wrong, said in one sentence: the mains print it on stderr and exit with code 2, without a traceback."""

import os
import sys
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in a flag or a file. The message names it and says what would be right."""


@contextmanager
def user_errors(program: str):
    """Turn a `UserError` into one line on stderr and exit code 2. Anything else is a bug and keeps its traceback."""
    try:
        yield
    except UserError as error:
        # Every rank checks the same flags; the ranks beside 0 say who they are, in case only their node is wrong.
        rank = os.environ.get("RANK", "0")
        where = "" if rank == "0" else f"[rank {rank}] "
        print(f"{where}{program}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
