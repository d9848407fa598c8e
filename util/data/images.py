"""Opening of untrusted image files: the formats, sizes and files that are allowed, and the errors of broken ones."""

import logging
import os
import stat
import struct
import sys
import threading
import zlib
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: pillow decodes, to the same pixels
    simplejpeg = None

# Pillow would print its reason for refusing a TIFF to stderr, once for each attempt; ours names the file.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)

# Formats that contain nothing but pixels; the file's ending does not matter. Pillow would detect further formats by
# their first bytes: it runs Ghostscript for EPS, and mistakes damaged files for formats with short signatures.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")

# Errors of the readers on files that are not complete images; any other error is a bug and must surface.
# (In pillow, unknown formats and truncated files raise OSError, broken PNG chunks SyntaxError, EXIF ValueError or
# IndexError, damaged AVIF RuntimeError, invalid lengths in JPEG 2000 OverflowError, lack of memory MemoryError.)
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    RuntimeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

_SCRATCH = 1 << 26  # bytes that a thread keeps for the next image; 4 for each pixel


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image without decoding it. Raises BROKEN_IMAGE, also above 179 million pixels (pillow's
    DecompressionBombError). A colour image of 16 bits per channel, which pillow will reduce to 8, is marked by
    `info["bits_per_channel"]`."""
    try:
        img = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:
        file.seek(0)
        raise OSError(_kind(file.read(512))) from error
    if img.mode in ("RGB", "RGBA") and any("16" in _raw_mode(tile) for tile in img.tile):
        img.info["bits_per_channel"] = 16
    return img


def _raw_mode(tile) -> str:
    """Return the layout of the stored pixels in a tile of pillow's, such as RGB;16B."""
    arguments = tile[3] if isinstance(tile[3], (tuple, list)) else (tile[3],)
    return str(arguments[0]) if arguments else ""


# Content that is mistaken for an image file: the bytes it begins with.
_OTHER_CONTENT = {
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip data (perhaps NIfTI)",
    b"%PDF": "a PDF document",
    b"%!PS": "a PostScript document",
    b"PAR1": "a parquet table",
    b"version https://git-lfs": "a pointer of Git LFS, whose content was not fetched",
    b"<": "HTML or XML",
    b"{": "JSON text",
}


def _kind(start: bytes) -> str:
    """Return what a file of this beginning (512 bytes) is, in words."""
    if not start:
        return "the file is empty"
    if start[128:132] == b"DICM":
        return "it is a DICOM file (convert it to 16-bit PNG or TIFF)"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return (
            "it is a TIFF of bands or types that pillow cannot read (as a file, not in a shard, the package tifffile "
            "reads it with the number of its bands in --in_chans; or convert it to 8-bit RGB or 16-bit grey)"
        )
    kind = next((name for magic, name in _OTHER_CONTENT.items() if start.lstrip().startswith(magic)), None)
    return f"it is {kind}, not an image" if kind else "cannot identify image file"


def read_image(file: BinaryIO) -> Image.Image:
    """Return a decoded image; of a file with several images the first. Raises BROKEN_IMAGE."""
    img = open_image(file)
    decoded = _decoded_jpeg(img, file) if simplejpeg is not None and img.format == "JPEG" else None
    if decoded is not None:
        return decoded
    img.load()
    return img


_thread = threading.local()


def _scratch(size: int) -> bytearray | None:
    """Return memory of this thread for at least `size` bytes, which the next call returns again: new memory would be
    zeroed by the system for each image. None for a large image, which gets memory of its own."""
    if size > _SCRATCH:
        return None
    if len(getattr(_thread, "scratch", b"")) < size:
        _thread.scratch = bytearray(size)
    return _thread.scratch


def _decoded_jpeg(img: Image.Image, file: BinaryIO) -> Image.Image | None:
    """Return the image of a JPEG `file` that pillow has opened as `img`, decoded by simplejpeg: the same pixels as
    pillow's, both by libjpeg-turbo, in two thirds of the time. None for modes other than grey and RGB, and for a file
    that is not flawless: pillow decides whether it can be read."""
    layout = {"L": "GRAY", "RGB": "RGBX"}.get(img.mode)  # pillow stores RGB in four bytes
    if layout is None:
        return None
    file.seek(0)
    try:
        pixels = simplejpeg.decode_jpeg(file.read(), layout, buffer=_scratch(4 * img.width * img.height))
    except ValueError:
        return None
    if pixels.shape[:2] != (img.height, img.width):
        return None
    decoded = Image.frombytes(img.mode, img.size, pixels, "raw", "L" if img.mode == "L" else layout)
    decoded.format, decoded.info = img.format, img.info
    return decoded


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading. Raises OSError for pipes and devices, which may block or never end."""
    return open(path, "rb", opener=_regular)


def _regular(path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # a pipe would block until it has a writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        raise IsADirectoryError("it is a folder") if is_folder else OSError("it is a pipe or a device, not a file")
    return descriptor


def printable(name: str) -> str:
    """Return a name that is safe to print: one with line breaks, escape sequences or invalid UTF-8 as a literal."""
    return name if name.isprintable() else repr(name)


def reason_of(error: Exception) -> str:
    """Return why an image is unreadable, in one line."""
    return printable(str(error)) or type(error).__name__


def warn_unreadable(name: str, error: Exception, rest: str = "") -> None:
    """Report an unreadable image on stderr; `print` is silent on all ranks but the first."""
    sys.stderr.write(f"unreadable image {printable(name)}: {reason_of(error)}{rest}\n")
    sys.stderr.flush()
