"""The flags of data sets for segmentation and detection."""


def add_dense_data_arguments(group, task: str) -> None:
    """Add the flags of dense data sets that `util.arguments.add_data_arguments` does not have. `task`: segmentation or
    detection; "" for a command that evaluates models of both."""
    group.add_argument(
        "--voc_year",
        type=int,
        nargs="+",
        metavar="YEAR",
        help="voc: 2007, 2012; needed where --data_path has several. Detection trains on all of them and evaluates on "
        "the first",
    )
    if task:
        _add_train_split(group, task)
    group.add_argument("--val_split", default="", metavar="NAME", help="voc: list of the evaluation images")
    group.add_argument(
        "--class_names", default="", metavar="FILE", help="names of the classes, one per line, in the order of labels"
    )
    if task != "detection":
        _add_mask_arguments(group)


def _add_train_split(group, task: str) -> None:
    lists = "ImageSets/Segmentation" if task == "segmentation" else "ImageSets/Main"
    usual = "train, val" if task == "segmentation" else "trainval and test, or train and val where there is no test"
    group.add_argument(
        "--train_split",
        default="",
        metavar="NAME",
        help=f"voc: list of the training images in {lists}; without it and --val_split: {usual}"
        + "; trainaug: the masks of SegmentationClassAug" * (task == "segmentation"),
    )


def _add_mask_arguments(group) -> None:
    group.add_argument(
        "--ignore_label", type=int, default=255, help="label of pixels that are neither learned nor evaluated"
    )
    group.add_argument(
        "--zero_is_ignored",
        "--reduce_zero_label",
        action="store_true",
        default=None,
        help="label 0 is unlabelled, and class i is stored as i + 1; without the flag this holds for ade20k, and for "
        "masks with the labels 0 to the number of classes",
    )
    group.add_argument(
        "--no_zero_is_ignored", action="store_false", dest="zero_is_ignored", help="label 0 is the first class"
    )
    group.set_defaults(zero_is_ignored=None)
    group.add_argument(
        "--color_table",
        default="",
        metavar="FILE",
        help="masks: R G B NAME in every line, for masks in colour; colours named ignore are not evaluated",
    )
