"""Readers of data sets by name (`--dataset`). Each returns a list of images, shards or a stream for one split."""

import os
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data import fine_grained
from util.data.file_lists import (
    check_below,
    class_names,
    images_below,
    note_odd_classes,
    read_lines,
)
from util.data.images import printable
from util.data.leftovers import Skipped
from util.data.list_flags import open_list, uses_labels
from util.data.list_labels import class_labels
from util.data.shards import Shards, find_shards
from util.data.sources import Arrays, Files, HuggingFaceImages, Images, TorchvisionImages
from util.errors import UserError
from util.parallel.distributed import main_process_first

FACTORY = ("hfds", "hfids", "tfds", "torch")  # prefixes of timm's data-set factory


def need_path(args) -> Path:
    """Return `--data_path`. Raises UserError when it is not given or not a folder."""
    if not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder of the data set")
    return _folder_at(args.data_path)


def _folder_at(path: str | Path, flag: str = "--data_path") -> Path:
    folder = Path(path).expanduser()
    if not os.path.isdir(folder):  # pathlib's raises for a name that is too long
        raise UserError(f"{flag} {folder} is not a folder")
    return folder


def class_folder(folder: Path, classes: list[str] | None = None, source: str = "in the training folder") -> Files:
    """Read `folder/<class>/...`. With `classes`, which come from `source`, the labels are indices in that list, and
    other folders are refused. A class without images keeps its index; in the training folder a note is printed."""
    skipped = Skipped()
    names = class_names(folder, skipped)
    if not names:
        raise UserError(f"{folder} has no class folders; for images without labels use --dataset folder")
    unknown = [name for name in names if classes is not None and name not in classes]
    if unknown:
        raise UserError(f"{folder} has the class folder {unknown[0]!r}, which is not {source}")
    is_train, classes = classes is None, classes or names
    index = {name: i for i, name in enumerate(classes)}
    samples = [(path, index[name]) for name in names for path in images_below(folder / name, skipped)]
    skipped.note(folder)
    if not samples:
        raise UserError(f"{folder} contains no images; supported endings are {' '.join(IMG_EXTENSIONS)}")
    if is_train:
        note_odd_classes(folder, classes, {target for _, target in samples})
    return Files([path for path, _ in samples], [target for _, target in samples], classes)


def _eval_path(args) -> str:
    return getattr(args, "eval_path", "")  # some callers have few flags


def _imagefolder(args, train: bool, classes: list[str] | None) -> Files:
    if not train and _eval_path(args):
        folder = _folder_at(_eval_path(args), "--eval_path")
        if classes is None:
            classes = class_names(split_folder(need_path(args), True))
        return class_folder(folder, classes, "a class of the training images")
    return image_folder(need_path(args), train, classes=classes)


# Names of the splits' folders, in any case. The first that exists is read; test images serve where nothing else does.
_TRAIN = ("train", "training")
_EVALUATION = ("val", "valid", "validation", "dev", "test", "testing")


def split_folder(root: Path, train: bool, flag: str = "--data_path") -> Path:
    """Return the folder of a split. A note is printed for other names than train and val. Raises UserError, which names
    `flag`, if there is none."""
    names = _TRAIN if train else _EVALUATION
    if (root / names[0]).is_dir():
        return root / names[0]
    with os.scandir(root) as entries:
        folders = {entry.name.lower(): entry.name for entry in entries if entry.is_dir()}
    found = next((folders[name] for name in names if name in folders), None)
    if found is None:
        others = ", ".join(f"{name}/" for name in names[1:])
        advice = "--dataset folder for images without labels" if train else "--eval_path for another folder"
        raise UserError(f"{flag} {root} has no {names[0]}/ folder (nor {others}): give {advice}")
    print(f"note: the {'training' if train else 'evaluation'} images are those of {printable(str(root / found))}")
    return root / found


def image_folder(path: str | Path, train: bool, flag: str = "--data_path", classes: list[str] | None = None) -> Files:
    """Return the images of `path`/train/<class>/ or `path`/val/<class>/; see `split_folder` for other names. `classes`
    (of a checkpoint) give the labels of the evaluation images, else the class folders of the training images do. Raises
    UserError, which names `flag`, when there is no such folder."""
    root = _folder_at(path, flag)
    if train:
        return class_folder(split_folder(root, True, flag))
    if classes is not None:
        return class_folder(split_folder(root, False, flag), classes, "a class of the checkpoint")
    names = class_names(split_folder(root, True, flag))
    return class_folder(split_folder(root, False, flag), names)


def _folder(args, train: bool, _classes) -> Files:
    given = "" if train else _eval_path(args)
    if given:
        return unlabelled_folder(_folder_at(given, "--eval_path"), "--eval_path")
    root = need_path(args)
    try:
        return unlabelled_folder(split_folder(root, train))
    except UserError:
        if not train:
            raise
    return unlabelled_folder(root)  # images at any depth, without splits


