"""Transforms of an image between file and batch: conversion to channels, augmentation, normalisation."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.transforms import MaybeToTensor, RandomResizedCropAndInterpolation
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

from util.data import random_steps
from util.data.bands import Bands, many_bands
from util.data.pixel_range import check_depth, is_wide, scaled_values
from util.data.random_steps import BICUBIC, RandomHorizontalFlip, three_augment
from util.errors import UserError

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def to_channels(
    img: Image.Image, in_chans: int, pixel_range: list | None = None, keep_depth: bool = False
) -> Image.Image:
    """Convert greyscale, palette, CMYK, LAB, 16-bit and alpha images to an 8-bit image of `in_chans` channels.

    Grey images of more than 8 bits are scaled by `pixel_range` (`util.data.pixel_range`). With `keep_depth` and 1 or 3
    channels they stay one channel of floats in 0..255 (mode F), which `ToTensor` repeats for the three channels. Alpha
    is dropped unless `in_chans` includes it; the colours under it stay. Bands stay `Bands` of uint8, or of floats in
    0..255; those of one or three channels become an 8-bit image without `keep_depth`. Raises ValueError for values
    outside the range, when the range is not known, and for another number of bands.
    """
    if isinstance(img, Bands) or many_bands(in_chans):
        return _to_bands(img, in_chans, pixel_range, keep_depth)
    mode = _MODES[in_chans]
    if is_wide(img):
        values = scaled_values(img, pixel_range)
        if keep_depth and mode in ("L", "RGB"):
            return Image.fromarray(values)
        img = _to_8_bits(img, values)
    check_depth(img, pixel_range)
    if img.mode == "P" and mode in ("RGB", "L"):
        img = img.convert("RGBA" if "transparency" in img.info else "RGB")
    if img.mode == "LA" and mode == "RGB":
        img = img.convert("L")
    if img.mode in ("LAB", "HSV", "PA"):  # pillow cannot convert these to every mode
        img = img.convert("RGBA" if img.mode == "PA" else "RGB")
    return img if img.mode == mode else img.convert(mode)


def _to_bands(img: Image.Image, in_chans: int, pixel_range: list | None, keep_depth: bool) -> Image.Image:
    if not isinstance(img, Bands) or len(img.values) != in_chans:
        raise ValueError(f"it has {len(img.getbands())} channels, but --in_chans is {in_chans}")
    values = scaled_values(img, pixel_range) if is_wide(img) else img.values
    if keep_depth or in_chans not in (1, 3):  # photometric steps take one or three channels
        return Bands(values)
    pixels = np.rint(values).astype(np.uint8).transpose(1, 2, 0)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if in_chans == 1 else pixels))


@dataclass(frozen=True)
class Converter:
    """`to_channels` with the settings of a data set and a model."""

    in_chans: int
    pixel_range: list | None = None
    keep_depth: bool = False

    def __call__(self, img: Image.Image) -> Image.Image:
        return to_channels(img, self.in_chans, self.pixel_range, self.keep_depth)


def _to_8_bits(img: Image.Image, values: np.ndarray) -> Image.Image:
    """Return the scaled `values` (H, W) of a grey image as an L image, or LA when the image marks one value as
    transparent."""
    grey = Image.fromarray(np.rint(values, out=values).astype(np.uint8))
    transparent = img.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(np.asarray(img) == transparent, 0, 255).astype(np.uint8)))
    return grey


def check_channels(in_chans: int, bands: bool = True) -> None:
    """Raise UserError for a number of channels that no image has. `bands`: whether files of any number of bands can be
    read."""
    if in_chans < 1 or (many_bands(in_chans) and not bands):
        more = "; files of more bands are for pretraining and classification" * (in_chans > 4)
        raise UserError(
            f"--in_chans {in_chans}: images have 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels{more}"
        )


def pad_and_crop(size: tuple[int, int]) -> list:
    """The usual augmentation of CIFAR: pad by an eighth of the side (4 pixels at 32), then crop to `size` (H, W)."""
    return [Resize(size), random_steps.RandomCrop(size, padding=(size[1] // 8, size[0] // 8))]


class Resize(transforms.Resize):
    """Bicubic resize to exactly (H, W). An image of that size is returned unchanged."""

    size: tuple[int, int]

    def __init__(self, size):
        super().__init__(size, interpolation=BICUBIC)

    def forward(self, img):
        return img if (img.height, img.width) == tuple(self.size) else super().forward(img)


class ToTensor:
    """Return pixels (C, H, W) in [0, 1] of an 8-bit image, of bands, or of one channel of floats in 0..255 (mode F),
    which is repeated `channels` times. Bicubic resizing of floats can leave 0..255 a little; such values are clipped,
    as those of 8-bit images are."""

    def __init__(self, channels: int):
        self.channels = channels

    def __call__(self, img: Image.Image) -> torch.Tensor:
        if isinstance(img, Bands):
            return torch.from_numpy(np.array(img.values, np.float32, order="C")).div_(255).clamp_(0, 1)
        if img.mode != "F":
            return to_tensor(img)
        grey = torch.from_numpy(np.array(img)).div_(255).clamp_(0, 1)
        return grey.repeat(self.channels, 1, 1)


_MANY = 1 << 14  # pixels of an image from which it is faster to copy the channels one by one


class ToPixels:
    """Return the pixels (C, H, W), 0..255, of an 8-bit image as uint8; those of bands in their type; those of one
    channel of floats (mode F) as float32, clipped and repeated `channels` times. `util.data.pixels.Normaliser` makes of
    them what `ToTensor` and torchvision's `Normalize` make of the image."""

    def __init__(self, channels: int):
        self.channels = channels

    def __call__(self, img: Image.Image) -> torch.Tensor:
        if isinstance(img, Bands):
            pixels = torch.from_numpy(np.array(img.values, order="C"))
            return pixels if pixels.dtype == torch.uint8 else pixels.clamp_(0, 255)
        if img.mode == "F":
            return torch.from_numpy(np.array(img)).clamp_(0, 255).repeat(self.channels, 1, 1)
        pixels = np.empty((len(img.getbands()), img.height, img.width), np.uint8)
        if img.mode == "RGB" and img.width * img.height >= _MANY:
            for channel, name in zip(pixels, img.mode):
                channel[:] = np.frombuffer(img.tobytes("raw", name), np.uint8).reshape(channel.shape)
        else:
            pixels[:] = np.asarray(img).reshape(img.height, img.width, -1).transpose(2, 0, 1)
        return torch.from_numpy(pixels)


