"""Scores of a classifier on a test set, accumulated batch by batch and reduced once over all ranks."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, roc_auc_score

from evaluation.confusion import Confusion, draw
from util.compute.precision import widest
from util.parallel.distributed import all_reduce_sum, gather_objects, get_rank, get_world_size


class TopK:
    """Top-1 and top-5 accuracy, balanced accuracy (the mean over classes of the share of their images that are correct)
    and, for two classes, the area under the ROC curve of the second, in percent; mean cross-entropy. For one label per
    image: `targets` (N,), -1 if unknown."""

    headline = "acc1"  # the metric by which the best weights are selected
    metrics = ("acc1", "acc5", "balanced_acc", "auc", "loss")  # those by which they may be

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, dtype=widest(device), device=device)  # loss, top-1, top-5, images, skipped
        self.confusion = Confusion(device)
        self.margins: list[torch.Tensor] = []  # for two classes: logit of the second minus that of the first

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        """Add a batch of logits (N, classes), float32. Images that are not `good` (N,), that is readable, are only
        counted, as `skipped`."""
        loss = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        ranked = top == targets[:, None]
        columns = [loss, ranked[:, 0].float(), ranked.any(dim=1).float(), torch.ones_like(loss)]
        self.sums[:4] += torch.stack([(column * good).sum() for column in columns])
        self.sums[4] += (~good).sum()
        self.confusion.add(torch.where(good, targets, -1), top[:, 0], logits.shape[1])
        if logits.shape[1] == 2:
            self.margins.append(logits[:, 1] - logits[:, 0])

    def read(self) -> dict[str, float]:
        """Return the metrics over all ranks; `auc` is absent unless there are two classes and images of both."""
        loss, top1, top5, count, skipped = all_reduce_sum(self.sums).tolist()
        count = max(count, 1.0)
        auc = self._auc()
        self.confusion.read()
        return {
            "loss": loss / count,
            "acc1": 100 * top1 / count,
            "acc5": 100 * top5 / count,
            "balanced_acc": self.confusion.balanced_accuracy(),
            **({} if math.isnan(auc) else {"auc": auc}),
            "skipped": skipped,
        }

    def _auc(self) -> float:
        own = [
            (margin.cpu().numpy(), pair[0].cpu().numpy()) for margin, pair in zip(self.margins, self.confusion.pairs)
        ]
        everyone = [batch for rank in gather_objects(_joined(own)) for batch in rank]
        if not everyone:
            return math.nan
        margins, targets = _joined(everyone)[0]
        known = targets >= 0
        return label_scores(margins[known, None], targets[known, None] == 1)[1].item()

    def details(self, names: list[str] | None) -> dict:
        """Return what `read` counted for each class, by its name, as JSON: recall in percent, images, and the rows of
        the confusion matrix, whose columns are the predicted classes in the same order."""
        names = names or [str(index) for index in range(len(self.confusion.images))]
        result = {"recall": dict(zip(names, self.confusion.recalls()))}
        result["images"] = dict(zip(names, self.confusion.images.tolist()))
        if self.confusion.matrix is not None:
            result["confusion_matrix"] = dict(zip(names, self.confusion.matrix.tolist()))
        return result

    def picture(self, names: list[str] | None) -> np.ndarray | None:
        """Return the confusion matrix as an RGB picture (H, W, 3) uint8, None if it was not counted."""
        matrix = self.confusion.matrix
        if matrix is None or not len(matrix):
            return None
        return draw(matrix, names or [str(index) for index in range(len(matrix))])

    def summary(self, stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        text = f"top-1 {stats['acc1']:.2f} %  top-5 {stats['acc5']:.2f} %  loss {stats['loss']:.4f}"
        auc = f"  AUC {stats['auc']:.2f} %" if "auc" in stats else ""
        return f"{text}  balanced {stats['balanced_acc']:.2f} %{auc}"


class MultiLabel:
    """Mean average precision, area under the ROC curve (mean over labels) and precision@1 in percent, and the mean
    loss, for a set of labels per image: `targets` (N, classes), positive for its labels. Rows sum to one, or to zero
    for images without labels, which precision@1 leaves out. Labels of all or of no image have no AUC.

    Average precision and AUC rank the scores of all images, so the scores are kept in main memory. Each rank holds
    those of its images (images / ranks x classes x 5 bytes) and, during `read`, copies of those of all images for
    `AT_ONCE` classes (images x `AT_ONCE` x 5 bytes a copy). For 1 M images and 1,000 classes on 8 GPUs this is 0.6 GB,
    and 0.3 GB a copy, on each rank.
    """

    headline = "mAP"
    metrics = ("mAP", "auc", "precision1", "loss")
    AT_ONCE = 64  # classes whose scores are gathered together

    def __init__(self, device: torch.device):
        self.scores, self.positives = [], []  # of each batch (n, classes): comparable between images; labels that hold
        self.sums = np.zeros(5)  # loss, images whose highest-ranked label is one of theirs, images, labelled, skipped
        self.by_label = np.zeros((2, 0))  # after `read`: average precision and AUC of each label, NaN if undefined

    def add(self, logits: torch.Tensor, targets: torch.Tensor, good: torch.Tensor) -> None:
        """Add a batch as `TopK.add` does."""
        logits, targets = logits[good].cpu(), targets[good].cpu()
        scores, positives = self._comparable(logits).numpy(), targets.numpy() > 0
        labelled = positives.any(axis=1)
        hits = precision_at_1(scores[labelled], positives[labelled]) / 100 * labelled.sum()
        self.sums += (self._loss(logits, targets), hits, len(scores), labelled.sum(), int((~good).sum()))
        self.scores.append(scores)
        self.positives.append(positives)

    def _comparable(self, logits: torch.Tensor) -> torch.Tensor:
        """Return scores that can be compared between images: after the softmax, which removes a constant added to all
        logits of an image."""
        return F.log_softmax(logits, dim=1)

    def _loss(self, logits: torch.Tensor, targets: torch.Tensor) -> float:
        return F.cross_entropy(logits, targets, reduction="sum").item()

    def read(self) -> dict[str, float]:
        """Return the metrics over all ranks; `auc` is absent if no label has one."""
        loss, hits, count, labelled, skipped = np.sum(gather_objects(self.sums), axis=0).tolist()
        self.by_label = self._scores_by_label()
        precision, auc = ([value for value in row if not math.isnan(value)] for row in self.by_label.tolist())
        return {
            "loss": loss / max(1, count),
            "mAP": _mean(precision),
            **({"auc": _mean(auc)} if auc else {}),
            "precision1": 100 * hits / max(1, labelled),
            "skipped": skipped,
        }

    def _scores_by_label(self) -> np.ndarray:
        """Return `label_scores` (2, classes) of the images of all ranks. The classes are divided among the ranks."""
        parts = {}
        classes = max(gather_objects(self.scores[0].shape[1] if self.scores else 0))
        for number, first in enumerate(range(0, classes, self.AT_ONCE)):
            columns = slice(first, first + self.AT_ONCE)
            own = [(scores[:, columns], labels[:, columns]) for scores, labels in zip(self.scores, self.positives)]
            everyone = [batch for rank in gather_objects(_joined(own)) for batch in rank]
            if number % get_world_size() == get_rank():
                parts[number] = label_scores(*_joined(everyone)[0])
        parts = {number: part for rank in gather_objects(parts) for number, part in rank.items()}
        return np.concatenate([np.zeros((2, 0)), *(parts[number] for number in sorted(parts))], axis=1)

    def details(self, names: list[str] | None) -> dict:
        """Return what `read` computed for each label, by its name, as JSON."""
        precision, auc = ([None if math.isnan(value) else value for value in row] for row in self.by_label.tolist())
        names = names or [str(index) for index in range(len(auc))]
        return {
            "average_precision": dict(zip(names, precision)),
            "auc": dict(zip(names, auc)),
            "labels_without_auc": auc.count(None),
        }

    def picture(self, names: list[str] | None) -> None:
        """There is no confusion matrix of sets of labels."""

    def summary(self, stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        text = f"mAP {stats['mAP']:.2f} %  precision@1 {stats['precision1']:.2f} %  loss {stats['loss']:.4f}"
        left_out = int(np.isnan(self.by_label[1]).sum())
        why = f" ({left_out} labels that all images or none have are left out)" if left_out else ""
        return text + (f"  AUC {stats['auc']:.2f} %{why}" if "auc" in stats else "")


class MultiLabelSigmoid(MultiLabel):
    """The same for `--multilabel_loss bce`, which scores every label on its own; the loss is the mean binary
    cross-entropy over labels."""

    def _comparable(self, logits):
        return logits

    def _loss(self, logits, targets):
        losses = F.binary_cross_entropy_with_logits(logits, (targets > 0).float(), reduction="none")
        return losses.mean(dim=1).sum().item()


def _joined(batches: list[tuple[np.ndarray, ...]]) -> list[tuple[np.ndarray, ...]]:
    """Concatenate all batches into one, and return it in a list; [] for no batch."""
    return [tuple(np.concatenate(parts) for parts in zip(*batches))] if batches else []


def label_scores(scores: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """Return the average precision and the AUC of each class in percent, (2, classes). `scores` and `positives` are (N,
    classes); `positives` is True where an image has the label. NaN without images for the average precision, and
    without images or others for the AUC."""
    result = np.full((2, positives.shape[1]), np.nan)
    for index in np.flatnonzero(positives.any(axis=0)):
        holds, values = positives[:, index], scores[:, index]
        if not np.isfinite(values).all():
            continue  # of a model that has diverged
        result[0, index] = 100 * average_precision_score(holds, values)
        if not holds.all():
            result[1, index] = 100 * roc_auc_score(holds, values)
    return result


def balanced_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the balanced accuracy and, for two classes with images of both, the AUC, in percent, of logits (N,
    classes) and labels (N,): those of `TopK`, without a reduction over ranks."""
    hits, present = logits.argmax(axis=1) == labels, np.unique(labels)
    scores = {"balanced_acc": 100 * float(np.mean([hits[labels == label].mean() for label in present]))}
    if logits.shape[1] == len(present) == 2:
        scores["auc"] = label_scores(logits[:, 1:] - logits[:, :1], labels[:, None] == 1)[1].item()
    return scores


def mean_average_precision(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the mean average precision in percent over the classes with images (`label_scores`), 0 without any."""
    return _mean([value for value in label_scores(scores, positives)[0].tolist() if not math.isnan(value)])


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0  # fsum is independent of the order of the ranks


def precision_at_1(scores: np.ndarray, positives: np.ndarray) -> float:
    """Return the percentage of images whose highest-ranked label is one of their labels."""
    return 100 * float(positives[np.arange(len(scores)), scores.argmax(axis=1)].mean()) if len(scores) else 0.0
