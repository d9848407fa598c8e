"""Transforms of an image together with its annotation, by torchvision.transforms.v2: what moves one moves the other.

A transform is called with an image of pillow's, already in the model's channels, and an annotation, and returns the
normalised tensor and the target. Random numbers are torch's, which `util.data.samples` seeds for every sample. Images
are resized bilinearly, masks to the nearest pixel (NEAREST_EXACT, which is pillow's; v2's NEAREST takes other pixels).
"""

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from util.data.dense.annotated import Objects, boxes_of_masks
from util.errors import UserError

Shape = tuple[int, int]  # (H, W)
_TRIES = 10  # crops that are tried for one in which no class has too large a share


def _times(shape: Shape, factor: float) -> Shape:
    return max(1, int(shape[0] * factor + 0.5)), max(1, int(shape[1] * factor + 0.5))


def scaled_shape(shape: Shape, box: tuple[float, float]) -> Shape:
    """Return the largest (H, W) of the aspect ratio of `shape` that fits into `box`."""
    return _times(shape, min(box[0] / shape[0], box[1] / shape[1]))


def short_side_shape(shape: Shape, short: float, longest: float) -> Shape:
    """Return (H, W) after the shorter side became `short`, or the longer one `longest` if it would be more."""
    return _times(shape, min(longest / max(shape), short / min(shape)))


Area = tuple[slice, slice]  # rows and columns
_ALL = slice(None), slice(None)


def resize_masks(masks: torch.Tensor, shape: Shape, area: Area = _ALL) -> torch.Tensor:
    """Resize masks (..., H, W) to `shape`, and return an `area` of the result. A pixel gets the value under its centre:
    NEAREST_EXACT, in whole numbers, so that any type keeps its values."""
    rows, columns = (
        (2 * torch.arange(new)[part] + 1) * old // (2 * new) for old, new, part in zip(masks.shape[-2:], shape, area)
    )
    return masks.index_select(-2, rows).index_select(-1, columns)


