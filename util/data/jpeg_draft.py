"""Random resized crops of JPEGs that are decoded small: the decoder computes fewer of the DCT's frequencies (libjpeg's
scaling by 1/2, 1/4, 1/8), as many as the crop at its final size can still show."""

from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from util.data.transforms import to_channels


class DraftedCrop:
    """`crop` (torchvision's, timm's or our random resized crop) on images that are not decoded yet.

    The box is the one that `crop` draws from the full size. A JPEG is decoded at the smallest scale at which the box
    has at least the final size in both directions; everything else is decoded whole and gives what `crop` gives.
    """

    def __init__(self, crop):
        self.crop = crop

    def __call__(self, img: Image.Image, in_chans: int) -> Image.Image:
        """Decode and crop. Raises what pillow raises on files that are no (whole) images."""
        (height, width), (full_width, full_height) = self.crop.size, img.size
        top, left, h, w = self.crop.get_params(img, self.crop.scale, self.crop.ratio)
        factor = min(h // height, w // width)
        # Decodes at the next smaller power of 2, and says what became of the whole image; None for other formats.
        drafted = img.draft(None, (full_width // factor, full_height // factor)) if factor >= 2 else None
        img.load()
        decoded = to_channels(img, in_chans)
        if drafted is None:
            return functional.resized_crop(decoded, top, left, h, w, self.crop.size, self.crop.interpolation)
        scale = full_width / drafted[1][2]
        box = left / scale, top / scale, (left + w) / scale, (top + h) / scale
        return decoded.resize((width, height), Image.Resampling.BICUBIC, box=box)


def split_crop(transform) -> tuple[DraftedCrop | None, transforms.Compose]:
    """The first step of `transform` as a drafted crop, and the others; None where it is no random resized crop."""
    steps = getattr(transform, "transforms", [None])
    if not all(hasattr(steps[0], name) for name in ("get_params", "scale", "ratio")):
        return None, transform
    return DraftedCrop(steps[0]), transforms.Compose(steps[1:])
