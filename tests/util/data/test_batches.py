"""Batches of ranks, workers and streams, and the random numbers that belong to each sample."""

import math
import random

import numpy as np
import pytest
import torch
from helpers.launches import counted_launches
from helpers.plain_images import PLAIN, finetune_flags, flags, global_states
from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import IterableDataset, get_worker_info
from torchvision import transforms as tvt

import util.data.build
import util.data.loader
import util.data.samples
from util.data import transforms
from util.data.build import build_loader
from util.data.image_format import IMAGENET
from util.data.loader import EpochBatches
from util.data.sample_rng import get_rng_state, noise_of_keys, sample_keys, sample_noise, seeded, set_rng_state
from util.data.sources import Arrays
from util.errors import UserError

# Random numbers per sample -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    arrays = np.random.RandomState(0).randint(0, 255, (26, 32, 32, 3), np.uint8)
    return Arrays(arrays, range(26), [str(i) for i in range(26)])


def augmentation(name):
    if name == "randaugment":
        args = finetune_flags("--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5)
        return transforms.finetune_transform(args, (32, 32), *IMAGENET), args
    return transforms.pretrain_transform(name, (32, 32), *IMAGENET), flags()


def batches_of(pictures, name, workers, seed=0):
    transform, args = augmentation(name)
    args.num_workers, args.seed = workers, seed
    return build_loader(pictures, transform, args, 4, train=True)


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs) for a, b in zip(one, other)
    )


@pytest.mark.parametrize("name", ["mae", "crop", "three", "randaugment"])
def test_images_belong_to_seed_epoch_and_index(pictures, name):
    here, there = batches_of(pictures, name, 0), batches_of(pictures, name, 2)
    epochs = [list(here.begin(epoch)) for epoch in (0, 1)]
    # The number of workers, other draws of this process, and the first batch have no effect.
    ours = []
    for batch in there.begin(0):
        random.random(), np.random.rand(3), torch.rand(5)
        ours.append(batch)
    assert same(ours, epochs[0])
    assert same(list(there.begin(1, 3)), epochs[1][3:])
    resumed = iter(there.begin(0, 2))  # stopped in the middle, with batches in preparation
    next(resumed)
    assert same(list(there.begin(1)), epochs[1])
    # The same image has other pixels in another epoch or with another seed.
    first, second = (
        dict(zip(torch.cat([b.index for b in e]).tolist(), torch.cat([b.image for b in e]))) for e in epochs
    )
    both = first.keys() & second.keys()
    assert len(both) > 20
    assert sum(torch.equal(first[i], second[i]) for i in both) <= (2 if name == "crop" else 0)  # 162 crops in all
    order = [torch.cat([batch.index for batch in e]).tolist() for e in epochs]
    assert order[0] != order[1]
    assert not same(list(batches_of(pictures, name, 0, seed=1).begin(0)), epochs[0])


@pytest.mark.parametrize("name", ["mae", "three", "randaugment"])
def test_reading_leaves_the_global_generators_alone(pictures, name):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = global_states()
    images = list(batches_of(pictures, name, 0).begin(0))
    assert global_states() == before
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    assert same(list(batches_of(pictures, name, 0).begin(0)), images)


def test_seeded_puts_the_states_back_after_an_error():
    before = global_states()
    with pytest.raises(KeyError), seeded(1, 2, 3):
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError
    assert global_states() == before


def test_every_word_of_a_seed_counts():
    draws = set()
    for words in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)):
        with seeded(*words):
            draws.add((random.random(), np.random.rand(), torch.rand(1).item()))
    assert all(len({draw[i] for draw in draws}) == 6 for i in range(3))


def test_rng_state_survives_a_checkpoint(tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), np.random.randn()  # both keep a second Gaussian for the next call
    torch.save(get_rng_state(torch.device("cpu")), tmp_path / "state")
    draw = lambda: (random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(2).tolist())  # noqa: E731
    expected = draw()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    set_rng_state(torch.load(tmp_path / "state", weights_only=True), torch.device("cpu"))
    assert draw() == expected


# Batches -------------------------------------------------------------------------------------------------------------


def rank_batches(monkeypatch, world, length, size, shuffle, epoch=0, start=0):
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(util.data.loader, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(util.data.loader, "get_world_size", lambda: world)
        sampler = EpochBatches(length, size, seed=5, shuffle=shuffle)
        sampler.set_epoch(epoch, start)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) - start
    return ranks


