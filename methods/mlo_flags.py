"""The flags of MLO-MAE, their defaults, and which of them make sense together."""

import argparse
import math

from methods.base import add_option
from util.errors import UserError

OPTIONS = {
    "mlo_labels": None,
    "mlo_val_fraction": 0.2,
    "mlo_unroll": 2,
    "mlo_update_every": 1,
    "mlo_hypergrad": "fd",
    "mlo_fd_alpha": None,
    "mlo_unroll_grad": "sum",
    "mlo_head_path": True,
    "mlo_precondition": "adam",
    "mlo_ste": False,
    "mlo_normalize": False,
    "mlo_head_lr": None,
    "mlo_mask_lr": 1e-2,
    "mlo_weight_decay": 0.01,
    "mlo_hidden": 512,
    "mlo_batch_size": None,
    "mlo_feature": "avg",
    "mlo_stage2": "linear",
    "mlo_prox": None,
    "mlo_levels": 3,
    "blo_lambda": None,
    "mlo_mask_net": None,
    "mlo_frozen": False,
    "mlo_warmup_epochs": 0,
    "mlo_head_norm": False,
    "mlo_ridge": None,
}


def add_arguments(group):
    group.add_argument("--mlo_mae", action="store_true", help="turn it on")

    def option(name, text, **kwargs):
        add_option(group, OPTIONS, name, help=text, **kwargs)

    option("mlo_labels", "the labelled task: `same` (the pretraining images) or a folder with train/<class>/")
    option("mlo_val_fraction", "share of every class of the labelled images held out for stage III", type=float)
    option("mlo_unroll", "steps of the autoencoder to one of the head", type=int)
    option("mlo_update_every", "the masking network moves with every so many-th step of the head", type=int)
    option("mlo_warmup_epochs", "epochs in which the head learns before the masking network moves", type=int)
    option("mlo_hypergrad", "derivatives by two forward passes, or exactly by forward mode", choices=["fd", "jvp"])
    option("mlo_fd_alpha", "length of fd's displacement in weight space (1e-2 with adam, else 1e-3)", type=float)
    option("mlo_unroll_grad", "count all unrolled steps, or the last alone", choices=["sum", "last"])
    option("mlo_head_path", "count what reaches the encoder through the step of the head", action="store_true")
    group.add_argument(
        "--no_mlo_head_path",
        dest="mlo_head_path",
        action="store_false",
        default=argparse.SUPPRESS,
        help="leave that out (one pass cheaper)",
    )
    option("mlo_precondition", "steps as Adam scales them, or as of gradient descent", choices=["adam", "none"])
    option("mlo_ste", "let kept patches count in the hypergradient: sorting is passed over", action="store_true")
    option("mlo_normalize", "divide the loss by the sum of probabilities, not their number", action="store_true")
    option("mlo_head_lr", "learning rate of stage II (1e-2), cosine to 0 over its own updates", type=float)
    option("mlo_mask_lr", "learning rate of the masking network, likewise", type=float)
    option("mlo_weight_decay", "of both", type=float)
    option("mlo_hidden", "width of the masking network", type=int)
    option("mlo_batch_size", "labelled images in a batch of stages II and III (as --batch_size)", type=int)
    option("mlo_feature", "what the head sees", choices=["cls", "avg"])
    option("mlo_head_norm", "standardise what the head sees: it follows the encoder faster", action="store_true")
    option(
        "mlo_stage2",
        "a step of the head, or with a copy of the encoder, or the best head for every move, which stage III then "
        "differentiates through: needs large labelled batches",
        choices=["linear", "finetune", "solve"],
    )
    option("mlo_ridge", "half of this times the square of the best head is added to its loss (0.01)", type=float)
    option("mlo_prox", "weight of the pull of that copy towards the encoder (with finetune)", type=float)
    option("mlo_levels", "3, or 2: the encoder learns both losses at once (BLO-MAE)", type=int, choices=[3, 2])
    option("blo_lambda", "weight of the task's loss with --mlo_levels 2 (1.0)", type=float)
    option("mlo_mask_net", "take the masking network of this checkpoint, with the embedding that it saw")
    option("mlo_frozen", "and leave it as it is: no labels, no outer levels", action="store_true")


