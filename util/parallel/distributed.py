"""Process groups: launch, devices, and collective operations that also work with one process."""

import datetime
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from util.errors import UserError
from util.parallel import watchdog
from util.parallel.launcher import read_launcher

Result = TypeVar("Result")


def is_dist_avail_and_initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def get_world_size() -> int:
    return dist.get_world_size() if is_dist_avail_and_initialized() else 1


def get_rank() -> int:
    return dist.get_rank() if is_dist_avail_and_initialized() else 0


def is_main_process() -> bool:
    return get_rank() == 0


def barrier() -> None:
    if get_world_size() > 1:
        dist.barrier()


def setup_for_distributed(is_master: bool) -> None:
    """Silence `print` on all ranks but the main one, except for `print(..., force=True)`."""
    import builtins

    original = getattr(builtins.print, "original", builtins.print)

    def print_on_master(*args, force=False, **kwargs):
        if is_master or force:
            original(*args, **kwargs)

    print_on_master.original = original
    builtins.print = print_on_master


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device for `--device`. `auto` is CUDA if available, else the CPU; `cuda` without a number is the GPU
    of this process.

    Raises UserError if CUDA, the GPU or Metal (mps, Apple's GPUs) is not available, and for an unknown device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not known; use auto, cuda, cuda:N, mps or cpu") from error
    if device.type not in ("cuda", "mps", "cpu"):
        raise UserError(f"--device {name} is not supported; use auto, cuda, cuda:N, mps or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            f"--device {name} needs an Apple GPU and a torch built for it, but torch {torch.__version__} detects none; "
            f"use --device cpu"
        )
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {name} needs a GPU, but torch {torch.__version__} detects none; use --device cpu"
            )
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device} does not exist: this machine has {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(device)
    return device


def init_distributed_mode(args) -> torch.device:
    """Join the process group that the launcher describes, if any, and return the device of this process.

    Sets args.distributed, rank, world_size, gpu. Raises UserError for an environment that cannot work, and if not all
    ranks join within `--timeout_s`; it names the missing ones. Afterwards a watchdog aborts, naming the hanging rank,
    if a rank makes no progress for that long.
    """
    launched = read_launcher(args)
    args.distributed = launched is not None
    args.rank, args.world_size, local_rank = launched or (0, 1, 0)
    args.gpu = local_rank
    device = choose_device(args.device, local_rank)
    if not args.distributed:
        return device
    if device.type == "mps":
        raise UserError(f"--device {args.device} is for one process, but there are {args.world_size}")
    backend = args.dist_backend
    if backend == "auto":
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=args.timeout_s)
    later = 2 * timeout  # the watchdog, which can name the hanging rank, must abort before torch does
    os.environ.update(RANK=str(args.rank), WORLD_SIZE=str(args.world_size), LOCAL_RANK=str(local_rank))
    began = time.monotonic()
    try:
        store, _, _ = next(dist.rendezvous(args.dist_url, args.rank, args.world_size, timeout=timeout))
        store.set_timeout(timeout)
        # After a restart by torchrun the store still holds the addresses of the earlier processes.
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=attempt, rank=args.rank, world_size=args.world_size, timeout=later)
        watchdog.prepare(dist.PrefixStore("watchdog", attempt.clone()), args.rank, args.world_size, args.timeout_s)
        # Only gloo's barrier can name the missing ranks, and only in a separate group.
        hosts = dist.new_group(backend="gloo", timeout=timeout)
        dist.monitored_barrier(hosts, timeout=timeout, wait_all_ranks=True)
        dist.destroy_process_group(hosts)  # else it keeps a socket to every other rank
    except (RuntimeError, ValueError) as error:
        raise UserError(_why_alone(args, str(error), time.monotonic() - began)) from error
    watchdog.start()
    setup_for_distributed(args.rank == 0)
    print(f"{args.world_size} processes on {device.type}, backend {backend}")
    return device


def _why_alone(args, reason: str, seconds: float) -> str:
    """Return the message for a process that did not join its group, after so many seconds."""
    address = args.dist_url
    if address == "env://":
        address = f"MASTER_ADDR={os.environ.get('MASTER_ADDR')} MASTER_PORT={os.environ.get('MASTER_PORT')}"
    reason = (reason.strip().splitlines() or ["no reason given"])[0]
    if seconds < 0.9 * args.timeout_s:  # an address that does not exist or is in use, a backend that is not there
        return f"rank {args.rank} of {args.world_size} cannot join the other ranks at {address}: {reason}"
    return (
        f"rank {args.rank} of {args.world_size} timed out waiting for the other ranks at {address} "
        f"(--timeout_s {args.timeout_s:g}): {reason}"
    )


def host_device() -> torch.device:
    """Return the device on which ranks compare a few numbers: the CPU if the backend supports it, so that no GPU is
    waited for."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def main_process_first():
    """Let the main process run the block before the others enter it: for downloads."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:
        if is_main_process():
            barrier()


