"""Random resized crops that torch resizes, four times as fast as pillow.

Both compute the same antialiased bicubic filter. torch rounds the filter's weights for 8-bit images to 16 bits and
pillow to 22, so that about 0.3 % of the values differ, by at most 2 of 255 (`tests/util/data/test_fast_resize.py`).
"""

import copy

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms.v2 import functional

from util.data.random_steps import BICUBIC, Box, FinetuneCrop, ProbeCrop, RandomResizedCrop, resized_crop


def crop_resized_by_torch(img: Image.Image, box: Box, size: tuple[int, int]) -> Image.Image:
    """Do what `resized_crop` does. Images with alpha, floats and bands are left to pillow."""
    if img.mode not in ("L", "RGB"):
        return resized_crop(img, box, size)
    top, left, height, width = box
    pixels = np.array(img.crop((left, top, left + width, top + height))).reshape(height, width, -1)
    resized = functional.resize(torch.from_numpy(pixels).permute(2, 0, 1), list(size), BICUBIC, antialias=True)
    rows = resized.permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(rows[..., 0] if img.mode == "L" else rows))


def with_fast_resize(transform: transforms.Compose) -> transforms.Compose:
    """Return a transform whose random resized crops are resized by torch."""
    steps = [copy.copy(step) for step in transform.transforms]
    for step in steps:
        if isinstance(step, (RandomResizedCrop, FinetuneCrop, ProbeCrop)):
            step.resized = crop_resized_by_torch
    return transforms.Compose(steps)
