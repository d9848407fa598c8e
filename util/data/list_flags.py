"""The flags of list files (`--dataset filelist`), and reading a list, or one split of it, as they say."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from util.data.list_files import ImageList, is_label_name, read_list
from util.data.list_labels import strata
from util.data.splits import choose_side
from util.errors import UserError
from util.notes import note_once
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
        "with --targets multilabel sets of labels; without it the column called label, class, ...",
    )
    group.add_argument(
        "--group_column",
        default="",
        metavar="NAME",
        help="column of patients or other groups in the lists: all images of one are in the same split",
    )
    rare(
        group.add_argument(
            "--allow_outside", action="store_true", help="filelist: allow paths and links to files outside --data_path"
        )
    )


def check_columns(args) -> None:
    """Raise UserError for columns without a list. Commands without these flags are accepted."""
    _check_groups(args)
    chooses = ("label_column",) if getattr(args, "group_column", "") else ("image_column", "label_column")
    given = [name for name in chooses if getattr(args, name, None)]
    if not given or args.dataset == "filelist" or args.dataset.startswith(("hfds/", "hfids/")):
        return
    if getattr(args, "data", ""):  # of a tool that reads a list there
        return
    if args.dataset != "imagefolder" or not args.val_list:
        raise UserError(f"--{given[0]} has no effect here: it is for --dataset filelist, hfds/... and --val_list")


def _check_groups(args) -> None:
    """Raise UserError for `--group_column` without effect."""
    column = getattr(args, "group_column", "")
    if not column or args.dataset == "filelist":
        return
    if args.dataset != "imagefolder":
        raise UserError(f"--group_column {column} is for --dataset filelist and imagefolder, not {args.dataset}")
    missing = [f"--{name}" for name in ("val_fraction", "train_list") if not getattr(args, name, None)]
    if missing:
        raise UserError(
            f"--group_column {column} needs {' and '.join(missing)} with --dataset imagefolder: the share for "
            f"evaluation, and a table that names the images and their groups"
        )


def open_list(args, path: str, root: Path, announce: bool = True) -> ImageList:
    """Read the list at `path`, which is one of `args`, with the columns that the flags choose."""
    columns = args.image_column, args.label_column
    # A division keeps the shares of the labels, so pretraining must know them as fine-tuning does.
    needed = uses_labels(args) or getattr(args, "val_fraction", None) is not None
    groups = getattr(args, "group_column", "")
    return read_list(path, root, args.allow_outside, *columns, announce, needs_labels=needed, group_column=groups)


def open_split(args, train: bool, root: Path, announce: bool = True) -> tuple[ImageList, Sequence[int]]:
    """Read the list that has the images of one split -> the list, and the rows that are of this split: all of them or,
    with `--val_fraction`, a part of `--train_list`. Raises UserError if a group is in both lists."""
    fraction = getattr(args, "val_fraction", None)
    listed = open_list(args, args.train_list if train or fraction else args.val_list, root, announce)
    if fraction:
        groups, column = listed.groups, getattr(args, "group_column", "")
        groups = relative_names(listed.paths, root) if groups is None else groups
        return listed, choose_side(groups, strata(listed), fraction, train, column)
    other = args.val_list if train else args.train_list
    if listed.groups is not None and other:
        _check_apart(args.group_column, listed, open_list(args, other, root, announce=False))
    return listed, range(len(listed.paths))


def relative_names(paths: Sequence[str], root: Path) -> list[str]:
    """Return the paths relative to `root`, by which `--val_fraction` draws."""
    prefix = os.path.join(root, "")
    return [path[len(prefix) :] if path.startswith(prefix) else os.path.relpath(path, root) for path in paths]


def groups_of_files(args, root: Path) -> Mapping[str, str] | None:
    """Return {path: group} of the images in `--train_list`, for a data set whose labels are not in the list; None
    without `--group_column`."""
    if not getattr(args, "group_column", ""):
        return None
    listed = read_list(args.train_list, root, False, args.image_column, None, group_column=args.group_column)
    return dict(zip(listed.paths, listed.groups))


def _check_apart(column: str, one: ImageList, other: ImageList) -> None:
    """Raise UserError if a group is in both lists."""
    counts = [Counter(listed.groups) for listed in (one, other)]
    common = sorted(counts[0].keys() & counts[1].keys())
    if common:
        here, there = (count[common[0]] for count in counts)
        raise UserError(
            f"--group_column {column}: {len(common)} groups are in both lists, among them {common[0]} with {here} "
            f"images in {one.source} and {there} in {other.source}: move all images of a group to one list, or let "
            f"--val_fraction divide one list"
        )


def note_other_split(args, path: str, stored: Mapping[str, Any]) -> None:
    """Print a note if `--val_fraction` divides a list here and the run that wrote the checkpoint `path`, with the flags
    `stored`, divided it in another way, or not at all."""
    lists = [os.path.basename(flags.get("train_list") or "") for flags in (vars(args), stored)]
    if not getattr(args, "val_fraction", None) or not lists[0] or lists[0] != lists[1]:
        return
    changed = []
    for name in ("val_fraction", "group_column", "label_column"):
        now, before = (_settled(flags.get(name)) for flags in (vars(args), stored))
        if now != before:
            changed.append(f"--{name} was {before or 'not given'} and is {now or 'not given'}")
    if changed:
        note_once(
            f"{path} was trained on another division of {lists[0]} ({', '.join(changed)}): some of the evaluation "
            f"images may have been training images"
        )


def _settled(value) -> str:
    """Return the value of a flag as text: "" for a label column that is also chosen without the flag."""
    words = value if isinstance(value, list) else [value] if value else []
    return "" if len(words) == 1 and is_label_name(str(words[0])) else " ".join(map(str, words))


def uses_labels(args) -> bool:
    """Whether the command needs labels: unlike pretraining, it has --nb_classes, or writes them into shards."""
    return hasattr(args, "nb_classes") or hasattr(args, "images_per_shard")