def unlabelled_folder(folder: Path, flag: str = "--data_path") -> Files:
    """Read all images below a folder, at any depth, in the order of their paths. Raises UserError, which names `flag`,
    when there are none."""
    skipped = Skipped()
    paths = images_below(folder, skipped)
    skipped.note(folder)
    if not paths:
        raise UserError(f"{flag} {folder} contains no images; supported endings are {' '.join(IMG_EXTENSIONS)}")
    return Files(paths, [-1] * len(paths), None)


def _filelist(args, train: bool, vocabulary: list[str] | None) -> Files:
    root = need_path(args)
    path = args.train_list if train else args.val_list
    listed = open_list(args, path, root)
    labels, classes = _classes_of_list(args, listed)
    within = "" if args.allow_outside else os.path.realpath(root)
    if labels is None:
        return Files(listed.paths, [-1] * len(listed.paths), None, within)
    if not train and vocabulary is not None:
        classes = vocabulary
    elif not train:
        classes = _classes_of_list(args, open_list(args, args.train_list, root, announce=False))[1]
    index = {label: i for i, label in enumerate(classes)}
    unknown = next((label for label in labels if label not in index), None)
    if unknown is not None:
        raise UserError(f"the list file {args.val_list} has the label {unknown!r}, which is not in {args.train_list}")
    return Files(listed.paths, [index[label] for label in labels], classes, within)


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
        return class_folder(root / "train")
    classes = class_names(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        if (root / "val").is_dir():  # a copy sorted into class folders
            return class_folder(root / "val", classes)
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

    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    split = train_test_split(images, data.target, test_size=0.2, random_state=0, stratify=data.target)
    return Arrays(split[0 if train else 1], split[2 if train else 3], [str(digit) for digit in range(10)])


def _fine_grained(args, train: bool, _classes) -> Files:
    root = need_path(args)
    paths, targets, classes = fine_grained.READERS[args.dataset](root, train)
    check_below(paths, root, f"--dataset {args.dataset}")
    return Files(paths, targets, classes)


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
    "wds": _shards,
}


def read_images(args, train: bool, classes: list[str] | None = None):
    """Return the images of one split: an `Images`, `Shards`, or timm's iterable set for streaming names of its factory.
    `classes` (of a checkpoint) give the labels of evaluation images, so that no training images are needed.

    Raises UserError for an unknown name and for missing or unusable files.
    """
    if args.dataset in READERS:
        if _eval_path(args) and args.dataset not in ("imagefolder", "folder"):
            raise UserError(f"--eval_path is for --dataset imagefolder and folder, not {args.dataset}")
        return READERS[args.dataset](args, train, classes)
    prefix, slash, _ = args.dataset.partition("/")
    prefix = prefix.lower()
    if slash and prefix == "wds":  # as timm's factory spells it
        return find_shards(args, train)
    if not slash or prefix not in FACTORY:
        raise UserError(
            f"--dataset {args.dataset!r} is not known: it must be one of {', '.join(READERS)}, "
            f"or a name of timm's data-set factory ({', '.join(f'{name}/...' for name in FACTORY)})"
        )
    if prefix == "torch" and not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder of the data set")
    from timm.data import create_dataset

    try:  # no batch_size: with one, timm fills the last batch of every worker by repeating samples
        dataset = create_dataset(
            args.dataset,
            root=args.data_path or None,
            split="train" if train else "validation",
            is_training=train,
            download=args.download,
            seed=args.seed,
            **({"input_img_mode": ""} if prefix == "hfids" else {}),  # do not convert images to RGB
        )
        if hasattr(dataset, "reader") and not isinstance(dataset, IterableDataset):
            return HuggingFaceImages(dataset.reader)
    except (ImportError, AssertionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--dataset {args.dataset} could not be opened by timm's data-set factory: {reason}") from error
    if isinstance(dataset, IterableDataset):
        dataset.classes = None  # unknown for a stream
        return dataset
    return _torchvision(dataset, args, train)


def _torchvision(dataset, args, train: bool) -> Images:
    """Wrap the torchvision data set that timm's factory returns for `torch/...`."""
    if type(dataset) is ImageFolder:  # each split numbers only its own class folders
        classes = dataset.classes if train else read_images(args, train=True).classes
        unknown = [name for name in dataset.classes if name not in classes]
        if unknown:
            raise UserError(f"{dataset.root} has the class folder {unknown[0]!r}, which is not in the training folder")
        samples = [(path, dataset.classes[target]) for path, target in dataset.samples]
        return Files([path for path, _ in samples], [classes.index(name) for _, name in samples], classes)
    return TorchvisionImages(dataset)
