"""Lists of images (`Images`) from files, arrays, Hugging Face tables and torchvision data sets."""

import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np
from PIL import Image

from util.data.band_files import open_file, read_file
from util.data.bands import BandLayout
from util.data.compact import PathList, Repeated, compact, take
from util.data.file_lists import is_below
from util.data.images import BROKEN_IMAGE, open_regular, read_image
from util.errors import UserError


class Images(ABC):
    """A list of images with integer labels, -1 where there are none.

    `classes` are the names of the labels, None without labels. `groups` says which images `--val_fraction` and the
    stages of MLO-MAE do not divide (those of one patient), None if all may be divided. `load(i)`, `open(i)` and
    `file(i)` may raise `util.data.images.BROKEN_IMAGE`; `name(i)` is the file or record of image i, for messages.
    """

    classes: list[str] | None = None
    groups: Sequence[str] | None = None
    targets: Sequence[int]

    def __len__(self) -> int:
        return len(self.targets)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Return an image in the mode in which it is stored."""

    def open(self, index: int) -> Image.Image:
        """Return an image that may not be decoded yet."""
        return self.load(index)

    def file(self, index: int) -> str:
        """Return the path of an image's file, "" when it has none. Raises OSError for a file that must not be read."""
        return ""

    def expect_bands(self, count: int | None, axis: str | None = None) -> None:  # noqa: B027
        """Say how files of bands are read: `count` bands, where `axis` says (`BandLayout`); None leaves what was said
        before. Without it arrays are not read. It has no effect on images that are not in files."""

    def sampled(self, count: int) -> Iterator[tuple[str, Image.Image]]:
        """Yield names and images, not yet decoded, of up to `count` readable images, evenly spaced over the list."""
        for index in dict.fromkeys(np.linspace(0, len(self) - 1, min(count, len(self))).astype(int).tolist()):
            try:
                yield self.name(index), self.open(index)
            except BROKEN_IMAGE:
                continue  # reported and counted when it is used

    def target(self, index: int) -> int:
        """Return the label of an image that has been loaded (some data sets do not know it before)."""
        return self.targets[index]

    def name(self, index: int) -> str:
        return f"image {index}"


class Files(Images):
    """Images in files. If `within` is set, links must not lead out of that folder."""

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        classes: list[str] | None,
        within: str = "",
        groups: Sequence[str] | None = None,
    ):
        self.paths = paths if isinstance(paths, PathList) else PathList(paths)
        self.targets, self.classes, self.within = compact(targets), classes, within
        self.groups = Repeated(groups) if isinstance(groups, list) else groups
        self._bands, self._band_axis = None, "auto"

    def expect_bands(self, count, axis=None):
        self._bands, self._band_axis = count or self._bands, axis or self._band_axis

    @property
    def layout(self) -> BandLayout | None:
        """How files of bands are read, None before `expect_bands`."""
        return BandLayout(self._bands, self._band_axis) if self._bands else None

    def load(self, index):
        with open_regular(self.file(index)) as file:
            return read_file(file, self.layout)

    def open(self, index):
        with open_regular(self.file(index)) as file:
            return open_file(io.BytesIO(file.read()), self.layout)

    def file(self, index):
        path = self.paths[index]
        if self.within and not is_below(os.path.realpath(path), self.within):
            raise OSError(f"it is a link out of --data_path {self.within}: give --allow_outside to follow it")
        return path

    def name(self, index):
        return self.paths[index]


class Arrays(Images):
    """Images in memory: (N, H, W) or (N, H, W, C) uint8."""

    def __init__(self, arrays: np.ndarray, targets, classes: list[str]):
        self.arrays, self.targets, self.classes = arrays, [int(t) for t in targets], list(classes)

    def load(self, index):
        return Image.fromarray(self.arrays[index])


class Subset(Images):
    """A part of another list, given by indices."""

    def __init__(self, images: Images, indices):
        indices = indices if isinstance(indices, (np.ndarray, range)) else [int(index) for index in indices]
        self.images, self.indices, self.classes = images, compact(indices), images.classes
        self.targets = take(images.targets, self.indices)
        self.groups = None if images.groups is None else take(images.groups, self.indices)

    def expect_bands(self, count, axis=None):
        self.images.expect_bands(count, axis)

    def load(self, index):
        return self.images.load(self.indices[index])

    def open(self, index):
        return self.images.open(self.indices[index])

    def file(self, index):
        return self.images.file(self.indices[index])

    def target(self, index):
        return self.images.target(self.indices[index])

    def name(self, index):
        return self.images.name(self.indices[index])


class HuggingFaceImages(Images):
    """`hfds/...`, read from the table of timm's reader: timm's own data set would skip unreadable images, convert all
    images to RGB and require a label."""

    def __init__(self, reader):
        self.table = reader.dataset
        self.column = self._image_column(reader.image_key)
        labelled = reader.label_key in self.table.column_names
        labels = self.table[reader.label_key] if labelled else [-1] * len(self.table)
        if not all(isinstance(label, Integral) for label in labels):
            wrong = next(label for label in labels if not isinstance(label, Integral))
            raise UserError(f"the column {reader.label_key} has {wrong!r}, which is no class: choose --label_column")
        self.targets = [int(label) for label in labels]
        self.classes = sorted(reader.class_to_idx, key=reader.class_to_idx.get) or None

    def _image_column(self, wanted: str) -> str:
        """Return `wanted` if this column has images, else the only column that has: CIFAR's is called img, and the
        library makes up an empty column for a name that does not exist. Raises UserError if there is none, or several.
        """
        first = self.table[0] if len(self.table) else {}
        found = [name for name, value in first.items() if isinstance(value, dict) and {"bytes", "path"} <= value.keys()]
        if wanted in found or not first:
            return wanted
        if len(found) != 1:
            raise UserError(
                f"the table has no images in the column {wanted!r}: choose one of {', '.join(found or first)} with "
                f"--image_column"
            )
        print(f"images are read from the column {found[0]}")
        return found[0]

    def load(self, index):
        record = self.table[index][self.column]
        with io.BytesIO(record["bytes"]) if record["bytes"] else open_regular(record["path"]) as file:
            return read_image(file)

    def name(self, index):
        return f"{index}: {self.table[index][self.column]['path']}"


class TorchvisionImages(Images):
    """A torchvision data set."""

    targets: list[int]

    def __init__(self, dataset):
        self.dataset = dataset
        self.targets = [int(t) for t in dataset.targets] if hasattr(dataset, "targets") else [-1] * len(dataset)
        self.classes = list(dataset.classes) if hasattr(dataset, "classes") else None

    def load(self, index):
        img, self.targets[index] = self.dataset[index]
        return img
