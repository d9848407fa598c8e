"""Made-up scenes: scikit-learn's handwritten digits pasted on crops of its two photographs, with exact annotations.

A scene is a function of (seed, split, index). Digits hide each other, but a part of each stays visible. Validation has
other digits and another part of the photographs than training. Neither a download nor a file is needed.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from util.data.dense.annotated import Detected, Objects, Segmented, boxes_of_masks, no_objects
from util.data.dense.rle import encode
from util.errors import UserError
from util.parser import rare

COUNTS = [2000, 200]  # scenes for training and validation
SIZE = 64
MOST = 6  # digits in a scene
SIDES = (0.25, 0.5)  # of a digit, as a share of the scene's
_VISIBLE = 0.4  # share of a digit's pixels that later digits must leave visible
_SPLIT_AT = 0.7  # share of a photograph's width that is for training


def add_scene_arguments(group) -> None:
    """Add the flags of `--dataset scenes`."""
    rare(
        group.add_argument(
            "--scene_digits", type=int, nargs="+", metavar="DIGIT", default=list(range(10)),
            help="scenes: the digits that occur, each a class; 0 1 7 is learned quickly",
        )
    )  # fmt: skip
    rare(
        group.add_argument(
            "--scene_count", type=int, nargs="+", metavar="N", default=COUNTS,
            help="scenes: number for training, and for validation (without it a tenth)",
        )
    )  # fmt: skip
    rare(group.add_argument("--scene_size", type=int, default=SIZE, help="scenes: side of an image in pixels"))
    rare(
        group.add_argument(
            "--scene_sides", type=float, nargs=2, metavar=("LOW", "HIGH"), default=list(SIDES),
            help="scenes: range of a digit's side, as a share of the scene's; larger digits are learned in fewer steps",
        )
    )  # fmt: skip
    rare(group.add_argument("--scene_most", type=int, metavar="N", default=MOST, help="scenes: most digits in one"))
    rare(
        group.add_argument(
            "--scene_seed", type=int, default=0, help="scenes: which scenes; --seed does not change them"
        )
    )


@dataclass(frozen=True)
class Scene:
    """image: (S, S, 3) uint8; classes: (S, S) uint8, 0 for the background, i + 1 for the i-th of the digits that were
    asked for; instances: (S, S) uint8, 0 for none, n for object n - 1; labels: (N,) int64, the values of `classes`;
    masks: (N, S, S) uint8, the visible part; boxes: (N, 4) float32, the extents of the masks."""

    image: np.ndarray
    classes: np.ndarray
    instances: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray


@functools.cache
def _photographs(train: bool) -> list[Image.Image]:
    """Return one split's part of scikit-learn's two photographs."""
    from sklearn.datasets import load_sample_images

    parts = []
    for photograph in load_sample_images().images:
        edge = round(photograph.shape[1] * _SPLIT_AT)
        parts.append(Image.fromarray(photograph[:, :edge] if train else photograph[:, edge:]))
    return parts


@functools.cache
def _digits(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 8, 8) uint8 and labels of scikit-learn's digits, in the split of `--dataset digits`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data: Any = load_digits()
    images = (data.images * (255 / 16)).round().astype(np.uint8)
    split = train_test_split(images, data.target, test_size=0.2, random_state=0, stratify=data.target)
    return split[0 if train else 1], split[2 if train else 3]


def _background(rng, train: bool, size: int) -> np.ndarray:
    """Return a random square of a photograph, resized to (size, size, 3)."""
    photographs = _photographs(train)
    photograph = photographs[rng.randint(len(photographs))]
    side = rng.randint(min(photograph.size) // 3, min(photograph.size) + 1)
    left, top = (rng.randint(length - side + 1) for length in photograph.size)
    crop = photograph.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    return np.array(crop)


def _ink(rng, digit: np.ndarray, size: int, sides: tuple[float, float]) -> np.ndarray:
    """Return a digit (8, 8) as a mask (h, w) of bool, enlarged and without an empty border."""
    height, width = (max(6, round(size * rng.uniform(*sides))) for _ in range(2))
    width = round((2 * height + width) / 3)  # changes the aspect ratio a little
    large = np.asarray(Image.fromarray(digit).resize((width, height), Image.Resampling.BICUBIC)) > 127
    rows, columns = (np.flatnonzero(large.any(axis=axis)) for axis in (1, 0))
    return large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(rng, ink: np.ndarray, masks: list[np.ndarray], whole: list[int], size: int) -> np.ndarray | None:
    """Return the mask (size, size) of a digit at a random place where enough of the earlier ones stays visible, None if
    ten tries give none."""
    for _ in range(10):
        top, left = (rng.randint(size - side + 1) for side in ink.shape)
        mask = np.zeros((size, size), bool)
        mask[top : top + ink.shape[0], left : left + ink.shape[1]] = ink
        if all((other & ~mask).sum() >= _VISIBLE * pixels for other, pixels in zip(masks, whole)):
            return mask
    return None


def make_scene(
    seed: int,
    train: bool,
    index: int,
    size: int,
    digits: tuple[int, ...],
    sides: tuple[float, float] = SIDES,
    most: int = MOST,
) -> Scene:
    """Return a scene of size x size pixels with one to `most` of `digits`, whose sides are a share `sides` of it."""
    # RandomState, not Generator: NumPy keeps the numbers that it draws for all versions.
    rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, int(train), index))))
    images, values = _digits(train)
    image, masks, whole, labels = _background(rng, train, size), [], [], []
    for _ in range(rng.randint(1, most + 1)):
        number = rng.randint(len(digits))
        candidates = np.flatnonzero(values == digits[number])
        mask = _place(rng, _ink(rng, images[candidates[rng.randint(len(candidates))]], size, sides), masks, whole, size)
        if mask is None:
            continue
        image[mask] = rng.randint(256, size=3)
        masks = [*(other & ~mask for other in masks), mask]
        whole.append(int(mask.sum()))
        labels.append(number + 1)
    masks, labels = np.stack(masks).astype(np.uint8), np.array(labels, np.int64)
    numbers = np.arange(1, len(masks) + 1, dtype=np.uint8)
    instances = (masks * numbers[:, None, None]).max(axis=0)
    classes = (masks * labels.astype(np.uint8)[:, None, None]).max(axis=0)
    return Scene(image, classes, instances, labels, masks, boxes_of_masks(masks))


class _Scenes:
    """What both kinds of annotated scenes share: the list of images."""

    def __init__(self, seed: int, train: bool, count: int, size: int, digits: list[int], sides=SIDES, most: int = MOST):
        self.settings, self.objects = (seed, train, size, tuple(digits)), (tuple(sides), most)
        self.targets: Any = [-1] * count
        self._last: tuple[int, Any] = (-1, None)  # index and Scene

    def scene(self, index: int) -> Scene:
        """Return scene `index`. The last one is kept, since its image and its annotation are read one by one."""
        last = self._last  # another thread may replace it
        if last[0] != index:
            seed, train, size, digits = self.settings
            self._last = last = index, make_scene(seed, train, index, size, digits, *self.objects)
        return last[1]

    def load(self, index):
        return Image.fromarray(self.scene(index).image)

    def described(self):
        """Yield what the scenes are a function of."""
        yield repr(self.settings if self.objects == (SIDES, MOST) else (*self.settings, *self.objects))

    def name(self, index):
        return f"{'training' if self.settings[1] else 'validation'} scene {index}"


class SegmentedScenes(_Scenes, Segmented):
    """Scenes whose pixels are background or one of the digits."""

    def __init__(self, *settings, ignore_label: int = 255):
        super().__init__(*settings)
        self.categories = ["background", *map(str, self.settings[3])]
        self.ignore_label = ignore_label

    def annotation(self, index, size):
        return self.scene(index).classes.astype(np.int32)


class DetectedScenes(_Scenes, Detected):
    """Scenes whose objects are the digits; `has_masks` says whether annotations have masks beside the boxes."""

    def __init__(self, *settings, has_masks: bool = True):
        super().__init__(*settings)
        self.has_masks = has_masks
        self.categories = [str(digit) for digit in self.settings[3]]
        self.category_ids = list(range(1, len(self.categories) + 1))

    def annotation(self, index, size):
        scene = self.scene(index)
        nothing, masks = np.zeros(len(scene.labels), bool), scene.masks.copy() if self.has_masks else None
        return Objects(scene.boxes.copy(), scene.labels.copy(), nothing, nothing, masks, index)

    def blank(self, index, size):
        return no_objects(index, size if self.has_masks else None)

    def record(self, index):
        scene, size = self.scene(index), self.settings[2]
        columns = zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks)
        objects = [
            dict(box=box, label=label, crowd=False, difficult=False, area=int(mask.sum()), segmentation=encode(mask))
            for box, label, mask in columns
        ]
        return {"id": index, "height": size, "width": size, "objects": objects}


def settings_of(args, train: bool) -> tuple:
    """Return the arguments of the classes above for the flags. Raises UserError for a flag out of range."""
    digits = list(getattr(args, "scene_digits", range(10)))
    if not all(0 <= digit <= 9 for digit in digits) or len(set(digits)) < len(digits):
        raise UserError(f"--scene_digits {' '.join(map(str, digits))} must be different digits from 0 to 9")
    counts = list(getattr(args, "scene_count", COUNTS))
    if len(counts) > 2 or min(counts) < 1:
        raise UserError(f"--scene_count {' '.join(map(str, counts))} must be one or two positive numbers")
    counts = counts if len(counts) == 2 else [counts[0], max(1, counts[0] // 10)]
    size, seed = getattr(args, "scene_size", SIZE), getattr(args, "scene_seed", 0)
    if not 24 <= size <= 4096:
        raise UserError(f"--scene_size {size} must be from 24 to 4096 pixels")
    if not 0 <= seed < 2**31:
        raise UserError(f"--scene_seed {seed} must not be negative, and below {2**31}")
    sides, most = list(getattr(args, "scene_sides", SIDES)), getattr(args, "scene_most", MOST)
    if not 0 < sides[0] <= sides[1] <= 1:
        raise UserError(f"--scene_sides {sides[0]:g} {sides[1]:g} must be two shares from 0 to 1, the lower one first")
    if not 1 <= most <= 255:
        raise UserError(f"--scene_most {most} must be from 1 to 255")
    return seed, train, counts[0 if train else 1], size, digits, sides, most
