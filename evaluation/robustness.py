"""Robustness of a classifier: evaluation sets and their classes, the mean corruption error (Hendrycks and Dietterich
2019), and the detection of out-of-distribution images (Hendrycks et al. 2021, ImageNet-O)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from evaluation.corruptions import NAMES, SEVERITIES, corrupt
from util.data.file_lists import class_names, read_lines
from util.data.image_folders import class_folder
from util.data.sources import Files, Images
from util.data.transforms import Converter
from util.errors import UserError

# AlexNet's errors in percent, averaged over the severities, by which those of a classifier are divided (the code of
# Hendrycks and Dietterich 2019), and its error on clean images (their Table 1).
ALEXNET = dict(zip(NAMES, (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7)))
ALEXNET_CLEAN = 43.5


def corruption_error(errors: dict[str, list[float]], clean: float | None = None) -> float:
    """Return the mean corruption error in percent (Section 4.2): the error of each of the 15 corruptions, averaged over
    the severities and divided by AlexNet's, averaged over the corruptions. `errors` are {corruption: one per severity},
    in percent. If `clean`, the error on clean images, is given, return the relative mean corruption error: the same of
    the increases over the clean error. It may be negative."""
    rows = []
    for name in NAMES:
        mean = float(np.mean(errors[name]))
        rows.append(mean / ALEXNET[name] if clean is None else (mean - clean) / (ALEXNET[name] - ALEXNET_CLEAN))
    return 100 * float(np.mean(rows))


def detection_aupr(inside: np.ndarray, outside: np.ndarray) -> float:
    """Return the area under the precision-recall curve, in percent, of the detection of out-of-distribution images by
    low confidence. `inside` are the confidences (M,) of in-distribution images, `outside` those (N,) of
    out-of-distribution images, which are the positives."""
    is_outside = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
    return 100 * float(average_precision_score(is_outside, -np.concatenate([inside, outside])))


# Classes --------------------------------------------------------------------------------------------------------------


@dataclass
class Classes:
    """The classes of a classifier: their number, their names in the order of its outputs (None: unknown), and the
    source of the names for messages."""

    count: int
    names: list[str] | None
    source: str

    def output_indices(self, names: list[str] | None, where: str) -> torch.Tensor:
        """Return the indices (k,) of the outputs for the classes `names` of the data set `where`. Names may also be
        these indices themselves, as those of ImageNet-V2's folders.

        Raises UserError for an unknown class, and if the names of the classifier's classes are needed and unknown.
        """
        if names is None:
            raise UserError(f"{where} has no labels, so the classifier cannot be evaluated on it")
        numbered = all(name.isdecimal() and int(name) < self.count for name in names)
        if numbered and len({int(name) for name in names}) == len(names) and not set(names) <= set(self.names or ()):
            return torch.tensor([int(name) for name in names])
        if self.names is None:
            raise UserError(
                f"{self.source} does not name its {self.count} classes: give --classes, a file with a name per line, "
                f"or --train_classes, the folder with the class folders it was trained on"
            )
        index = {name: number for number, name in enumerate(self.names)}
        unknown = [name for name in names if name not in index]
        if unknown:
            raise UserError(
                f"{where} has the class {unknown[0]!r}, which is none of the {self.count} classes of {self.source} "
                f"({', '.join(self.names[:3])}, ...); {len(unknown)} of the {len(names)} classes are unknown"
            )
        return torch.tensor([index[name] for name in names])


def known_classes(path: str, count: int, stored: list[str] | None, file: str = "", folder: str = "") -> Classes:
    """Return the `count` classes of the classifier in the checkpoint `path`. Their names are from `--classes` (`file`),
    `--train_classes` (`folder`) or the checkpoint (`stored`). Raises UserError if both flags are given, if the names
    cannot be read, or if there are not `count` different ones."""
    if file and folder:
        raise UserError("--classes and --train_classes both name the classes: give one of them")
    names, source = stored, path
    if file:
        names = [line.strip() for line in read_lines(file, "--classes")]
        source = f"--classes {file}"
    elif folder:
        if not Path(folder).is_dir():
            raise UserError(f"--train_classes {folder} is not a folder")
        names = class_names(Path(folder))
        source = f"--train_classes {folder}"
    if names is not None and len(names) != count:
        raise UserError(f"{source} names {len(names)} classes, and the classifier of {path} has {count}")
    if names is not None and len(set(names)) < count:
        raise UserError(f"{source} names a class twice")
    return Classes(count, names, source)


# Images ---------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """An evaluation set. Its label i is the output `output_indices[i]` of the classifier."""

    name: str
    images: Images
    output_indices: torch.Tensor


def open_folder(path: str | Path, classes: Classes) -> Evaluation:
    """Open a folder of class folders. Raises UserError for any other folder, and for an unknown class."""
    images = class_folder(_folder(path))
    return Evaluation(Path(path).name, images, classes.output_indices(images.classes, str(path)))


def open_foreign(path: str | Path, classes: Classes) -> Evaluation:
    """Open a folder of out-of-distribution images. If its folders have names of classes, predictions are among these
    classes, else among all. (ImageNet-O's folders have the names of the classes that the images are mistaken for.)"""
    images = class_folder(_folder(path))
    if classes.names is not None and not set(images.classes) & set(classes.names):
        print(f"{path}: none of its folders is named after a class; predictions are among all {classes.count}")
        return Evaluation(Path(path).name, Files(images.paths, [0] * len(images), None), torch.arange(classes.count))
    return Evaluation(Path(path).name, images, classes.output_indices(images.classes, str(path)))


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path} is not a folder")
    return folder


