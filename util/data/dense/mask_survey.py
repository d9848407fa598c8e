"""What the masks of a data set say about its labels, before training: which values occur, and what they mean."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from util.data.dense.mask_labels import ColorTable, Labelling, stored_values
from util.data.images import BROKEN_IMAGE, open_image, open_regular, printable, read_image, reason_of
from util.data.samples import BadAnnotation
from util.errors import UserError
from util.parallel.distributed import is_main_process

SAMPLE = 64  # masks that are checked at the start, of a data set whose classes are known


@dataclass
class Found:
    """What a reader finds out about one split.

    images, masks: paths by key; where masks must be for a missing one is `folder`
    names: of the classes, None if nothing names them
    certain: whether the names are those of the data set, and not numbers that stand for them
    """

    images: dict[str, str]
    masks: dict[str, str]
    folder: str
    names: list[str] | None
    certain: bool = True
    source: str = ""  # of the names
    stored: list[int] | None = None
    zero_is_ignored: bool | None = None  # None: not known


def read_mask(path: str):
    """Return a decoded mask. Raises OSError for one of the errors of BROKEN_IMAGE, naming the file."""
    try:
        with open_regular(path) as file:
            return read_image(file)
    except BROKEN_IMAGE as error:
        raise OSError(f"its mask {path}: {reason_of(error)}") from error


def wrong_size(mask: str, mask_size, image: str, size) -> str:
    return (
        f"the mask {printable(mask)} has {mask_size[0]} x {mask_size[1]} pixels, but its image {printable(image)} has "
        f"{size[0]} x {size[1]}"
    )


def settle_labelling(
    found: Found, given: bool | None, paths: Sequence[str], masks: Sequence[str], colors: ColorTable | None, ignore: int
) -> Labelling:
    """Check masks, a sample or, if no names say how many classes there are, all, and return what their values mean.
    `given`: the flag --zero_is_ignored, None without it. Raises UserError for masks that are wrong."""
    indices = range(len(masks))
    if found.names is not None and len(masks) > SAMPLE:
        indices = np.linspace(0, len(masks) - 1, SAMPLE).astype(int).tolist()
    if colors is not None or found.stored is not None:
        labelling = Labelling(found.names or [], ignore, False, found.stored, colors)
        labels = _values(paths, masks, indices, labelling.decode)
        _check_some(labels, ignore, masks)
        return labelling
    values = _values(paths, masks, indices, stored_values)
    zero = found.zero_is_ignored if given is None else given
    _check_some(values if not zero else [value for value in values if value], ignore, masks)
    labelling = _from_values(found, zero, values, ignore)
    _note_ignored_class(labelling)
    _check_values(labelling, masks, indices, values)
    if len(indices) == len(masks):
        _note_absent(labelling, values, found.folder)
    return labelling


def _from_values(found: Found, zero: bool | None, values: list[int], ignore: int) -> Labelling:
    """Return the labelling of masks in which `values` occur; `zero` is None if nothing says whether 0 is unlabelled."""
    highest, names, source = max((value for value in values if value != ignore), default=0), found.names, found.source
    if names is None:
        names, source = [str(index + bool(zero)) for index in range(highest + (not zero))], ""
        print(f"note: without classes.txt or --class_names there are {len(names)} classes, after the masks")
    if zero is None and highest == len(names) and 0 in values:
        print(
            f"note: the masks have the labels 0 to {highest} for {len(names)} classes: 0 is read as unlabelled "
            f"(--zero_is_ignored); --no_zero_is_ignored refuses them"
        )
        zero = True
    return Labelling(names, ignore, bool(zero), of_file=source)


def _values(paths, masks, indices, values_of: Callable) -> list[int]:
    """Return the values that occur in masks, ascending. Unreadable ones are passed over: they are counted when they are
    used. Raises UserError for a mask of another size than its image, and what `values_of(image, name)` raises."""

    def of_one(index: int) -> np.ndarray:
        try:
            img, size = read_mask(masks[index]), _size_of(paths[index])
        except BROKEN_IMAGE:
            return np.zeros(0, int)
        if img.size != size:
            raise BadAnnotation(wrong_size(masks[index], img.size, paths[index], size))
        return np.flatnonzero(np.bincount(values_of(img, masks[index]).ravel()))

    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        hidden = None if is_main_process() and len(indices) > SAMPLE else True
        found = list(tqdm(pool.map(of_one, indices), "reading masks", len(indices), disable=hidden, leave=False))
    return np.unique(np.concatenate(found)).tolist()


def _size_of(path: str) -> tuple[int, int]:
    with open_regular(path) as file:
        return open_image(file).size


def _check_some(values: Iterable[int], ignore: int, masks) -> None:
    """Raise UserError if all pixels of the sample are ignored."""
    if not set(values) - {ignore}:
        raise UserError(
            f"the masks have no label: all pixels of {printable(masks[0])} and of the others that were read are "
            f"--ignore_label {ignore} or unlabelled"
        )


def _check_values(labelling: Labelling, masks, indices, values: list[int]) -> None:
    """Raise UserError, naming a mask, if one of the values that occur is no label, and for masks of 0 and 255 only."""
    if values == [0, 255] and labelling.ignore_label == 255:
        raise UserError(
            f"the masks, such as {printable(masks[0])}, have only the values 0 and 255, and 255 is --ignore_label: if "
            f"255 is a class, give --color_table FILE with the lines '0 0 0 background' and '255 255 255 NAME'"
        )
    if min(labelling.labels_of(values)) < 0:
        for index in indices:
            try:
                labelling.decode(read_mask(masks[index]), masks[index])
            except BadAnnotation as error:
                raise UserError(str(error)) from error
            except BROKEN_IMAGE:
                continue


def _note_ignored_class(labelling: Labelling) -> None:
    ignore, classes = labelling.ignore_label, len(labelling.categories)
    if labelling.zero_is_ignored and ignore <= classes:  # the stored values are 1 to the number of classes
        raise UserError(
            f"--ignore_label {ignore} is also one of the {classes} classes once --zero_is_ignored has moved them: "
            f"give a value that no mask has, such as 65535"
        )
    if ignore < classes:
        print(f"note: --ignore_label {ignore} is the class {labelling.categories[ignore]!r}, which is not evaluated")


def _note_absent(labelling: Labelling, values: list[int], folder: str) -> None:
    present = labelling.labels_of(values)
    absent = [name for index, name in enumerate(labelling.categories) if index not in present]
    if absent:
        print(f"note: {len(absent)} classes occur in no mask of {folder}, among them {printable(absent[0])!r}")
