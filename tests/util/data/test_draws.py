"""Random numbers of a sample by position: equal to those of whole batches, distributed as torchvision's, independent of
each other; and the choice of their version."""

import math
import random
from argparse import Namespace

import numpy as np
import pytest
import torch
from helpers.plain_images import finetune_flags, global_states
from PIL import Image
from torchvision import transforms as tvt

from util.crop import RandomResizedCrop as OfficialProbeCrop
from util.data import draws as positions
from util.data.batch_aug import BatchTransform, crop_boxes
from util.data.draws import COUNT, STREAM, Draws, SampleRng, current_draws, settle_sample_rng
from util.data.image_format import IMAGENET
from util.data.random_steps import ProbeCrop, RandomHorizontalFlip, RandomResizedCrop, random_box
from util.data.sample_rng import sample_noise
from util.data.samples import KeyedDataset
from util.data.sources import Arrays
from util.data.transforms import finetune_transform, pretrain_transform, probe_transform, uses_generators

KEYS = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (7, 399, 1_281_166), (2**31 - 1, 3, 2**33 + 5)]


def batch_of(draws) -> np.ndarray:
    return np.array([[one[position] for position in range(COUNT)] for one in draws])


# The numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS)
def test_they_are_those_of_sample_noise(key):
    seed, epoch, index = key
    theirs = sample_noise(seed, epoch, torch.tensor([index]), COUNT, stream=STREAM)[0]
    assert [Draws(*key)[position] for position in range(COUNT)] == theirs.tolist()


def test_known_values():
    """A change of these numbers would change the images of every run that is resumed."""
    assert [round(Draws(0, 0, 0)[position], 7) for position in (0, 1, 40, 47)] == KNOWN[0]
    assert [round(Draws(3, 5, 1000, 2)[position], 7) for position in (0, 1, 40, 47)] == KNOWN[1]
    assert [Draws(3, 5, 1000).below(positions.REPLACEMENT, 1_281_167) for _ in range(2)] == [KNOWN[2]] * 2
    assert random_box(Draws(0, 1, 2), 375, 500, (0.2, 1.0), (3 / 4, 4 / 3)) == KNOWN[3]


KNOWN = (
    [0.7289267, 0.6001479, 0.072833, 0.1012],
    [0.1609743, 0.4687736, 0.2772144, 0.2011879],
    33356,
    (23, 53, 292, 281),
)


def test_they_are_uniform_and_independent():
    """Means and variances over 4,000 samples, and the correlations of all pairs of positions, of neighbouring samples,
    and of a sample in two epochs, two runs and two places, within five standard errors."""
    count = 4000
    samples = batch_of(Draws(0, 0, index) for index in range(count))
    assert samples.min() >= 0 and samples.max() < 1
    assert np.abs(samples.mean(0) - 0.5).max() < 5 / math.sqrt(12 * count)
    assert np.abs(samples.var(0) - 1 / 12).max() < 5 * math.sqrt(1 / 180 / count)
    pairs = np.corrcoef(samples.T) - np.eye(COUNT)
    assert np.abs(pairs).max() < 5 / math.sqrt(count)
    others = [Draws(0, 1, i) for i in range(count)], [Draws(1, 0, i) for i in range(count)]
    others += ([Draws(0, 0, i, 0) for i in range(count)], [Draws(0, 0, i, 1) for i in range(count)])
    for other in [np.roll(samples, 1, axis=0), *map(batch_of, others)]:
        same_position = ((samples - 0.5) * (other - 0.5)).mean(0) * 12
        assert np.abs(same_position).max() < 5 / math.sqrt(count)


def test_below():
    """Uniform over its range, also for more images than 24 bits have values."""
    values = np.array([Draws(0, 0, index).below(positions.REPLACEMENT, 10) for index in range(4000)])
    counts = np.bincount(values, minlength=10)
    assert len(counts) == 10 and np.abs(counts - 400).max() < 5 * math.sqrt(4000 * 0.09)
    wide = np.array([Draws(0, 0, index).below(positions.REPLACEMENT, 2**40) for index in range(1000)])
    assert wide.max() < 2**40 and len(set(wide % 2**10)) > 500


# The steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (500, 60), (20, 900)])
def test_crops_are_those_of_whole_batches(size):
    """`--data_cache` makes the same crops."""
    theirs = crop_boxes(sample_noise(0, 2, torch.arange(500), COUNT, STREAM)[:, :40], size)
    ours = [random_box(Draws(0, 2, index), *size, (0.2, 1.0), (3 / 4, 4 / 3)) for index in range(500)]
    assert ours == [tuple(box) for box in theirs.long().tolist()]


