"""The transforms of pretraining (`util.data.transforms`) for an image with its mask, and the labels of patches.

The image becomes what the transform of images alone makes of it with the same random numbers, bit for bit; the mask
follows it.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from util.data.dense.transforms import resize_masks
from util.data.random_steps import GaussianBlur, RandomHorizontalFlip, Solarization
from util.data.transforms import ResizeShortSide, ToPixels, ToTensor, resized_shape

Pair = tuple[Image.Image, torch.Tensor]  # an image, and its mask (H, W), in which 0 is a pixel without a label


def _resized_crop(step: Any, img, mask) -> Pair:
    top, left, height, width = area = step.get_params(img, step.scale, step.ratio)
    mask = resize_masks(mask[top : top + height, left : left + width], step.size)
    return F.resized_crop(img, *area, step.size, step.interpolation, antialias=step.antialias), mask


def _random_crop(step: Any, img, mask) -> Pair:
    img, mask = F.pad(img, step.padding), F.pad(mask, step.padding)
    area = step.get_params(img, step.size)
    return F.crop(img, *area), F.crop(mask, *area)


def _centre_crop(step: Any, img, mask) -> Pair:
    return F.center_crop(img, step.size), F.center_crop(mask, step.size)


def _flip(step: RandomHorizontalFlip, img, mask) -> Pair:
    return (F.hflip(img), F.hflip(mask)) if step.drawn() else (img, mask)


def _resize(step: Any, img, mask) -> Pair:
    resized, whole = step(img), step.size
    if isinstance(step, ResizeShortSide):
        whole = resized_shape(img.height, img.width, step.size) if min(img.size) != step.size else mask.shape
    # Of a long strip, `resized` is only the centre.
    tops = ((full - part) // 2 for full, part in zip(whole, (resized.height, resized.width)))
    area = tuple(slice(top, top + part) for top, part in zip(tops, (resized.height, resized.width)))
    return resized, resize_masks(mask, whole, area)


_GEOMETRIC = {
    transforms.RandomResizedCrop: _resized_crop,
    transforms.RandomCrop: _random_crop,
    transforms.CenterCrop: _centre_crop,
    RandomHorizontalFlip: _flip,
    transforms.Resize: _resize,
}
# Steps that leave every pixel where it is.
_PHOTOMETRIC = (transforms.RandomChoice, transforms.Grayscale, transforms.ColorJitter, Solarization, GaussianBlur)
_PHOTOMETRIC += (ToTensor, ToPixels, transforms.Normalize)


class PairedSteps:
    """The steps of a transform of images, applied to an image and its mask.

    Returns the tensor (C, H, W) and the labels (H, W) int64; `ignore_label` fills what lies outside the image.
    Raises TypeError for a step that is not known to leave pixels where they are, or how it moves them.
    """

    def __init__(self, transform: transforms.Compose, size: tuple[int, int], ignore_label: int = 255):
        self.transforms, self.size, self.ignore_label = transform.transforms, tuple(size), ignore_label
        self.steps = [(step, self._follower(step)) for step in self.transforms]

    def with_steps(self, steps: list) -> "PairedSteps":
        """Return the same with other steps."""
        other = copy.copy(self)
        other.transforms, other.steps = steps, [(step, self._follower(step)) for step in steps]
        return other

    @staticmethod
    def _follower(step):
        found = next((follow for known, follow in _GEOMETRIC.items() if isinstance(step, known)), None)
        if found is None and not isinstance(step, _PHOTOMETRIC):
            raise TypeError(f"{step} may move pixels: say how masks follow it")
        return found

    def __call__(self, img: Image.Image, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        mask = torch.from_numpy(labels).long() - self.ignore_label  # the steps fill with 0
        for step, follow in self.steps:
            img, mask = follow(step, img, mask) if follow else (step(img), mask)
        return img, mask + self.ignore_label


class PatchLabels(PairedSteps):
    """`PairedSteps` that return, in place of the mask, its `patch_counts` for patches of `patch` (height, width)."""

    def __init__(self, transform, size, ignore_label: int, patch: tuple[int, int], classes: int):
        super().__init__(transform, size, ignore_label)
        self.patch, self.classes = patch, classes
        # Of a batch's memory: int32 takes as much as float32.
        self.target_channels = -(-(classes + 1) // (patch[0] * patch[1]))

    def __call__(self, img, labels):
        tensor, mask = super().__call__(img, labels)
        return tensor, patch_counts(mask, self.patch, self.classes, self.ignore_label)


def patch_counts(labels: torch.Tensor, patch: Sequence[int], classes: int, ignore_label: int) -> torch.Tensor:
    """Return how many pixels of each class every patch has: (..., L, classes + 1) int32 for labels (..., H, W). Patches
    are ordered row by row; the last column counts pixels with `ignore_label`, and with a label that is no class."""
    height, width = patch
    known = torch.where((labels >= 0) & (labels < classes) & (labels != ignore_label), labels, classes)
    patches = known.unflatten(-2, (-1, height)).unflatten(-1, (-1, width)).transpose(-3, -2).flatten(-4, -3).flatten(-2)
    counts = torch.zeros(*patches.shape[:-1], classes + 1, dtype=torch.int32, device=labels.device)
    return counts.scatter_add_(-1, patches, torch.ones_like(patches, dtype=torch.int32))
