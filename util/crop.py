"""The random resized crop of the official linear probe: one draw, clamped to the image, instead of rejected draws."""

import math

import torch
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import get_dimensions


class RandomResizedCrop(transforms.RandomResizedCrop):
    """Draw area and aspect ratio once and clamp the crop to the image's size. (torchvision draws up to ten times until
    the crop fits, then falls back to the centre.) Arguments and defaults are those of torchvision."""

    def __init__(self, size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), interpolation=InterpolationMode.BICUBIC, **rest):
        super().__init__(size, scale=scale, ratio=ratio, interpolation=interpolation, **rest)

    @staticmethod
    def get_params(img, scale, ratio):
        """Return (top, left, height, width) of a random crop of `img`."""
        _, height, width = get_dimensions(img)
        area = height * width * torch.empty(()).uniform_(*scale).item()
        aspect = math.exp(torch.empty(()).uniform_(math.log(ratio[0]), math.log(ratio[1])).item())
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        top = int(torch.randint(height - h + 1, ()))
        left = int(torch.randint(width - w + 1, ()))
        return top, left, h, w
