"""Scores of a classifier on a test set, accumulated batch by batch and reduced once over all ranks."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from util.parallel.distributed import all_reduce_sum, gather_objects, get_rank, get_world_size


class TopK:
    """Top-1 and top-5 accuracy in percent and mean cross-entropy; one label per image (`targets` (N,), -1 where
    unknown)."""

    headline = "acc1"  # the metric that selects the best weights

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, top-1, top-5, images, skipped

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        """Add a batch: logits (N, classes) float32; images that are not `good` (N,) are only counted, as `skipped`."""
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
    """Mean average precision and precision@1 in percent and mean cross-entropy; a set of labels per image (`targets`
    (N, classes), positive for its labels, rows sum to one).

    Average precision ranks the scores of all images, so they are kept in main memory: on each rank those of its own
    images (images / ranks x classes x 5 bytes) and, during `read`, those of all images for a few classes at a time
    (images x `AT_ONCE` x 5 bytes). For 1 M images and 1,000 classes on 8 GPUs this is 0.6 GB and 0.3 GB on each rank.
    """

    headline = "mAP"
    AT_ONCE = 64  # classes

    def __init__(self, device: torch.device):
        self.scores, self.holds, self.sums = [], [], np.zeros(4)  # loss, hits of the first label, images, skipped

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        logits, targets = logits[good].cpu(), targets[good].cpu()
        # A constant added to all logits of an image leaves the softmax unchanged: only its output compares images.
        scores, holds = F.log_softmax(logits, dim=1).numpy(), targets.numpy() > 0
        loss = F.cross_entropy(logits, targets, reduction="sum").item()
        hits = precision_at_1(scores, holds) / 100 * len(scores)
        self.sums += (loss, hits, len(scores), int((~good).sum()))
        self.scores.append(scores)
        self.holds.append(holds)

    def read(self) -> dict[str, float]:
        loss, hits, count, skipped = np.sum(gather_objects(self.sums), axis=0).tolist()
        return {
            "loss": loss / max(1, count),
            "mAP": self._mean_average_precision(),
            "precision1": 100 * hits / max(1, count),
            "skipped": skipped,
        }

    def _mean_average_precision(self) -> float:
        """Return `mean_average_precision` over the images of all ranks; each rank computes some of the classes."""
        precisions = []
        classes = max(gather_objects(self.scores[0].shape[1] if self.scores else 0))
        for number, first in enumerate(range(0, classes, self.AT_ONCE)):
            columns = slice(first, first + self.AT_ONCE)
            own = [(scores[:, columns], holds[:, columns]) for scores, holds in zip(self.scores, self.holds)]
            everyone = [batch for rank in gather_objects(_joined(own)) for batch in rank]
            if number % get_world_size() == get_rank():
                precisions += average_precisions(*_joined(everyone)[0])
        return _mean([value for part in gather_objects(precisions) for value in part])

    @staticmethod
    def summary(stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        return f"mAP {stats['mAP']:.2f} %  precision@1 {stats['precision1']:.2f} %  loss {stats['loss']:.4f}"


def _joined(batches: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """Concatenate all batches into one; no batch stays none."""
    return [tuple(np.concatenate(parts) for parts in zip(*batches))] if batches else []


def average_precisions(scores: np.ndarray, holds: np.ndarray) -> list[float]:
    """Return the average precision in percent of each class with at least one image; `scores` and `holds`, whether a
    label holds, are (N, classes)."""
    occurs = np.flatnonzero(holds.any(axis=0))
    return [100 * float(average_precision_score(holds[:, index], scores[:, index])) for index in occurs]


def mean_average_precision(scores: np.ndarray, holds: np.ndarray) -> float:
    """Return the mean of `average_precisions`, 0 if there are none."""
    return _mean(average_precisions(scores, holds))


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0  # exact, so the order of the ranks is irrelevant


def precision_at_1(scores: np.ndarray, holds: np.ndarray) -> float:
    """Return the percentage of images whose highest-ranked label holds."""
    return 100 * float(holds[np.arange(len(scores)), scores.argmax(axis=1)].mean()) if len(scores) else 0.0
