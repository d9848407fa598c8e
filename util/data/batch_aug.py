"""Augmentation of whole batches on their device, with random numbers keyed by sample.

The distributions are those of the per-image transforms in `util.data.transforms` (pillow and torchvision). All images
are uint8 tensors of one size. Every draw is a function of (seed, epoch, sample index), so the result does not depend
on the batch, the number of workers or the device.

Shapes: N images, C channels, (H, W) pixels; values are 0..255 in float32 until they are normalised.
"""

import itertools
import math

import torch
import torch.nn.functional as F

from util.compute.constants import constant
from util.compute.precision import full_precision, widest
from util.data import draws as positions
from util.data.pixels import Normaliser
from util.data.random_steps import TRIES, central_box
from util.data.sample_rng import sample_noise
from util.data.transforms import LARGEST, default_crop_pct, resized_shape


def crop_boxes(draws: torch.Tensor, size: tuple[int, int], scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3)) -> torch.Tensor:
    """Draw random resized crops as torchvision does: an area and an aspect ratio, up to ten times, until the crop fits
    into `size` (H, W); after that the largest central crop with an allowed ratio. `draws` (N, 40) in [0, 1) -> (N, 4):
    top, left, height, width in whole pixels."""
    height, width = size
    area, log_ratio, top, left = draws.to(widest(draws.device)).view(len(draws), TRIES, 4).unbind(-1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area)
    aspect = torch.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * log_ratio)
    w, h = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.int8).argmax(dim=1, keepdim=True)
    w, h, top, left, fits = (x.gather(1, first)[:, 0] for x in (w, h, top, left, fits))
    top, left = (top * (height - h + 1)).floor(), (left * (width - w + 1)).floor()
    boxes = torch.stack([top, left, h, w], dim=1)
    fallback = constant(central_box(height, width, ratio), boxes.device, boxes.dtype)
    return torch.where(fits[:, None], boxes, fallback)


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys's bicubic kernel with a = -1/2, as in pillow."""
    x = x.abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def resampling(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """Return matrices (N, target, source) that resize the `length` (N,) pixels from `start` (N,) on to `target` pixels:
    bicubic, antialiased (the kernel scales with a target pixel) and cut off at the ends of the crop, as pillow resizes
    a cropped image."""
    scale = (length / target)[:, None, None]
    width = scale.clamp_min(1.0)
    # Coordinates within the crop: centres of the target pixels, and source pixels.
    centre = (torch.arange(target, device=start.device) + 0.5)[None, :, None] * scale
    pixel = torch.arange(source, device=start.device)[None, None, :] - start[:, None, None]
    weights = _cubic((pixel + 0.5 - centre) / width)
    # Pillow rounds the ends of the kernel to decide which pixels it covers.
    low, high = (centre - 2 * width + 0.5).floor(), (centre + 2 * width + 0.5).floor()
    inside = (pixel >= 0) & (pixel < length[:, None, None]) & (pixel >= low) & (pixel < high)
    weights = weights * inside
    return (weights / weights.sum(dim=-1, keepdim=True)).float()


def resized_crops(images: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], flip=None) -> torch.Tensor:
    """Crop uint8 images (N, C, H, W) to `boxes` (N, 4), resize the crops to `size` and mirror those with `flip` (N,).
    Values are rounded to whole levels, as in pillow."""
    if images.device.type == "cpu":
        return _one_by_one(images, boxes, size, flip)
    return by_matrices(images, boxes, size, flip)


def _one_by_one(images, boxes, size, flip):
    """`resized_crops` with torch's kernel for uint8, the fastest one on a CPU."""
    images = images.contiguous(memory_format=torch.channels_last)
    crops = []
    for index, (top, left, height, width) in enumerate(boxes.long().tolist()):
        crop = images[index : index + 1, :, top : top + height, left : left + width]
        if (height, width) != tuple(size):
            crop = F.interpolate(crop, tuple(size), mode="bicubic", antialias=True)
        crops.append(crop)
    crops = torch.cat(crops).float()
    return crops if flip is None else torch.where(flip[:, None, None, None], crops.flip(3), crops)


