"""Scores of a segmentation model on a test set: a confusion matrix of pixels, reduced once over all ranks."""

import numpy as np
import torch

from evaluation.confusion import draw
from util.parallel.distributed import all_reduce_sum


class SegmentScores:
    """Mean intersection over union (Jaccard index; Everingham et al. 2010), mean class accuracy and pixel accuracy in
    percent, over all pixels of all images together.

    Pixels whose label is `ignore_label`, or not in 0 ... `classes` - 1, are left out. A class that neither occurs
    nor is predicted has no IoU, and one that does not occur no accuracy: they are left out of the means.
    """

    headline = "mIoU"
    metrics = ("mIoU", "mean_acc", "pixel_acc")

    def __init__(self, device: torch.device, classes: int, ignore_label: int = -1):
        self.classes, self.ignore_label = classes, ignore_label
        # Counts of pixels, rows being the true classes, and the number of unreadable images.
        self.counts = torch.zeros(classes**2 + 1, dtype=torch.int64, device=device)
        self.matrix = np.zeros((classes, classes), int)  # after `read`, of all ranks

    def add(self, predicted, targets, good: torch.Tensor) -> None:
        """Add a batch of images: predicted and true classes, each a tensor (N, H, W) or a list of (H, W). Images that
        are not `good` (N,), that is readable, are only counted, as `skipped`."""
        for ours, truth, readable in zip(predicted, targets, good.tolist()):
            if not readable:
                self.counts[-1] += 1
                continue
            ours, truth = ours.to(self.counts.device).flatten(), truth.to(self.counts.device).flatten()
            known = (truth >= 0) & (truth < self.classes) & (truth != self.ignore_label)
            pairs = truth[known].long() * self.classes + ours[known].long()
            self.counts[:-1] += torch.bincount(pairs, minlength=self.classes**2)

    def read(self) -> dict[str, float]:
        """Return the metrics over all ranks."""
        *counts, skipped = all_reduce_sum(self.counts).tolist()
        self.matrix = np.array(counts, int).reshape(self.classes, self.classes)
        total = max(1, self.matrix.sum())
        return {
            "mIoU": _mean(self.ious()),
            "mean_acc": _mean(self.accuracies()),
            "pixel_acc": 100 * float(self.matrix.trace() / total),
            "skipped": skipped,
        }

    def ious(self) -> list[float | None]:
        """Return the IoU of each class in percent, None for a class that neither occurs nor is predicted."""
        unions = self.matrix.sum(axis=0) + self.matrix.sum(axis=1) - self.matrix.diagonal()
        return _percentages(self.matrix.diagonal(), unions)

    def accuracies(self) -> list[float | None]:
        """Return the percentage of each class's pixels that are predicted right, None for a class without pixels."""
        return _percentages(self.matrix.diagonal(), self.matrix.sum(axis=1))

    def details(self, names: list[str] | None) -> dict:
        """Return what `read` counted for each class, by its name, as JSON: IoU and accuracy in percent, pixels."""
        names = names or [str(index) for index in range(self.classes)]
        return {
            "iou": dict(zip(names, self.ious())),
            "accuracy": dict(zip(names, self.accuracies())),
            "pixels": dict(zip(names, self.matrix.sum(axis=1).tolist())),
        }

    def picture(self, names: list[str] | None) -> np.ndarray:
        """Return the confusion matrix as an RGB picture (H, W, 3) uint8."""
        return draw(self.matrix, names or [str(index) for index in range(self.classes)])

    def summary(self, stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        text = f"mIoU {stats['mIoU']:.2f} %  mean accuracy {stats['mean_acc']:.2f} %"
        absent = self.ious().count(None)
        why = (
            f" ({absent} of {self.classes} classes neither occur nor are predicted and are left out)" if absent else ""
        )
        if self.classes > 1 and np.count_nonzero(self.matrix.sum(axis=0)) == 1:
            why += f" (every pixel is predicted as class {self.matrix.sum(axis=0).argmax()})"
        return f"{text}  pixel accuracy {stats['pixel_acc']:.2f} %{why}"


def _percentages(counts: np.ndarray, totals: np.ndarray) -> list[float | None]:
    return [100 * count / total if total else None for count, total in zip(counts.tolist(), totals.tolist())]


def _mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 0.0
