"""Nearest neighbours part by part: the same as all at once, in bounded memory; and the features that they are among."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaluation import features
from evaluation.features import extract, knn_accuracies, knn_accuracy, knn_predict, nearest, nearest_bytes
from util.data.build import build_loader
from util.data.sources import Arrays

CPU = torch.device("cpu")


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(features, "BANK", 37)
    monkeypatch.setattr(features, "QUERIES", 11)
    monkeypatch.setattr(features, "AT_ONCE", 40)


def whole(train, test, k):
    similarity = F.normalize(test, dim=1) @ F.normalize(train, dim=1).T
    return similarity, *similarity.topk(min(k, len(train)), dim=1)


@pytest.mark.parametrize("count", [5, 37, 38, 200])
def test_parts_give_the_same_neighbours(small_parts, count):
    generator = torch.Generator().manual_seed(count)
    train, test = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (count, 50))
    labels, truth = torch.arange(count) % 3, torch.arange(50) % 3
    for k in (1, 7, 60):
        _, similarity, index = whole(train, test, k)
        ours = nearest(train, test, k)
        assert torch.equal(ours[1], index) and torch.allclose(ours[0], similarity, rtol=0, atol=1e-14)
        votes = torch.zeros(50, 3).scatter_add_(1, labels[index], (similarity.float() / 0.07).exp())
        assert torch.allclose(knn_predict(train, labels, test, 3, k), votes)
        expected = 100 * (votes.argmax(dim=1) == truth).float().mean().item()
        assert knn_accuracy(train, labels, test, truth, k) == pytest.approx(expected)
    each = [knn_accuracy(train, labels, test, truth, k) for k in (7, 1)]
    assert knn_accuracies(train, labels, test, truth, [7, 1]) == each


def test_ties(small_parts):
    """Where rows are equally similar, the similarities are still those of the nearest, each row occurs once, and a row
    that is nearer than the last neighbour is never left out."""
    generator = torch.Generator().manual_seed(0)
    distinct = torch.randn(9, 8, generator=generator, dtype=torch.float64)
    train, test = distinct[torch.arange(120) % 9], torch.randn(30, 8, generator=generator, dtype=torch.float64)
    for k in (1, 5, 13, 40):
        every, similarity, _ = whole(train, test, k)
        ours, index = nearest(train, test, k)
        assert torch.allclose(ours, similarity, rtol=0, atol=1e-14)
        assert torch.allclose(every.gather(1, index), ours, rtol=0, atol=1e-14)
        assert all(len(set(row)) == min(k, 120) for row in index.tolist())
        missing = every.scatter(1, index, -2.0)  # what was not chosen
        assert (missing.max(dim=1).values <= ours[:, -1] + 1e-14).all()


class Tracked(TorchDispatchMode):
    """Count the bytes of the tensors that operators have made and that are still alive, at most; and the largest.
    Views of the tensors `given` do not count."""

    def __init__(self, *given):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.storages, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self.given:
                self.storages[storage._cdata] = (torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage))
                self.largest = max(self.largest, len(storage))
        self.storages = {key: pair for key, pair in self.storages.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.storages.values()))
        return result


@pytest.mark.parametrize("rows", [4000, 8000])
def test_memory_is_bounded(monkeypatch, rows):
    """By a number that does not grow with the training images, once they are more than a part."""
    monkeypatch.setattr(features, "BANK", 1000)
    monkeypatch.setattr(features, "QUERIES", 100)
    train, test = torch.randn(rows, 32), torch.randn(600, 32)
    with Tracked(train, test) as tracked:
        nearest(train, test, 20)
    bound = nearest_bytes(rows, 600, 32, 20)
    assert tracked.largest <= 1000 * 100 * 4  # similarities of one part with another
    assert 0.3 * bound < tracked.peak <= bound
    assert bound == nearest_bytes(2000, 600, 32, 20)


def test_imagenet_fits():
    """1.28 million training images and 50,000 others, 768 features: far below 16 GB."""
    assert nearest_bytes(1_281_167, 50_000, 768, 20) < 1 << 30
    assert nearest_bytes(14_197_122, 50_000, 1024, 200) < 2 << 30


# Features -------------------------------------------------------------------------------------------------------------


def loader_of(count: int, batch_size: int = 4):
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None].expand(-1, 8, 8).numpy()
    images = Arrays(pixels, [i % 3 for i in range(count)], list("abc"))
    args = SimpleNamespace(seed=0, in_chans=1, num_workers=0, pin_mem=False)
    return images, build_loader(images, to_tensor, args, batch_size, train=False)


def to_tensor(image):
    return torch.tensor(image.getpixel((0, 0)), dtype=torch.float32).expand(1, 2, 2)


def test_features_are_held_once():
    """In the order of the images, without the unreadable ones, in one tensor that is not copied at the end."""
    images, loader = loader_of(30)
    load = images.load

    def damaged(index):
        if index in (0, 7, 29):
            raise OSError("damaged")
        return load(index)

    images.load = damaged
    with Tracked() as tracked:
        found, labels = extract(lambda x: x.mean(dim=(2, 3)).expand(-1, 500) + 1, loader, CPU, torch.float32)
    readable = [i for i in range(30) if i not in (0, 7, 29)]
    assert found[:, 0].tolist() == [i + 1 for i in readable] and labels.tolist() == [i % 3 for i in readable]
    assert found.shape == (27, 500)
    assert tracked.peak < 30 * 500 * 4 * 1.7  # the features, and two batches of four


def test_no_image_at_all():
    images, loader = loader_of(3)
    images.load = lambda index: (_ for _ in ()).throw(OSError("damaged"))
    found, labels = extract(lambda x: x.flatten(1), loader, CPU, torch.float32)
    assert len(found) == len(labels) == 0


def test_batches_are_stored_one_behind():
    """A GPU computes batch i + 1 while the features of batch i arrive."""
    made, stored = [], []

    def values():
        for i in range(4):
            made.append(i)
            yield i

    for value in features._one_behind(values()):
        stored.append((value, len(made)))
    assert stored == [(0, 2), (1, 3), (2, 4), (3, 4)]
