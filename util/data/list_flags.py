"""The flags of list files (`--dataset filelist`), and reading a list as they say."""

from pathlib import Path

from util.data.list_files import ImageList, read_list
from util.errors import UserError
from util.parser import rare


def add_list_arguments(group) -> None:
    """Add the flags that name the lists and choose their columns."""
    group.add_argument(
        "--train_list",
        default="",
        metavar="FILE",
        help="filelist: text file, path or path<TAB>label per line; or a table with commas, semicolons or spaces and a "
        "header, as other tools write it",
    )
    group.add_argument("--val_list", default="", metavar="FILE", help="filelist: the same for validation")
    rare(
        group.add_argument(
            "--image_column",
            default="",
            metavar="NAME",
            help="filelist: column of the image names, by its name in the header or by number from 1; without it the "
            "column whose cells name files",
        )
    )
    group.add_argument(
        "--label_column",
        nargs="+",
        default=[],
        metavar="NAME",
        help="filelist: column of the labels, by name or number; several columns of 0 and 1 are one-hot labels, or "
        "with --targets multilabel sets of labels; without it the column with a usual name (label, class, ...)",
    )
    rare(
        group.add_argument(
            "--allow_outside", action="store_true", help="filelist: allow paths and links to files outside --data_path"
        )
    )


def check_columns(args) -> None:
    """Raise UserError for columns without a list. Commands without these flags are accepted."""
    for name in ("image_column", "label_column"):
        has_list = args.dataset == "filelist" or (args.dataset == "imagefolder" and getattr(args, "val_list", ""))
        if getattr(args, name, None) and not has_list and not args.dataset.startswith(("hfds/", "hfids/")):
            raise UserError(
                f"--{name} has no effect here: it is for --dataset filelist or hfds/..., and for --val_list"
            )


def open_list(args, path: str, root: Path, announce: bool = True) -> ImageList:
    """Read the list at `path`, which is one of `args`, with the columns that the flags choose."""
    columns = args.image_column, args.label_column
    return read_list(path, root, args.allow_outside, *columns, announce, needs_labels=uses_labels(args))


def uses_labels(args) -> bool:
    """Whether the command needs labels: unlike pretraining, it has --nb_classes, or writes them into shards."""
    return hasattr(args, "nb_classes") or hasattr(args, "images_per_shard")
