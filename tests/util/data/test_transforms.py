"""Transforms of training and evaluation: crops, flips, colours, sizes."""

import math

import numpy as np
import pytest
import torch
from helpers.plain_images import finetune_flags, global_states
from PIL import Image
from torchvision import transforms as tvt

from util.data import random_steps, transforms
from util.data.draws import VERSIONS, SampleRng
from util.data.image_format import IMAGENET, image_shape
from util.data.sample_rng import seeded
from util.errors import UserError

NO_NORM = ((0.0,) * 3, (1.0,) * 3)


def noise_image(width, height, mode="RGB"):
    values = np.random.RandomState(1).randint(1, 255, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.fixture(params=VERSIONS)
def sample(request):
    """A function of a number: a block with the random numbers of that sample."""
    return lambda index: SampleRng(0, request.param).sample(0, index)


def crops(monkeypatch, transform, img, count, sample):
    """(top, left, height, width) of the resized crops that `transform` makes."""
    made, resized = [], []
    crop, resize = Image.Image.crop, Image.Image.resize

    def recorded(img, box):
        left, top, right, bottom = box
        made.append((top, left, bottom - top, right - left))
        return crop(img, box)

    monkeypatch.setattr(Image.Image, "crop", recorded)
    monkeypatch.setattr(Image.Image, "resize", lambda img, *how: (resized.append(how), resize(img, *how))[1])
    for i in range(count):
        with sample(i):
            transform(img)
    assert len(made) == count
    assert set(resized) == {((32, 32), Image.Resampling.BICUBIC)} and len(resized) == count
    return np.array(made)


@pytest.mark.parametrize(("smallest", "aug"), [(0.2, "mae"), (0.2, "three"), (0.08, "rrc")])
def test_resized_crops_cover_the_area_of_the_paper(monkeypatch, smallest, aug, sample):
    make = transforms.probe_transform if aug == "rrc" else transforms.pretrain_transform
    boxes = crops(monkeypatch, make(aug, (32, 32), *NO_NORM), noise_image(200, 200), 300, sample)
    areas = boxes[:, 2] * boxes[:, 3] / 200**2
    shapes = boxes[:, 3] / boxes[:, 2]
    assert smallest - 0.005 < areas.min() < smallest + 0.05 and 0.9 < areas.max() <= 1  # sides are whole pixels
    assert 0.73 < shapes.min() < 0.8 and 1.25 < shapes.max() < 1.36
    assert (boxes[:, :2].min(axis=0) == 0).all() and (boxes[:, :2] > 20).any(axis=0).all()


def test_flips_half_of_the_time(sample):
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))).convert("RGB")
    for transform in (
        transforms.pretrain_transform("mae", (32, 32), *NO_NORM),
        transforms.pretrain_transform("crop", (32, 32), *NO_NORM),
        transforms.probe_transform("rrc", (32, 32), *NO_NORM),
        transforms.finetune_transform(finetune_flags("--aa", "", "--reprob", 0), (32, 32), *NO_NORM),
    ):
        flipped = 0
        for i in range(200):
            with sample(i):
                middle = transform(ramp)[0, 16]
                flipped += bool(middle[14] > middle[18])
        assert abs(flipped - 100) < 5 * math.sqrt(50)