def check(args) -> None:
    if getattr(args, "fsdp", False):
        raise UserError("--mlo_mae moves whole weights to and fro, which --fsdp never has: leave one of them out")
    if args.mlo_frozen:
        return _check_frozen(args)
    if not args.mlo_labels:
        raise UserError("--mlo_mae needs --mlo_labels: `same`, or a folder with train/<class>/ of labelled images")
    if not 0 < args.mlo_val_fraction < 1:
        raise UserError(f"--mlo_val_fraction {args.mlo_val_fraction} must lie between 0 and 1, for example 0.2")
    for name in ("mlo_unroll", "mlo_update_every", "mlo_hidden", "mlo_batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be positive")
    if not 0 <= args.mlo_warmup_epochs < args.epochs:
        raise UserError(f"--mlo_warmup_epochs {args.mlo_warmup_epochs} must lie in [0, --epochs {args.epochs})")
    _check_pairs(args)
    for name in ("mlo_fd_alpha", "mlo_head_lr", "mlo_mask_lr", "mlo_prox", "mlo_ridge", "blo_lambda"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value} must be a positive number")
    if not 0 <= args.mlo_weight_decay < math.inf:
        raise UserError(f"--mlo_weight_decay {args.mlo_weight_decay} must not be negative")


def _check_frozen(args) -> None:
    if not args.mlo_mask_net:
        raise UserError("--mlo_frozen needs --mlo_mask_net, the checkpoint of the masking network to keep")
    kept = ("mlo_mask_net", "mlo_frozen", "mlo_normalize")
    for name, default in OPTIONS.items():
        if name not in kept and getattr(args, name) != default:
            raise UserError(f"--{name} has no effect with --mlo_frozen: the masking network does not learn")


def _check_pairs(args) -> None:
    """Flags that mean something only beside others; then the defaults of those that were not given."""
    joint, tuned, solved = args.mlo_levels == 2, args.mlo_stage2 == "finetune", args.mlo_stage2 == "solve"
    without_effect = [
        ("mlo_fd_alpha", args.mlo_fd_alpha is not None and args.mlo_hypergrad != "fd", "without --mlo_hypergrad fd"),
        ("mlo_unroll_grad last", args.mlo_unroll_grad == "last" and args.mlo_unroll == 1, "with --mlo_unroll 1"),
        (f"mlo_stage2 {args.mlo_stage2}", (tuned or solved) and joint, "with --mlo_levels 2: there is no stage II"),
        ("mlo_head_lr", args.mlo_head_lr is not None and solved, "with --mlo_stage2 solve: the head takes no steps"),
        ("mlo_ridge", args.mlo_ridge is not None and not solved, "without --mlo_stage2 solve"),
        ("mlo_head_lr", args.mlo_head_lr is not None and joint, "with --mlo_levels 2: the head learns with --lr"),
        ("no_mlo_head_path", not args.mlo_head_path and joint, "with --mlo_levels 2: there is no such path"),
        ("no_mlo_head_path", not args.mlo_head_path and tuned, "with --mlo_stage2 finetune: there is no such path"),
        ("mlo_head_norm", args.mlo_head_norm and (joint or tuned), "but with --mlo_stage2 linear on three levels"),
        ("mlo_head_norm", args.mlo_head_norm and solved, "with --mlo_stage2 solve, which always standardises"),
        ("mlo_prox", args.mlo_prox is not None and not tuned, "without --mlo_stage2 finetune"),
        ("blo_lambda", args.blo_lambda is not None and not joint, "without --mlo_levels 2"),
        ("mlo_hidden", args.mlo_mask_net and args.mlo_hidden != 512, "with --mlo_mask_net: the file decides"),
    ]
    for name, useless, why in without_effect:
        if useless:
            raise UserError(f"--{name} has no effect {why}")
    if tuned and args.mlo_prox is None:
        raise UserError("--mlo_stage2 finetune needs --mlo_prox, for example 0.1: without a pull nothing reaches theta")
    defaults = (
        # Adam's scaling puts much of a direction's length into weights that hardly matter.
        ("mlo_fd_alpha", 1e-2 if args.mlo_precondition == "adam" else 1e-3, args.mlo_hypergrad == "fd"),
        ("mlo_head_lr", 1e-2, not joint and not solved),
        ("mlo_ridge", 1e-2, solved),
        ("blo_lambda", 1.0, joint),
    )
    for name, default, applies in defaults:
        if applies and getattr(args, name) is None:
            setattr(args, name, default)
