"""Data sets by name (`--dataset`), each an indexable list of images that says where every image comes from."""

import os
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data import fine_grained
from util.data.file_lists import (
    check_below,
    class_names,
    images_below,
    read_lines,
    read_list,
    say_odd_classes,
    say_others,
    sorted_labels,
)
from util.data.shards import find_shards
from util.data.sources import Arrays, Files, HuggingFaceImages, Images, TorchvisionImages
from util.errors import UserError
from util.parallel.distributed import main_process_first

FACTORY = ("hfds", "hfids", "tfds", "torch")  # prefixes of timm's data-set factory


def need_path(args) -> Path:
    if not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder that holds it")
    return _folder_at(args.data_path)


def _folder_at(path: str | Path, flag: str = "--data_path") -> Path:
    folder = Path(path).expanduser()
    if not os.path.isdir(folder):  # unlike pathlib's, it says False to a name that is too long
        raise UserError(f"{flag} {folder} is not a folder")
    return folder


def class_folder(folder: Path, classes: list[str] | None = None) -> Files:
    """`folder/<class>/...`; with `classes` the labels are places in that list, and other folders are refused. A class
    without images keeps its place, and a note says so."""
    found = class_names(folder)
    if not found:
        raise UserError(f"{folder} has no class folders; for images without labels use --dataset folder")
    unknown = [name for name in found if classes is not None and name not in classes]
    if unknown:
        raise UserError(f"{folder} has the class folder {unknown[0]!r}, which the training folder has not")
    is_train, classes = classes is None, classes or found
    index = {name: place for place, name in enumerate(classes)}
    others = Counter()
    samples = [(path, index[name]) for name in found for path in images_below(folder / name, others)]
    say_others(folder, others)
    if not samples:
        raise UserError(f"{folder} holds no images; known endings are {' '.join(IMG_EXTENSIONS)}")
    if is_train:
        say_odd_classes(folder, classes, {target for _, target in samples})
    return Files([path for path, _ in samples], [target for _, target in samples], classes)


def _imagefolder(args, train: bool) -> Files:
    return image_folder(need_path(args), train)


def image_folder(path: str | Path, train: bool, flag: str = "--data_path") -> Files:
    """Return the images of `path`/train/<class>/ or `path`/val/<class>/. Raises UserError, which names `flag`, when
    there is no such folder."""
    root = _folder_at(path, flag)
    if not (root / "train").is_dir():
        raise UserError(f"{flag} {root} has no train/ folder; use --dataset folder for images without that layout")
    if train:
        return class_folder(root / "train")
    if not (root / "val").is_dir():
        raise UserError(f"{flag} {root} has no val/ folder")
    classes = class_names(root / "train")
    return class_folder(root / "val", classes)


def _folder(args, train: bool) -> Files:
    root = need_path(args)
    split = root / ("train" if train else "val")
    if not train and not split.is_dir():
        raise UserError(f"--data_path {root} has no val/ folder, so there is nothing to validate on")
    folder = split if split.is_dir() else root
    others = Counter()
    paths = images_below(folder, others)
    say_others(folder, others)
    if not paths:
        raise UserError(f"--data_path {folder} holds no images; known endings are {' '.join(IMG_EXTENSIONS)}")
    return Files(paths, [-1] * len(paths), None)


def _filelist(args, train: bool) -> Files:
    root, outside = need_path(args), args.allow_outside
    paths, labels = read_list(args.train_list if train else args.val_list, root, outside)
    within = "" if outside else os.path.realpath(root)
    if labels is None:
        return Files(paths, [-1] * len(paths), None, within)
    vocabulary = labels if train else read_list(args.train_list, root, outside)[1] or []
    classes = sorted_labels(vocabulary)
    index = {label: place for place, label in enumerate(classes)}
    unknown = next((label for label in labels if label not in index), None)
    if unknown is not None:
        raise UserError(f"the list file {args.val_list} has the label {unknown!r}, which {args.train_list} has not")
    return Files(paths, [index[label] for label in labels], classes, within)


def _cifar(args, train: bool) -> Arrays:
    reader = tv.CIFAR10 if args.dataset == "cifar10" else tv.CIFAR100
    root = args.data_path or "data"
    try:
        with main_process_first() if args.download else nullcontext():
            data = reader(root, train=train, download=args.download)
    except OSError as error:  # of the network or the disk
        raise UserError(f"--data_path {root}: {args.dataset} cannot be read or downloaded there: {error}") from error
    except RuntimeError as error:
        raise UserError(
            f"--data_path {root} does not hold {reader.base_folder} (the python version of {args.dataset}); "
            f"--download fetches it"
        ) from error
    return Arrays(data.data, data.targets, data.classes)