def test_crop_pads_by_an_eighth(sample):
    """Pixels are numbered from one, which gives the position of every crop; padding is zero."""
    numbers = np.arange(1, 1025, dtype=np.int64).reshape(32, 32)
    img = Image.fromarray(np.stack([numbers // 256, numbers % 256, numbers * 0 + 1], -1).astype(np.uint8))
    padded = np.pad(numbers, 4)
    windows = {}
    for dy in range(9):
        for dx in range(9):
            window = padded[dy : dy + 32, dx : dx + 32]
            windows[window.tobytes()] = windows[window[:, ::-1].tobytes()] = (dy - 4, dx - 4)
    places = set()
    for make in (transforms.pretrain_transform, transforms.probe_transform):
        transform = make("crop", (32, 32), *NO_NORM)
        for i in range(150):
            with sample(i):
                high, low, inside = (transform(img) * 255).round().long().numpy()
            places.add(windows[((high * 256 + low) * inside).tobytes()])
    assert {dy for dy, _ in places} == {dx for _, dx in places} == set(range(-4, 5))


@pytest.mark.parametrize("channels", [1, 3])
def test_three_augment_takes_one_of_three(monkeypatch, channels, sample):
    used = []
    operations = [
        (tvt.Grayscale, "forward"),
        (random_steps.Solarization, "__call__"),
        (random_steps.GaussianBlur, "__call__"),
    ]

    def counted(operation, original):
        def call(self, img):
            used.append(operation)
            return original(self, img)

        return call

    for operation, method in operations:
        monkeypatch.setattr(operation, method, counted(operation, getattr(operation, method)))
    jitters = []
    monkeypatch.setattr(tvt.ColorJitter, "forward", lambda self, img: (jitters.append(self), img)[1])
    transform = transforms.pretrain_transform("three", (32, 32), (0.0,) * channels, (1.0,) * channels)
    img = noise_image(32, 32, "L" if channels == 1 else "RGB")
    for i in range(300):
        with sample(i):
            assert transform(img).shape == (channels, 32, 32)
        assert len(used) == len(jitters) == i + 1
    assert all(abs(used.count(operation) - 100) < 5 * math.sqrt(300 * 2 / 9) for operation, _ in operations)
    assert jitters[0].brightness == jitters[0].contrast == jitters[0].saturation == (0.7, 1.3)


def test_solarization_and_blur(sample):
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    solarized = np.asarray(random_steps.Solarization()(ramp))[0].astype(int)
    assert solarized.tolist() == [v if v < 128 else 255 - v for v in range(256)]
    edge = Image.fromarray(np.repeat([[0, 255]], 32, axis=1).astype(np.uint8).repeat(8, axis=0))
    widths = set()
    for i in range(50):
        with sample(i):
            row = np.asarray(random_steps.GaussianBlur()(edge))[4].astype(int)
        assert (np.diff(row) >= 0).all()
        widths.add(int(((row > 2) & (row < 253)).sum()))
    assert min(widths) <= 2 and 6 <= max(widths) <= 16  # radii from 0.1 to 2 pixels


@pytest.mark.parametrize("channels", [2, 4])
def test_augmentations_without_alpha_are_refused(channels):
    norm = (0.5,) * channels, (0.5,) * channels
    with pytest.raises(UserError, match="--aug three"):
        transforms.pretrain_transform("three", (32, 32), *norm)
    with pytest.raises(UserError, match="--aa"):
        transforms.finetune_transform(finetune_flags(), (32, 32), *norm)
    transform = transforms.finetune_transform(finetune_flags("--aa", "", "--color_jitter", 0.4), (32, 32), *norm)
    img = transforms.to_channels(noise_image(40, 40), channels)
    for step in (transform, *(transforms.pretrain_transform(aug, (32, 32), *norm) for aug in ("mae", "crop", "none"))):
        for _ in range(20):
            assert step(img).shape == (channels, 32, 32)


def test_none_is_the_evaluation_transform():
    for size, img in (((32, 32), noise_image(40, 32)), ((224, 224), noise_image(300, 280))):
        plain = transforms.eval_transform(size, *IMAGENET)(img)
        for make in (transforms.pretrain_transform, transforms.probe_transform):
            transform = make("none", size, *IMAGENET)
            before = global_states()
            assert torch.equal(transform(img), plain) and torch.equal(transform(img), plain)
            assert global_states() == before


def pixels(img) -> torch.Tensor:
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).float() / 255


def test_evaluation_at_224_is_the_official_recipe():
    img = noise_image(400, 300)
    resized = img.resize((341, 256), Image.Resampling.BICUBIC)
    expected = pixels(resized.crop((58, 16, 282, 240)))  # (341 - 224) / 2 = 58.5, rounded to even
    assert torch.equal(transforms.eval_transform((224, 224), *NO_NORM)(img), expected)
    mean, std = IMAGENET
    normal = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(transforms.eval_transform((224, 224), mean, std)(img), normal)


def test_evaluation_of_small_and_large_sizes_takes_the_whole_image():
    img = noise_image(32, 32)
    assert torch.equal(transforms.eval_transform((32, 32), *NO_NORM)(img), pixels(img))
    for side in (32, 64, 384):
        img = noise_image(100, 100)
        whole = pixels(img.resize((side, side), Image.Resampling.BICUBIC))
        assert torch.equal(transforms.eval_transform((side, side), *NO_NORM)(img), whole)
    half = transforms.eval_transform((32, 32), *NO_NORM, crop_pct=0.5)(noise_image(64, 64))
    assert torch.equal(half, pixels(noise_image(64, 64).crop((16, 16, 48, 48))))


def test_rectangles():
    size = (24, 64)  # (H, W)
    img = noise_image(90, 50)
    whole = pixels(img.resize((64, 24), Image.Resampling.BICUBIC))
    assert torch.equal(transforms.eval_transform(size, *NO_NORM)(img), whole)
    larger = pixels(img.resize((128, 48), Image.Resampling.BICUBIC).crop((32, 12, 96, 36)))
    assert torch.equal(transforms.eval_transform(size, *NO_NORM, crop_pct=0.5)(img), larger)
    args = finetune_flags()
    every = [transforms.pretrain_transform(aug, size, *NO_NORM) for aug in ("mae", "crop", "three", "none")]
    every += [transforms.probe_transform(aug, size, *NO_NORM) for aug in ("rrc", "crop", "none")]
    every += [transforms.finetune_transform(args, size, *NO_NORM)]
    args.aug = "crop"
    every += [transforms.finetune_transform(args, size, *NO_NORM)]
    for transform in every:
        assert transform(img).shape == (3, 24, 64)
    assert image_shape([24, 64]) == (24, 64) and image_shape(40) == (40, 40)


@pytest.mark.parametrize("crop_pct", [0.0, -0.5, 1.2])
def test_crop_pct_out_of_range(crop_pct):
    with pytest.raises(UserError, match="--crop_pct"):
        transforms.eval_transform((32, 32), *NO_NORM, crop_pct=crop_pct)


def test_finetuning_transform():
    """Pad-and-crop replaces the resized crop; erasing fills with noise; jitter works without a policy."""
    img = noise_image(32, 32)
    args = finetune_flags("--aa", "", "--reprob", 0)
    args.aug = "crop"
    kept = transforms.finetune_transform(args, (32, 32), *NO_NORM)
    for i in range(30):  # an unscaled part of the image: every value of its middle is in the image's rows
        with seeded(i):
            middle = kept(img)[:, 8:24, 8:24]
        windows = pixels(img).unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 17, 17, 16, 16)
        match = [(windows == piece[:, None, None]).all(dim=(0, 3, 4)).any() for piece in (middle, middle.flip(2))]
        assert any(match)
    erased = transforms.finetune_transform(finetune_flags("--aa", "", "--reprob", 1), (32, 32), *NO_NORM)
    values = erased(img)
    assert values.min() < 0 or values.max() > 1  # standard normal pixels
    grey = transforms.finetune_transform(finetune_flags(), (32, 32), (0.5,), (0.5,))
    for i in range(60):
        with seeded(i):
            assert grey(img.convert("L")).shape == (1, 32, 32)
    jitter = finetune_flags("--aa", "", "--reprob", 0, "--color_jitter", 0.4)
    jitter.aug = "crop"
    transform = transforms.finetune_transform(jitter, (32, 32), *NO_NORM)
    flat = Image.new("RGB", (32, 32), (120, 120, 120))
    assert len({transform(flat)[0, 16, 16].item() for _ in range(10)}) > 5