# Steps that pillow can do for floats. Photometric steps need 8 bits.
_DEPTH_KEEPING = (transforms.RandomResizedCrop, RandomResizedCropAndInterpolation, transforms.RandomHorizontalFlip)
_DEPTH_KEEPING += (transforms.Resize, transforms.CenterCrop, transforms.RandomCrop)
# Steps that draw no random numbers, or draw them by position (`util.data.draws`).
_WITHOUT_GENERATORS = (transforms.Resize, transforms.CenterCrop, transforms.Grayscale, transforms.Normalize, ToTensor)
_WITHOUT_GENERATORS += (ToPixels, *random_steps.STEPS)


def keeps_depth(transform) -> bool:
    """Whether a transform takes images of floats (mode F): geometric steps up to `ToTensor` or `ToPixels`."""
    for step in getattr(transform, "transforms", ()):
        if isinstance(step, (ToTensor, ToPixels)):
            return True
        if not isinstance(step, _DEPTH_KEEPING):
            return False
    return False


def uses_generators(transform) -> bool:
    """Whether a transform may draw from the generators of Python, NumPy and torch: steps of timm, and all that are not
    known."""
    return not all(isinstance(step, _WITHOUT_GENERATORS) for step in getattr(transform, "transforms", (None,)))


def _to_tensor(mean, std) -> list:
    return [ToTensor(len(mean)), transforms.Normalize(mean, std)]


def pretrain_transform(aug: str, size: tuple[int, int], mean, std, crop_pct: float | None = None):
    """Return the transform of pretraining. `mae`: random resized crop and flip; `crop`: pad-and-crop and flip; `three`:
    random resized crop, flip and 3-Augment; `none`: the evaluation transform."""
    flip = RandomHorizontalFlip()
    if aug == "none":
        return eval_transform(size, mean, std, crop_pct)
    if aug == "crop":
        steps = [*pad_and_crop(size), flip]
    else:
        steps = [random_steps.RandomResizedCrop(size), flip]
    if aug == "three":
        steps += three_augment(len(mean))
    return transforms.Compose([*steps, *_to_tensor(mean, std)])


def probe_transform(aug: str, size: tuple[int, int], mean, std) -> transforms.Compose:
    """Return the transform of linear probing. `rrc`: the official random crop of 8-100 % of the area, and flip; `crop`:
    pad-and-crop and flip; `none`: the evaluation transform."""
    if aug == "none":
        return eval_transform(size, mean, std)
    crop = pad_and_crop(size) if aug == "crop" else [random_steps.ProbeCrop(size)]
    return transforms.Compose([*crop, RandomHorizontalFlip(), *_to_tensor(mean, std)])


def default_crop_pct(size: tuple[int, int]) -> float:
    """Return the official recipe's 224/256 for inputs of 160 to 224 pixels, 1 for larger and smaller inputs."""
    return 224 / 256 if 160 <= min(size) <= 224 else 1.0


