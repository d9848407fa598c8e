"""Smaller copies of images for shards: the shorter side resized, and encoded anew.

What the reader shows of a copy is what it shows of the original, resized: the stored pixels. So EXIF's rotation is not
applied (pillow itself applies it to TIFF), and no metadata is kept that another program would apply.
"""

import io

import numpy as np
from PIL import Image

from util.data.pixel_range import has_fixed_range, is_wide
from util.data.transforms import resized_shape, to_channels

LONGEST = 65_500  # pixels of a side that a JPEG may have in libjpeg


def shrinks(img: Image.Image, side: int) -> bool:
    """Whether an image (which may not be decoded yet) is to be resized: its shorter side is longer than `side`, and a
    JPEG can hold the result. A grey image of more than 8 bits in which one value means transparent cannot be resized.
    """
    if is_wide(img) and "transparency" in img.info:
        return False
    return min(img.size) > side and max(resized_shape(img.height, img.width, side)) <= LONGEST


def smaller(img: Image.Image, side: int, quality: int) -> tuple[str, bytes]:
    """Return the file ending and the bytes of a decoded image whose shorter side becomes `side` (bicubic, and the size
    rounded, as the evaluation transform does).

    Grey and colour images become JPEGs of one and three channels, of this `quality` (colours at half resolution).
    Palette, CMYK, YCCK, LAB and 16-bit colour images are converted as the reader does it for three channels. JPEG
    cannot hold the rest: images that are transparent somewhere become PNGs, colours and alpha resized each by itself;
    grey images of more than 8 bits become 16-bit PNGs, or TIFFs of 32-bit integers or floats, and their values stay in
    the range of the original's (integers beyond 2**24 are rounded). Raises ValueError for NaN and infinite values.
    """
    height, width = resized_shape(img.height, img.width, side)
    if is_wide(img):
        return _wide(img, (width, height))
    img = _plain(img)
    if img.mode in ("LA", "RGBA"):
        bands = [band.resize((width, height), Image.Resampling.BICUBIC) for band in img.split()]
        return "png", _encoded(Image.merge(img.mode, bands), "PNG")
    resized = img.resize((width, height), Image.Resampling.BICUBIC)
    resized.info = {}  # comments, which pillow would write
    return "jpg", _encoded(resized, "JPEG", quality=quality)


def _plain(img: Image.Image) -> Image.Image:
    """Return an 8-bit image as L, RGB or, if it is transparent somewhere, LA or RGBA."""
    grey = img.mode in ("1", "L", "LA", "La")
    if img.has_transparency_data:
        with_alpha = to_channels(img, 2 if grey else 4)
        if with_alpha.getextrema()[-1] != (255, 255):
            return with_alpha
    return to_channels(img, 1 if grey else 3)


def _wide(img: Image.Image, size: tuple[int, int]) -> tuple[str, bytes]:
    """Resize a grey image of more than 8 bits to `size` (W, H). Raises ValueError for NaN and infinite values."""
    values = np.asarray(img)
    lowest, highest = values.min(), values.max()  # NaN if any value is NaN
    if not np.isfinite(lowest) or not np.isfinite(highest):
        raise ValueError("it has values that are NaN or infinite")
    resized = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
    resized = resized.clip(lowest, highest)  # bicubic interpolation overshoots
    if img.mode == "F":
        return "tif", _encoded(Image.fromarray(resized), "TIFF")
    if has_fixed_range(img):
        return "png", _encoded(Image.fromarray(np.rint(resized).astype(np.uint16)), "PNG")
    return "tif", _encoded(Image.fromarray(np.rint(resized).astype(np.int32)), "TIFF")


def _encoded(img: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    img.save(file, form, **options)
    return file.getvalue()
