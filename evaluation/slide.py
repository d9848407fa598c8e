"""Segmentation of images of any size by a model of one size: sliding windows, and labels at the original size."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

CHANNELS = 16  # classes whose logits are resized together


def starts(length: int, size: int, stride: int) -> list[int]:
    """Return where windows of `size` begin, one every `stride`, the last at the end of `length`."""
    count = 1 + max(0, -(-(length - size) // stride))
    return [max(0, min(index * stride, length - size)) for index in range(count)]


def slide(model: Callable, img: torch.Tensor, size: Sequence[int], stride: int) -> torch.Tensor:
    """Return the logits (K, H, W) of an image (C, H, W): the mean over windows of `size` (h, w), one every `stride`
    pixels in both directions. `model` gives the logits (n, K, h, w) of all windows (n, C, h, w), in one batch.

    An image smaller than the window is padded with zeros below and on the right, the mean colour of normalised images.
    """
    (rows, columns), (height, width) = img.shape[-2:], size
    img = F.pad(img, (0, max(0, width - columns), 0, max(0, height - rows)))
    corners = [(y, x) for y in starts(img.shape[1], height, stride) for x in starts(img.shape[2], width, stride)]
    outputs = model(torch.stack([img[:, y : y + height, x : x + width] for y, x in corners]))
    total = outputs.new_zeros(outputs.shape[1], *img.shape[1:])
    windows = outputs.new_zeros(img.shape[1:])
    for output, (y, x) in zip(outputs, corners):
        total[:, y : y + height, x : x + width] += output
        windows[y : y + height, x : x + width] += 1
    return (total / windows)[:, :rows, :columns]


def labels_at_size(logits: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Return the class (H, W) int64 of each pixel of an image of `size` (H, W) from logits (K, h, w), resized
    bilinearly. The logits of a few classes are resized at a time: those of 150 classes for 3000 x 2000 pixels would
    need 3.6 GB."""
    best = labels = None
    for first in range(0, len(logits), CHANNELS):
        part = F.interpolate(logits[None, first : first + CHANNELS], size=tuple(size), mode="bilinear")[0]
        values, indices = part.max(dim=0)
        if best is None or labels is None:
            best, labels = values, indices
        else:
            higher = values > best
            best, labels = torch.where(higher, values, best), torch.where(higher, indices + first, labels)
    return labels
