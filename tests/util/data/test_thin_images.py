"""Long strips: the memory of an image is bounded by what it becomes on the way, not by its file."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.launch import ROOT
from PIL import Image

from util.data import batch_aug, transforms
from util.data.batch_aug import BatchTransform
from util.data.cache import Decoder
from util.data.sources import Files
from util.data.transforms import ResizeShortSide, eval_transform

NORM = (0.5,) * 3, (0.5,) * 3


def strip(width, height):
    return Image.fromarray(np.random.RandomState(0).randint(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("size", [(2, 3001), (3, 1002), (3002, 2), (1, 999), (7, 1000)])
@pytest.mark.parametrize("side", [16, 15])
@pytest.mark.parametrize("mode", ["RGB", "F"])
def test_the_centre_is_that_of_the_whole(monkeypatch, size, side, mode):
    """Pillow's kernel reaches beyond the box. With low contrast no overshoot is clipped: pillow resizes tall parts
    in another order."""
    img = strip(*size).point(lambda value: 100 + value // 4)
    img = img.convert("L").convert("F") if mode == "F" else img
    transform = eval_transform((side, side), *NORM, crop_pct=0.875)
    whole = transform(img)
    monkeypatch.setattr(transforms, "LARGEST", 0)
    torch.testing.assert_close(transform(img), whole, atol=2 / 255 * (1 + 1e-3), rtol=0)  # one level of rounding


def test_ordinary_images_are_unchanged():
    img = strip(300, 200)
    resized = ResizeShortSide(256)(img)
    assert resized.size == (384, 256)
    assert resized == img.resize((384, 256), Image.Resampling.BICUBIC)


MEMORY = """
import resource, sys
from util.data.cache import Decoder
from util.data.samples import KeyedDataset
from util.data.sources import Files
from util.data.transforms import eval_transform, pretrain_transform, probe_transform
images = Files(sys.argv[1:], [0] * len(sys.argv[1:]), None)
norm = (0.5,) * 3, (0.5,) * 3
steps = [eval_transform((224, 224), *norm), eval_transform((224, 160), *norm)]
steps += [pretrain_transform(aug, (224, 224), *norm) for aug in ("mae", "crop", "three")]
steps += [probe_transform("rrc", (224, 224), *norm)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for transform in steps:
    dataset = KeyedDataset(images, transform, 0, 3, replace=False)
    assert not any(dataset[i].bad for i in range(len(images)))
decoder = Decoder(images, 3, 256)
assert all(decoder._decoded(i).shape == (3, 256, 256) for i in range(len(images)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_memory(tmp_path):
    """A strip of 2 x 60,000 pixels took 8.4 GB."""
    for name, size in (("wide.png", (60_000, 2)), ("tall.png", (2, 60_000)), ("grey.tif", (60_000, 2))):
        picture = strip(*size)
        (picture.convert("L") if name == "grey.tif" else picture).save(tmp_path / name)
    files = [str(tmp_path / name) for name in ("wide.png", "tall.png", "grey.tif")]
    done = subprocess.run([sys.executable, "-c", MEMORY, *files], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400  # MB; the largest resized image has 100 MB, and pillow's copies


def test_a_cache_of_strips(monkeypatch):
    """`--data_cache` with `--aug none` enlarges whole batches."""
    images = torch.randint(0, 256, (2, 3, 4, 400), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = BatchTransform("none", (16, 16), *NORM, seed=0)
    whole = transform(images, 0, torch.arange(2))
    monkeypatch.setattr(batch_aug, "LARGEST", 0)
    cut, resize = [], batch_aug.resized_crops

    def watched(images, *given):
        cut.append(images.shape)
        return resize(images, *given)

    monkeypatch.setattr(batch_aug, "resized_crops", watched)
    torch.testing.assert_close(transform(images, 0, torch.arange(2)), whole)
    assert cut == [(2, 3, 4, 16)]


def test_a_strip_as_jpeg_leaves_nvjpeg_to_pillow(tmp_path, monkeypatch):
    strip(6000, 2).save(tmp_path / "x.jpg")
    monkeypatch.setattr(transforms, "LARGEST", 1000)
    decoder = Decoder(Files([str(tmp_path / "x.jpg")], [0], None), 3, 16, torch.device("cpu"))
    assert decoder._decoded_on_device(0) is None and decoder._decoded(0).shape == (3, 16, 16)