def corruption_folders(path: str | Path) -> dict[str, list[Path]]:
    """Return {corruption: its five severity folders} for a folder like ImageNet-C (corruption/severity/class/image, or
    the same in the folders of its download: noise/, blur/, ...), {} for any other folder. Only the 15 corruptions are
    read. Raises UserError if a severity is missing."""
    root = _folder(path)
    groups = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    folders = {}
    for name in NAMES:
        parent = next((group / name for group in groups if (group / name).is_dir()), None)
        if parent is None:
            continue
        folders[name] = [parent / str(severity) for severity in SEVERITIES]
        missing = next((folder for folder in folders[name] if not folder.is_dir()), None)
        if missing is not None:
            raise UserError(f"{missing} is missing: every corruption needs the severities 1 to 5")
    return folders


@dataclass
class Shape:
    """The size (H, W) and channels of the classifier's input. `to_size` resizes and crops PIL images to the size."""

    to_size: Callable
    size: tuple[int, int]
    convert: Converter


class Corrupted(Images):
    """Images under one corruption, in the shape of the classifier's input.

    Larger images are corrupted after resizing, as in ImageNet-C, smaller ones before, as in CIFAR-10-C. An image's
    random numbers depend on its index in the whole set, also in a `Subset`, so that it is corrupted alike in both.
    """

    def __init__(self, images: Images, corruption: str, severity: int, shape: Shape, seed: int, photographs=()):
        self.images, self.corruption, self.severity, self.shape = images, corruption, severity, shape
        self.seed, self.photographs = seed, photographs
        self.classes, self.targets = images.classes, images.targets

    def load(self, index):
        shape = self.shape
        img = shape.convert(self.images.load(index))
        small = img.height < shape.size[0] or img.width < shape.size[1]
        img = img if small else shape.to_size(img)
        whole_index = self.images.indices[index] if hasattr(self.images, "indices") else index
        img = corrupt(img, self.corruption, self.severity, self.seed, whole_index, self.photographs)
        return shape.to_size(img) if small else img

    def target(self, index):
        return self.images.target(index)

    def name(self, index):
        return self.images.name(index)


def only(evaluation: Evaluation, classes: torch.Tensor) -> Evaluation:
    """Return the images of `evaluation` whose class is among `classes`, indices of the classifier's outputs. Raises
    UserError if there are none."""
    wanted = torch.isin(evaluation.output_indices, classes)
    images: Any = evaluation.images
    chosen = [i for i, target in enumerate(images.targets) if wanted[target]]
    if not chosen:
        raise UserError(f"{evaluation.name} has no image of the {len(classes)} classes of the --ood images")
    labels = (torch.cumsum(wanted, 0) - 1).tolist()
    names = [name for name, is_wanted in zip(images.classes, wanted.tolist()) if is_wanted]
    subset = Files([images.paths[i] for i in chosen], [labels[images.targets[i]] for i in chosen], names)
    return Evaluation(evaluation.name, subset, evaluation.output_indices[wanted])
