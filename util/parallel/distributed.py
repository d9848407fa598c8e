"""Processes: how a run finds out that it has several, and what they tell each other."""

import datetime
import hashlib
import os
from contextlib import contextmanager

import torch
import torch.distributed as dist

from util.errors import UserError
from util.parallel import watchdog


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
    """Silence `print` on the other ranks; `print(..., force=True)` still speaks."""
    import builtins

    original = getattr(builtins.print, "original", builtins.print)

    def print_on_master(*args, force=False, **kwargs):
        if is_master or force:
            original(*args, **kwargs)

    print_on_master.original = original
    builtins.print = print_on_master


def _launcher(args) -> tuple[int, int, int] | None:
    """(rank, world size, local rank) as the launcher's environment tells them; None for a single process."""
    env = os.environ
    if args.dist_on_itp and "OMPI_COMM_WORLD_RANK" in env:
        rank, world, local = (int(env[f"OMPI_COMM_WORLD_{key}"]) for key in ("RANK", "SIZE", "LOCAL_RANK"))
        args.dist_url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        return rank, world, local
    if "RANK" in env and "WORLD_SIZE" in env:
        local = env.get("LOCAL_RANK", args.local_rank if args.local_rank >= 0 else 0)
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(local)
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env.get("SLURM_LOCALID", 0))
    return None


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA when there is one, else the CPU; a bare `cuda` is this process's own GPU.

    Raises UserError for CUDA without CUDA, for a GPU that is not there and for an unknown device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not known; use auto, cuda, cuda:N or cpu") from error
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name} is not supported; use auto, cuda, cuda:N or cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"--device {name} asks for a GPU, but torch {torch.__version__} sees none; use --device cpu"
            )
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device} is not there: this machine has {torch.cuda.device_count()} GPU(s)")
        torch.cuda.set_device(device)
    return device


def init_distributed_mode(args) -> torch.device:
    """Join the process group that the launcher describes, if any, and choose this process's device.

    Sets args.distributed, rank, world_size, gpu. The first meeting of the ranks waits at most `--timeout_s` and then
    names the ranks that are missing; from then on a watchdog names one that stands still for so long.
    """
    found = _launcher(args)
    args.distributed = found is not None
    args.rank, args.world_size, local_rank = found or (0, 1, 0)
    args.gpu = local_rank
    device = choose_device(args.device, local_rank)
    if not args.distributed:
        return device
    backend = args.dist_backend
    if backend == "auto":
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=args.timeout_s)
    later = 2 * timeout  # the watchdog, which knows the rank, is to speak before torch does
    os.environ.update(RANK=str(args.rank), WORLD_SIZE=str(args.world_size), LOCAL_RANK=str(local_rank))
    try:
        store, _, _ = next(dist.rendezvous(args.dist_url, args.rank, args.world_size, timeout=timeout))
        store.set_timeout(timeout)
        # After a restart by torchrun the store still holds the addresses of processes that are gone.
        attempt = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=attempt, rank=args.rank, world_size=args.world_size, timeout=later)
        watchdog.prepare(dist.PrefixStore("watchdog", attempt.clone()), args.rank, args.world_size, args.timeout_s)
        # Only gloo's barrier can name the ranks that are missing, and only in a group of its own.
        hosts = dist.new_group(backend="gloo", timeout=timeout)
        dist.monitored_barrier(hosts, timeout=timeout, wait_all_ranks=True)
    except (RuntimeError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise UserError(
            f"rank {args.rank} of {args.world_size} waited at {args.dist_url} for the other ranks in vain "
            f"(--timeout_s {args.timeout_s:g}): {first_line}"
        ) from error
    watchdog.start()
    setup_for_distributed(args.rank == 0)
    print(f"{args.world_size} processes on {device.type}, backend {backend}")
    return device


def host_device() -> torch.device:
    """Where a few numbers are compared between ranks: the CPU where the backend can, so that no GPU is waited for."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


@contextmanager
def main_process_first():
    """The main process goes through the block before the others enter it: for downloads."""
    if not is_main_process():
        barrier()
    try:
        yield
    finally:
        if is_main_process():
            barrier()


def from_main_process(function):
    """`function()` of the main process, on every rank."""
    box = [function() if is_main_process() else None]
    if get_world_size() > 1:
        dist.broadcast_object_list(box, 0)
    return box[0]


def shut_down() -> None:
    watchdog.stop()
    if is_dist_avail_and_initialized():
        dist.destroy_process_group()


def find_difference(values: dict) -> tuple | None:
    """The first name under which a rank has another value than rank 0: name, rank 0's value, the rank, its value."""
    everyone = gather_objects(values)
    for name, first in everyone[0].items():
        for rank, theirs in enumerate(everyone):
            if theirs.get(name) != first:
                return name, first, rank, theirs.get(name)
    return None


def check_same_flags(args, may_differ=("rank", "gpu", "local_rank")) -> None:
    """UserError on every rank when the ranks were started with different flags, naming flag, ranks and values."""
    found = find_difference({k: v for k, v in vars(args).items() if k not in may_differ})
    if found:
        flag, first, rank, theirs = found
        raise UserError(
            f"the ranks were started with different flags: --{flag} is {first!r} on rank 0 "
            f"and {theirs!r} on rank {rank}"
        )


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; the tensor itself when there is one process."""
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
    """Maximum over ranks, in place."""
    if get_world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_reduce_mean(x: float) -> float:
    """Mean of a python number over ranks."""
    if get_world_size() == 1:
        return x
    return all_reduce_sum(torch.tensor(float(x), dtype=torch.float64, device=host_device())).item() / get_world_size()


def average(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mean of each tensor over ranks, in one message; all of one type and device."""
    if get_world_size() == 1 or not tensors:
        return tensors
    flat = all_reduce_sum(torch.cat([tensor.flatten() for tensor in tensors])) / get_world_size()
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors)]


def same_everywhere(text: str) -> bool:
    """Whether every rank gives the same text, on every rank: one reduction of two numbers, whatever the texts. It is
    compared by 56 bits of its hash."""
    if get_world_size() == 1:
        return True
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])
    largest, smallest = all_reduce_max(torch.tensor([number, -number], device=host_device())).tolist()
    return largest == -smallest


def sync_buffers(module: torch.nn.Module) -> None:
    """Rank 0's buffers (running statistics, which see only a rank's own images) on every rank."""
    if get_world_size() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def gather_objects(value) -> list:
    """Every rank's `value`, in rank order, on every rank."""
    if get_world_size() == 1:
        return [value]
    everyone: list = [None] * get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