def eval_transform(size: tuple[int, int], mean, std, crop_pct: float | None = None) -> transforms.Compose:
    """Return the transform of evaluation: bicubic resize to size / crop_pct, then a centre crop to `size`. The default
    `crop_pct` of a rectangle is 1. Raises UserError for a `crop_pct` outside (0, 1]."""
    if crop_pct is not None and not 0 < crop_pct <= 1:
        raise UserError(f"--crop_pct {crop_pct} must lie in (0, 1]")
    if size[0] == size[1]:
        resize = ResizeShortSide(int(size[0] / (crop_pct or default_crop_pct(size))))
    else:
        resize = Resize(tuple(int(side / (crop_pct or 1.0)) for side in size))
    return transforms.Compose([resize, transforms.CenterCrop(size), *_to_tensor(mean, std)])


LARGEST = 1 << 25  # pixels of a resized image; of a larger one only the centre is made (100 MB for RGB)


def resized_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (H, W) after the shorter side became `side`, as torchvision rounds it."""
    if height < width:
        return side, int(side * width / height)
    return int(side * height / width), side


class ResizeShortSide(transforms.Resize):
    """Bicubic resize of the shorter side. An image in which it has that length is returned unchanged.

    A strip of 2 x 60,000 pixels would become 256 x 7,680,000. Where the result would have more than LARGEST pixels,
    only its central part, at least twice `side` long, is computed, with the same values up to rounding; a centre crop
    of up to that length follows.
    """

    size: int

    def __init__(self, side: int):
        super().__init__(side, interpolation=BICUBIC)

    def forward(self, img):
        if min(img.size) == self.size:
            return img
        if self.fits(img.height, img.width):
            return super().forward(img)
        return self._centre(img)

    def fits(self, height: int, width: int) -> bool:
        """Whether an image of this size becomes one of at most LARGEST pixels."""
        return math.prod(resized_shape(height, width, self.size)) <= LARGEST

    def _centre(self, img: Image.Image) -> Image.Image:
        whole, box = resized_shape(img.height, img.width, self.size), [0.0, 0.0, img.width, img.height]
        long = int(whole[1] > whole[0])  # 0: height, 1: width
        # The part left out on either side is even, so that a centre crop of the part rounds as one of the whole.
        length = 2 * self.size + (whole[long] - 2 * self.size) % 4
        start, scale = (whole[long] - length) // 2, (img.height, img.width)[long] / whole[long]
        box[1 - long], box[3 - long] = start * scale, (start + length) * scale
        size = (length, self.size) if long else (self.size, length)
        return img.resize(size, Image.Resampling.BICUBIC, box=(box[0], box[1], box[2], box[3]))

    def tensor(self, img: torch.Tensor) -> torch.Tensor:
        """Resize pixels (C, H, W) in the same way; they must be of a size that `fits`."""
        return img if min(img.shape[1:]) == self.size else super().forward(img)


def finetune_transform(args, size: tuple[int, int], mean, std):
    """Return timm's training transform: random resized crop (or pad-and-crop), flip, RandAugment or colour jitter,
    random erasing. Raises UserError for an unknown `--aa` policy, and for `--aa` with alpha."""
    if args.aa and len(mean) not in (1, 3):
        raise UserError(f"--aa {args.aa} needs 1 or 3 channels: with --in_chans {len(mean)} disable it with --aa ''")
    if args.color_jitter and many_bands(len(mean)):
        raise UserError(f"--color_jitter is for images of 1 to 4 channels, not for --in_chans {len(mean)}: remove it")
    try:
        transform: Any = create_transform(
            input_size=(len(mean), *size),
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation="bicubic",
            hflip=getattr(args, "hflip", 0.5),  # forks' flags lack it
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=tuple(mean),
            std=tuple(std),
        )
    except (AssertionError, ValueError, KeyError) as error:  # the other flags have been checked
        raise UserError(f"--aa {args.aa} is not a policy of timm: {error}") from error
    steps = [_own(step, len(mean)) for step in transform.transforms]
    if args.aug == "crop":  # the first step is the random resized crop
        steps[:1] = pad_and_crop(size)
    return transforms.Compose(steps)


def _own(step, channels: int):
    """Return our step in the place of one of timm's transform; others are returned unchanged."""
    if isinstance(step, MaybeToTensor):
        return ToTensor(channels)
    if isinstance(step, RandomResizedCropAndInterpolation):
        return random_steps.FinetuneCrop(step)
    if isinstance(step, transforms.RandomHorizontalFlip):
        return RandomHorizontalFlip(step.p)
    return step