@pytest.mark.parametrize("aug", ["mae", "crop", "three", "none"])
def test_a_cache_makes_the_same_images(aug):
    """Up to rounding: pillow and torch resize and blur a little differently."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    images = np.stack([np.asarray(Image.fromarray(i).resize((40, 40), Image.Resampling.BICUBIC)) for i in images])
    transform = pretrain_transform(aug, (32, 32), *IMAGENET)
    data = KeyedDataset(Arrays(images, range(12), []), transform, seed=5, in_chans=3)
    ours = torch.stack([data[3, index].image for index in range(12)])
    batch = BatchTransform(aug, (32, 32), *IMAGENET, 5)
    theirs = batch(torch.from_numpy(images).permute(0, 3, 1, 2), 3, torch.arange(12))
    levels = (ours - theirs).abs() * torch.tensor(IMAGENET[1])[:, None, None] * 255
    assert levels.mean() < (0.6 if aug == "three" else 0.05) and levels.max() < (12 if aug == "three" else 2.1)


def moments(boxes) -> np.ndarray:
    """Return the statistics (7,) of crops (N, 4) of an image of 375 x 500 pixels: means of area, log aspect ratio, and
    the relative position in both directions where there is room; and the variances of area, aspect and top."""
    top, left, height, width = np.array(boxes, float).T
    area, aspect = height * width / (375 * 500), np.log(width / height)
    down = ((top + 0.5) / (375 - height + 1))[height < 330]
    across = ((left + 0.5) / (500 - width + 1))[width < 440]
    return np.array([*(v.mean() for v in (area, aspect, down, across)), *(v.var() for v in (area, aspect, down))])


OURS = {
    "pretraining": (RandomResizedCrop((32, 32)), tvt.RandomResizedCrop),
    "probe": (ProbeCrop(32), OfficialProbeCrop),
}


@pytest.mark.parametrize("name", OURS)
def test_crops_are_distributed_as_the_originals(name):
    """Statistics of 8,000 crops each; the error of a difference is estimated from eight parts of each sample."""
    step, original = OURS[name]
    img, ours, theirs = Image.new("L", (500, 375)), [], []
    torch.manual_seed(0)
    for index in range(8000):
        with SampleRng(0, generators=False).sample(0, index):
            ours.append(step.get_params(img, step.scale, step.ratio))
        theirs.append(original.get_params(img, step.scale, step.ratio))
    parts = [np.stack([moments(boxes[i::8]) for i in range(8)]) for boxes in (ours, theirs)]
    error = np.sqrt((parts[0].var(0, ddof=1) + parts[1].var(0, ddof=1)) / 8)
    assert (np.abs(parts[0].mean(0) - parts[1].mean(0)) < 5 * error).all()


@pytest.mark.parametrize("rate", [0.5, 0.2, 0.0])
def test_flips_have_their_rate(rate):
    step, count = RandomHorizontalFlip(rate), 4000
    flips = 0
    for index in range(count):
        with SampleRng(0, generators=False).sample(0, index):
            flips += step.drawn()
    assert abs(flips - rate * count) <= 5 * math.sqrt(count * rate * (1 - rate))


def test_pixels_are_those_of_torchvisions_steps():
    """With the same box and the same shift."""
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    step = RandomResizedCrop((32, 48))
    with SampleRng(0).sample(0, 1):
        box = step.get_params(img, step.scale, step.ratio)
        ours = step(img)
    theirs = tvt.functional.resized_crop(img, *box, [32, 48], tvt.InterpolationMode.BICUBIC)
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    pad = next(s for s in pretrain_transform("crop", (40, 50), *IMAGENET).transforms if isinstance(s, tvt.RandomCrop))
    with SampleRng(0).sample(0, 1):
        bordered = tvt.functional.pad(img, pad.padding)
        top, left, height, width = pad.get_params(bordered, pad.size)
        ours = pad(img)
    assert np.array_equal(np.asarray(ours), np.asarray(tvt.functional.crop(bordered, top, left, height, width)))


# Generators -----------------------------------------------------------------------------------------------------------


def test_our_steps_touch_no_generator():
    """Neither inside a sample, where they draw by position, nor after it."""
    img = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    plain = finetune_transform(finetune_flags("--aa", "", "--reprob", 0), (32, 32), *IMAGENET)
    every = [pretrain_transform(aug, (32, 32), *IMAGENET) for aug in ("mae", "crop", "three", "none")]
    every += [probe_transform(aug, (32, 32), *IMAGENET) for aug in ("rrc", "crop", "none")] + [plain]
    before = global_states()
    for transform in every:
        assert not uses_generators(transform)
        with SampleRng(0, generators=False).sample(0, 0):
            transform(img)
            assert global_states() == before and current_draws() is not None
        assert current_draws() is None


@pytest.mark.parametrize("flags", [(), ("--aa", ""), ("--aa", "", "--reprob", 0, "--color_jitter", 0.4)])
def test_steps_of_others_draw_from_seeded_generators(flags):
    transform = finetune_transform(finetune_flags(*flags), (32, 32), *IMAGENET)
    assert uses_generators(transform) and uses_generators(lambda img: img)
    words = []
    for _ in range(2):
        for key in ((0, 0), (0, 1), (1, 0)):
            with SampleRng(0).sample(*key):
                words.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert words[:3] == words[3:] and len(set(np.array(words).flat)) == 9


def test_version_one_is_that_of_older_revisions():
    """Random numbers that the code before `--sample_rng` drew: (seed, epoch, index) = (0, 1, 2), photograph's size."""
    img, step = Image.new("RGB", (500, 375)), RandomResizedCrop((224, 224))
    with SampleRng(0, "v1").sample(1, 2):
        assert current_draws() is None
        box = step.get_params(img, step.scale, step.ratio)
        rest = random.random(), np.random.rand(), torch.rand(1).item()
    assert box == OLD[0] and rest == pytest.approx(OLD[1], abs=1e-12)


OLD = (37, 172, 236, 314), (0.26341234575751027, 0.170098577374305, 0.8173259496688843)


# The flag -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "stored", "settled"),
    [
        (None, None, "v2"),
        (None, {}, "v1"),
        (None, {"sample_rng": "v1"}, "v1"),
        (None, {"sample_rng": "v2"}, "v2"),
        ("v1", None, "v1"),
        ("v2", {}, "v2"),
    ],
)
def test_the_version_is_that_of_the_resumed_run(given, stored, settled, capsys):
    args = Namespace(sample_rng=given)
    settle_sample_rng(args, stored)
    assert args.sample_rng == settled
    assert ("--sample_rng v1, from the checkpoint" in capsys.readouterr().out) == (given is None and settled == "v1")
