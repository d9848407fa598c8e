"""The flags of MLO-MAE, their defaults, and the check that they fit together."""

import math

from methods.options import Option
from util.data.dense.segmentation import FILES, SEGMENTATION
from util.errors import UserError


def year(text: str) -> list[int]:
    """Return `--voc_year` as the readers of Pascal VOC take it."""
    return [int(text)]


# How masks are read; the names are those of main_segment.py.
MASK_OPTIONS = (
    Option(
        "mlo_dataset",
        None,
        "segmentation: how the masks in the folder --mlo_labels are stored; without it masks",
        choices=tuple(FILES),
        rare=True,
    ),
    Option(
        "ignore_label",
        255,
        "segmentation: label of pixels that do not count",
        rare=True,
    ),
    Option(
        "zero_is_ignored",
        None,
        "segmentation: label 0 is unlabelled, and class i is stored as i + 1; without the flag this holds for ade20k, "
        "and for masks with the labels 0 to the number of classes",
        rare=True,
        negated="segmentation: label 0 is the first class",
    ),
    Option(
        "class_names",
        None,
        "segmentation: file with the names of the classes, one per line, in the order of labels",
        metavar="FILE",
        rare=True,
    ),
    Option(
        "color_table",
        None,
        "segmentation, masks in colour: file with R G B NAME in every line; colours named ignore do not count",
        metavar="FILE",
        rare=True,
    ),
    Option("voc_year", None, "segmentation, voc: 2007 or 2012, where the folder has both", type=year, rare=True),
    Option(
        "train_split",
        None,
        "segmentation, voc: list of the images in ImageSets/Segmentation; without it train",
        metavar="NAME",
        rare=True,
    ),
)
OPTIONS = (
    Option(
        "mlo_task",
        "classification",
        "of stages II and III; segmentation reads masks",
        choices=("classification", "segmentation"),
    ),
    Option(
        "mlo_labels",
        None,
        "`same` (the pretraining images), or a folder with train/<class>/ or train/{images,masks}/",
    ),
    Option("mlo_val_fraction", 0.2, "share of the labelled images, of every class, held out for stage III", rare=True),
    *MASK_OPTIONS,
    Option("mlo_unroll", 2, "steps of the autoencoder for each step of the head"),
    Option("mlo_update_every", 1, "steps of the head for each step of the masking network; 5 is nearly twice as fast"),
    Option(
        "mlo_hypergrad",
        "fd",
        "directional derivatives: fd: finite differences of two forward passes; jvp: exact, in forward mode",
        choices=("fd", "jvp"),
        rare=True,
    ),
    Option(
        "mlo_fd_alpha",
        None,
        "length of fd's displacement in weight space; without it 1e-2 with adam, else 1e-3",
        type=float,
        rare=True,
    ),
    Option(
        "mlo_unroll_grad",
        "sum",
        "differentiate through all unrolled steps, or through the last one only",
        choices=("sum", "last"),
        rare=True,
    ),
    Option(
        "mlo_head_path",
        True,
        "include the gradient through the head's update",
        rare=True,
        negated="leave that gradient out: one pass cheaper",
    ),
    Option(
        "mlo_precondition",
        "adam",
        "treat unrolled steps as Adam's, or as plain gradient descent",
        choices=("adam", "none"),
        rare=True,
    ),
    Option(
        "mlo_ste",
        False,
        "straight-through estimator for the sort: visible patches count in the hypergradient",
        rare=True,
    ),
    Option(
        "mlo_normalize",
        False,
        "divide the loss by the sum of the probabilities instead of the number of removed patches",
        rare=True,
    ),
    Option(
        "mlo_head_lr",
        None,
        "learning rate of stage II, decayed to 0 on a cosine over its updates; without it 1e-2",
        type=float,
        rare=True,
    ),
    Option("mlo_mask_lr", 1e-2, "learning rate of the masking network, decayed to 0 on a cosine over its updates"),
    Option("mlo_weight_decay", 0.01, "weight decay of the head and of the masking network", rare=True),
    Option("mlo_hidden", 512, "hidden width of the masking network", rare=True),
    Option(
        "mlo_batch_size",
        None,
        "labelled images in a batch of stages II and III; without it --batch_size",
        type=int,
        rare=True,
    ),
    Option(
        "mlo_feature", "avg", "input of the head: [cls] or the mean over patches", choices=("cls", "avg"), rare=True
    ),
    Option(
        "mlo_stage2",
        "linear",
        "linear: one step of the head; finetune: also one of a copy of the encoder; solve: the optimal head, for large "
        "batches",
        choices=("linear", "finetune", "solve"),
    ),
    Option(
        "mlo_prox",
        None,
        "with finetune: weight of the proximal term that pulls the copy towards the encoder, for example 0.1",
        type=float,
        rare=True,
    ),
    Option(
        "mlo_levels",
        3,
        "2: the encoder is trained on both losses at once (BLO-MAE)",
        choices=(3, 2),
        rare=True,
    ),
    Option(
        "blo_lambda",
        None,
        "with --mlo_levels 2: weight of the task's loss; without it 1",
        type=float,
        rare=True,
    ),
    Option(
        "mlo_mask_net", None, "use the masking network of this checkpoint, with the patch embedding it was trained on"
    ),
    Option("mlo_frozen", False, "do not train --mlo_mask_net; needs no labels"),
    Option("mlo_warmup_epochs", 0, "epochs in which only the head is trained, before the masking network", rare=True),
    Option(
        "mlo_head_norm", False, "standardise the input of the head, which then adapts faster to the encoder", rare=True
    ),
    Option(
        "mlo_ridge",
        None,
        "with solve: ridge penalty; half of it times the head's squared norm is added to its loss; without it 0.01",
        type=float,
        rare=True,
    ),
)


