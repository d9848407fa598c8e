"""Files of bands: NumPy arrays (.npy, .npz) and TIFF with any number of bands and any type (package tifffile)."""

import logging
import math
import zipfile
from typing import BinaryIO

import numpy as np
from PIL import Image

from util.data.bands import BandLayout, Bands, OtherBands, many_bands
from util.data.images import open_image, read_image

try:
    import tifffile
except ImportError:  # optional: pillow reads TIFF of up to four channels
    tifffile = None

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it would print what is odd about a file; ours names it

_NUMPY, _ZIP = b"\x93NUMPY", b"PK\x03\x04"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
_MOST = 4 * 179_000_000  # values of an image: four channels of pillow's largest
_SAMPLES_PER_PIXEL = 277  # tag of TIFF


def read_file(file: BinaryIO, layout: BandLayout | None) -> Image.Image:
    """Return a decoded image: `Bands` for arrays of several bands, and for TIFF files of more bands than pillow reads;
    else an image of pillow's, also for an array of one band. Without a `layout` arrays are refused. Raises
    `util.data.images.BROKEN_IMAGE`."""
    return _read_bands(file, layout) or read_image(file)


def open_file(file: BinaryIO, layout: BandLayout | None) -> Image.Image:
    """Return an image as `read_file`, but one of pillow's may not be decoded yet."""
    return _read_bands(file, layout) or open_image(file)


def _read_bands(file: BinaryIO, layout: BandLayout | None) -> Image.Image | None:
    """Return the image of an array or of a TIFF that tifffile reads; None for other files, from their beginning."""
    start = file.read(len(_NUMPY))
    file.seek(0)
    if layout is None:
        return None
    if start == _NUMPY:
        return _image(_read_array(file), layout)
    if start[:4] == _ZIP:
        return _image(_read_archive(file), layout)
    if start[:4] in _TIFF and not _is_for_pillow(file, layout.count):
        values, known = _read_tiff(file)
        return _image(values, layout, known)
    return None


# Arrays ---------------------------------------------------------------------------------------------------------------


def _read_array(file: BinaryIO) -> np.ndarray:
    """Return the array of a .npy file. Raises OSError for a damaged one, ValueError for one of Python objects or one
    that is too large."""
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
    except ValueError as error:
        raise OSError(f"it is a NumPy array that cannot be read: {error}") from error
    if dtype.hasobject:
        raise ValueError("it is an array of Python objects, which are not read")
    _check_size(shape)
    file.seek(0)
    return np.lib.format.read_array(file, allow_pickle=False)


def _read_archive(file: BinaryIO) -> np.ndarray:
    """Return the only array of a .npz file, or the one called image. Raises ValueError if there is neither."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            arrays = {name.removesuffix(".npy"): name for name in names}
            chosen = arrays.get("image") if len(names) > 1 else names[0] if names else None
            if chosen is None:
                shown = ", ".join(list(arrays)[:5]) or "none"
                raise ValueError(f"which of its arrays is the image is not clear ({shown}): keep one, or call it image")
            with archive.open(chosen) as member:
                return _read_array(member)
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise OSError(f"it is a zip archive that cannot be read: {error}") from error


# TIFF -----------------------------------------------------------------------------------------------------------------


def _is_for_pillow(file: BinaryIO, count: int) -> bool:
    """Whether pillow reads a TIFF for a model of `count` channels: if it can, and shows as many channels as there are
    (of four samples without a colour space it leaves out the fourth)."""
    if many_bands(count):
        return False
    try:
        with_header = open_image(file)
        samples = with_header.tag_v2.get(_SAMPLES_PER_PIXEL, 1)
        return samples != count or len(with_header.getbands()) == count
    except Exception:  # pillow has many errors for TIFF files that are not for it
        return tifffile is None  # then pillow's own reason is reported
    finally:
        file.seek(0)


def _read_tiff(file: BinaryIO) -> tuple[np.ndarray, str]:
    """Return the values of the first image (series of pages) in a TIFF, axes of length 1 left out, and where its bands
    are: first, last, or "" if it does not say. Raises ValueError for more than three axes."""
    if tifffile is None:
        raise OSError("TIFF files of many bands need the package tifffile: pip install tifffile")
    try:
        with tifffile.TiffFile(file) as tiff:
            series = tiff.series[0]
            _check_size(series.shape)
            values, axes = series.asarray(maxworkers=1), series.axes
    except Exception as error:  # a damaged file leads to errors of any type inside tifffile
        reason = str(error).strip().splitlines()
        raise OSError(
            f"it is a TIFF that tifffile cannot read: {reason[0] if reason else type(error).__name__}"
        ) from error
    kept = [i for i, length in enumerate(values.shape) if length > 1 or axes[i] in "YX"]
    axes = "".join(axes[i] for i in kept)
    values = values.reshape([values.shape[i] for i in kept])
    if len(kept) > 3:
        raise ValueError(f"its axes are {axes} of lengths {_lengths(values.shape)}: bands, height and width are needed")
    if len(kept) == 3 and axes[-1] in "SC":
        return values, "last"
    return values, "first" if len(kept) == 3 and axes[0] in "SC" else ""


# Values ---------------------------------------------------------------------------------------------------------------


def _check_size(shape) -> None:
    if math.prod(shape) > _MOST:
        raise ValueError(f"it has {_lengths(shape)} values, more than {_MOST}")


def _lengths(shape) -> str:
    return " x ".join(map(str, shape))


def _image(values: np.ndarray, layout: BandLayout, known: str = "") -> Image.Image:
    """Return an array as an image. `known` says where its bands are, if the file does. Raises ValueError for types
    other than real numbers, and for shapes that are no image of `layout.count` bands."""
    if values.dtype.kind not in "uif":
        raise ValueError(f"its values are {values.dtype}, which are no real numbers")
    if not values.size:
        raise ValueError(f"its shape is {_lengths(values.shape)}: it is empty")
    values = values.astype(values.dtype.newbyteorder("="), copy=False)
    if layout.count == 1 and values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
        values = values[0] if len(values) == 1 else values[..., 0]
    if values.ndim == 2:
        return _grey(values)
    if values.ndim != 3:
        raise ValueError(f"its shape is {_lengths(values.shape)}: two or three axes are needed")
    order = known or (layout.axis if layout.axis != "auto" else _order(values.shape, layout.count))
    values = np.moveaxis(values, -1, 0) if order == "last" else values
    if len(values) != layout.count:
        raise OtherBands(f"it has {len(values)} bands, but --in_chans is {layout.count}")
    return Bands(values, "" if known else order)


def _order(shape: tuple[int, ...], count: int) -> str:
    """Return where the bands of an array are. Raises ValueError if both or none of the outer axes can be theirs."""
    first, last = shape[0] == count, shape[2] == count
    if first and last:
        raise ValueError(
            f"its shape is {_lengths(shape)}: whether the first or the last axis has the bands is not clear, give "
            f"--band_axis first or last"
        )
    if not first and not last:
        raise OtherBands(
            f"its shape is {_lengths(shape)}: neither its first nor its last axis has the {count} bands of --in_chans"
        )
    return "first" if first else "last"


def _grey(values: np.ndarray) -> Image.Image:
    """Return an array (H, W) as a grey image: of 8 or 16 bits, or of integers or floats of 32 bits."""
    if values.dtype not in (np.uint8, np.uint16):
        limits = np.iinfo(np.int32)
        integers = values.dtype.kind in "ui" and limits.min <= values.min() and values.max() <= limits.max
        values = values.astype(np.int32 if integers else np.float32)
    return Image.fromarray(np.ascontiguousarray(values))
