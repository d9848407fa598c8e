"""Files that are written completely or not at all."""

import os
from contextlib import suppress
from pathlib import Path

import torch


def write_atomically(path: Path, write) -> None:
    """`write(file)` into a temporary file beside `path`, synced, then renamed: `path` is old or new, never half.
    OSError when that is not possible; then nothing is left of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # torch.save answers a full disk with a RuntimeError about the position in the file.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    write_atomically(path, lambda file: torch.save(content, file))