def by_matrices(images, boxes, size, flip=None):
    """`resized_crops` as two batched matrix products, for a GPU: all crops at once, without waiting for the host."""
    boxes = boxes.to(widest(boxes.device))
    rows = resampling(boxes[:, 0], boxes[:, 2], images.shape[2], size[0])
    columns = resampling(boxes[:, 1], boxes[:, 3], images.shape[3], size[1])
    if flip is not None:
        columns = torch.where(flip[:, None, None], columns.flip(1), columns)
    with full_precision():
        across = images.float() @ columns[:, None].transpose(2, 3)  # along the rows first, as pillow does
        return (rows[:, None] @ across.round().clamp(0, 255)).round().clamp(0, 255)


def padded_crops(images: torch.Tensor, top, left, padding: tuple[int, int], flip=None) -> torch.Tensor:
    """Add a black border of `padding` (rows, columns) to the images, and cut crops of the images' own size at `top` and
    `left` (N,) of the padded images. Crops with `flip` (N,) are mirrored."""
    height, width = images.shape[2:]
    bordered = F.pad(images, (padding[1], padding[1], padding[0], padding[0]))
    rows = torch.arange(height, device=images.device)[None] + top[:, None]
    columns = torch.arange(width, device=images.device)[None] + left[:, None]
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    picture = torch.arange(len(images), device=images.device)
    crops = bordered.movedim(1, -1)[picture[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops.movedim(-1, 1)


def grey(images: torch.Tensor) -> torch.Tensor:
    """Return the luma (ITU-R 601-2), rounded, in every channel."""
    if images.shape[1] == 1:
        return images
    weights = constant((0.299, 0.587, 0.114), images.device)
    return (images * weights[:, None, None]).sum(dim=1, keepdim=True).round().expand_as(images)


def gaussian_blur(images: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Gaussian blur with standard deviation `radius` (N,), at most 2 pixels, with repeated edges: three box filters, as
    in pillow (Gwosdek et al. 2011, extended box blur)."""
    variance = (radius**2 / 3)[:, None]  # of one box
    whole = ((12 * variance + 1).sqrt() / 2 - 0.5).floor()  # pixels of full weight on either side
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    tap = torch.arange(-3, 4, device=images.device)
    weights = torch.where(tap.abs() <= whole, 1.0, torch.where(tap.abs() <= whole + 1, rest, 0.0))
    weights = weights / weights.sum(dim=1, keepdim=True)  # (N, taps)

    def matrix(side):
        source = (torch.arange(side, device=images.device)[:, None] + tap).clamp(0, side - 1)  # (side, taps)
        box = images.new_zeros(len(images), side, side)
        box.scatter_add_(2, source.expand(len(images), -1, -1), weights[:, None].expand(-1, side, -1))
        return (box @ box @ box)[:, None]

    with full_precision():
        across = (images @ matrix(images.shape[3]).transpose(2, 3)).round()
        return (matrix(images.shape[2]) @ across).round().clamp(0, 255)


def three_augment(images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """3-Augment (Touvron et al. 2022, DeiT III, Section 3.2): greyscale, solarisation or blur, then brightness,
    contrast and saturation changed by up to 0.3 in random order. `draws` (N, 6) in [0, 1)."""
    choice = (draws[:, 0] * 3).long()[:, None, None, None]
    solarised = torch.where(images < 128, images, 255 - images)
    blurred = gaussian_blur(images, 0.1 + 1.9 * draws[:, 1])
    images = torch.where(choice == 0, grey(images), torch.where(choice == 1, solarised, blurred))
    factors = (0.7 + 0.6 * draws[:, 2:5])[..., None, None, None]  # (N, 3, 1, 1, 1)
    orders = constant(tuple(itertools.permutations(range(3))), images.device)[(draws[:, 5] * 6).long()]
    for turn in range(3):
        operation = orders[:, turn][:, None, None, None]
        mean = grey(images)[:, :1].mean(dim=(2, 3), keepdim=True).round()
        towards = torch.where(operation == 0, torch.zeros_like(images), torch.where(operation == 1, mean, grey(images)))
        factor = factors.gather(1, operation[:, None])[:, 0]
        images = (towards + factor * (images - towards)).clamp(0, 255).floor()  # pillow truncates
    return images


class BatchTransform:
    """`pretrain_transform` for batches of uint8 images of one size; `aug` is mae, crop, three or none."""

    def __init__(self, aug: str, size: tuple[int, int], mean, std, seed: int, crop_pct: float | None = None):
        self.aug, self.size, self.seed = aug, (size[0], size[1]), seed
        self.normalised = Normaliser(mean, std)
        self.crop_pct = crop_pct or (default_crop_pct(self.size) if size[0] == size[1] else 1.0)

    def __call__(self, images: torch.Tensor, epoch: int, indices: torch.Tensor) -> torch.Tensor:
        """Augment and normalise: images (N, C, H, W) uint8, indices (N,) of the samples -> (N, C, *size)."""
        return self.normalised(self.augmented(images, epoch, indices))

    def augmented(self, images: torch.Tensor, epoch: int, indices: torch.Tensor) -> torch.Tensor:
        """Return the augmented images before normalisation: whole numbers from 0 to 255, float32 or uint8."""
        draws = sample_noise(self.seed, epoch, indices, positions.COUNT, stream=positions.STREAM)
        height, width = images.shape[2:]
        if self.aug == "none":
            return self._centre(images)
        flip = draws[:, positions.FLIP] < 0.5
        if self.aug == "crop":
            images = self._resized(images, self.size)
            border = self.size[0] // 8, self.size[1] // 8
            top, left = ((draws[:, positions.SHIFT + i] * (2 * side + 1)).long() for i, side in enumerate(border))
            return padded_crops(images, top, left, border, flip)
        images = resized_crops(images, crop_boxes(draws[:, : positions.FLIP], (height, width)), self.size, flip)
        return three_augment(images, draws[:, positions.COLOUR :]) if self.aug == "three" else images

    def _centre(self, images: torch.Tensor) -> torch.Tensor:
        """Resize and crop the centre as `eval_transform` does: a square input resizes the shorter side, a rectangle
        both sides."""
        sides, larger = images.shape[2:], [int(side / self.crop_pct) for side in self.size]
        if self.size[0] == self.size[1]:
            images, sides = self._without_ends(images, larger[0])
            larger = [larger[0] * side // min(sides) for side in sides]
        images = self._resized(images, larger)
        top, left = (round((whole - part) / 2) for whole, part in zip(larger, self.size))
        return images[:, :, top : top + self.size[0], left : left + self.size[1]]

    @staticmethod
    def _without_ends(images: torch.Tensor, side: int) -> tuple[torch.Tensor, list[int]]:
        """Return `images` and their (H, W). Strips that would become too large when their shorter side is resized to
        `side` are cut to their central part, at least four times as long as high."""
        sides = list(images.shape[2:])
        if math.prod(resized_shape(sides[0], sides[1], side)) > LARGEST:
            axis = 2 + sides.index(max(sides))
            length = 4 * min(sides) + (max(sides) % 2)
            images = images.narrow(axis, (max(sides) - length) // 2, length)
        return images, list(images.shape[2:])

    def _resized(self, images: torch.Tensor, size) -> torch.Tensor:
        if tuple(images.shape[2:]) == tuple(size):
            return images.float()
        box = constant(((0, 0, *images.shape[2:]),), images.device).expand(len(images), -1)
        return resized_crops(images, box, size)
