"""Unusual and damaged images as bytes, and shards of them."""

import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

DARK = (10, 20, 30)


def encoded(picture: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG, written by hand: pillow does not write these."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    parts = [header, *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    made = (struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def plain(value=DARK, mode="RGB", size=(8, 8)) -> Image.Image:
    return Image.new(mode, size, value)


def frames() -> dict:
    return dict(save_all=True, append_images=[plain((200, 0, 0)), plain((0, 200, 0))])


def ycck() -> bytes:
    """Return a JPEG of four channels, of which Adobe's marker declares the first three to be YCbCr."""
    merged = Image.merge("CMYK", (*plain().convert("YCbCr").split(), plain(0, "L")))
    content = bytearray(encoded(merged, "JPEG", quality=100, subsampling=0))
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def with_exif(damage=False) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    content = bytearray(encoded(two_rows(), "JPEG", quality=100, subsampling=0, exif=exif))
    if damage:
        offset = content.index(b"Exif") + 6
        content[offset : offset + 12] = b"\xff" * 12
    return bytes(content)


def two_rows() -> Image.Image:
    """Return an image that is dark above and white below, so that a rotation shows."""
    picture = plain()
    picture.paste((255, 255, 255), (0, 4, 8, 8))
    return picture


GIF = dict(transparency=0)
SIXTEEN = struct.pack(">HHH", 10 * 257, 20 * 257, 30 * 257)
# 8x8 pixels of colour DARK, in the first picture of the file.
GOOD = {
    "CMYK JPEG": encoded(plain().convert("CMYK"), "JPEG", quality=100),
    "YCCK JPEG": ycck(),
    "CMYK TIFF": encoded(plain().convert("CMYK"), "TIFF"),
    "LAB TIFF": encoded(plain().convert("LAB"), "TIFF"),
    "16-bit PNG": png(8, 8, 16, 2, (b"\0" + SIXTEEN * 8) * 8),
    "16-bit PNG with alpha": png(8, 8, 16, 6, (b"\0" + (SIXTEEN + b"\0\0") * 8) * 8),
    "palette": encoded(plain().convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
    "palette GIF with transparency": encoded(plain().convert("P", palette=Image.Palette.ADAPTIVE), "GIF", **GIF),
    "animated GIF": encoded(plain(), "GIF", **frames()),
    "animated WEBP": encoded(plain(), "WEBP", lossless=True, **frames()),
    "animated PNG": encoded(plain(), "PNG", **frames()),
    "TIFF of several pages": encoded(plain(), "TIFF", **frames()),
    "EXIF that turns it": with_exif(),
    "EXIF that is broken": with_exif(damage=True),
    "RGBA, all transparent": encoded(plain((*DARK, 0), "RGBA"), "PNG"),
    "JPEG 2000": encoded(plain(), "JPEG2000"),
    "progressive JPEG": encoded(plain(), "JPEG", quality=100, progressive=True),
    "more behind its end": encoded(plain(), "PNG") + b"<?php system('ls') ?>",
}
NOISE = Image.frombytes("RGB", (32, 32), np.random.RandomState(0).bytes(3072))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def half(format: str) -> bytes:
    content = encoded(NOISE, format)
    return content[: len(content) // 2]


def huge(format: str) -> bytes:
    """Return a small file whose header claims billions of pixels."""
    side = 50_000
    if format == "PNG":
        return png(side, side, 8, 2, b"")
    if format == "PPM":
        return b"P6\n%d %d\n255\n" % (side, side)
    content = bytearray(encoded(plain(size=(16, 16)), format))
    offset, form = {
        "JPEG": (content.find(b"\xff\xc0") + 5, ">HH"),
        "GIF": (6, "<HH"),
        "BMP": (18, "<ii"),
    }[format]
    struct.pack_into(form, content, offset, side, side)
    return bytes(content)


BAD = {
    **{f"half a {format}": half(format) for format in ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000")},
    **{f"a huge {format}": huge(format) for format in ("PNG", "JPEG", "GIF", "BMP", "PPM")},
    "nothing": b"",
    "text": b"404: not found",
    "EPS": EPS,
    "floats with NaN": encoded(Image.fromarray(np.array([[0, np.nan]], np.float32)), "TIFF"),
    "floats with Inf": encoded(Image.fromarray(np.array([[0, np.inf]], np.float32)), "TIFF"),
    "floats below 0": encoded(Image.fromarray(np.array([[-1, 1]], np.float32)), "TIFF"),
    "integers above 16 bits": encoded(Image.fromarray(np.array([[0, 70_000]], np.int32)), "TIFF"),
    "a text of 200 MB inside": png(1, 1, 8, 2, b"\0abc", (b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20), 1))),
}


def write_shard(path, members: dict[str, bytes | tarfile.TarInfo]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                content.name = name
                tar.addfile(content)
                continue
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
