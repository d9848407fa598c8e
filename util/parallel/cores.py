"""The CPU cores that this process may use, and the number of data workers that follows from them."""

import math
import os
from pathlib import Path

from util.notes import note_once

MOST_WORKERS = 10  # the official MAE's --num_workers
_CGROUP = Path("/sys/fs/cgroup")  # inside a container, its own group


def available_cores() -> int:
    """Return the number of cores that this process may use: those of its affinity (taskset, srun), or fewer where its
    container has a limit."""
    affinity = getattr(os, "sched_getaffinity", None)  # macOS has none
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(_cgroup_limit() or cores)))


def _cgroup_limit() -> float | None:
    """Return the limit of the control group in cores, None without one: of version 2, else of version 1."""
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota, period = ((_CGROUP / f"cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return None
    quota = quota.strip()
    return None if quota in ("max", "-1") else int(quota) / int(period)


def processes_here() -> int:
    """Return the number of processes that share the cores: those of torchrun or Open MPI on this node. srun binds each
    of its tasks to cores of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or 1)


def default_workers(dataset: str) -> int:
    """Return the number of data workers of each process: one per core, from 1 to `MOST_WORKERS`. The images of shards
    and of timm's streams are read in an order that depends on it, so there it is the same on every machine."""
    if dataset == "wds" or "/" in dataset:
        return MOST_WORKERS
    return max(1, min(MOST_WORKERS, available_cores() // processes_here()))


def note_many_workers(workers: int) -> None:
    """Print a note, once, if the data workers of all processes of this node are more than its cores."""
    cores, processes = available_cores(), processes_here()
    if workers and workers * processes > cores:
        each = f" for each of {processes} processes" if processes > 1 else ""
        note_once(
            f"--num_workers {workers}{each} is more than the {cores} core(s) that this run may use: more workers "
            f"need more memory and read no faster; give --num_workers {max(1, cores // processes)}"
        )