def from_main_process(function: Callable[[], Result]) -> Result:
    """Call `function` on the main process and return the result on every rank."""
    result: list[Any] = [function() if is_main_process() else None]
    if get_world_size() > 1:
        dist.broadcast_object_list(result, 0)
    return result[0]


def from_main_process_or_error(function: Callable[[], Result]) -> Result:
    """Call `function` on the main process and return its result, or raise its UserError, on every rank."""

    def call() -> tuple[Any, str]:
        try:
            return function(), ""
        except UserError as error:
            return None, str(error)

    result, problem = from_main_process(call)
    if problem:
        raise UserError(problem)
    return result


def shut_down() -> None:
    watchdog.stop()
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()


def find_difference(values: dict) -> tuple | None:
    """Compare `values` with those of rank 0. Return the first difference: (name, rank 0's value, the rank, its value),
    or None."""
    everyone = gather_objects(values)
    for name, first in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if theirs.get(name) != first:
                return name, first, rank, theirs.get(name)
    return None


def check_same_flags(args, may_differ=("rank", "gpu", "local_rank")) -> None:
    """Raise UserError on every rank if the ranks have different flags; it names flag, rank and values."""
    difference = find_difference({k: v for k, v in vars(args).items() if k not in may_differ})
    if difference:
        flag, first, rank, theirs = difference
        raise UserError(
            f"the ranks were started with different flags: --{flag} is {first!r} on rank 0 "
            f"and {theirs!r} on rank {rank}"
        )


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over ranks, in place."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


class _GatherRows(torch.autograd.Function):
    """What `gather_with_gradients` does on several ranks."""

    @staticmethod
    def forward(ctx, rows):
        everyone = [torch.empty_like(rows) for _ in range(get_world_size())]
        dist.all_gather(everyone, rows)
        return torch.cat(everyone)

    @staticmethod
    def backward(ctx, gradient):
        total = all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format))
        return total.chunk(get_world_size())[get_rank()]


def gather_with_gradients(rows: torch.Tensor) -> torch.Tensor:
    """Every rank's `rows` (N, ...), in rank order, on every rank: (ranks * N, ...); N must be the same on all ranks.

    The gradient of a rank's own rows is the sum over all ranks' losses. Where every rank computes the same loss of the
    gathered rows, the average over ranks that DDP and FSDP take of weights' gradients is then the gradient of one
    process with the whole batch. (torch.distributed.nn.functional.all_gather does the same, but is deprecated in 2.14,
    and its successor is not in 2.11.)
    """
    return _GatherRows.apply(rows.contiguous()) if get_world_size() > 1 else rows


def all_reduce_max(tensor: torch.Tensor) -> torch.Tensor:
    """Take the maximum of `tensor` over ranks, in place."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_reduce_mean(x: float) -> float:
    """Return the mean of a Python number over ranks."""
    if get_world_size() == 1:
        return x
    return all_reduce_sum(torch.tensor(float(x), dtype=torch.float64, device=host_device())).item() / get_world_size()


def average(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the mean of each tensor over ranks, in one all-reduce; all tensors have one type and device."""
    if get_world_size() == 1 or not tensors:
        return tensors
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors])) / get_world_size()
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def same_everywhere(text: str) -> bool:
    """Return, on every rank, whether all ranks give the same text: one all-reduce of 56 bits of its hash."""
    if get_world_size() == 1:
        return True
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    largest, smallest = all_reduce_max(torch.tensor([number, -number], device=host_device())).tolist()
    return largest == -smallest


def sync_buffers(module: torch.nn.Module) -> None:
    """Broadcast rank 0's buffers (running statistics, which depend on a rank's images)."""
    if get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather_objects(value) -> list:
    """Return the `value` of every rank, in rank order, on every rank."""
    if get_world_size() == 1:
        return [value]
    everyone: list = [None] * get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def gather_to_main(value) -> list | None:
    """Return the `value` of every rank, in rank order, on the main process, and None on the others: for values that are
    large or that only the main process writes."""
    if get_world_size() == 1:
        return [value]
    everyone: list | None = [None] * get_world_size() if is_main_process() else None
    dist.gather_object(value, everyone)
    return everyone


def gather_rows(rows: torch.Tensor) -> torch.Tensor | None:
    """Return all ranks' `rows` (N, D), in rank order, on the main process, and None on the others. N may differ, and
    a rank without rows may give (0, 0). The ranks send one after the other, so that nothing is held twice."""
    if get_world_size() == 1:
        return rows
    shapes, device = gather_objects(tuple(rows.shape)), host_device()
    if not is_main_process():
        if len(rows):
            dist.send(rows.contiguous().to(device), 0)
        return None
    whole = rows.new_empty(sum(count for count, _ in shapes), max(width for _, width in shapes))
    parts = whole.split([count for count, _ in shapes])
    for rank, part in enumerate(parts):
        if rank == 0:
            part.copy_(rows.view_as(part))
        elif len(part):
            received = part if device.type == "cpu" else torch.empty_like(part, device=device)
            dist.recv(received, rank)
            part.copy_(received)
    return whole
