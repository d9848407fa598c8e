"""Frozen features of a data set, and their nearest-neighbour accuracy."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from util.compute.precision import autocast, full_precision
from util.data.loader import Loader
from util.parallel.distributed import gather_objects, gather_rows, is_main_process

BANK, QUERIES = 65_536, 1024  # rows of the training and of the test features that are compared at once
AT_ONCE = 1 << 24  # votes (images x classes) that are counted at once


@torch.no_grad()
def extract(encode, loader, device, amp_dtype, title: str = "") -> tuple[Any, torch.Tensor]:
    """Apply `encode(imgs)` to a loader made with `train=False` -> features (M, D) float32 and labels (M,), on the CPU,
    of all ranks, in the order of the data set. Unreadable images are left out. Only the main process holds the features
    of all ranks; on the others they are None. A `title` adds a progress bar.

    With one process the features are held once; with several, the main process holds them twice for a moment."""
    features, targets, indices = _Rows(_rows_of(loader)), [], []
    hidden = None if title and is_main_process() else True  # None: shown on a terminal
    batches = loader.on(device).begin(0)
    progress = tqdm(batches, desc=title, unit=" batches", disable=hidden, leave=False, dynamic_ncols=True)
    for batch, output in _one_behind(_encoded(progress, encode, device, amp_dtype)):
        good = batch.bad == 0
        features.add(output()[good])
        targets.append(batch.target[good])
        indices.append(batch.index[good])
    # With fewer images than ranks a rank has no batch, so lists, which may be empty, are gathered and joined here.
    ranks = gather_objects((targets, indices))
    targets, indices = (torch.cat([part for rank in column for part in rank]) for column in zip(*ranks))
    features = gather_rows(features.tensor())
    if (indices[1:] > indices[:-1]).all():
        return features, targets
    order = torch.argsort(indices, stable=True)
    return None if features is None else features[order], targets[order]


def _encoded(batches, encode, device, amp_dtype) -> Iterator[tuple]:
    """Yield each batch and a function that waits for its features (N, D), float32 on the CPU."""
    for batch in batches:
        with autocast(device, amp_dtype):
            output = encode(batch.image)
        yield batch, _to_host(output.float())


def _one_behind(values: Iterator) -> Iterator:
    """Yield the values, each after the next one was made: a GPU computes the next features while these are stored."""
    before = []
    for value in values:
        yield from before
        before = [value]
    yield from before


def _to_host(output: torch.Tensor):
    """Begin to copy a tensor to the CPU, and return a function that waits for the copy."""
    if output.device.type != "cuda" or not torch.cuda.is_available():
        return output.cpu
    host = torch.empty(output.shape, dtype=output.dtype, pin_memory=True)
    host.copy_(output, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def wait() -> torch.Tensor:
        copied.synchronize()
        return host

    return wait


def _rows_of(loader) -> int:
    """Return the number of images that this rank reads at most, 0 if it is not known."""
    if not isinstance(loader, Loader) or loader.stream:
        return 0
    batches = loader.batches
    return len(range(batches.rank, batches.length, batches.world))


class _Rows:
    """Rows (N, D) that arrive in parts, in one tensor of `count` rows or, if that is 0, in a list."""

    def __init__(self, count: int):
        self.count, self.filled = count, 0
        self.parts: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        if not self.count:
            self.parts.append(rows)
            return
        if not self.parts:
            self.parts = [rows.new_empty(self.count, rows.shape[1])]
        self.parts[0][self.filled : self.filled + len(rows)] = rows
        self.filled += len(rows)

    def tensor(self) -> torch.Tensor:
        """Return all rows; (0, 0) if no part has arrived."""
        if self.count and self.parts:
            return self.parts[0][: self.filled]
        return torch.cat(self.parts) if self.parts else torch.empty(0, 0)


# Nearest neighbours ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def nearest(
    train: torch.Tensor, test: torch.Tensor, k: int, device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `k` rows of `train` (M, D) that are most similar to each row of `test` (N, D), or all if there are
    fewer: cosine similarities in descending order and indices, (N, k), on the CPU. Which of several equally similar
    rows are among the last ones is not determined.

    Parts of both are compared on `device` (by default that of `train`), which holds at most `nearest_bytes`. Features
    of float32 are normalised and multiplied in float32, also under autocast and without TF32.
    """
    device, k = device or train.device, min(k, len(train))
    best = None
    for first in range(0, len(train), BANK):
        bank = F.normalize(train[first : first + BANK].to(device, non_blocking=True), dim=1)
        found = [_most_similar(part, bank, k, first, device) for part in test.split(QUERIES)]
        best = found if best is None else [_merged(*pair, k) for pair in zip(best, found)]
    if not best:
        return train.new_empty(0, k), torch.empty(0, k, dtype=torch.int64)
    similarity, index = (torch.cat(column).cpu() for column in zip(*best))
    return similarity, index


