"""The random steps of our transforms: crops, flip and 3-Augment, for images of pillow's.

In a sample of version v2 (`util.data.draws`) a step takes its numbers by their position, as `util.data.batch_aug` does
for whole batches. Otherwise it draws what torchvision's or timm's class of the same name draws, from the generators of
Python, NumPy and torch. The pixels are those of these classes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from util import crop
from util.data.bands import Bands
from util.data.draws import COLOUR, CROP, FLIP, SHIFT, Draws, current_draws
from util.errors import UserError

BICUBIC = InterpolationMode.BICUBIC
TRIES = 10  # random resized crops that are drawn for one that fits into the image
Box = tuple[int, int, int, int]  # top, left, height, width


def resized_crop(img: Image.Image, box: Box, size: Sequence[int]) -> Image.Image:
    """Cut `box` out of an image, and resize the part bicubically to `size` (H, W)."""
    top, left, height, width = box
    return img.crop((left, top, left + width, top + height)).resize((size[1], size[0]), Image.Resampling.BICUBIC)


# Random resized crops -------------------------------------------------------------------------------------------------


def _drawn(draws: Draws, first: int, area: float, scale, log_ratio) -> tuple[float, float]:
    """Return the (height, width) of a crop of an image of `area` pixels, from the numbers at `first` and after it."""
    area *= scale[0] + (scale[1] - scale[0]) * draws[first]
    aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[first + 1])
    return math.sqrt(area / aspect), math.sqrt(area * aspect)


def _shifted(draws: Draws, first: int, rows: int, columns: int) -> tuple[int, int]:
    """Return (top, left), each from 0 to the given number, from the numbers at `first` and after it."""
    return int(draws[first] * (rows + 1)), int(draws[first + 1] * (columns + 1))


def random_box(draws: Draws, height: int, width: int, scale, ratio) -> Box:
    """Return a random resized crop of an image (`height`, `width`), as `util.data.batch_aug.crop_boxes` does: area and
    aspect ratio are drawn up to ten times, until the crop fits; then the largest central crop is taken."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for first in range(CROP, CROP + 4 * TRIES, 4):
        h, w = map(round, _drawn(draws, first, height * width, scale, log_ratio))
        if 0 < w <= width and 0 < h <= height:
            return *_shifted(draws, first + 2, height - h, width - w), h, w
    return central_box(height, width, ratio)