def _tiny_imagenet(args, train: bool) -> Files:
    """train/<wnid>/images/*.JPEG and val/images/*.JPEG with val/val_annotations.txt (file, wnid, box)."""
    root = need_path(args)
    if not (root / "train").is_dir():
        raise UserError(
            f"--data_path {root} has no train/ folder; tiny_imagenet is what tiny-imagenet-200.zip unpacks to"
        )
    if train:
        return class_folder(root / "train")
    classes = class_names(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        if (root / "val").is_dir():  # a copy sorted into class folders
            return class_folder(root / "val", classes)
        raise UserError(f"{annotations} is missing; tiny_imagenet is what tiny-imagenet-200.zip unpacks to")
    rows = [line.split("\t")[:2] for line in read_lines(annotations, "the annotations")]
    index = {wnid: place for place, wnid in enumerate(classes)}
    unknown = next((row for row in rows if len(row) < 2 or row[1] not in index), None)
    if unknown is not None:
        raise UserError(f"{annotations} names {unknown}, which is no class folder of {root / 'train'}")
    paths = [str(root / "val" / "images" / name) for name, _ in rows]
    check_below(paths, root, annotations)
    return Files(paths, [index[wnid] for _, wnid in rows], classes)


def _digits(args, train: bool) -> Arrays:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, split 80/20, stratified, always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    split = train_test_split(images, data.target, test_size=0.2, random_state=0, stratify=data.target)
    return Arrays(split[0 if train else 1], split[2 if train else 3], [str(digit) for digit in range(10)])


def _fine_grained(args, train: bool) -> Files:
    root = need_path(args)
    paths, targets, classes = fine_grained.READERS[args.dataset](root, train)
    check_below(paths, root, f"--dataset {args.dataset}")
    return Files(paths, targets, classes)


READERS = {
    "imagefolder": _imagefolder,
    "folder": _folder,
    "filelist": _filelist,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny_imagenet": _tiny_imagenet,
    "digits": _digits,
    **dict.fromkeys(fine_grained.READERS, _fine_grained),
    "wds": find_shards,
}


def read_images(args, train: bool):
    """The images of one split: an `Images`, `Shards`, or timm's iterable set for the streaming names of its factory.

    Raises UserError for an unknown name and for whatever is missing on disk.
    """
    if args.dataset in READERS:
        return READERS[args.dataset](args, train)
    prefix, slash, _ = args.dataset.partition("/")
    prefix = prefix.lower()
    if slash and prefix == "wds":  # as timm's factory spells it
        return find_shards(args, train)
    if not slash or prefix not in FACTORY:
        raise UserError(
            f"--dataset {args.dataset!r} is not known; the known ones are {', '.join(READERS)}, "
            f"and the names of timm's data-set factory ({', '.join(f'{name}/...' for name in FACTORY)})"
        )
    if prefix == "torch" and not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder that holds it")
    from timm.data import create_dataset

    try:  # without batch_size: timm would fill up the last batch of every worker with samples it has given already
        dataset = create_dataset(
            args.dataset,
            root=args.data_path or None,
            split="train" if train else "validation",
            is_training=train,
            download=args.download,
            seed=args.seed,
            **({"input_img_mode": ""} if prefix == "hfids" else {}),  # images as they are, not made RGB
        )
        if hasattr(dataset, "reader") and not isinstance(dataset, IterableDataset):
            return HuggingFaceImages(dataset.reader)
    except (ImportError, AssertionError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"--dataset {args.dataset} could not be opened by timm's data-set factory: {reason}") from error
    if isinstance(dataset, IterableDataset):
        dataset.classes = None  # a stream does not count them
        return dataset
    return _torchvision(dataset, args, train)


def _torchvision(dataset, args, train: bool) -> Images:
    """A plain torchvision set, as timm's factory returns for `torch/...`."""
    if type(dataset) is tv.ImageFolder:  # it numbers the folders of its own split
        classes = dataset.classes if train else read_images(args, train=True).classes
        unknown = [name for name in dataset.classes if name not in classes]
        if unknown:
            raise UserError(f"{dataset.root} has the class folder {unknown[0]!r}, which the training folder has not")
        paths = [path for path, _ in dataset.samples]
        return Files(paths, [classes.index(dataset.classes[target]) for target in dataset.targets], classes)
    return TorchvisionImages(dataset)
