"""The length of a run in optimizer steps, and its learning rate."""

import math

from util.errors import UserError
from util.parallel.distributed import get_world_size


def run_length(batches: int, accum_iter: int, epochs: float, max_steps: int | None) -> tuple[int, float]:
    """Return the number of optimizer steps of a run whose epochs have `batches` micro-batches, and the epochs after
    which the last step ends: a fraction where that is inside an epoch. `max_steps` replaces `epochs`. Given its own
    result as `epochs`, it returns the same."""
    per_epoch = math.ceil(batches / accum_iter)
    whole, fraction = divmod(epochs, 1)
    rest = math.ceil(round(fraction * batches) / accum_iter)
    steps = max_steps or max(1, int(whole) * per_epoch + rest)
    whole, rest = divmod(steps, per_epoch)
    return steps, whole + min(rest * accum_iter, batches) / batches if rest else whole


def settle_schedule(args, batches: int, warmup: int = 1500) -> int:
    """Settle `args.epochs` (see `run_length`) and `args.lr`, and return the number of optimizer steps.

    Without --lr the learning rate is --blr x effective batch / 256, as in He et al. 2022. `warmup` is the default of
    --warmup_steps. Raises UserError when --start_epoch leaves nothing to train.
    """
    steps, args.epochs = run_length(batches, args.accum_iter, args.epochs, args.max_steps)
    if args.start_epoch >= args.epochs and not args.resume:
        raise UserError(f"--start_epoch {args.start_epoch} leaves none of the {args.epochs:g} epochs to train")
    _settle_warmup(args, batches, min(warmup, steps // 10))
    if args.lr is None:
        args.lr = args.blr * args.batch_size * args.accum_iter * get_world_size() / 256
    if args.warmup_epochs >= args.epochs:
        print(f"note: --warmup_epochs {args.warmup_epochs} fills all {args.epochs:g} epochs: the rate never peaks")
    return steps


def _settle_warmup(args, batches: int, default: int) -> None:
    """Settle `--warmup_steps`, for commands that have it, and the epochs that it takes. Raises UserError if both are
    given."""
    if not hasattr(args, "warmup_steps"):
        return
    if args.warmup_steps and args.warmup_epochs and not args.resume:
        raise UserError("--warmup_steps and --warmup_epochs both set the length of the warm-up: give one of them")
    if args.warmup_steps is None and not args.warmup_epochs:
        args.warmup_steps = default
    if args.warmup_steps:
        args.warmup_epochs = args.warmup_steps * args.accum_iter / batches
