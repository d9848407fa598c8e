"""Scores of a classifier on a test set, accumulated batch by batch and reduced once over all ranks."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from util.parallel.distributed import all_reduce_sum, gather_objects, get_rank, get_world_size


class TopK:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy, for one label per image: `targets` (N,), -1 if
    unknown."""

    headline = "acc1"  # the metric by which the best weights are selected

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, top-1, top-5, images, skipped

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        """Add a batch of logits (N, classes), float32. Images that are not `good` (N,), that is readable, are only
        counted, as `skipped`."""
        loss = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        columns = [loss, ranked[:, 0].float(), ranked.any(dim=1).float(), torch.ones_like(loss)]
        self.sums[:4] += torch.stack([(column * good).sum() for column in columns])
        self.sums[4] += (~good).sum()

    def read(self) -> dict[str, float]:
        loss, top1, top5, count, skipped = all_reduce_sum(self.sums).tolist()
        count = max(count, 1.0)
        return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "skipped": skipped}

    @staticmethod
    def summary(stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        return f"top-1 {stats['acc1']:.2f} %  top-5 {stats['acc5']:.2f} %  loss {stats['loss']:.4f}"


class MultiLabel:
    """Mean average precision and precision@1 in percent and mean cross-entropy, for a set of labels per image:
    `targets` (N, classes), positive for its labels; rows sum to one.

    Average precision ranks the scores of all images, so the scores are kept in main memory. Each rank holds those of
    its images (images / ranks x classes x 5 bytes) and, during `read`, copies of those of all images for `AT_ONCE`
    classes (images x `AT_ONCE` x 5 bytes a copy). For 1 M images and 1,000 classes on 8 GPUs this is 0.6 GB, and 0.3 GB
    a copy, on each rank.
    """

    headline = "mAP"
    AT_ONCE = 64  # classes whose scores are gathered together

    def __init__(self, device: torch.device):
        self.scores, self.positives = [], []  # of each batch (n, classes): log-probabilities, and whether labels hold
        self.sums = np.zeros(4)  # loss, images whose highest-ranked label is one of theirs, images, skipped

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        logits, targets = logits[good].cpu(), targets[good].cpu()
        # Logits are comparable between images only after the softmax, which removes a constant added to all of them.
        scores, positives = F.log_softmax(logits, dim=1).numpy(), targets.numpy() > 0
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        hits = precision_at_1(scores, positives) / 100 * len(scores)
        self.sums += (loss, hits, len(scores), int((~good).sum()))
        self.scores.append(scores)
        self.positives.append(positives)

    def read(self) -> dict[str, float]:
        loss, hits, count, skipped = np.sum(gather_objects(self.sums), axis=0).tolist()
        return {
            "loss": loss / max(1, count),
            "mAP": self._mean_average_precision(),
            "precision1": 100 * hits / max(1, count),
            "skipped": skipped,
        }

    def _mean_average_precision(self) -> float:
        """Return `mean_average_precision` of the images of all ranks. The classes are divided among the ranks."""
        precisions = []
        classes = max(gather_objects(self.scores[0].shape[1] if self.scores else 0))
        for number, first in enumerate(range(0, classes, self.AT_ONCE)):
            columns = slice(first, first + self.AT_ONCE)
            own = [(scores[:, columns], labels[:, columns]) for scores, labels in zip(self.scores, self.positives)]
            everyone = [batch for rank in gather_objects(_joined(own)) for batch in rank]
            if number % get_world_size() == get_rank():
                precisions += average_precisions(*_joined(everyone)[0])
        return _mean([value for part in gather_objects(precisions) for value in part])

    @staticmethod
    def summary(stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        return f"mAP {stats['mAP']:.2f} %  precision@1 {stats['precision1']:.2f} %  loss {stats['loss']:.4f}"


def _joined(batches: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """Concatenate all batches into one, and return it in a list; [] for no batch."""
    return [tuple(np.concatenate(parts) for parts in zip(*batches))] if batches else []


def average_precisions(scores: np.ndarray, positives: np.ndarray) -> list[float]:
    """Return the average precision in percent of each class with at least one image. `scores` and `positives` are
    (N, classes); `positives` is True where an image has the label."""
    present = np.flatnonzero(positives.any(axis=0))
    return [100 * float(average_precision_score(positives[:, index], scores[:, index])) for index in present]


def mean_average_precision(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the mean of `average_precisions`, 0 if there are none."""
    return _mean(average_precisions(scores, positives))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0  # fsum is independent of the order of the ranks


def precision_at_1(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the percentage of images whose highest-ranked label is one of their labels."""
    return 100 * float(positives[np.arange(len(scores)), scores.argmax(axis=1)].mean()) if len(scores) else 0.0