def _most_similar(part, bank, k: int, first: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the similarities and indices of the `k` rows of a normalised bank, whose first row has the index `first`,
    that are most similar to the rows of `part`."""
    queries = F.normalize(part.to(device, non_blocking=True), dim=1)
    with torch.autocast(device.type, enabled=False), full_precision():
        similarity, index = (queries @ bank.T).topk(min(k, len(bank)), dim=1)
    return similarity, index + first


def _merged(one, other, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `k` most similar rows of two lists of them; of equally similar ones those of the first list."""
    similarity, index = (torch.cat(pair, dim=1) for pair in zip(one, other))
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return similarity[:, :k], index.gather(1, order[:, :k])


def nearest_bytes(rows: int, queries: int, width: int, k: int, size: int = 4) -> int:
    """Return the most bytes that `nearest` holds on its device: parts of the features with their normalised copies, the
    similarities, and the neighbours so far, with those of a part. `size` is the number of bytes of a feature."""
    bank, part = min(rows, BANK), min(queries, QUERIES)
    features, similarities = 2 * (bank + part) * width * size, bank * part * size
    return features + similarities + 2 * queries * k * (size + 8) + 8 * part * k * (size + 8)


def _votes(similarity, labels, classes: int, temperature: float) -> torch.Tensor:
    """Return the scores (N, classes) of rows with neighbours of these similarities and labels, (N, k)."""
    votes = torch.zeros(len(similarity), classes)
    return votes.scatter_add_(1, labels, (similarity.float() / temperature).exp())


def knn_predict(train, labels, test, classes: int, k: int = 20, temperature: float = 0.07, device=None):
    """Compute weighted k-nearest-neighbour scores (N, classes): cosine similarity, votes of weight exp(similarity /
    temperature), as Wu et al. 2018 and Caron et al. 2021 (DINO, Section 4.1). Features are (M, D) and (N, D), labels
    (M,); see `nearest`."""
    similarity, index = nearest(train, test, k, device)
    return _votes(similarity, labels[index], classes, temperature)


def knn_accuracies(
    train, train_labels, test, test_labels, ks: Sequence[int], device=None, temperature: float = 0.07
) -> list[float]:
    """Return for each of `ks` the top-1 accuracy of `knn_predict` in percent. Features are (M, D) and (N, D), labels
    (M,) and (N,); of each at least one. The neighbours are searched once, and the votes of `AT_ONCE` are held."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    similarity, index = nearest(train, test, max(ks), device)
    size, hits = max(1, AT_ONCE // classes), torch.zeros(len(ks))
    parts = zip(similarity.split(size), train_labels[index].split(size), test_labels.split(size))
    for near, labels, expected in parts:
        for i, k in enumerate(ks):
            predicted = _votes(near[:, :k], labels[:, :k], classes, temperature).argmax(dim=1)
            hits[i] += (predicted == expected).sum()
    return (100.0 * hits / len(test)).tolist()


def knn_accuracy(train, train_labels, test, test_labels, k: int = 20, device=None) -> float:
    """Return the accuracy of `knn_accuracies` for one `k`."""
    return knn_accuracies(train, train_labels, test, test_labels, [k], device)[0]
