"""Masks in files: from stored values or colours to indices of classes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.file_lists import read_lines
from util.data.images import printable
from util.data.samples import BadAnnotation
from util.errors import UserError

VALUES = 1 << 16  # that a mask of 16 bits can store
_WRONG = -1


@dataclass(frozen=True)
class ColorTable:
    """The colours of RGB-coded masks: `codes`, ascending, of 0xRRGGBB, and the label of each."""

    path: str
    codes: np.ndarray
    labels: np.ndarray

    def values(self, img: Image.Image) -> np.ndarray:
        """Return the labels (H, W) of a mask. Raises ValueError for a colour that is not in the table."""
        red, green, blue = np.moveaxis(np.asarray(img.convert("RGB")).astype(np.int32), 2, 0)
        code = red << 16 | green << 8 | blue
        position = np.searchsorted(self.codes, code).clip(max=len(self.codes) - 1)
        unknown = self.codes[position] != code
        if unknown.any():
            first = int(code[unknown][0])
            raise ValueError(
                f"has the colour {first >> 16} {first >> 8 & 255} {first & 255}, which is not in --color_table "
                f"{self.path}"
            )
        return self.labels[position]


def read_color_table(path: str, ignore_label: int) -> tuple[ColorTable, list[str]]:
    """Read a table with a class per line, `R G B name`, or `name,R,G,B` as in CamVid's class_dict.csv; a header is
    passed over. Colours named ignore, unlabelled or void are not evaluated. Return the table and the names of the
    classes. Raises UserError for another content."""
    codes, labels, names = [], [], []
    for number, line in enumerate(read_lines(path, "--color_table")):
        cells = [cell for cell in re.split(r"[,;\s]+", line.strip()) if cell]
        colour = [int(cell) for cell in cells if cell.isdecimal() and len(cell) <= 3]
        name = " ".join(cell for cell in cells if not cell.isdecimal())
        if not colour and number == 0:
            continue
        if len(colour) != 3 or max(colour) > 255:
            raise UserError(
                f"--color_table {path} has the line {line.strip()!r}: R G B (0 to 255) and a name are needed"
            )
        codes.append(colour[0] << 16 | colour[1] << 8 | colour[2])
        ignored = name.lower() in ("ignore", "unlabelled", "unlabeled", "void")
        labels.append(ignore_label if ignored else len(names))
        names += [] if ignored else [name or str(len(names))]
    if len(set(codes)) < len(codes) or not names:
        raise UserError(f"--color_table {path} {'repeats a colour' if names else 'has no class'}")
    order = np.argsort(codes)
    return ColorTable(path, np.array(codes)[order], np.array(labels, np.int32)[order]), names


def read_class_names(path: str | Path, what: str = "--class_names") -> list[str]:
    """Return the lines of a file of class names. Raises UserError when it has none, and when one is there twice."""
    names = [line.strip() for line in read_lines(path, what)]
    repeated = next((name for name in names if names.count(name) > 1), None)
    if not names or repeated is not None:
        raise UserError(f"{what} {path} {'is empty' if not names else f'repeats {repeated!r}'}: one class per line")
    return names


@dataclass(frozen=True)
class Labelling:
    """The meaning of a data set's masks.

    categories: names of the classes; a label is an index in them, or `ignore_label`
    zero_is_ignored: stored value 0 is unlabelled, and v stands for class v - 1
    stored: the stored value of each class (Cityscapes' ids), where it is not its index; other values of these masks are
        unlabelled
    colors: of RGB-coded masks
    """

    categories: list[str]
    ignore_label: int = 255
    zero_is_ignored: bool = False
    stored: Sequence[int] | None = None
    colors: ColorTable | None = None
    of_file: str = field(default="", compare=False)  # where the names come from, for messages

    @cached_property
    def _table(self) -> np.ndarray:
        """The label of every stored value, (65536,) int32, -1 for those without one."""
        classes = len(self.categories)
        table = np.full(VALUES, _WRONG if self.stored is None else self.ignore_label, np.int32)
        first = int(self.zero_is_ignored)
        table[first : first + classes] = np.arange(classes) if self.stored is None else table[first : first + classes]
        if self.stored is not None:
            table[list(self.stored)] = np.arange(classes)
        elif self.zero_is_ignored:
            table[0] = self.ignore_label
        table[self.ignore_label] = self.ignore_label
        return table

    def labels_of(self, values: Sequence[int]) -> set[int]:
        """Return the labels of stored values; -1 is that of a value without one."""
        return set(self._table[list(values)].tolist())

    def decode(self, img: Image.Image, name: str) -> np.ndarray:
        """Return the labels (H, W) int32 of the mask `img` in the file `name`. Raises BadAnnotation for values or
        colours without a label, and for images that are no masks."""
        if self.colors is not None:
            try:
                return self.colors.values(img)
            except ValueError as error:
                raise BadAnnotation(f"the mask {printable(name)} {error}") from error
        values = stored_values(img, name)
        labels = self._table[values]
        wrong = labels == _WRONG
        if wrong.any():
            raise BadAnnotation(self._out_of_range(int(values[wrong].max()), name))
        return labels

    def _out_of_range(self, value: int, name: str) -> str:
        classes, first = len(self.categories), int(self.zero_is_ignored)
        hint = ""
        if not self.zero_is_ignored:
            hint = ": is 0 unlabelled? then give --zero_is_ignored" if value == classes else ""
        return (
            f"the mask {printable(name)} has the label {value}, but the {classes} classes{self.of_file} are "
            f"{first}..{first + classes - 1}, and --ignore_label is {self.ignore_label}{hint}"
        )


def stored_values(img: Image.Image, name: str) -> np.ndarray:
    """Return the stored values (H, W) of a mask as integers from 0 to 65535; those of a palette image are the indices,
    not the colours. Raises BadAnnotation for images in colour and of other types."""
    if img.format == "JPEG":
        raise BadAnnotation(f"the mask {printable(name)} is a JPEG, whose values are not exact: PNG is needed")
    if img.mode not in ("1", "L", "P", "I") and not img.mode.startswith("I;16"):
        raise BadAnnotation(
            f"the mask {printable(name)} is an image in colour (mode {img.mode}): class indices are needed, or the "
            f"classes of its colours in a file, --color_table"
        )
    values = np.asarray(img)
    if values.dtype == bool:
        return values.astype(np.uint8)
    if values.dtype not in (np.uint8, np.uint16) and values.size and not 0 <= values.min() <= values.max() < VALUES:
        raise BadAnnotation(f"the mask {printable(name)} has labels from {values.min()} to {values.max()}")
    return values
