"""Images of any number of bands (satellite, microscopy, hyperspectral), for the steps of our transforms.

pillow has no such images. `Bands` offers what geometric steps use of one of pillow's images, and resizes band by band
with pillow's own filter: an RGB image in it becomes the same pixels as an image of pillow's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

ARRAY_ENDINGS = (".npy", ".npz")  # of files that hold arrays; TIFF files of many bands end like others
ORDERS = ("auto", "first", "last")  # of --band_axis
_IN_PILLOW = (1, 2, 3, 4)  # grey, grey and alpha, RGB, RGBA
_FLIPS = {Image.Transpose.FLIP_LEFT_RIGHT: np.s_[:, :, ::-1], Image.Transpose.FLIP_TOP_BOTTOM: np.s_[:, ::-1]}


def many_bands(in_chans: int) -> bool:
    """Whether images of this many channels can only be files of bands, not images of pillow's."""
    return in_chans not in _IN_PILLOW


@dataclass(frozen=True)
class BandLayout:
    """How files of bands are read: `count` is the number of bands of the model, `axis` where they are in an array:
    first (C, H, W), last (H, W, C), or auto: wherever `count` is."""

    count: int
    axis: str = "auto"


class OtherBands(ValueError):
    """A file whose number of bands is not that of the model."""


class Bands(Image.Image):
    """An image of bands: `values` (C, H, W) as stored, or after `util.data.transforms.to_channels` in 0..255, uint8 or
    float32. `order` says where the bands are in its file: first or last, "" where the file says so itself.

    Geometric methods work as pillow's; all others raise an error, since pillow has no such mode."""

    def __init__(self, values: np.ndarray, order: str = ""):
        super().__init__()
        self.values, self.order = values, order
        self._mode, self._size = "bands", (values.shape[2], values.shape[1])

    def load(self) -> None:
        """Do nothing: the values have been read."""

    def getbands(self) -> tuple[str, ...]:
        return tuple(map(str, range(len(self.values))))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)

    @property
    def __array_interface__(self):
        raise AttributeError("values of any type and size: numpy takes __array__")

    def crop(self, box: Sequence[float] | None = None) -> "Bands":
        """Return the part in `box` (left, top, right, bottom); it is 0 outside of the image."""
        left, top, right, bottom = (0, 0, *self.size) if box is None else map(round, box)
        (columns, rows), shape = self.size, (len(self.values), bottom - top, right - left)
        if left >= 0 and top >= 0 and right <= columns and bottom <= rows:
            return Bands(self.values[:, top:bottom, left:right])
        cut = np.zeros(shape, self.values.dtype)
        inside = self.values[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
        y, x = max(-top, 0), max(-left, 0)
        cut[:, y : y + inside.shape[1], x : x + inside.shape[2]] = inside
        return Bands(cut)

    def resize(self, size, resample=Image.Resampling.BICUBIC, box=None, reducing_gap=None) -> "Bands":
        """Return the image, or the part of it in `box`, at another size (columns, rows)."""
        columns, rows = size
        made = np.empty((len(self.values), rows, columns), self.values.dtype)
        for band, resized in zip(self.values, made):
            resized[:] = Image.fromarray(np.ascontiguousarray(band)).resize((columns, rows), resample, box)
        return Bands(made)

    def transpose(self, method: Image.Transpose) -> "Bands":
        """Return the image mirrored. Raises NotImplementedError for rotations."""
        if method not in _FLIPS:
            raise NotImplementedError(f"images of bands are mirrored only, not {method!r}")
        return Bands(self.values[_FLIPS[method]])


def black(count: int, size: tuple[int, int] = (32, 32)) -> Bands:
    """Return an image of `count` bands that is 0 everywhere."""
    return Bands(np.zeros((count, *size), np.uint8))
