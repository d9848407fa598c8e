"""Folders of images: a folder for each class, with or without folders for the splits, or images without labels."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.bands import ARRAY_ENDINGS
from util.data.compact import Repeated, take
from util.data.file_lists import class_names, note_odd_classes
from util.data.images import printable
from util.data.leftovers import Skipped, is_leftover
from util.data.listing import IndexFiles, list_images
from util.data.sources import Files
from util.data.splits import choose_side
from util.errors import MissingSplit, UserError
from util.notes import note_once
from util.parser import rare

# Names of the splits' folders, in any case. The first that exists is read; test images serve where nothing else does.
_TRAIN = ("train", "training")
_EVALUATION = ("val", "valid", "validation", "dev", "test", "testing")


def add_folder_arguments(group) -> None:
    """Add the flags for evaluation images in folders."""
    group.add_argument(
        "--eval_path",
        default="",
        metavar="DIR",
        help="imagefolder, folder: the evaluation images (class folders, or images), instead of val/ (or valid/, "
        "validation/, dev/, test/) in --data_path",
    )
    group.add_argument(
        "--val_fraction",
        type=float,
        metavar="SHARE",
        help="imagefolder without train/ and val/, filelist without --val_list: this share of each class is for "
        "evaluation, always the same images",
    )
    rare(
        group.add_argument(
            "--index_dir",
            metavar="DIR",
            help="imagefolder, folder, tiny_imagenet: where the list of 100,000 images or more is kept for the next "
            "start, which lists changed folders only; without it --output_dir, if the command has it; '' keeps none",
        )
    )
    rare(
        group.add_argument(
            "--relist", action="store_true", help="list all folders anew and replace what is kept in --index_dir"
        )
    )


def index_files(args) -> IndexFiles:
    """Return where the lists of large folders are kept, by `--index_dir` and `--relist`."""
    given = getattr(args, "index_dir", None)
    folder = getattr(args, "output_dir", "") if given is None else given
    return IndexFiles(folder or "", getattr(args, "relist", False))


def check_folder_flags(args) -> None:
    """Raise UserError for a share out of range, and for flags without effect. Commands without these flags are
    accepted."""
    fraction = getattr(args, "val_fraction", None)
    if fraction is not None and not 0 < fraction < 1:
        raise UserError(f"--val_fraction {fraction} must lie between 0 and 1, both excluded")
    if fraction is not None and args.dataset not in ("imagefolder", "filelist"):
        raise UserError(f"--val_fraction is for --dataset imagefolder and filelist, not {args.dataset}")
    if getattr(args, "eval_path", "") and args.dataset not in ("imagefolder", "folder"):
        raise UserError(f"--eval_path is for --dataset imagefolder and folder, not {args.dataset}")
    given = [f"--{name}" for name in ("eval_path", "val_list") if getattr(args, name, "")]
    if given and fraction is not None:
        raise UserError(f"{given[0]} and --val_fraction both choose the evaluation images: give one of them")
    if getattr(args, "targets", "single") != "single":
        return  # has a sentence of its own for data sets without lists
    groups = args.dataset == "imagefolder" and getattr(args, "group_column", "")
    if getattr(args, "train_list", "") and args.dataset != "filelist" and not groups:
        raise UserError(f"--train_list is for --dataset filelist, not {args.dataset}")
    if getattr(args, "val_list", "") and args.dataset not in ("filelist", "imagefolder"):
        raise UserError(f"--val_list is for --dataset filelist and imagefolder, not {args.dataset}")


def folder_at(path: str | Path, flag: str = "--data_path") -> Path:
    """Return the path of a folder. Raises UserError, which names `flag`, for anything else."""
    folder = Path(path).expanduser()
    if not os.path.isdir(folder):  # pathlib's raises for a name that is too long
        hint = _hint(folder.name) if os.path.isfile(folder) else ""
        raise UserError(f"{flag} {folder} is not a folder{hint and ': ' + hint}")
    return folder


def class_folder(
    folder: Path,
    classes: list[str] | None = None,
    source: str = "in the training folder",
    index: IndexFiles | None = None,
) -> Files:
    """Read `folder/<class>/...`. With `classes`, which come from `source`, the labels are indices in that list, and
    other folders are refused. A class without images keeps its index; in the training folder a note is printed."""
    skipped = Skipped()
    names = class_names(folder, skipped)
    if not names:
        raise UserError(
            f"{folder} has no class folders{_other_layout(folder)}; for images without labels use --dataset folder, "
            f"for a list of images and labels --dataset filelist (of evaluation images alone: --val_list)"
        )
    unknown = [name for name in names if classes is not None and name not in classes]
    if unknown:
        raise UserError(f"{folder} has the class folder {unknown[0]!r}, which is not {source}")
    is_train, classes = classes is None, classes or names
    number = {name: i for i, name in enumerate(classes)}
    paths, counts = list_images(folder, names, skipped, index)
    targets = np.repeat([number[name] for name in names], counts)
    skipped.note(folder)
    if not paths:
        raise _no_images(str(folder), folder, skipped)
    if is_train:
        note_odd_classes(folder, classes, set(np.flatnonzero(counts).tolist()))
    return Files(paths, targets, classes)


def unlabelled_folder(folder: Path, flag: str = "--data_path", index: IndexFiles | None = None) -> Files:
    """Read all images below a folder, at any depth, in the order of their paths. Raises UserError, which names `flag`,
    when there are none."""
    skipped = Skipped()
    paths, _ = list_images(folder, [""], skipped, index)
    skipped.note(folder)
    if not paths:
        raise _no_images(f"{flag} {folder}", folder, skipped)
    return Files(paths, np.full(len(paths), -1), None)


# Splits ---------------------------------------------------------------------------------------------------------------


def find_split(root: Path, train: bool) -> Path | None:
    """Return the folder of a split, None if there is none. A note is printed, once, for other names than train and
    val."""
    names = _TRAIN if train else _EVALUATION
    if (root / names[0]).is_dir():
        return root / names[0]
    with os.scandir(root) as entries:
        folders = {entry.name.lower(): entry.name for entry in entries if entry.is_dir()}
    found = next((folders[name] for name in names if name in folders), None)
    if found is None:
        return None
    note_once(f"the {'training' if train else 'evaluation'} images are those of {printable(str(root / found))}")
    return root / found


def split_folder(root: Path, train: bool, flag: str = "--data_path") -> Path:
    """Return the folder of a split. Raises UserError, which names `flag`, if there is none."""
    found = find_split(root, train)
    if found is None:
        name, *others = _TRAIN if train else _EVALUATION
        advice = "--dataset folder for images without labels" if train else "--eval_path for another folder"
        raise MissingSplit(
            f"{flag} {root} has no {name}/ folder (nor {', '.join(f'{other}/' for other in others)})"
            f"{_other_layout(root)}: give {advice}"
        )
    return found


def image_folder(
    path: str | Path,
    train: bool,
    flag: str = "--data_path",
    classes: list[str] | None = None,
    index: IndexFiles | None = None,
) -> Files:
    """Return the images of `path`/train/<class>/ or `path`/val/<class>/; see `find_split` for other names. `classes`
    (of a checkpoint) give the labels of the evaluation images, else the class folders of the training images do. Raises
    UserError, which names `flag`, when there is no such folder."""
    root = folder_at(path, flag)
    if train:
        return class_folder(split_folder(root, True, flag), index=index)
    if classes is not None:
        return class_folder(split_folder(root, False, flag), classes, "a class of the checkpoint", index)
    names = class_names(split_folder(root, True, flag))
    return class_folder(split_folder(root, False, flag), names, index=index)


def divided_folder(
    root: Path,
    train: bool,
    fraction: float,
    classes: list[str] | None = None,
    groups: Mapping[str, str] | None = None,
    column: str = "",
    index: IndexFiles | None = None,
) -> Files:
    """Return one side of a folder of class folders, whose images `--val_fraction` divides (`hold_out`). It does not
    depend on `--seed`, so that every run and tool has the same evaluation images. `classes` are those of a checkpoint,
    `groups` the group of each path, from the `column` of a table. Raises UserError for a folder with splits of its own,
    and for images without a group."""
    split = find_split(root, True) or find_split(root, False)
    if split is not None:
        raise UserError(
            f"--val_fraction is for a folder of class folders, but --data_path {root} has {split.name}/: leave it out"
        )
    images = class_folder(root, classes, "a class of the checkpoint", index)
    names = images.paths.below(str(root))
    if groups is not None:
        missing = [path for path in images.paths if path not in groups]
        if missing:
            raise UserError(
                f"--group_column {column}: the table of --train_list has no group for {len(missing)} of {len(images)} "
                f"images, among them {missing[0]}: add them to the table"
            )
        names = Repeated(groups[path] for path in images.paths)
    labels = Repeated.of_codes(images.targets, images.classes or ())
    rows = choose_side(names, labels, fraction, train, column)
    own = None if groups is None else names.take(rows)
    return Files(images.paths.take(rows), take(images.targets, rows), images.classes, groups=own)


# Mistakes -------------------------------------------------------------------------------------------------------------

_HINTS = {
    ".nii.gz": "NIfTI is not read: write its slices to 16-bit PNG or TIFF, and give --pixel_range",
    ".zip": "extract the archive first",
    ".tar": "extract the archive, or read it as a shard with --dataset wds",
    ".gz": "extract the archive first",
    ".parquet": "tables of Hugging Face are read by --dataset hfds/... (package datasets)",
    ".arrow": "tables of Hugging Face are read by --dataset hfds/... (package datasets)",
    ".tfrecord": "TensorFlow's records are read by --dataset tfds/... (package tensorflow-datasets)",
    ".h5": "HDF5 is not read: write its images to files, or to shards for --dataset wds",
    ".hdf5": "HDF5 is not read: write its images to files, or to shards for --dataset wds",
    ".mat": "MATLAB's files are not read: write their arrays to .npy files, or to image files (16-bit PNG)",
    ".mdb": "LMDB is not read: write its images to files, or to shards for --dataset wds",
    ".dcm": "DICOM is not read: convert it to 16-bit PNG or TIFF, and give --pixel_range",
    ".nii": "NIfTI is not read: write its slices to 16-bit PNG or TIFF, and give --pixel_range",
}
_ZARR = {"zarr.json", ".zarray", ".zgroup"}


def _no_images(where: str, folder: Path, skipped: Skipped) -> UserError:
    """Return the error of a folder without images, with what to do about what it has."""
    text = f"{where} contains no images; supported endings are {' '.join((*IMG_EXTENSIONS, *ARRAY_ENDINGS))}"
    hints = [hint for hint in map(_hint, skipped.endings) if hint]
    if any(_ZARR & set(files) for _, _, files in os.walk(folder)):
        hints.append("Zarr is not read: write its images to files, or to shards for --dataset wds")
    return UserError("; ".join(dict.fromkeys([text, *hints])))


def _hint(name: str) -> str:
    """Return what to do about a file of this name, "" if nothing is known."""
    return next((hint for ending, hint in _HINTS.items() if name.lower().endswith(ending)), "")


def _other_layout(root: Path) -> str:
    """Return a clause about what `root` has instead of the expected folders, "" if there is nothing to say."""
    with os.scandir(root) as entries:
        entries = [(entry.name, entry.is_dir()) for entry in entries if not is_leftover(entry.name)]
    if any("\\" in name for name, _ in entries):
        return ", but file names with backslashes (a Windows archive whose folders were lost: extract it with unzip)"
    folders = sorted(name for name, is_folder in entries if is_folder)
    full = [name for name in folders if _has_image(root / name)]
    if len(full) > 1:
        shown = ", ".join(map(printable, full[:3])) + ", ..." * (len(full) > 3)
        return (
            f", but folders of images ({shown}): if these are classes, --val_fraction 0.2 holds out a part of each "
            f"for evaluation"
        )
    return ""


def _has_image(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith((*IMG_EXTENSIONS, *ARRAY_ENDINGS)) for entry in entries)
    except OSError:
        return False