_ON_PATCHES = "with --mlo_task segmentation, whose head reads patch tokens"


def check(args) -> None:
    if getattr(args, "fsdp", False):
        raise UserError("--mlo_mae needs whole weights, which --fsdp never holds: leave one of them out")
    if getattr(args, "device", "").startswith("mps"):
        raise UserError("--mlo_mae computes in float64, which --device mps lacks: give --device cpu")
    if args.mlo_frozen:
        return _check_frozen(args)
    if not args.mlo_labels:
        folder = "masks" if args.mlo_task == "segmentation" else "train/<class>/ of labelled images"
        raise UserError(f"--mlo_mae needs --mlo_labels: `same`, or a folder with {folder}")
    _check_masks(args)
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
    for option in OPTIONS:
        if option.name not in kept and getattr(args, option.name) != option.default:
            raise UserError(f"--{option.name} has no effect with --mlo_frozen: the masking network is not trained")


def _check_masks(args) -> None:
    """Check the flags that say which masks are read, and how."""
    same, segmentation = args.mlo_labels == "same", args.mlo_task == "segmentation"
    given = [option.name for option in MASK_OPTIONS if getattr(args, option.name) != option.default]
    if given and not segmentation:
        raise UserError(f"--{given[0]} has no effect without --mlo_task segmentation")
    if same and args.mlo_dataset:
        raise UserError("--mlo_dataset has no effect with --mlo_labels same: the masks are those of --dataset")
    if segmentation and same and args.dataset not in SEGMENTATION:
        raise UserError(
            f"--mlo_task segmentation needs masks, and --dataset {args.dataset} has none: pretrain on "
            f"{', '.join(SEGMENTATION)}, or give a folder of masks as --mlo_labels"
        )
    dataset = args.dataset if same else args.mlo_dataset or "masks"
    for name in ("voc_year", "train_split"):
        if name in given and dataset != "voc":
            raise UserError(f"--{name} has no effect with masks of {dataset}: it is for voc")


def _check_pairs(args) -> None:
    """Check flags that have an effect only beside others, and set the defaults of those that were not given."""
    joint, tuned, solved = args.mlo_levels == 2, args.mlo_stage2 == "finetune", args.mlo_stage2 == "solve"
    without_effect = [
        ("mlo_feature cls", args.mlo_feature == "cls" and args.mlo_task == "segmentation", _ON_PATCHES),
        ("mlo_fd_alpha", args.mlo_fd_alpha is not None and args.mlo_hypergrad != "fd", "without --mlo_hypergrad fd"),
        ("mlo_unroll_grad last", args.mlo_unroll_grad == "last" and args.mlo_unroll == 1, "with --mlo_unroll 1"),
        (f"mlo_stage2 {args.mlo_stage2}", (tuned or solved) and joint, "with --mlo_levels 2: there is no stage II"),
        ("mlo_head_lr", args.mlo_head_lr is not None and solved, "with --mlo_stage2 solve: the head takes no steps"),
        ("mlo_ridge", args.mlo_ridge is not None and not solved, "without --mlo_stage2 solve"),
        ("mlo_head_lr", args.mlo_head_lr is not None and joint, "with --mlo_levels 2: the head is trained with --lr"),
        ("no_mlo_head_path", not args.mlo_head_path and joint, "with --mlo_levels 2: there is no such path"),
        ("no_mlo_head_path", not args.mlo_head_path and tuned, "with --mlo_stage2 finetune: there is no such path"),
        (
            "mlo_head_norm",
            args.mlo_head_norm and (joint or tuned),
            "unless with --mlo_stage2 linear and --mlo_levels 3",
        ),
        ("mlo_head_norm", args.mlo_head_norm and solved, "with --mlo_stage2 solve, which always standardises"),
        ("mlo_prox", args.mlo_prox is not None and not tuned, "without --mlo_stage2 finetune"),
        ("blo_lambda", args.blo_lambda is not None and not joint, "without --mlo_levels 2"),
        ("mlo_hidden", args.mlo_mask_net and args.mlo_hidden != 512, "with --mlo_mask_net: the file decides"),
    ]
    for name, useless, why in without_effect:
        if useless:
            raise UserError(f"--{name} has no effect {why}")
    if args.mlo_task == "segmentation":
        args.mlo_feature = None
    if tuned and args.mlo_prox is None:
        raise UserError(
            "--mlo_stage2 finetune needs --mlo_prox, for example 0.1: without it no gradient reaches the encoder"
        )
    defaults = (
        # Preconditioned by Adam, much of a direction's length lies in weights that hardly affect the loss.
        ("mlo_fd_alpha", 1e-2 if args.mlo_precondition == "adam" else 1e-3, args.mlo_hypergrad == "fd"),
        ("mlo_head_lr", 1e-2, not joint and not solved),
        ("mlo_ridge", 1e-2, solved),
        ("blo_lambda", 1.0, joint),
    )
    for name, default, applies in defaults:
        if applies and getattr(args, name) is None:
            setattr(args, name, default)