def central_box(height: int, width: int, ratio) -> Box:
    """Return the largest central crop whose aspect ratio lies in `ratio`."""
    w, h = width, height
    if width / height < min(ratio):
        h = round(width / min(ratio))
    elif width / height > max(ratio):
        w = round(height * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's random resized crop, bicubic."""

    size: tuple[int, int]
    resized = staticmethod(resized_crop)

    def __init__(self, size: tuple[int, int], scale=(0.2, 1.0)):
        super().__init__(size, scale=scale, interpolation=BICUBIC)

    @staticmethod
    def get_params(img: Any, scale: Any, ratio: Any) -> Box:
        draws = current_draws()
        if draws is None:
            return transforms.RandomResizedCrop.get_params(img, scale, ratio)
        return random_box(draws, img.height, img.width, scale, ratio)

    def forward(self, img):
        return self.resized(img, self.get_params(img, self.scale, self.ratio), self.size)


class FinetuneCrop(RandomResizedCropAndInterpolation):
    """timm's random resized crop, bicubic, with the distribution of `RandomResizedCrop`; `like` is the original."""

    resized = staticmethod(resized_crop)

    def __init__(self, like: RandomResizedCropAndInterpolation):
        super().__init__(like.size, like.scale, like.ratio, interpolation="bicubic")

    @staticmethod
    def get_params(img: Any, scale: Any, ratio: Any) -> Box:
        draws = current_draws()
        if draws is None:
            return RandomResizedCropAndInterpolation.get_params(img, scale, ratio)
        return random_box(draws, img.height, img.width, scale, ratio)

    def __call__(self, img):
        return self.resized(img, self.get_params(img, self.scale, self.ratio), self.size)


class ProbeCrop(crop.RandomResizedCrop):
    """The random resized crop of the official linear probe: one draw, clamped to the image (`util.crop`)."""

    resized = staticmethod(resized_crop)

    def __init__(self, size: tuple[int, int]):
        super().__init__(size, scale=(0.08, 1.0))

    @staticmethod
    def get_params(img: Any, scale: Any, ratio: Any) -> Box:
        draws = current_draws()
        if draws is None:
            return crop.RandomResizedCrop.get_params(img, scale, ratio)
        height, width = img.height, img.width
        h, w = map(round, _drawn(draws, CROP, height * width, scale, (math.log(ratio[0]), math.log(ratio[1]))))
        h, w = min(max(h, 1), height), min(max(w, 1), width)
        return *_shifted(draws, CROP + 2, height - h, width - w), h, w

    def forward(self, img):
        return self.resized(img, self.get_params(img, self.scale, self.ratio), self.size)


# Crop of a padded image, and flip -------------------------------------------------------------------------------------


class RandomCrop(transforms.RandomCrop):
    """torchvision's random crop of an image with a black border of `padding` (columns, rows)."""

    @staticmethod
    def get_params(img: Any, output_size) -> Box:
        """Return a crop of `output_size` of an image that has its border already."""
        draws = current_draws()
        if draws is None:
            return transforms.RandomCrop.get_params(img, output_size)
        height, width = output_size
        return *_shifted(draws, SHIFT, img.height - height, img.width - width), height, width

    def forward(self, img):
        draws, (columns, rows), (height, width) = current_draws(), self.padding, self.size
        if draws is None and isinstance(img, Bands):
            img = img.crop((-columns, -rows, img.width + columns, img.height + rows))
            top, left, *_ = self.get_params(img, self.size)
        elif draws is None:
            return super().forward(img)
        else:
            top, left = _shifted(draws, SHIFT, img.height + 2 * rows - height, img.width + 2 * columns - width)
            top, left = top - rows, left - columns
        return img.crop((left, top, left + width, top + height))  # black outside the image


class RandomHorizontalFlip(transforms.RandomHorizontalFlip):
    """torchvision's flip."""

    def drawn(self) -> bool:
        """Draw whether to flip."""
        draws = current_draws()
        return bool(torch.rand(1) < self.p) if draws is None else draws[FLIP] < self.p

    def forward(self, img):
        return img.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.drawn() else img


# 3-Augment ------------------------------------------------------------------------------------------------------------


class GaussianBlur:
    """Blur with a radius drawn from [0.1, 2] (pillow's filter, as in DeiT III)."""

    def __init__(self, radius=(0.1, 2.0)):
        self.low, self.high = radius

    def __call__(self, img):
        draws = current_draws()
        if draws is None:
            radius = float(np.random.uniform(self.low, self.high))
        else:
            radius = self.low + (self.high - self.low) * draws[COLOUR + 1]
        return img.filter(ImageFilter.GaussianBlur(radius=radius))


class Solarization:
    """Invert pixel values of 128 and more."""

    def __call__(self, img):
        return ImageOps.solarize(img)


class OneOf(transforms.RandomChoice):
    """torchvision's choice of one step."""

    def __call__(self, img):
        draws = current_draws()
        if draws is None:
            return super().__call__(img)
        return self.transforms[int(draws[COLOUR] * len(self.transforms))](img)


class Jitter(transforms.ColorJitter):
    """torchvision's change of brightness, contrast and saturation in random order."""

    ORDERS = tuple(itertools.permutations(range(3)))

    @staticmethod
    def get_params(brightness: Any, contrast: Any, saturation: Any, hue: Any):
        draws = current_draws()
        if draws is None:
            return transforms.ColorJitter.get_params(brightness, contrast, saturation, hue)
        ranges = enumerate((brightness, contrast, saturation), COLOUR + 2)
        factors = [low + (high - low) * draws[position] for position, (low, high) in ranges]
        return Jitter.ORDERS[int(draws[COLOUR + 5] * 6)], *factors, None


def three_augment(channels: int) -> list:
    """3-Augment (Touvron et al. 2022, DeiT III, Section 3.2): greyscale, solarisation or blur, then colour jitter 0.3.
    Raises UserError for images with alpha."""
    if channels not in (1, 3):
        raise UserError(
            f"--aug three needs 1 or 3 channels, not --in_chans {channels}: it changes colours; --aug mae does not"
        )
    return [OneOf([transforms.Grayscale(channels), Solarization(), GaussianBlur()]), Jitter(0.3, 0.3, 0.3)]


STEPS = (RandomResizedCrop, FinetuneCrop, ProbeCrop, RandomCrop, RandomHorizontalFlip, OneOf, Jitter, GaussianBlur)
STEPS += (Solarization,)
"""Steps that draw no numbers in version v2 but those of their sample."""
