"""Opening of untrusted image files: the formats, sizes and files that are allowed, and the errors of broken ones."""

import os
import stat
import struct
import sys
import zlib
from typing import BinaryIO

from PIL import Image

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


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image without decoding it. Raises BROKEN_IMAGE, also above 179 million pixels (pillow's
    DecompressionBombError)."""
    return Image.open(file, formats=FORMATS)


def read_image(file: BinaryIO) -> Image.Image:
    """Return a decoded image; of a file with several images the first."""
    img = open_image(file)
    img.load()
    return img


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
