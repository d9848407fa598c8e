"""The shared memory by which data workers pass batches on: /dev/shm, of which containers have 64 MB by default."""

import os
from math import prod

from util.errors import MORE_SHARED_MEMORY, UserError
from util.notes import note_once

FOLDER = "/dev/shm"
_AHEAD = 2  # batches that each worker of a DataLoader prepares ahead, its `prefetch_factor`


def check_shared_memory(
    workers: int, batch_size: int, channels: int, size: int | tuple[int, ...] | None, bytes_per_value: int = 4
) -> None:
    """Raise UserError if one batch of images (`channels`, *`size`) does not fit into the free shared memory; print a
    note, once, if those of all workers do not."""
    free = _free_bytes()
    if not workers or not size or free is None:
        return
    height, width = (size[0], size[-1]) if isinstance(size, (list, tuple)) else (size, size)
    batch = bytes_per_value * prod((batch_size, channels, height, width))
    if batch > free:
        raise UserError(
            f"--num_workers {workers}: a batch takes {_megabytes(batch)} (--batch_size {batch_size}), but {FOLDER}, by "
            f"which data workers pass it on, has {_megabytes(free)} free: {MORE_SHARED_MEMORY}"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of torchrun, on this node
    needed = batch * workers * _AHEAD * processes
    if needed > free:
        note_once(
            f"the batches that --num_workers {workers} prepare take up to {_megabytes(needed)} of {FOLDER}, "
            f"which has {_megabytes(free)} free: if a worker fails, {MORE_SHARED_MEMORY}"
        )


def _free_bytes() -> int | None:
    """Return the free bytes of the shared memory, None where the system has no such folder."""
    try:
        stats = os.statvfs(FOLDER)
    except (OSError, AttributeError):
        return None
    return stats.f_bavail * stats.f_frsize if stats.f_blocks else None  # a file system without a limit has no blocks


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB" if size < 1e7 else f"{size / 1e6:,.0f} MB"
