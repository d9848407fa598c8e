"""Pixels between a data worker and the network. Workers hand over bytes; `Normaliser` makes the network's input of
whole batches, on their device. A batch of bytes takes a quarter of the memory and of the time to copy.

Values are 0..255: uint8, or float32 for images of more than 8 bits.
"""

import torch
from torchvision import transforms

from util.compute.constants import constant
from util.data.transforms import ToPixels, ToTensor

_CACHED = 1 << 17  # values that a CPU normalises at once: they and their bytes stay in its cache


class Normaliser:
    """Normalises batches of pixels: (N, C, H, W) in 0..255 -> float32 with the per-channel `mean` and `std` of pixels
    in [0, 1] subtracted and divided by, on the device of the pixels. The operations are those of `ToTensor` and
    torchvision's `Normalize`, in their order, so that the values are equal bit for bit."""

    def __init__(self, mean, std):
        self.mean, self.std = tuple(mean), tuple(std)

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        device = pixels.device
        mean, std = (constant(values, device, torch.float32)[:, None, None] for values in (self.mean, self.std))
        white = constant((255.0,), device)  # a GPU would multiply by the reciprocal of a number
        images = torch.empty(pixels.shape, dtype=torch.float32, device=device)
        count = len(pixels) if device.type != "cpu" else max(1, _CACHED // max(1, pixels[:1].numel()))
        for part, source in zip(images.split(max(1, count)), pixels.split(max(1, count))):
            part.copy_(source).div_(white).sub_(mean).div_(std)
        return images


def split_normalisation(transform):
    """Return (`transform` that ends with `ToPixels`, the `Normaliser` that does the rest), or (`transform`, None) if it
    does not end with `ToTensor` and torchvision's `Normalize`: steps after these, such as timm's random erasing, need
    normalised values."""
    steps = list(getattr(transform, "transforms", ()))
    if len(steps) < 2 or not isinstance(steps[-2], ToTensor) or not isinstance(steps[-1], transforms.Normalize):
        return transform, None
    *kept, to_tensor, normalize = steps
    rebuilt = getattr(transform, "with_steps", transforms.Compose)([*kept, ToPixels(to_tensor.channels)])
    return rebuilt, Normaliser(normalize.mean, normalize.std)


def bytes_per_value(normalise: Normaliser | None, pixel_range: list | None) -> int:
    """Return the size of a value that workers hand over. Images of more than 8 bits, which are floats, are known by the
    `pixel_range` of the data set; those of 16 bits need none, and are taken for images of 8 bits."""
    return 4 if normalise is None or pixel_range else 1