@pytest.mark.parametrize("length", [48, 53, 71])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(monkeypatch, world, length):
    (single,) = rank_batches(monkeypatch, 1, length, 12, True, epoch=3)
    ranks = rank_batches(monkeypatch, world, length, 12 // world, True, epoch=3)
    assert len(single) == length // 12  # the last incomplete batch is dropped
    assert {epoch for batch in single for epoch, _ in batch} == {3}
    indices = [index for batch in single for _, index in batch]
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(length)) and indices != sorted(indices)
    for k, batch in enumerate(single):
        parts = [rank[k] for rank in ranks]
        assert all(len(part) == 12 // world for part in parts)
        assert sorted(key for part in parts for key in part) == sorted(batch)
    assert [rank[2:] for rank in ranks] == rank_batches(monkeypatch, world, length, 12 // world, True, 3, start=2)


@pytest.mark.parametrize("length", [1, 23, 24, 25])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_index_once(monkeypatch, world, length):
    ranks = rank_batches(monkeypatch, world, length, 3, False)
    indices = [index for rank in ranks for batch in rank for _, index in batch]
    assert sorted(indices) == list(range(length))
    assert max(map(len, ranks)) == math.ceil(math.ceil(length / world) / 3)


def test_orders_differ_between_epochs_and_seeds():
    def order(seed, epoch):
        sampler = EpochBatches(40, 4, seed)
        sampler.set_epoch(epoch)
        return tuple(index for batch in sampler for _, index in batch)

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16
    assert order(1, 2) == order(1, 2)


def test_fewer_samples_than_one_batch(pictures, monkeypatch):
    args = flags("--num_workers", 0)
    build_loader(pictures, PLAIN, args, 26, train=True)
    with pytest.raises(UserError, match="26 images, fewer than one batch of 27"):
        build_loader(pictures, PLAIN, args, 27, train=True)
    assert len(list(build_loader(pictures, PLAIN, args, 27, train=False))) == 1
    monkeypatch.setattr(util.data.build, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"batch of 28 .*2 process"):
        build_loader(pictures, PLAIN, args, 14, train=True)


# Streams -------------------------------------------------------------------------------------------------------------


class Reader:
    """Behaves like timm's streaming readers: it initialises at its first use, and reads the part of its worker and
    rank."""

    def __init__(self, count):
        self.num_samples, self.order, self.worker_seed = count, None, 0
        self.dist_rank, self.dist_num_replicas, self.epoch = 0, 1, SharedCount()

    def __iter__(self):
        if self.order is None:
            info = get_worker_info()
            worker, workers = (info.id, info.num_workers) if info else (0, 1)
            part = range(self.dist_rank * workers + worker, self.num_samples, self.dist_num_replicas * workers)
            self.order = list(part)
            self.shuffle = random.Random(info.seed if info else self.worker_seed)
        self.shuffle.shuffle(self.order)
        for value in self.order:
            yield Image.new("RGB", (8, 8), (value,) * 3), value


class Stream(IterableDataset):
    def __init__(self, count):
        self.reader = Reader(count)

    def __iter__(self):
        return iter(self.reader)

    def __len__(self):
        return math.ceil(self.reader.num_samples / self.reader.dist_num_replicas)

    def set_epoch(self, epoch):
        self.reader.epoch.value = epoch


def stream_loader(workers, train=True, batch=4, count=22):
    transform = tvt.Compose([tvt.ToTensor(), lambda x: torch.cat([x, torch.rand_like(x[:1])])])
    return build_loader(Stream(count), transform, flags("--num_workers", workers), batch, train)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_gives_each_sample_once(workers):
    loader = stream_loader(workers)
    epochs = [list(loader.begin(epoch)) for epoch in (0, 1)]
    for batches in epochs:
        assert len(batches) == len(loader) == 5  # 22 in batches of 4, although both workers end with an incomplete one
        assert all(len(batch.target) == 4 for batch in batches)
        labels = torch.cat([batch.target for batch in batches]).tolist()
        assert len(set(labels)) == 20 and labels != sorted(labels)
        values = torch.cat([batch.image[:, 0, 0, 0] for batch in batches]) * 255
        assert values.round().int().tolist() == labels
        indices = torch.cat([batch.index for batch in batches]).tolist()
        assert len(set(indices)) == 20
    assert not torch.equal(epochs[0][0].target, epochs[1][0].target)
    # A run that resumes inside epoch 1 has the same batches as the uninterrupted one, random numbers included.
    for ours, theirs in zip(list(stream_loader(workers).begin(1, 2)), epochs[1][2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_evaluation_is_complete(workers):
    loader = stream_loader(workers, train=False)
    batches = list(loader.begin(0))
    assert len(batches) == len(loader) == 6
    assert sorted(torch.cat([batch.target for batch in batches]).tolist()) == list(range(22))


def test_stream_of_several_ranks(monkeypatch):
    """The length is that of one rank's part; the reader uses its rank even if it was made before the group."""
    seen = []
    for rank in range(2):
        for module in (util.data.loader, util.data.samples):
            monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "get_world_size", lambda: 2)
        loader = stream_loader(0)
        batches = list(loader.begin(0))
        assert len(batches) == len(loader) == 2  # 22 // (2 * 4)
        seen += torch.cat([batch.target for batch in batches]).tolist()
    assert len(set(seen)) == 16


# Noise of the masks --------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_sample():
    indices = torch.tensor([7, 0, 123456, 7, 3])
    noise = sample_noise(1, 2, indices, 50)
    assert noise.shape == (5, 50) and noise.dtype == torch.float32
    assert noise.min() >= 0 and noise.max() < 1
    for row, index in zip(noise, indices):
        assert torch.equal(row, sample_noise(1, 2, index[None], 50)[0])
    assert torch.equal(sample_noise(1, 2, indices.flip(0), 50), noise.flip(0))
    assert torch.equal(sample_noise(1, 2, indices.to(torch.int32), 50), noise)
    assert torch.equal(sample_noise(1, 2, indices, 20), noise[:, :20])
    far = indices + 2**32  # indices of streams may be large
    assert not torch.equal(sample_noise(1, 2, far, 50), noise)


def test_noise_stays_what_it_was():
    """Masks of all runs come from these numbers; they are those of the first revision."""
    noise = sample_noise(7, 3, torch.tensor([0, 2**40]), 4, stream=16)
    expected = [[179541, 6052772, 11465401, 9498233], [6120645, 15464040, 703512, 16242457]]
    assert (noise.double() * 2**24).tolist() == expected


def test_noise_takes_few_kernels():
    """On a GPU each operation is a kernel. A step draws from keys that the host has computed."""
    indices = torch.arange(6, device="meta")
    noise_of_keys(indices, 16)  # the hashed counters are made once
    with counted_launches() as count:
        noise_of_keys(indices, 16)
    assert count.launches <= 26
    with counted_launches() as count:
        sample_noise(0, 1, indices, 16)
    assert count.launches <= 73  # 138 before the words that are numbers were hashed as numbers
    with counted_launches() as count:
        sample_keys(0, 1, torch.arange(6))
    assert count.launches <= 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_the_same_on_a_gpu():
    indices = torch.arange(1000)
    assert torch.equal(sample_noise(3, 4, indices.cuda(), 196).cpu(), sample_noise(3, 4, indices, 196))


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_noise_is_uniform(seed):
    values = sample_noise(seed, 3, torch.arange(1000), 100).flatten().double()
    count = len(values)
    ordered = values.sort().values
    distance = (ordered - torch.arange(count) / count).abs().max().item()
    assert distance < 2.2 / math.sqrt(count)  # Kolmogorov-Smirnov: chance 1e-4
    for part in (values, values * 2**8 % 1, values * 2**16 % 1):  # high, middle and low bits
        observed = torch.histc(part, 256, 0, 1)
        chi2 = ((observed - count / 256) ** 2 / (count / 256)).sum().item()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)  # five standard deviations
    ties = count - len(values.unique())
    expected = count**2 / 2 / 2**24  # 24 bits: pairs / number of values
    assert ties < expected + 5 * math.sqrt(expected)


def correlation(a, b) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def test_noise_of_neighbours_is_uncorrelated():
    indices = torch.arange(1001)
    base = sample_noise(5, 6, indices, 100)
    pairs = {
        "index": (base[:-1], base[1:]),
        "index, far": (base[:-1], sample_noise(5, 6, indices + 2**32, 100)[:-1]),
        "patch": (base[:, :-1], base[:, 1:]),
        "index and patch": (base[:-1, 1:], base[1:, :-1]),
        "epoch": (base, sample_noise(5, 7, indices, 100)),
        "seed": (base, sample_noise(6, 6, indices, 100)),
        "stream": (base, sample_noise(5, 6, indices, 100, stream=1)),
        "seed and epoch swapped": (base, sample_noise(6, 5, indices, 100)),
        "epoch and index": (base[1:], sample_noise(5, 7, indices, 100)[:-1]),
        "stream and epoch": (sample_noise(5, 7, indices, 100), sample_noise(5, 6, indices, 100, stream=1)),
    }
    for name, (a, b) in pairs.items():
        # The correlation of n independent pairs has deviation 1 / sqrt(n): five of them. Squares show dependence.
        bound = 5 / math.sqrt(a.numel())
        assert abs(correlation(a, b)) < bound, name
        assert abs(correlation((a - 0.5) ** 2, (b - 0.5) ** 2)) < bound, name


def test_every_patch_is_masked_equally_often():
    samples, patches, keep = 8000, 64, 16
    kept = sample_noise(0, 0, torch.arange(samples), patches).argsort(dim=1)[:, :keep]
    counts = torch.bincount(kept.flatten(), minlength=patches).double()
    deviation = math.sqrt(samples * keep / patches * (1 - keep / patches))
    assert (counts - samples * keep / patches).abs().max() < 4.5 * deviation
