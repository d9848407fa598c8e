"""Judging a classifier away from its training data: which class a folder of an evaluation set is, the mean corruption
error of Hendrycks and Dietterich 2019, and the detection of foreign images of Hendrycks et al. 2021 (ImageNet-O)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import average_precision_score

from evaluation.corruptions import NAMES, SEVERITIES, corrupt
from util.data.file_lists import class_names, read_lines
from util.data.readers import class_folder
from util.data.sources import Files, Images
from util.data.transforms import to_channels
from util.errors import UserError

# Errors of AlexNet in percent, averaged over the severities, by which those of others are divided (Hendrycks and
# Dietterich 2019, Table 1 and its code), and its error on clean images.
ALEXNET = dict(zip(NAMES, (88.6, 89.4, 92.3, 82.0, 82.6, 78.6, 79.8, 86.7, 82.7, 81.9, 56.5, 85.3, 64.6, 71.8, 60.7)))
ALEXNET_CLEAN = 43.5


def corruption_error(errors: dict[str, list[float]], clean: float | None = None) -> float:
    """Mean corruption error in percent of errors in percent, {corruption: one per severity}: the mean over the 15 of
    the mean error over AlexNet's (Section 4.2). With the error on `clean` images, the relative one, of what the
    corruption adds: it may be negative."""
    rows = []
    for name in NAMES:
        mean = float(np.mean(errors[name]))
        rows.append(mean / ALEXNET[name] if clean is None else (mean - clean) / (ALEXNET[name] - ALEXNET_CLEAN))
    return 100 * float(np.mean(rows))


def detection_aupr(inside: np.ndarray, outside: np.ndarray) -> float:
    """Area under the precision-recall curve in percent, when images are called foreign in the order of confidence, the
    lowest first. Confidences (M,) of images of the known classes, and of foreign ones, which are the positives."""
    foreign = np.concatenate([np.zeros(len(inside)), np.ones(len(outside))])
    return 100 * float(average_precision_score(foreign, -np.concatenate([inside, outside])))


# Classes --------------------------------------------------------------------------------------------------------------


@dataclass
class Classes:
    """What a classifier tells apart: how many classes, their names in the order of its outputs (None: not known), and
    where those are from."""

    count: int
    names: list[str] | None
    source: str

    def places(self, found: list[str], where: str) -> torch.Tensor:
        """The outputs (k,) of the classes called `found`. ImageNet-V2's folders are numbers, from 0: the outputs.

        UserError for one that the classifier does not know, and where its names are needed and not known.
        """
        numbered = all(name.isdecimal() and int(name) < self.count for name in found)
        if numbered and len({int(name) for name in found}) == len(found) and not set(found) <= set(self.names or ()):
            return torch.tensor([int(name) for name in found])
        if self.names is None:
            raise UserError(
                f"{self.source} does not say what its {self.count} classes are called: give --classes, a file with a "
                f"name per line, or --train_classes, the folder with the class folders it was trained on"
            )
        place = {name: number for number, name in enumerate(self.names)}
        unknown = [name for name in found if name not in place]
        if unknown:
            raise UserError(
                f"{where} has the class {unknown[0]!r}, which is none of the {self.count} classes of {self.source} "
                f"({', '.join(self.names[:3])}, ...); {len(unknown)} of its {len(found)} classes are not"
            )
        return torch.tensor([place[name] for name in found])


def known_classes(path: str, count: int, stored: list[str] | None, file: str = "", folder: str = "") -> Classes:
    """The classes of the classifier in `path`: of `--classes`, of `--train_classes`, or as its checkpoint says.
    UserError when both flags are given, when they cannot be read, or when the number is not `count`."""
    if file and folder:
        raise UserError("--classes and --train_classes say the same twice: give one of them")
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
        raise UserError(f"{source} names {len(names)} classes, and the classifier of {path} tells {count} apart")
    if names is not None and len(set(names)) < count:
        raise UserError(f"{source} names a class twice")
    return Classes(count, names, source)


# Images ---------------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """An evaluation set: images whose label i is output `places[i]` of the classifier."""

    name: str
    images: Images
    places: torch.Tensor


def open_folder(path: str | Path, classes: Classes) -> Evaluation:
    """A folder of class folders. UserError when it is none, and for classes that the classifier does not know."""
    images = class_folder(_folder(path))
    return Evaluation(Path(path).name, images, classes.places(images.classes, str(path)))


def open_foreign(path: str | Path, classes: Classes) -> Evaluation:
    """A folder of images of no class. Where its folders are called after classes, as ImageNet-O's after those that its
    images are mistaken for, these are what the images are to be told from, else all classes."""
    images = class_folder(_folder(path))
    if classes.names is not None and not set(images.classes) & set(classes.names):
        print(f"{path}: none of its folders is called after a class, its images are told from all {classes.count}")
        return Evaluation(Path(path).name, Files(images.paths, [0] * len(images), None), torch.arange(classes.count))
    return Evaluation(Path(path).name, images, classes.places(images.classes, str(path)))


def _folder(path: str | Path) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{path} is not a folder")
    return folder


def corruption_folders(path: str | Path) -> dict[str, list[Path]]:
    """{corruption: its five severity folders} of a folder like ImageNet-C: corruption/severity/class/image, perhaps
    with the groups of its download (noise/, blur/, ...) above; {} for any other folder. Corruptions beside
    the 15 are left out.

    UserError when a severity is missing.
    """
    root = _folder(path)
    groups = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    found = {}
    for name in NAMES:
        parent = next((group / name for group in groups if (group / name).is_dir()), None)
        if parent is None:
            continue
        found[name] = [parent / str(severity) for severity in SEVERITIES]
        missing = next((folder for folder in found[name] if not folder.is_dir()), None)
        if missing is not None:
            raise UserError(f"{missing} is missing: every corruption needs the severities 1 to 5")
    return found


@dataclass
class Shape:
    """How images come to the size (H, W) of the input and to its channels: `to_size` is of PIL images."""

    to_size: Callable
    size: tuple[int, int]
    in_chans: int


class Corrupted(Images):
    """Other images under one corruption, in the shape of the input.

    Larger images are corrupted after they came to that size, as ImageNet-C's were, smaller ones before, as CIFAR-10-C's
    were. The random numbers belong to an image's place in the whole list where `images` are a part of one, so that a
    part is corrupted like the whole.
    """

    def __init__(self, images: Images, corruption: str, severity: int, shape: Shape, seed: int, photographs=()):
        self.images, self.corruption, self.severity, self.shape = images, corruption, severity, shape
        self.seed, self.photographs = seed, photographs
        self.classes, self.targets = images.classes, images.targets

    def load(self, index):
        shape = self.shape
        img = to_channels(self.images.load(index), shape.in_chans)
        small = img.height < shape.size[0] or img.width < shape.size[1]
        img = img if small else shape.to_size(img)
        number = self.images.indices[index] if hasattr(self.images, "indices") else index
        img = corrupt(img, self.corruption, self.severity, self.seed, number, self.photographs)
        return shape.to_size(img) if small else img

    def target(self, index):
        return self.images.target(index)

    def name(self, index):
        return self.images.name(index)


def only(evaluation: Evaluation, classes: torch.Tensor) -> Evaluation:
    """The images of a folder that are of some classes, given as outputs of the classifier. UserError without any."""
    wanted = torch.isin(evaluation.places, classes)
    images = evaluation.images
    chosen = [i for i, target in enumerate(images.targets) if wanted[target]]
    if not chosen:
        raise UserError(f"{evaluation.name} has no image of the {len(classes)} classes of the foreign images")
    labels = (torch.cumsum(wanted, 0) - 1).tolist()
    names = [name for name, is_wanted in zip(images.classes, wanted.tolist()) if is_wanted]
    part = Files([images.paths[i] for i in chosen], [labels[images.targets[i]] for i in chosen], names)
    return Evaluation(evaluation.name, part, evaluation.places[wanted])
