"""Random resized crops of JPEGs that are decoded at a reduced size: the decoder computes only the DCT frequencies that
the final crop can show (libjpeg's scaling by 1/2, 1/4, 1/8)."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional


class DraftedCrop:
    """`crop` (the random resized crop of torchvision, timm or `util.crop`) for images that are not decoded yet.

    `crop` draws the box at the full size. A JPEG is decoded at the smallest scale at which the box is at least as high
    and as wide as the final crop. Other formats are decoded at full size, with the same result as `crop`.
    """

    def __init__(self, crop):
        self.crop = crop

    def __call__(self, img: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
        """Decode, `convert` to the channels of the model, and crop. Raises `util.data.images.BROKEN_IMAGE`."""
        (height, width), (full_width, full_height) = self.crop.size, img.size
        top, left, h, w = self.crop.get_params(img, self.crop.scale, self.crop.ratio)
        factor = min(h // height, w // width)
        # Scales by the largest power of 2 that fits, and returns the box of the whole image; None for other formats.
        drafted = img.draft(None, (full_width // factor, full_height // factor)) if factor >= 2 else None
        img.load()
        decoded = convert(img)
        if drafted is None:
            whole: Any = decoded
            return functional.resized_crop(whole, top, left, h, w, self.crop.size, self.crop.interpolation)
        scale = full_width / drafted[1][2]
        box = left / scale, top / scale, (left + w) / scale, (top + h) / scale
        return decoded.resize((width, height), Image.Resampling.BICUBIC, box=box)


def split_crop(transform) -> tuple[DraftedCrop | None, transforms.Compose]:
    """Return the first step of `transform` as a DraftedCrop and the other steps, or (None, `transform`) when the first
    step is not a random resized crop."""
    steps = getattr(transform, "transforms", [None])
    if not all(hasattr(steps[0], name) for name in ("get_params", "scale", "ratio")):
        return None, transform
    return DraftedCrop(steps[0]), transforms.Compose(steps[1:])
