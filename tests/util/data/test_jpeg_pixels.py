"""JPEG files are decoded by simplejpeg to pillow's pixels, and what it refuses is pillow's to judge."""

import io

import numpy as np
import pytest
from PIL import Image

from util.data import images
from util.data.images import BROKEN_IMAGE, open_image, read_image

simplejpeg = pytest.importorskip("simplejpeg", reason="no wheel for this platform: pillow decodes")

SIZES = [(1, 1), (8, 8), (33, 17), (64, 48), (127, 200)]
SAVED = {
    "4:4:4": dict(subsampling="4:4:4"),
    "4:2:2": dict(subsampling="4:2:2"),
    "4:2:0": dict(subsampling="4:2:0"),
    "progressive": dict(progressive=True),
    "progressive 4:2:0": dict(progressive=True, subsampling="4:2:0", quality=30),
    "restart markers": dict(restart_marker_blocks=3),
    "optimised": dict(optimize=True, quality=98),
    "stored as RGB": dict(keep_rgb=True),
}


def picture(width, height, mode="RGB"):
    """A smooth picture with noise: chroma that changes from pixel to pixel."""
    rng = np.random.default_rng(width * height)
    smooth = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    noise = rng.integers(-40, 41, (height, width, 3))
    return Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)).convert(mode)


def jpeg(img, **options) -> bytes:
    file = io.BytesIO()
    img.save(file, "JPEG", **{"quality": 90} | options)
    return file.getvalue()


def by_pillow(content: bytes) -> Image.Image:
    img = open_image(io.BytesIO(content))
    img.load()
    return img


@pytest.fixture
def decoded(monkeypatch):
    """The number of images that simplejpeg has decoded."""
    count, original = [], simplejpeg.decode_jpeg
    monkeypatch.setattr(
        images.simplejpeg, "decode_jpeg", lambda *args, **more: (original(*args, **more), count.append(1))[0]
    )
    return count


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", SAVED)
def test_pixels_are_pillows(name, mode, decoded):
    options = {key: value for key, value in SAVED[name].items() if mode == "RGB" or key in ("progressive", "optimize")}
    for size in SIZES:
        content = jpeg(picture(*size, mode), **options)
        ours, theirs = read_image(io.BytesIO(content)), by_pillow(content)
        assert ours.mode == theirs.mode == mode and ours.size == size and ours.format == "JPEG"
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert len(decoded) == len(SIZES)


def test_cmyk_is_pillows(decoded):
    content = jpeg(picture(40, 30).convert("CMYK"))
    assert read_image(io.BytesIO(content)).mode == "CMYK" and not decoded


def test_other_formats_are_pillows(decoded):
    file = io.BytesIO()
    picture(20, 10).save(file, "PNG")
    assert read_image(file).size == (20, 10) and not decoded


DAMAGE = {
    "cut in the pixels": lambda content: content[: len(content) // 2],
    "without an end": lambda content: content[:-2],
    "with a tail": lambda content: content + b"more bytes",
    "with a hole": lambda content: content[: len(content) // 2] + content[len(content) // 2 + 40 :],
    "with zeros": lambda content: content[:-300] + bytes(300),
    "cut in the header": lambda content: content[:100],
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_what_they_are_to_pillow(name):
    """Refused with the same error, or read with the same pixels."""
    content = DAMAGE[name](jpeg(picture(127, 200)))
    outcomes = []
    for read in (lambda file: by_pillow(file.read()), read_image):
        try:
            outcomes.append(np.asarray(read(io.BytesIO(content))).tobytes())
        except BROKEN_IMAGE as error:
            outcomes.append((type(error), str(error).split(" <")[0]))
    assert outcomes[0] == outcomes[1]


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    content = jpeg(picture(33, 17))
    expected = np.asarray(read_image(io.BytesIO(content)))
    monkeypatch.setattr(images, "simplejpeg", None)
    assert np.array_equal(np.asarray(read_image(io.BytesIO(content))), expected)
