"""Transforms of an image between file and batch: conversion to channels, augmentation, normalisation."""

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from util.crop import RandomResizedCrop
from util.errors import UserError

_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
BICUBIC = InterpolationMode.BICUBIC


def to_channels(img: Image.Image, in_chans: int) -> Image.Image:
    """Convert greyscale, palette, CMYK, LAB, 16-bit and alpha images to an 8-bit image of `in_chans` channels.

    16-bit values are divided by 257 (pillow would clip them). Alpha is dropped unless `in_chans` includes it; the
    colours under it stay. Raises ValueError when the range of the values is unknown.
    """
    mode = _MODES[in_chans]
    if img.mode.startswith("I") or img.mode == "F":
        img = _to_8_bits(img)
    if img.mode == "P" and mode in ("RGB", "L"):
        img = img.convert("RGBA" if "transparency" in img.info else "RGB")
    if img.mode == "LA" and mode == "RGB":
        img = img.convert("L")
    if img.mode in ("LAB", "HSV", "PA"):  # pillow cannot convert these to every mode
        img = img.convert("RGBA" if img.mode == "PA" else "RGB")
    return img if img.mode == mode else img.convert(mode)


def _to_8_bits(img: Image.Image) -> Image.Image:
    """Return an L image, or LA when the image marks one value as transparent. 16-bit integers, and 32-bit integers
    above 255, have the range 0..65535. Floats have the range 0..1 if they fit, else 0..255, else 0..65535."""
    values, transparent = np.asarray(img), img.info.get("transparency")
    lowest, highest = values.min(), values.max()  # NaN if any value is NaN
    if not (lowest >= 0 and highest <= 65535):
        raise ValueError(f"its values range from {lowest:g} to {highest:g}: supported are 0..1, 0..255 and 0..65535")
    top = 255.0 if highest <= 255 else 65535.0
    if values.dtype.itemsize == 2:
        top = 65535.0
    elif values.dtype.kind == "f" and highest <= 1:
        top = 1.0
    scaled = np.multiply(values, 255.0 / top, dtype=np.float32)  # 4 bytes per pixel: there may be 179 million
    grey = Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def check_channels(in_chans: int) -> None:
    if in_chans not in _MODES:
        raise UserError(f"--in_chans {in_chans}: images have 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels")


class GaussianBlur:
    """Blur with a radius drawn from [0.1, 2] (pillow's filter, as in DeiT III)."""

    def __init__(self, radius=(0.1, 2.0)):
        self.low, self.high = radius

    def __call__(self, img):
        radius = float(np.random.uniform(self.low, self.high))
        return img.filter(ImageFilter.GaussianBlur(radius=radius))


class Solarization:
    """Invert pixel values of 128 and more."""

    def __call__(self, img):
        return ImageOps.solarize(img)


def three_augment(channels: int) -> list:
    """3-Augment (Touvron et al. 2022, DeiT III, Section 3.2): greyscale, solarisation or blur, then colour jitter 0.3.
    Raises UserError for images with alpha."""
    if channels not in (1, 3):
        raise UserError(f"--aug three needs 1 or 3 channels, not --in_chans {channels}: alpha cannot be solarised")
    return [
        transforms.RandomChoice([transforms.Grayscale(channels), Solarization(), GaussianBlur()]),
        transforms.ColorJitter(0.3, 0.3, 0.3),
    ]


def pad_and_crop(size: tuple[int, int]) -> list:
    """The usual augmentation of CIFAR: pad by an eighth of the side (4 pixels at 32), then crop to `size` (H, W)."""
    return [Resize(size), transforms.RandomCrop(size, padding=(size[1] // 8, size[0] // 8))]


class Resize(transforms.Resize):
    """Bicubic resize to exactly (H, W). An image of that size is returned unchanged."""

    def __init__(self, size):
        super().__init__(size, interpolation=BICUBIC)

    def forward(self, img):
        return img if (img.height, img.width) == tuple(self.size) else super().forward(img)


def _to_tensor(mean, std) -> list:
    return [transforms.ToTensor(), transforms.Normalize(mean, std)]


def pretrain_transform(aug: str, size: tuple[int, int], mean, std, crop_pct: float | None = None):
    """Return the transform of pretraining. `mae`: random resized crop and flip; `crop`: pad-and-crop and flip; `three`:
    random resized crop, flip and 3-Augment; `none`: the evaluation transform."""
    flip = transforms.RandomHorizontalFlip()
    if aug == "none":
        return eval_transform(size, mean, std, crop_pct)
    if aug == "crop":
        steps = [*pad_and_crop(size), flip]
    else:
        steps = [transforms.RandomResizedCrop(size, scale=(0.2, 1.0), interpolation=BICUBIC), flip]
    if aug == "three":
        steps += three_augment(len(mean))
    return transforms.Compose([*steps, *_to_tensor(mean, std)])


def probe_transform(aug: str, size: tuple[int, int], mean, std) -> transforms.Compose:
    """Return the transform of linear probing. `rrc`: the official random crop of 8-100 % of the area, and flip; `crop`:
    pad-and-crop and flip; `none`: the evaluation transform."""
    if aug == "none":
        return eval_transform(size, mean, std)
    crop = pad_and_crop(size) if aug == "crop" else [RandomResizedCrop(size, scale=(0.08, 1.0))]
    return transforms.Compose([*crop, transforms.RandomHorizontalFlip(), *_to_tensor(mean, std)])


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


class ResizeShortSide(transforms.Resize):
    """Bicubic resize of the shorter side. An image in which it has that length is returned unchanged."""

    def __init__(self, side: int):
        super().__init__(side, interpolation=BICUBIC)

    def forward(self, img):
        return img if min(img.size) == self.size else super().forward(img)

    def tensor(self, img: torch.Tensor) -> torch.Tensor:
        """Resize pixels (C, H, W) in the same way."""
        return img if min(img.shape[1:]) == self.size else super().forward(img)


def finetune_transform(args, size: tuple[int, int], mean, std):
    """Return timm's training transform: random resized crop (or pad-and-crop), flip, RandAugment or colour jitter,
    random erasing. Raises UserError for an unknown `--aa` policy, and for `--aa` with alpha."""
    if args.aa and len(mean) not in (1, 3):
        raise UserError(f"--aa {args.aa} needs 1 or 3 channels: with --in_chans {len(mean)} disable it with --aa ''")
    try:
        transform = create_transform(
            input_size=(len(mean), *size),
            is_training=True,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation="bicubic",
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            mean=tuple(mean),
            std=tuple(std),
        )
    except (AssertionError, ValueError, KeyError) as error:  # the other flags have been checked
        raise UserError(f"--aa {args.aa} is not a policy of timm: {error}") from error
    if args.aug == "crop":  # the first step is the random resized crop
        transform.transforms[:1] = pad_and_crop(size)
    return transform
