"""The names that users of the official repository import from `util.misc`; most are defined in other files."""

from pathlib import Path

from util.checkpoint.atomic import write_tensors
from util.checkpoint.files import checkpoint_name
from util.checkpoint.same_run import plain
from util.compute.precision import NativeScalerWithGradNormCount, get_grad_norm_
from util.parallel.distributed import (
    all_reduce_mean,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_dist_avail_and_initialized,
    is_main_process,
    setup_for_distributed,
)
from util.training.meters import MetricLogger, SmoothedValue
from util.weights.file import read_file


def save_on_master(content, path) -> None:
    """Save `content` atomically on the main process."""
    if is_main_process():
        write_tensors(Path(path), content)


def save_model(args, epoch, model, model_without_ddp, optimizer, loss_scaler) -> None:
    """Write a checkpoint with the official keys, for custom training loops; `util.training.run.Run` stores more."""
    content = {
        "model": model_without_ddp.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "scaler": loss_scaler.state_dict(),
        "args": {key: plain(value) for key, value in vars(args).items()},
    }
    save_on_master(content, Path(args.output_dir) / checkpoint_name(epoch))


def load_model(args, model_without_ddp, optimizer, loss_scaler) -> None:
    """Load the checkpoint `args.resume` of `save_model`, if given; set `args.start_epoch`."""
    if not args.resume:
        return
    state = read_file(args.resume)
    model_without_ddp.load_state_dict(state["model"])
    if "optimizer" in state and "epoch" in state and not getattr(args, "eval", False):
        optimizer.load_state_dict(state["optimizer"])
        args.start_epoch = state["epoch"] + 1
        if state.get("scaler"):  # empty in older checkpoints in bf16 and fp32
            loss_scaler.load_state_dict(state["scaler"])


__all__ = [
    "MetricLogger",
    "NativeScalerWithGradNormCount",
    "SmoothedValue",
    "all_reduce_mean",
    "get_grad_norm_",
    "get_rank",
    "get_world_size",
    "init_distributed_mode",
    "is_dist_avail_and_initialized",
    "is_main_process",
    "load_model",
    "save_model",
    "save_on_master",
    "setup_for_distributed",
]
