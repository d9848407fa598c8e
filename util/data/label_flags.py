"""The flags of labels and targets in fine-tuning."""

from util.errors import UserError


def add_label_arguments(group) -> None:
    """Add the flags of the targets of fine-tuning."""
    group.add_argument(
        "--targets",
        choices=["single", "multilabel", "regression"],
        default="single",
        help="single: one class per image; multilabel: --dataset filelist with path<TAB>label,label,...; images "
        "without labels (path<TAB>) are allowed; evaluation gives mean average precision, AUC and precision@1; "
        "regression: path<TAB>number or several --label_column, mean squared error; evaluation gives R2 and "
        "errors in the units of the list",
    )
    group.add_argument(
        "--multilabel_loss",
        choices=["softmax", "bce"],
        default="softmax",
        help="softmax: cross-entropy with equal weights of an image's labels, which sum to one; images without labels "
        "have no loss; bce: binary cross-entropy of every label, which learns from them too",
    )
    _add_set_arguments(group)
    group.add_argument(
        "--label_noise",
        type=float,
        default=0.0,
        metavar="P",
        help="for studies: replace each training label by another class with probability P; multilabel: drop each "
        "label with probability P, and for each add another with probability P, frequent ones more often",
    )


def _add_set_arguments(group) -> None:
    """Add the flags for reading sets of labels."""
    group.add_argument(
        "--label_sep",
        metavar="TEXT",
        help="multilabel: what separates the labels of a cell; without it a comma; ChestX-ray14 has |; single: '' "
        "accepts labels that look like sets, such as a|b, as classes",
    )
    group.add_argument(
        "--no_finding",
        default="",
        metavar="NAME",
        help='multilabel: the label that stands for no label; "No Finding" in ChestX-ray14',
    )
    group.add_argument(
        "--label_vocab",
        default="",
        metavar="FILE",
        help="multilabel: all labels, one per line; without it those of --train_list",
    )


def add_imbalance_arguments(group) -> None:
    """Add the flags for classes of different frequency, for fine-tuning and probing."""
    group.add_argument(
        "--class_weights",
        choices=["none", "balanced"],
        default="none",
        help="balanced: each image's training loss is multiplied by images / (classes * images of its class), which is "
        "1 on average; evaluation is not weighted",
    )
    group.add_argument(
        "--balanced_sampler",
        action="store_true",
        help="draw the images of an epoch with replacement, so that each class occurs equally often on average",
    )


def check_imbalance(args, trains: bool, reads_batches: bool = True, condition: str = "with --eval") -> None:
    """Raise UserError for flags of imbalance without effect. `trains`: whether the command trains; `reads_batches`:
    whether by batches of images. `condition` is the end of the message, such as "with --eval"."""
    weighted, targets = args.class_weights != "none", getattr(args, "targets", "single")
    if weighted and not trains:
        raise UserError(f"--class_weights has no effect {condition}")
    if args.balanced_sampler and not (trains and reads_batches):
        raise UserError(f"--balanced_sampler has no effect {condition}")
    if weighted and args.balanced_sampler:
        raise UserError("--class_weights balanced and --balanced_sampler correct the same imbalance: give one of them")
    if args.balanced_sampler and targets != "single":
        raise UserError(f"--balanced_sampler needs one class per image, which --targets {targets} does not have")
    if weighted and targets == "regression":
        raise UserError("--class_weights has no effect with --targets regression, which has no classes")
    if weighted and targets == "multilabel" and args.multilabel_loss == "softmax":
        raise UserError("--class_weights with --targets multilabel needs --multilabel_loss bce")


def check_labels(args, mixes: bool) -> None:
    """Raise UserError for flags that contradict `--targets`. `mixes`: whether images are mixed."""
    if args.targets != "single":
        example = {"multilabel": "label,label,...", "regression": "number"}[args.targets]
        if args.dataset != "filelist":
            raise UserError(f"--targets {args.targets} needs --dataset filelist, whose lists hold path<TAB>{example}")
        if mixes:
            raise UserError(
                f"--targets {args.targets} excludes --mixup and --cutmix, which mix images of one label each"
            )
    if args.targets != "multilabel":
        given = {"label_vocab": args.label_vocab, "label_sep": args.label_sep, "no_finding": args.no_finding}
        given["multilabel_loss"] = args.multilabel_loss != "softmax"
        for name in (name for name, value in given.items() if value):
            raise UserError(f"--{name} has no effect without --targets multilabel")
    if args.label_noise and args.targets == "regression":
        raise UserError("--label_noise exchanges classes, and --targets regression has none: leave it out")
    if args.label_noise and args.eval:
        raise UserError("--label_noise has no effect with --eval: it changes only training labels")
