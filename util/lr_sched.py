"""The learning rate as a function of the fractional epoch: linear warm-up, then half a cosine to `min_lr`
(He et al. 2022, Table 8), or one of the schedules of dense tasks."""

import math

SCHEDULES = ("cosine", "linear", "step", "constant")  # values of --lr_schedule


def learning_rate(epoch: float, args) -> float:
    """Return the learning rate at `epoch` (from 0, with a fraction). `args` has lr, min_lr, warmup_epochs, epochs, and
    may have lr_schedule ("cosine" without it) and lr_steps, the shares of the run after which "step" divides by 10."""
    if epoch < args.warmup_epochs:
        return args.lr * epoch / args.warmup_epochs
    schedule = getattr(args, "lr_schedule", "cosine")
    if schedule == "constant":
        return args.lr
    if schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= share * args.epochs for share in args.lr_steps)
    progress = (epoch - args.warmup_epochs) / (args.epochs - args.warmup_epochs)
    left = 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return args.min_lr + (args.lr - args.min_lr) * left


def adjust_learning_rate(optimizer, epoch: float, args) -> float:
    """Set the learning rate of every group, times its `lr_scale` if it has one; return the unscaled rate."""
    lr = learning_rate(epoch, args)
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr
