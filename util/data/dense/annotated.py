"""Images with dense annotations: a class for every pixel (`Segmented`), or objects with boxes and masks (`Detected`).

They are `Images` whose labels are -1 (`classes` is None), so that pretraining reads them as images alone. The names of
what is annotated are their `categories`.
"""

import json
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from util.data.sources import Images, Subset
from util.errors import UserError


@dataclass
class Objects:
    """The objects of an image of H x W pixels.

    boxes: (N, 4) float32, left, top, right, bottom in pixels, half-open: a box of all pixels is 0, 0, W, H
    labels: (N,) int64, from 1 on; category i of the data set is i + 1, and 0 stands for the background
    crowd: (N,) bool, a group of objects (COCO)
    difficult: (N,) bool, neither right nor wrong when it is detected (VOC)
    masks: (N, H, W) uint8, 1 inside, or None for boxes alone
    image_id: the number of the image in the annotation file
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    masks: np.ndarray | None
    image_id: int


class Annotated(Images):
    """Images with annotations. `annotation(i, size)` may raise `util.data.images.BROKEN_IMAGE`, and `BadAnnotation` for
    one that does not fit an image of `size` (W, H) or the categories."""

    categories: list[str]

    @abstractmethod
    def annotation(self, index: int, size: tuple[int, int]) -> Any:
        """Return the annotation of an image of `size` (W, H)."""

    def described(self) -> Iterator[str]:
        """Yield texts that differ for sets with other annotations, as far as they are known before images are read."""
        yield json.dumps(self.categories)

    @abstractmethod
    def blank(self, index: int, size: tuple[int, int]) -> Any:
        """Return the annotation that stands for an unreadable one in evaluation: nothing is labelled."""


class Segmented(Annotated):
    """Images with a class for every pixel: annotations are (H, W) int32, indices in `categories`, or `ignore_label`."""

    ignore_label: int

    def blank(self, index, size):
        return np.full((size[1], size[0]), self.ignore_label, np.int32)


class Detected(Annotated):
    """Images with `Objects`. `category_ids` are the numbers of the categories in the annotation file, in the order of
    `categories`."""

    category_ids: list[int]
    has_masks: bool

    @abstractmethod
    def record(self, index: int) -> dict:
        """Return what the annotation file says about an image, without reading the image. Keys: id, height, width and
        objects, a list of dicts with box (as in `Objects`), label (from 1), crowd, difficult, area, and segmentation
        (as in COCO's files, None without)."""

    def ground_truth(self, records: Iterable[dict] | None = None) -> dict:
        """Return the annotations of all images in COCO's format, for pycocotools. Nothing that training leaves out is
        missing. Objects have numbers from 1, because pycocotools takes 0 for no match. `records` are those of all
        images, if the caller has them."""
        images, annotations = [], []
        for record in records or map(self.record, range(len(self))):
            images.append({key: record[key] for key in ("id", "height", "width")})
            for each in record["objects"]:
                left, top, right, bottom = each["box"]
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": record["id"],
                        "category_id": self.category_ids[each["label"] - 1],
                        "bbox": [left, top, right - left, bottom - top],
                        "area": each["area"],
                        "iscrowd": int(each["crowd"]),
                        **({"segmentation": each["segmentation"]} if each["segmentation"] else {}),
                    }
                )
        names = zip(self.category_ids, self.categories)
        categories = [{"id": number, "name": name} for number, name in names]
        return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


class _Part(Subset):
    """A part of annotated images, given by indices."""

    images: Any  # the Annotated whole

    def __init__(self, images: Annotated, indices):
        super().__init__(images, indices)
        self.categories = images.categories

    def described(self):
        return self.images.described()

    def annotation(self, index, size):
        return self.images.annotation(self.indices[index], size)

    def blank(self, index, size):
        return self.images.blank(self.indices[index], size)


class SegmentedPart(_Part, Segmented):
    """A part of segmented images, given by indices."""

    def __init__(self, images: Segmented, indices):
        super().__init__(images, indices)
        self.ignore_label = images.ignore_label


class DetectedPart(_Part, Detected):
    """A part of images with objects, given by indices."""

    def __init__(self, images: Detected, indices):
        super().__init__(images, indices)
        self.category_ids, self.has_masks = images.category_ids, images.has_masks

    def record(self, index):
        return self.images.record(self.indices[index])


def check_categories(
    names: list[str] | None,
    needed: list[str] | None,
    source: str,
    nouns: tuple[str, str] = ("class", "classes"),
    same_names: bool = True,
) -> None:
    """Raise UserError if the `names` that `source` gives the categories are not those `needed`; without `same_names`
    their number suffices. None: not known, or any. `nouns` are words for one category and for several."""
    if names is None or needed is None or names == needed:
        return
    one, several = nouns
    if len(names) != len(needed):
        raise UserError(f"{source} has {len(names)} {several}, but those of the training set are {len(needed)}")
    if same_names:
        here, there = next((a, b) for a, b in zip(names, needed) if a != b)
        raise UserError(f"{source} has the {one} {here!r} where the training set has {there!r}")


def no_objects(image_id: int, size: tuple[int, int] | None = None) -> Objects:
    """Return the annotation of an image without objects; with the `size` (W, H) of the image there are masks, none."""
    nothing = np.zeros(0, bool)
    masks = None if size is None else np.zeros((0, size[1], size[0]), np.uint8)
    return Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), nothing, nothing, masks, image_id)


def boxes_of_masks(masks: np.ndarray) -> np.ndarray:
    """Return the extents (N, 4) float32 of masks (N, H, W), half-open (the largest row and column plus one); zeros for
    an empty mask."""
    boxes = np.zeros((len(masks), 4), np.float32)
    if masks.size:
        for first, axis in ((0, 1), (1, 2)):  # columns, then rows, that the object touches
            touched: np.ndarray = masks.any(axis=axis)
            boxes[:, first] = touched.argmax(axis=1)
            boxes[:, first + 2] = touched.shape[1] - touched[:, ::-1].argmax(axis=1)
        boxes[~touched.any(axis=1)] = 0
    return boxes
