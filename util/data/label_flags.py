"""The flags of labels and targets in fine-tuning."""

from util.errors import UserError


def add_label_arguments(group) -> None:
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
    group.add_argument(
        "--label_noise",
        type=float,
        default=0.0,
        metavar="P",
        help="for studies: replace each training label by another class with probability P; multilabel: drop each "
        "label with probability P, and for each add another with probability P, frequent ones more often",
    )


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
