"""How good a classifier is on a test set: sums that are kept batch by batch and read once, over all ranks."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from util.distributed import all_reduce_sum, from_main_process, gather_objects


class TopK:
    """One label per image (`targets` (N,), -1 where unknown): top-1 and top-5 in percent, mean cross-entropy."""

    headline = "acc1"  # what decides which weights are the best

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, top-1, top-5, images, skipped

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        """logits (N, classes) float32; `good` (N,) bool: what is not is only counted, under `skipped`."""
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
    def said(stats: dict) -> str:
        return f"top-1 {stats['acc1']:.2f} %  top-5 {stats['acc5']:.2f} %  loss {stats['loss']:.4f}"


class MultiLabel:
    """Sets of labels (`targets` (N, classes), positive where a label holds, rows sum to one): mean average precision
    and precision@1 in percent, mean cross-entropy.

    Every score is kept in main memory, on every rank: images x classes x 5 bytes.
    """

    headline = "mAP"

    def __init__(self, device: torch.device):
        self.scores, self.holds, self.loss, self.skipped = [], [], 0.0, 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        logits, targets = logits[good].cpu(), targets[good].cpu()
        self.loss += F.cross_entropy(logits, targets, reduction="sum").item()
        # Softmax is blind to a constant added to all logits of an image, so they compare between images only after it.
        self.scores.append(F.log_softmax(logits, dim=1).numpy())
        self.holds.append(targets.numpy() > 0)
        self.skipped += int((~good).sum())

    def read(self) -> dict[str, float]:
        everyone = gather_objects((self.scores, self.holds, self.loss, self.skipped))
        scores = np.concatenate([batch for rank in everyone for batch in rank[0]] or [np.zeros((0, 1))])
        holds = np.concatenate([batch for rank in everyone for batch in rank[1]] or [np.zeros((0, 1), bool)])
        loss, skipped = (sum(rank[place] for rank in everyone) for place in (2, 3))
        return {
            "loss": loss / max(1, len(scores)),
            "mAP": from_main_process(lambda: mean_average_precision(scores, holds)),
            "precision1": precision_at_1(scores, holds),
            "skipped": float(skipped),
        }

    @staticmethod
    def said(stats: dict) -> str:
        return f"mAP {stats['mAP']:.2f} %  precision@1 {stats['precision1']:.2f} %  loss {stats['loss']:.4f}"


def mean_average_precision(scores: np.ndarray, holds: np.ndarray) -> float:
    """Average precision of each class over all images, averaged over the classes that occur, in percent; (N, classes)
    both, `holds` bool. 0 where no class occurs."""
    occurs = np.flatnonzero(holds.any(axis=0))
    values = [average_precision_score(holds[:, place], scores[:, place]) for place in occurs]
    return 100 * float(np.mean(values)) if values else 0.0


def precision_at_1(scores: np.ndarray, holds: np.ndarray) -> float:
    """Percentage of the images whose highest-ranked label holds."""
    return 100 * float(holds[np.arange(len(scores)), scores.argmax(axis=1)].mean()) if len(scores) else 0.0
