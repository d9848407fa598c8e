"""Workers hand over bytes, and a loader makes of them the values of `ToTensor` and `Normalize`, bit for bit."""

import numpy as np
import pytest
import torch
from helpers.plain_images import finetune_flags, flags
from PIL import Image
from torchvision import transforms as tvt

from util.data.build import build_loader
from util.data.image_format import IMAGENET
from util.data.loader import Loader, collate
from util.data.pixels import Normaliser, bytes_per_value, split_normalisation
from util.data.samples import KeyedDataset, Sample
from util.data.sources import Arrays, Images
from util.data.transforms import ToPixels, ToTensor, eval_transform, finetune_transform, pretrain_transform

MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
STATS = {channels: ((0.1, 0.485, 0.456, 0.9)[:channels], (0.229, 0.224, 0.3, 1.7)[:channels]) for channels in MODES}


@pytest.fixture(scope="module")
def arrays():
    values = np.random.default_rng(0).integers(0, 256, (22, 40, 36, 3), np.uint8)
    values[0].flat[:256] = np.arange(256)
    return Arrays(values, range(22), [])


class Wide(Images):
    """Images of 16 bits, every third one of 8."""

    def __init__(self, count=9):
        self.targets, rng = [-1] * count, np.random.default_rng(1)
        self.images = [Image.fromarray(rng.integers(0, 65536, (40, 36), np.uint16)) for _ in range(count)]
        self.images[::3] = [Image.fromarray(rng.integers(0, 256, (40, 36), np.uint8)) for _ in self.images[::3]]

    def load(self, index):
        return self.images[index]


@pytest.mark.parametrize("side", [5, 150])
@pytest.mark.parametrize("channels", MODES)
def test_bytes_are_the_same_values(channels, side):
    """A batch that a CPU normalises in several parts; small and large images, which are copied differently."""
    rng, (mean, std) = np.random.default_rng(channels), STATS[channels]
    values = rng.integers(0, 256, (9, side, side + 3, 4), np.uint8)
    images = [
        Image.fromarray(v).convert("RGB" if channels in (1, 3) else "RGBA").convert(MODES[channels]) for v in values
    ]
    expected = torch.stack([tvt.Compose([ToTensor(channels), tvt.Normalize(mean, std)])(img) for img in images])
    pixels = torch.stack([ToPixels(channels)(img) for img in images])
    assert pixels.dtype == torch.uint8 and pixels.shape == (9, channels, side, side + 3)
    before = pixels.clone()
    assert torch.equal(Normaliser(mean, std)(pixels), expected) and torch.equal(pixels, before)
    assert Normaliser(mean, std)(pixels[:0]).shape == (0, channels, side, side + 3)


def test_every_level_of_every_channel():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    expected = tvt.Normalize(*IMAGENET)(levels / 255)
    assert torch.equal(Normaliser(*IMAGENET)(levels), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("aug", ["mae", "crop", "three", "none"])
def test_a_loader_normalises(arrays, aug, workers):
    """The values are those of the transform that was given; on the way they are bytes."""
    transform = pretrain_transform(aug, (32, 32), *IMAGENET)
    args = flags("--num_workers", workers, "--seed", 3)
    loader = build_loader(arrays, transform, args, 5, train=True)
    whole = KeyedDataset(arrays, transform, 3, 3)
    raw = next(iter(loader.begin(2).loader))
    assert raw.image.dtype == torch.uint8
    batches = list(loader.begin(2))
    assert len(batches) == 4
    for batch in batches:
        expected = torch.stack([whole[2, index].image for index in batch.index.tolist()])
        assert batch.image.dtype == torch.float32 and torch.equal(batch.image, expected)


def test_images_of_more_bits_stay_floats():
    """Also in a batch with images of 8 bits."""
    images, transform = Wide(), eval_transform((32, 32), *IMAGENET)
    loader = build_loader(images, transform, flags("--num_workers", 2), 4, train=False)
    whole = KeyedDataset(images, transform, 0, 3, replace=False)
    for batch in loader.begin(0):
        expected = torch.stack([whole[index].image for index in batch.index.tolist()])
        assert torch.equal(batch.image, expected)
    raw = next(iter(loader.begin(0).loader)).image
    assert raw.dtype == torch.float32 and (raw % 1 != 0).any() and raw.min() >= 0 and raw.max() <= 255


def test_random_erasing_needs_floats(arrays):
    """Its noise is that of normalised images."""
    transform = finetune_transform(finetune_flags("--aa", "", "--reprob", 1), (32, 32), *IMAGENET)
    assert split_normalisation(transform) == (transform, None)
    loader = build_loader(arrays, transform, flags("--num_workers", 0), 5, train=True)
    whole, batch = KeyedDataset(arrays, transform, 0, 3), next(iter(loader.begin(0)))
    assert torch.equal(batch.image, torch.stack([whole[0, index].image for index in batch.index.tolist()]))
    without = finetune_transform(finetune_flags("--aa", "", "--reprob", 0), (32, 32), *IMAGENET)
    assert isinstance(split_normalisation(without)[0].transforms[-1], ToPixels)


def test_transforms_of_others_are_left_alone():
    for transform in (lambda img: img, tvt.Compose([tvt.ToTensor(), tvt.Normalize(*IMAGENET)]), tvt.ToTensor()):
        assert split_normalisation(transform) == (transform, None)


def test_images_are_normalised_where_they_are_used():
    """`on` says where; the data set's batch is moved first, a quarter of the bytes."""
    seen = []

    def normalise(image):
        seen.append((image.device.type, image.dtype))
        return image.float()

    class Bytes(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, key):
            return Sample(torch.zeros(3, 2, 2, dtype=torch.uint8), 0, key[1], 0)

    loader = Loader(Bytes(), 2, False, 0, 0, normalise=normalise)
    assert [batch.image.device.type for batch in loader.begin(0)] == ["cpu"] * 2
    assert [batch.image.device.type for batch in loader.on(torch.device("meta")).begin(0)] == ["meta"] * 2
    assert seen == [("cpu", torch.uint8)] * 2 + [("meta", torch.uint8)] * 2


def test_size_of_a_value():
    assert bytes_per_value(Normaliser(*IMAGENET), None) == 1
    assert bytes_per_value(None, None) == bytes_per_value(Normaliser(*IMAGENET), ["16bit"]) == 4


def test_a_batch_of_both_depths():
    samples = [
        Sample(torch.full((1, 2, 2), 7, dtype=torch.uint8), 0, 0, 0),
        Sample(torch.full((1, 2, 2), 7.5), 1, 1, 0),
    ]
    assert collate(samples).image.flatten(1).tolist() == [[7.0] * 4, [7.5] * 4]
