"""Writing files completely or not at all."""

import os
from contextlib import suppress
from pathlib import Path

import torch


def write_atomically(path: Path, write) -> None:
    """Write a temporary file beside `path` by `write(file)`, sync it, and rename it to `path`. So `path` is always
    either the old file or the complete new one. Raises OSError when writing fails, and removes the temporary file."""
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
        # On a full disk torch.save raises a RuntimeError about the position in the file, caused by the OSError.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_tensors(path: Path, content: dict) -> None:
    """Save `content` with torch.save, completely or not at all."""
    write_atomically(path, lambda file: torch.save(content, file))
