"""Readers of data sets by name (`--dataset`). Each returns a list of images, shards or a stream for one split."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.datasets import CIFAR10, CIFAR100

from util.data import fine_grained
from util.data.dense import layouts, scenes
from util.data.factory import FACTORY, open_from_factory
from util.data.file_lists import (
    check_below,
    class_indices,
    class_names,
    read_lines,
)
from util.data.image_folders import (
    class_folder,
    divided_folder,
    find_split,
    folder_at,
    image_folder,
    index_files,
    split_folder,
    unlabelled_folder,
)
from util.data.list_flags import groups_of_files, open_list, open_split, uses_labels
from util.data.list_labels import class_labels
from util.data.shards import Shards, find_shards
from util.data.sources import Arrays, Files, Images
from util.errors import UserError
from util.parallel.distributed import main_process_first
from util.parser import closest, did_you_mean


def need_path(args) -> Path:
    """Return `--data_path`. Raises UserError when it is not given or not a folder."""
    if not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder of the data set")
    return folder_at(args.data_path)


def _eval_path(args) -> Path | None:
    given = getattr(args, "eval_path", "")  # some callers have few flags
    return folder_at(given, "--eval_path") if given else None


def _imagefolder(args, train: bool, classes: list[str] | None) -> Files:
    fraction, index = getattr(args, "val_fraction", None), index_files(args)
    if fraction:
        root = need_path(args)
        groups, column = groups_of_files(args, root), getattr(args, "group_column", "")
        return divided_folder(root, train, fraction, None if train else classes, groups, column, index)
    if train:
        return image_folder(need_path(args), True, index=index)
    folder, listed = _eval_path(args), getattr(args, "val_list", "")
    if not folder and not listed:
        return image_folder(need_path(args), False, classes=classes, index=index)
    source = "of the checkpoint"
    if classes is None:
        classes, source = class_names(split_folder(need_path(args), True)), "of the training images"
    if not listed:
        return class_folder(folder, classes, f"a class {source}", index)
    return _listed_classes(args, folder or split_folder(need_path(args), False), classes, source)


def _listed_classes(args, folder: Path, classes: list[str], source: str) -> Files:
    """Return the evaluation images of `--val_list` in `folder`; their labels are names of `classes`."""
    listed = open_list(args, args.val_list, folder)
    labels = class_labels(listed)[0]
    if labels is None:
        raise UserError(f"the list file {args.val_list} has no labels: the names of the class folders are needed")
    targets = class_indices(labels, classes, args.val_list, f"a class {source}")
    return Files(listed.paths, targets, classes, os.path.realpath(folder))


def _folder(args, train: bool, _classes) -> Files:
    given = None if train else _eval_path(args)
    if given:
        return unlabelled_folder(given, "--eval_path", index_files(args))
    root = need_path(args)
    folder = split_folder(root, False) if not train else find_split(root, True) or root
    return unlabelled_folder(folder, index=index_files(args))  # without splits: images at any depth


def _filelist(args, train: bool, vocabulary: list[str] | None) -> Files:
    root = need_path(args)
    listed, rows = open_split(args, train, root)
    labels, classes = _classes_of_list(args, listed)
    paths, groups = listed.of(rows)
    within = "" if args.allow_outside else os.path.realpath(root)
    if labels is None:
        return Files(paths, [-1] * len(paths), None, within, groups)
    source = f"in {args.train_list}"
    if not train and vocabulary is not None:
        classes, source = vocabulary, "a class of the checkpoint"
    elif not train and listed.source != args.train_list:
        classes = _classes_of_list(args, open_list(args, args.train_list, root, announce=False))[1]
    targets = class_indices([labels[row] for row in rows], classes, listed.source, source)
    return Files(paths, targets, classes, within, groups)


def _classes_of_list(args, listed) -> tuple[list[str] | None, list[str]]:
    """Return `class_labels`. Commands that do not use labels read a list whose labels are no classes without them."""
    try:
        return class_labels(listed, check_sets=getattr(args, "label_sep", None) != "")
    except UserError as error:
        if uses_labels(args):
            raise
        print(f"note: {error}; the images are read without labels")
        return None, []


def _cifar(args, train: bool, _classes) -> Arrays:
    reader = CIFAR10 if args.dataset == "cifar10" else CIFAR100
    root = args.data_path or "data"
    try:
        with main_process_first() if args.download else nullcontext():
            data = reader(root, train=train, download=args.download)
    except OSError as error:  # of the network or the disk
        raise UserError(f"--data_path {root}: {args.dataset} cannot be read or downloaded there: {error}") from error
    except RuntimeError as error:
        raise UserError(
            f"--data_path {root} does not contain {reader.base_folder} (the Python version of {args.dataset}); "
            f"--download downloads it"
        ) from error
    return Arrays(data.data, data.targets, data.classes)


def _tiny_imagenet(args, train: bool, _classes) -> Files:
    """Read train/<wnid>/images/*.JPEG, or val/images/*.JPEG with val/val_annotations.txt (file, wnid, box)."""
    root = need_path(args)
    if not (root / "train").is_dir():
        raise UserError(
            f"--data_path {root} has no train/ folder; tiny_imagenet needs the contents of tiny-imagenet-200.zip"
        )
    if train:
        return class_folder(root / "train", index=index_files(args))
    classes = class_names(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        if (root / "val").is_dir():  # a copy sorted into class folders
            return class_folder(root / "val", classes, index=index_files(args))
        raise UserError(f"{annotations} is missing; tiny_imagenet needs the contents of tiny-imagenet-200.zip")
    rows = [line.split("\t")[:2] for line in read_lines(annotations, "the annotations")]
    index = {wnid: i for i, wnid in enumerate(classes)}
    unknown = next((row for row in rows if len(row) < 2 or row[1] not in index), None)
    if unknown is not None:
        raise UserError(f"{annotations} has the line {unknown}, whose class is not a folder of {root / 'train'}")
    paths = [str(root / "val" / "images" / name) for name, _ in rows]
    check_below(paths, root, annotations)
    return Files(paths, [index[wnid] for _, wnid in rows], classes)


def _digits(args, train: bool, _classes) -> Arrays:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, in a fixed stratified 80/20 split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    split = train_test_split(images, data.target, test_size=0.2, random_state=0, stratify=data.target)
    return Arrays(split[0 if train else 1], split[2 if train else 3], [str(digit) for digit in range(10)])


def _fine_grained(args, train: bool, _classes) -> Files:
    root = need_path(args)
    paths, targets, classes = fine_grained.READERS[args.dataset](root, train)
    check_below(paths, root, f"--dataset {args.dataset}")
    return Files(paths, targets, classes)


def _dense(args, train: bool, _classes) -> Files:
    """The images of a data set for segmentation or detection, without their annotations."""
    paths = list(layouts.IMAGES[args.dataset](need_path(args), train, args).values())
    return Files(paths, [-1] * len(paths), None)


def _scenes(args, train: bool, _classes) -> scenes.SegmentedScenes:
    return scenes.SegmentedScenes(*scenes.settings_of(args, train))


def _shards(args, train: bool, _classes) -> Shards:
    return find_shards(args, train)


READERS = {
    "imagefolder": _imagefolder,
    "folder": _folder,
    "filelist": _filelist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny_imagenet": _tiny_imagenet,
    "digits": _digits,
    **dict.fromkeys(fine_grained.READERS, _fine_grained),
    **dict.fromkeys(layouts.IMAGES, _dense),
    "scenes": _scenes,
    "wds": _shards,
}


def read_images(args, train: bool, classes: list[str] | None = None):
    """Return the images of one split: an `Images`, `Shards`, or timm's iterable set for streaming names of its factory.
    `classes` (of a checkpoint) give the labels of evaluation images, so that no training images are needed.

    Raises UserError for an unknown name and for missing or unusable files.
    """
    if args.dataset in READERS:
        images = READERS[args.dataset](args, train, classes)
        if isinstance(images, Images):
            images.expect_bands(getattr(args, "in_chans", None), getattr(args, "band_axis", None))
        return images
    prefix, slash, _ = args.dataset.partition("/")
    prefix = prefix.lower()
    if slash and prefix == "wds":  # as timm's factory spells it
        return find_shards(args, train)
    if not slash or prefix not in FACTORY:
        raise UserError(
            f"--dataset {args.dataset!r} is not known: it must be one of {', '.join(READERS)}, "
            f"or a name of timm's data-set factory ({', '.join(f'{name}/...' for name in FACTORY)})"
            f"{did_you_mean(closest(args.dataset, READERS))}"
        )
    return open_from_factory(args, prefix, train)
