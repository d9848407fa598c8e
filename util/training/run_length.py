"""The length of a run in optimizer steps, and its learning rate."""

import math

from util.errors import UserError
from util.parallel.distributed import get_world_size


def settle_length(args, batches: int) -> int:
    """Return the run's number of optimizer steps, for epochs of so many `batches`; set args.epochs to the epoch in
    which the last step ends. Raises UserError if --start_epoch is not before that."""
    per_epoch = math.ceil(batches / args.accum_iter)
    whole, fraction = divmod(args.epochs, 1)
    rest = math.ceil(round(fraction * batches) / args.accum_iter)
    steps = args.max_steps or max(1, int(whole) * per_epoch + rest)
    whole, rest = divmod(steps, per_epoch)
    args.epochs = whole + min(rest * args.accum_iter, batches) / batches if rest else whole
    if args.start_epoch >= args.epochs and not args.resume:
        raise UserError(f"--start_epoch {args.start_epoch} leaves none of the {args.epochs:g} epochs to train")
    return steps


def settle_learning_rate(args) -> None:
    """Set args.lr from --blr and the effective batch size, as in the official repository; print both."""
    effective = args.batch_size * args.accum_iter * get_world_size()
    if args.lr is None:
        args.lr = args.blr * effective / 256
    print(f"learning rate {args.lr:.3g} (base {args.lr * 256 / effective:.3g}), effective batch {effective}")
    if args.warmup_epochs >= args.epochs:
        print(f"note: --warmup_epochs {args.warmup_epochs} fills all {args.epochs:g} epochs: the rate never peaks")
