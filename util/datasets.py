"""Data sets by name (`--dataset`), each an indexable list of images that says where every image comes from."""

import io
import os
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset
from torchvision import datasets as tv
from torchvision.datasets.folder import IMG_EXTENSIONS

from util import fine_grained, transforms
from util.distributed import main_process_first
from util.errors import UserError
from util.images import open_image, open_regular, read_image
from util.listing import (
    check_below,
    class_names,
    images_below,
    is_below,
    read_lines,
    read_list,
    say_odd_classes,
    say_others,
    sorted_labels,
)
from util.shards import find_shards

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Channel mean and deviation of the training sets, computed with tools/mean_std.py; ImageNet's for unknown folders.
MEAN_STD = {
    "cifar10": ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    "cifar100": ((0.50707, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
    "tiny_imagenet": ((0.48024, 0.44807, 0.39755), (0.27699, 0.26906, 0.28208)),
    "digits": ((0.30543,) * 3, (0.37596,) * 3),
}
FACTORY = ("hfds", "hfids", "tfds", "torch")  # prefixes of timm's data-set factory


class Images(ABC):
    """A list of images with integer labels (-1 where there are none): what every reader below returns.

    `classes` is the list of label names, None without labels. `load(i)` may raise what pillow raises; `name(i)` says
    which file or record that was.
    """

    classes: list[str] | None = None
    targets: list[int]

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Image number `index`, in whatever mode it is stored."""

    def open(self, index: int) -> Image.Image:
        """The same, perhaps not decoded yet."""
        return self.load(index)

    def file(self, index: int) -> str:
        """Path of the file that this image is, "" where it is none. OSError for one that must not be read."""
        return ""

    def target(self, index: int) -> int:
        """The label of an image that was loaded (some sets learn it only then)."""
        return self.targets[index]

    def name(self, index: int) -> str:
        return f"image {index}"


class Files(Images):
    """Images in files; with `within` a folder that no link may lead out of."""

    def __init__(self, paths: list[str], targets: list[int], classes: list[str] | None, within: str = ""):
        self.paths, self.targets, self.classes, self.within = np.array(paths), targets, classes, within

    def load(self, index):
        with open_regular(self.file(index)) as file:
            return read_image(file)

    def open(self, index):
        with open_regular(self.file(index)) as file:
            return open_image(io.BytesIO(file.read()))

    def file(self, index):
        path = str(self.paths[index])  # what numpy calls its strings would be in pillow's messages
        if self.within and not is_below(os.path.realpath(path), self.within):
            raise OSError(f"a link that leads out of --data_path {self.within}: --allow_outside follows it")
        return path

    def name(self, index):
        return str(self.paths[index])


class Arrays(Images):
    """Images in memory: (N, H, W) or (N, H, W, C) uint8."""

    def __init__(self, arrays: np.ndarray, targets, classes: list[str]):
        self.arrays, self.targets, self.classes = arrays, [int(t) for t in targets], list(classes)

    def load(self, index):
        return Image.fromarray(self.arrays[index])


class Part(Images):
    """Some images of another list, by their places in it."""

    def __init__(self, images: Images, places):
        self.images, self.places, self.classes = images, [int(place) for place in places], images.classes
        self.targets = [images.targets[place] for place in self.places]

    def load(self, index):
        return self.images.load(self.places[index])

    def open(self, index):
        return self.images.open(self.places[index])

    def file(self, index):
        return self.images.file(self.places[index])

    def target(self, index):
        return self.images.target(self.places[index])

    def name(self, index):
        return self.images.name(self.places[index])


class HuggingFaceImages(Images):
    """`hfds/...` by the table of timm's reader. timm's own data set would skip what it cannot read, make everything
    RGB, and want a label."""

    def __init__(self, reader):
        self.table, self.column = reader.dataset, reader.image_key
        labelled = reader.label_key in self.table.column_names
        self.targets = [int(t) for t in self.table[reader.label_key]] if labelled else [-1] * len(self.table)
        self.classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get) or None

    def load(self, index):
        record = self.table[index][self.column]
        with io.BytesIO(record["bytes"]) if record["bytes"] else open_regular(record["path"]) as file:
            return read_image(file)

    def name(self, index):
        return f"{index}: {self.table[index][self.column]['path']}"


def need_path(args) -> Path:
    if not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder that holds it")
    path = Path(args.data_path).expanduser()
    if not os.path.isdir(path):  # unlike pathlib's, it says False to a name that is too long
        raise UserError(f"--data_path {path} is not a folder")
    return path


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
    root = need_path(args)
    if not (root / "train").is_dir():
        raise UserError(f"--data_path {root} has no train/ folder; use --dataset folder for images without that layout")
    if train:
        return class_folder(root / "train")
    if not (root / "val").is_dir():
        raise UserError(f"--data_path {root} has no val/ folder")
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


class TorchvisionImages(Images):
    """A torchvision set."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.targets = [int(t) for t in dataset.targets] if hasattr(dataset, "targets") else [-1] * len(dataset)
        self.classes = list(dataset.classes) if hasattr(dataset, "classes") else None

    def load(self, index):
        img, self.targets[index] = self.dataset[index]
        return img


def mean_std(args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and deviation: `--mean/--std`, else the data set's own, for `--in_chans` channels.

    Raises UserError when only one is given or their number is not the number of channels.
    """
    mean, std = args.mean, args.std
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: give both (tools/mean_std.py computes them) or neither")
    if mean is None:
        mean, std = MEAN_STD.get(args.dataset, IMAGENET)
        if args.in_chans != 3:  # grey, or grey and alpha: the average channel; alpha counts like a colour
            mean, std = ([sum(values) / 3] * args.in_chans for values in (mean, std))
    if len(mean) != args.in_chans or len(std) != args.in_chans:
        raise UserError(f"--mean and --std need one number per channel: --in_chans is {args.in_chans}")
    if min(std) <= 0:
        raise UserError("--std must be positive")
    return tuple(mean), tuple(std)


def input_size(args) -> tuple[int, int]:
    """(H, W) of `args.input_size`, which the mains have set to the model's own where the flag was absent."""
    size = args.input_size
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


def build_transform(is_train: bool, args):
    """The fine-tuning transform (`is_train`) or the evaluation transform of these flags."""
    mean, std = mean_std(args)
    if is_train:
        return transforms.finetune_transform(args, input_size(args), mean, std)
    return transforms.eval_transform(input_size(args), mean, std, args.crop_pct)


def build_dataset(is_train: bool, args):
    """Images of one split with `build_transform`'s transform, ready for a loader (`util.loading`)."""
    from util.loading import KeyedDataset

    return KeyedDataset(read_images(args, is_train), build_transform(is_train, args), args)