def resize_image(image: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Resize an image (C, H, W) uint8 bilinearly, with antialiasing. One of that size is returned unchanged."""
    if tuple(image.shape[-2:]) == tuple(shape):
        return image
    return F.resize_image(image, list(shape), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)


class Distort(v2.RandomPhotometricDistort):
    """Change brightness, contrast, saturation and hue, each with probability 0.5, as mmsegmentation's
    PhotoMetricDistortion, which exchanges no channels."""

    def __init__(self):
        super().__init__(hue=(-0.1, 0.1))

    def make_params(self, flat_inputs):
        return {**super().make_params(flat_inputs), "channel_permutation": None}


def check_distortion(in_chans: int) -> None:
    """Raise UserError for channels whose photometric distortion is not defined."""
    if in_chans not in (1, 3):
        raise UserError(
            f"--in_chans {in_chans}: photometric distortion needs 1 (grey) or 3 (RGB) channels: give --no_distort"
        )


class _Paired:
    """What the transforms share: from pillow's image to a tensor, and normalisation. `size` is the (H, W) of the
    network's input."""

    def __init__(self, size: Shape, mean, std):
        self.size = (size[0], size[1])
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def normalised(self, image: torch.Tensor, shape: Shape) -> torch.Tensor:
        """Normalise an image (C, h, w) uint8, and add zeros, which are the mean colour, at the right and at the bottom
        up to `shape`. Returns float32, at least as large as the image."""
        image = (image.as_subclass(torch.Tensor).float() / 255 - self.mean) / self.std
        return _padded(image, shape, 0.0)


def _padded(tensor: torch.Tensor, shape: Shape, value: float) -> torch.Tensor:
    bottom, right = (max(0, wanted - side) for wanted, side in zip(shape, tensor.shape[-2:]))
    return torch.nn.functional.pad(tensor, (0, right, 0, bottom), value=value) if bottom or right else tensor


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _below(limit: int) -> int:
    """Return a random number from 0 to `limit`, both included."""
    return int(torch.randint(limit + 1, ()))


# Segmentation ---------------------------------------------------------------------------------------------------------


class SegmentationTraining(_Paired):
    """Scale jitter, random crop, flip and photometric distortion, as in BEiT's and MAE's transfer to ADE20K.

    size: (H, W) of the crop; short_side: side to which an image is resized at scale 1 (the crop's shorter side), its
    longer side at most four times as long; scale: range of the factor; max_ratio: share of the largest class in a crop,
    0.75, above which another crop is tried, up to ten times; flip: probability; distort: photometric distortion.
    Targets are (H, W) int64; `ignore_label` fills what lies outside the image.
    """

    def __init__(
        self,
        size: Shape,
        mean,
        std,
        ignore_label: int = 255,
        scale: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        max_ratio: float = 0.75,
        flip: float = 0.5,
        distort: bool = True,
    ):
        super().__init__(size, mean, std)
        if distort:
            check_distortion(len(mean))
        self.ignore_label, self.scale, self.short_side = ignore_label, scale, short_side or min(size)
        self.max_ratio, self.flip, self.distort = max_ratio, flip, Distort() if distort else None

    def __call__(self, img: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = F.pil_to_tensor(img), torch.from_numpy(labels)
        short = self.short_side * _uniform(*self.scale)
        shape = short_side_shape((img.height, img.width), short, 4 * short)
        image, mask = resize_image(image, shape), resize_masks(mask, shape)
        top, left = self._crop(mask)
        area = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        image, mask = tv_tensors.Image(image[:, *area]), tv_tensors.Mask(mask[area])
        if torch.rand(()) < self.flip:
            image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
        if self.distort is not None:
            image = self.distort(image)
        target = _padded(mask.as_subclass(torch.Tensor).long(), self.size, self.ignore_label)
        return self.normalised(image, self.size), target

    def _crop(self, mask: torch.Tensor) -> tuple[int, int]:
        """Return top and left of a random crop in which no class has a larger share than `max_ratio` of the labelled
        pixels, or of the last one that was tried."""
        for _ in range(_TRIES):
            top, left = (_below(max(0, side - part)) for side, part in zip(mask.shape, self.size))
            if self.max_ratio >= 1:
                break
            counts = torch.bincount(mask[top : top + self.size[0], left : left + self.size[1]].flatten())
            counts[self.ignore_label : self.ignore_label + 1] = 0
            if (counts > 0).sum() > 1 and counts.max() < self.max_ratio * counts.sum():
                break
        return top, left


class SegmentationEvaluation(_Paired):
    """Resize an image for evaluation; the target (H, W) int64 keeps the original size, at which predictions are scored.

    With `short_side`, the shorter side gets that length and the longer one at most four times as much (sliding windows
    of `size`); without it the image is made to fit into `size`. Zeros are added at the right and at the bottom up to
    `size`; `shape(H, W)` is the part of the network's input that has the image.
    """

    def __init__(self, size: Shape, mean, std, short_side: int | None = None):
        super().__init__(size, mean, std)
        self.short_side = short_side

    def shape(self, height: int, width: int) -> Shape:
        """Return the (h, w) to which an image of this size is resized. It is at the top left of the input."""
        if self.short_side is None:
            return scaled_shape((height, width), self.size)
        return short_side_shape((height, width), self.short_side, 4 * self.short_side)

    def __call__(self, img: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        image = resize_image(F.pil_to_tensor(img), self.shape(img.height, img.width))
        return self.normalised(image, self.size), torch.from_numpy(labels).long()


class SegmentationInput(SegmentationEvaluation):
    """Make image and mask fit into `size`: targets (H, W) int64 have the size of the input, and `ignore_label` outside
    the image."""

    def __init__(self, size: Shape, mean, std, ignore_label: int = 255):
        super().__init__(size, mean, std)
        self.ignore_label = ignore_label

    def __call__(self, img: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        image, target = super().__call__(img, labels)
        mask = resize_masks(target, self.shape(img.height, img.width))
        return image, _padded(mask, self.size, self.ignore_label)


class SegmentationBatches(SegmentationEvaluation):
    """As `SegmentationEvaluation`, with targets {"labels": (H, W)}: images of several sizes form a batch, if their
    inputs have one size."""

    def __call__(self, img: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, dict]:
        image, target = super().__call__(img, labels)
        return image, {"labels": target}


# Detection ------------------------------------------------------------------------------------------------------------


class DetectionTraining(_Paired):
    """Large-scale jitter (Ghiasi et al. 2021): an image is resized to `scale` times the largest size that fits into
    `size`, cropped at random to `size` or padded, and mirrored with probability `flip`.

    Targets are dicts: boxes (N, 4) float32, left, top, right, bottom in pixels of the input; labels (N,) int64 from 1;
    masks (N, H, W) uint8 if the annotation has them; image_id () int64; covered (2,) int64, the (h, w) of the input
    that are not padding. Objects of which less than a pixel in height or
    width remains are left out; a box is the extent of its mask, if there is one.
    """

    def __init__(self, size: Shape, mean, std, scale: tuple[float, float] = (0.1, 2.0), flip: float = 0.5):
        super().__init__(size, mean, std)
        self.scale, self.flip = scale, flip

    def __call__(self, img: Image.Image, objects: Objects) -> tuple[torch.Tensor, dict]:
        image, before = F.pil_to_tensor(img), (img.height, img.width)
        factor = _uniform(*self.scale)
        shape = scaled_shape(before, (self.size[0] * factor, self.size[1] * factor))
        top, left = (_below(max(0, side - part)) for side, part in zip(shape, self.size))
        area = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        image = tv_tensors.Image(resize_image(image, shape)[:, *area])
        canvas = (image.shape[-2], image.shape[-1])
        boxes = torch.from_numpy(objects.boxes) * _factors(before, shape) - torch.tensor([left, top] * 2)
        boxes = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas)
        masks = objects.masks
        if masks is not None:
            masks = tv_tensors.Mask(resize_masks(torch.from_numpy(masks), shape, area))
        if torch.rand(()) < self.flip:
            image, boxes = F.horizontal_flip(image), F.horizontal_flip(boxes)
            masks = None if masks is None else F.horizontal_flip(masks)
        target = {**self._target(objects, boxes, masks), "covered": torch.tensor(canvas)}
        return self.normalised(image, self.size), target

    def _target(self, objects: Objects, boxes, masks) -> dict:
        if masks is None:
            boxes = F.clamp_bounding_boxes(boxes).as_subclass(torch.Tensor)
        else:
            boxes = torch.from_numpy(boxes_of_masks(masks.as_subclass(torch.Tensor).numpy()))
        kept = ((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1)
        target = {"boxes": boxes[kept], "labels": torch.from_numpy(objects.labels)[kept]}
        if masks is not None:
            target["masks"] = _padded(masks.as_subclass(torch.Tensor)[kept], self.size, 0)
        return {**target, "image_id": torch.tensor(objects.image_id)}


class DetectionEvaluation(_Paired):
    """Resize an image to the largest size that fits into `size`, and add zeros at the right and at the bottom.

    Targets are dicts: size (2,) int64, the original (H, W). What is scored is read from the records of the images
    (`evaluation.detector.truth_of`).
    """

    def shape(self, height: int, width: int) -> Shape:
        """Return the (h, w) to which an image of this size is resized. It is at the top left of the input."""
        return scaled_shape((height, width), self.size)

    def __call__(self, img: Image.Image, objects: Objects) -> tuple[torch.Tensor, dict]:
        size = img.height, img.width
        image = resize_image(F.pil_to_tensor(img), self.shape(*size))
        return self.normalised(image, self.size), {"size": torch.tensor(size)}


def _factors(before: Shape, after: Shape) -> torch.Tensor:
    """Return the factors (4,) float32 that scale the coordinates of a box (left, top, right, bottom)."""
    vertical, horizontal = (new / old for old, new in zip(before, after))
    return torch.tensor([horizontal, vertical] * 2)
