"""Opening images that strangers made: in which formats, how large, from what kind of file; what is unreadable."""

import os
import stat
import struct
import sys
import zlib
from typing import BinaryIO

from PIL import Image

# Formats that hold pixels and nothing else, whatever a file is called. Pillow knows others by their first bytes: for
# EPS it starts Ghostscript, and takes damaged files for formats with weak marks.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF", "JPEG2000", "AVIF")

# What readers raise on files that are no (whole) images; anything else is a bug and must surface.
# (pillow: UnidentifiedImageError and truncation are OSError, broken PNG chunks SyntaxError, EXIF ValueError/IndexError,
# damaged AVIF RuntimeError, lengths of JPEG 2000 that are none OverflowError, more memory than there is MemoryError)
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
    """Not decoded yet. Raises BROKEN_IMAGE, also for more than 179 million pixels (pillow's DecompressionBombError)."""
    return Image.open(file, formats=FORMATS)


def read_image(file: BinaryIO) -> Image.Image:
    """Decoded; of several pictures in one file the first."""
    img = open_image(file)
    img.load()
    return img


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """A file to read. OSError for pipes and devices, which might never end, or never begin."""
    return open(path, "rb", opener=_regular)


def _regular(path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # else it would wait for a pipe's writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        raise IsADirectoryError("it is a folder") if is_folder else OSError("it is a pipe or a device, and no file")
    return descriptor


def shown(name: str) -> str:
    """A file's name as it can be printed: line breaks, escape sequences and what is no UTF-8 as a literal."""
    return name if name.isprintable() else repr(name)


def say_unreadable(name: str, error: Exception, rest: str = "") -> None:
    """On stderr, and not by `print`, which is silent on all ranks but one."""
    sys.stderr.write(f"unreadable image {shown(name)}: {shown(str(error)) or type(error).__name__}{rest}\n")
    sys.stderr.flush()
