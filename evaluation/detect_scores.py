"""Scores of a detector on a test set: COCO's twelve numbers by pycocotools, and Pascal VOC's average precision.

Each rank keeps the detections and the objects of its images, masks as run-length codes. `read` sends them to the main
process, which alone computes the scores and sends them to all ranks. Boxes are (x1, y1, x2, y2) in pixels of the
original image, half-open; labels begin with 1.
"""

import contextlib
import io
from abc import ABC, abstractmethod

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.parallel.distributed import from_main_process, gather_to_main

AREAS = {"s": "small", "m": "medium", "l": "large"}
COCO_METRICS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()  # in the order of COCOeval.stats
THRESHOLDS = [0.5 + 0.05 * step for step in range(10)]  # of the IoU, for VOC's AP; as in COCO's


class Detections(ABC):
    """What the scores of detectors share: they collect the images of a rank.

    A target is the dict of an image with `image_id` (a number that no other image has), `boxes` (M, 4), `labels` (M,),
    and optionally `masks` (M, H, W) uint8 or `rles` (pycocotools' codes), `iscrowd` (M,), `area` (M,), `difficult`
    (M,). A detection has `boxes`, `labels`, `scores` (M,) and, for masks, `masks` (M, H, W).
    """

    def __init__(self, device: torch.device):
        self.images: dict[int, dict] = {}
        self.skipped = 0
        self.by_class: dict[str, dict[int, float | None]] = {}  # after `read`: {metric: {label: percent}}

    def add(self, detections: list[dict], targets: list[dict], good: torch.Tensor) -> None:
        """Add the detections and the targets of a batch. Images that are not `good` (N,), that is readable, are only
        counted, as `skipped`."""
        for found, target, readable in zip(detections, targets, good.tolist()):
            if readable:
                self.images[int(target["image_id"])] = {"found": _plain(found), "target": _plain(target)}
            else:
                self.skipped += 1

    def read(self) -> dict[str, float]:
        """Return the metrics over all ranks; those that are not defined for these images are absent."""
        everyone = gather_to_main((self.images, self.skipped))
        stats, self.by_class = from_main_process(lambda: self._evaluate(*_merged(everyone)))
        return stats

    @abstractmethod
    def _evaluate(self, images: dict[int, dict], skipped: int) -> tuple[dict[str, float], dict]:
        """Return the metrics, and `by_class`."""

    def details(self, names: list[str] | None) -> dict:
        """Return what `read` computed for each class, by its name, as JSON; `names` are those of the labels from 1."""
        return {
            metric: {names[label - 1] if names else str(label): value for label, value in values.items()}
            for metric, values in self.by_class.items()
        }

    def picture(self, names: list[str] | None) -> None:
        """Return None: there is no confusion matrix of objects."""
        return


def _merged(everyone: list[tuple[dict, int]]) -> tuple[dict[int, dict], int]:
    """Return the images of all ranks in the order of their numbers, and the number of unreadable ones."""
    images = {number: image for images, _ in everyone for number, image in images.items()}
    return dict(sorted(images.items())), sum(skipped for _, skipped in everyone)


def _plain(values: dict) -> dict:
    """Return the tensors of a dict as arrays, with masks as run-length codes, `rles`."""
    plain = {name: value.cpu().numpy() if torch.is_tensor(value) else value for name, value in values.items()}
    masks = plain.pop("masks", None)
    if masks is not None and "rles" not in plain:
        plain["rles"] = [rle.encode(np.asfortranarray(mask.astype(np.uint8))) for mask in masks]
    return plain


class CocoScores(Detections):
    """COCO's average precision and recall in percent, of boxes and, with `masks`, of masks (Lin et al. 2014): AP is the
    mean over IoU thresholds 0.5, 0.55, ..., 0.95 and classes, AP50 and AP75 are those at one threshold, APs, APm, APl
    those of objects below 32², up to 96², and larger; AR1, AR10, AR100 are recalls with so many detections an image."""

    def __init__(self, device: torch.device, masks: bool):
        super().__init__(device)
        self.kinds = {"box": "bbox", "mask": "segm"} if masks else {"box": "bbox"}
        self.headline = "box_AP"
        self.metrics = tuple(f"{kind}_{metric}" for kind in self.kinds for metric in COCO_METRICS)

    def _evaluate(self, images, skipped):
        truth = _coco(images, [_object(image["target"], "mask" in self.kinds) for image in images.values()])
        stats, by_class = {"skipped": float(skipped)}, {}
        for kind, iou_type in self.kinds.items():
            found = _coco(images, [_found(image["found"], kind) for image in images.values()], truth)
            with contextlib.redirect_stdout(io.StringIO()):  # COCOeval prints its progress and a table
                evaluation = COCOeval(truth, found, iou_type)
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            values = zip(COCO_METRICS, evaluation.stats.tolist())
            stats |= {f"{kind}_{metric}": 100 * value for metric, value in values if value >= 0}  # -1: no such object
            precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds, recalls, classes), all areas
            means = [_mean(100 * precision[:, :, k][precision[:, :, k] >= 0]) for k in range(precision.shape[2])]
            by_class[f"{kind}_AP"] = dict(zip(evaluation.params.catIds, means))
        return stats, by_class

    def summary(self, stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        if "box_AP" not in stats:
            return "no AP, because no object is annotated in these images"
        texts = []
        for kind in self.kinds:
            values = [(metric, stats.get(f"{kind}_{metric}")) for metric in COCO_METRICS[:6]]
            texts.append(
                f"{kind} " + " ".join(f"{metric} {value:.2f}" for metric, value in values if value is not None)
            )
        absent = [name for letter, name in AREAS.items() if f"box_AP{letter}" not in stats]
        return "  ".join(texts) + (f" (no {' or '.join(absent)} objects)" if absent else "")


def _object(target: dict, with_masks: bool) -> list[dict]:
    """Return the objects of an image as COCO's annotations. Without `area` it is that of the mask or else of the box;
    `area` decides what is small, medium or large."""
    boxes = np.asarray(target["boxes"], float).reshape(-1, 4)
    codes = target.get("rles") if with_masks else None
    sides = boxes[:, 2:] - boxes[:, :2]
    areas = target.get("area")
    if areas is None:
        areas = sides.prod(axis=1) if target.get("rles") is None else [rle.area(code) for code in target["rles"]]
    crowd = target.get("iscrowd")
    objects = []
    for i, label in enumerate(np.asarray(target["labels"]).tolist()):
        objects.append(
            {
                "category_id": label,
                "bbox": [*boxes[i, :2].tolist(), *sides[i].tolist()],
                "area": float(areas[i]),
                "iscrowd": 0 if crowd is None else int(crowd[i]),
                **({} if codes is None else {"segmentation": codes[i]}),
            }
        )
    return objects


def _found(found: dict, kind: str) -> list[dict]:
    """Return the detections of an image as COCO's annotations. The area of a mask is counted in pixels, not taken from
    its box."""
    boxes = np.asarray(found["boxes"], float).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    detections = []
    for i, (label, score) in enumerate(zip(found["labels"].tolist(), found["scores"].tolist())):
        detection = {"category_id": label, "score": score, "iscrowd": 0}
        if kind == "mask":
            detection |= {"segmentation": found["rles"][i], "area": float(rle.area(found["rles"][i]))}
        else:
            detection |= {"bbox": [*boxes[i, :2].tolist(), *sides[i].tolist()], "area": float(sides[i].prod())}
        detections.append(detection)
    return detections


def _coco(images: dict[int, dict], annotations: list[list[dict]], truth: COCO | None = None) -> COCO:
    """Return pycocotools' index of the annotations of each image; its classes are those of `truth`, or else all that
    occur."""
    flat = [
        {**annotation, "image_id": number, "id": 0}
        for number, of_image in zip(images, annotations)
        for annotation in of_image
    ]
    for number, annotation in enumerate(flat):
        annotation["id"] = number + 1  # COCOeval takes 0 for "not matched"
    labels = sorted({annotation["category_id"] for annotation in flat})
    categories = [{"id": label} for label in labels] if truth is None else truth.dataset["categories"]
    sizes = [{"id": number, "height": 0, "width": 0} for number in images]  # pycocotools needs them for polygons only
    coco = COCO()
    coco.dataset = {"images": sizes, "annotations": flat, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


class VocScores(Detections):
    """Pascal VOC's average precision in percent, the mean over classes with objects (Everingham et al. 2010).

    `metric` "07" is the mean of the precision at eleven recalls, the metric until 2009; "area" that of all recalls.
    AP50 is VOC's, at an IoU above 0.5; AP75 and AP (the mean over COCO's thresholds) are stricter. `difficult` objects
    neither count nor hurt; a second detection of an object is wrong.
    """

    headline = "AP50"

    def __init__(self, device: torch.device, metric: str = "07"):
        super().__init__(device)
        self.metric, self.other = metric, {"07": "area", "area": "07"}[metric]
        self.metrics = ("AP50", "AP75", "AP", f"AP50_{self.other}")

    def _evaluate(self, images, skipped):
        labels = sorted({label for image in images.values() for label in image["target"]["labels"].tolist()})
        classes = {label: VocClass(images, label) for label in labels}
        classes = {label: matched for label, matched in classes.items() if matched.positives}
        eleven = self.metric == "07"
        at = {
            threshold: {label: 100 * matched.ap(threshold, eleven) for label, matched in classes.items()}
            for threshold in THRESHOLDS
        }
        other = {label: 100 * matched.ap(0.5, not eleven) for label, matched in classes.items()}
        stats = {"skipped": float(skipped)}
        if classes:
            means = {threshold: _mean(list(values.values())) for threshold, values in at.items()}
            stats |= {"AP50": means[0.5], "AP75": means[0.75], "AP": _mean(list(means.values()))}
            stats[f"AP50_{self.other}"] = _mean(list(other.values()))
        return stats, {"AP50": at[0.5], f"AP50_{self.other}": other}

    def summary(self, stats: dict) -> str:
        """Return the line that is printed after an evaluation."""
        if "AP50" not in stats:
            return "no AP, because no object is annotated in these images"
        names = {"07": "11-point", "area": "area"}
        return (
            f"AP50 {stats['AP50']:.2f} %  AP75 {stats['AP75']:.2f} %  AP {stats['AP']:.2f} % ({names[self.metric]})  "
            f"AP50 {stats[f'AP50_{self.other}']:.2f} % ({names[self.other]})"
        )


class VocClass:
    """The detections of one class, the highest score first, with the object that each overlaps most."""

    def __init__(self, images: dict[int, dict], label: int):
        scores, overlaps, matches, difficult = [], [], [], []
        for image in images.values():
            found, target = image["found"], image["target"]
            mine, theirs = found["labels"] == label, target["labels"] == label
            boxes = np.asarray(target["boxes"], float).reshape(-1, 4)[theirs]
            ious = box_ious(np.asarray(found["boxes"], float).reshape(-1, 4)[mine], boxes)
            scores.append(found["scores"][mine])
            overlaps.append(ious.max(axis=1, initial=-1))
            matches.append(len(difficult) + (ious.argmax(axis=1) if len(boxes) else np.full(len(ious), -1)))
            hard = target.get("difficult")
            difficult += (
                np.zeros(len(boxes), bool).tolist() if hard is None else np.asarray(hard, bool)[theirs].tolist()
            )
        order = np.argsort(-np.concatenate(scores), kind="stable")
        self.overlaps, self.matches = np.concatenate(overlaps)[order], np.concatenate(matches)[order]
        self.difficult = np.array(difficult, bool)
        self.positives = int((~self.difficult).sum())

    def ap(self, threshold: float, eleven_points: bool) -> float:
        """Return the average precision, 0 to 1, with objects found at an IoU above `threshold`."""
        overlapping = np.flatnonzero(self.overlaps > threshold)
        hard = np.zeros(len(self.overlaps), bool)
        hard[overlapping] = self.difficult[self.matches[overlapping]]
        candidates = np.flatnonzero((self.overlaps > threshold) & ~hard)
        right = np.zeros(len(self.overlaps), bool)
        right[candidates[np.unique(self.matches[candidates], return_index=True)[1]]] = True  # the first of each object
        found, wrong = np.cumsum(right), np.cumsum(~right & ~hard)
        recall = found / max(1, self.positives)
        precision = found / np.maximum(found + wrong, 1)
        return average_precision(recall, precision, eleven_points)


def average_precision(recall: np.ndarray, precision: np.ndarray, eleven_points: bool) -> float:
    """Return VOC's summary of a curve whose recall does not fall: the mean of the highest precision at or above the
    recalls 0, 0.1, ..., 1, or the area below the highest precision at or above each recall."""
    if eleven_points:
        return float(np.mean([precision[recall >= r].max(initial=0.0) for r in np.arange(0.0, 1.1, 0.1)]))
    recall = np.concatenate([[0.0], recall, [1.0]])
    highest = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(recall) * highest[1:]))


def intersections(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the areas (n, m) that boxes (n, 4) and (m, 4) have in common."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    return np.clip(high - low, 0, None).prod(axis=2)


def box_ious(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the intersections over unions (n, m) of boxes (n, 4) and (m, 4)."""
    both = intersections(boxes, others)
    areas, other_areas = ((b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, others))
    return both / np.maximum(areas[:, None] + other_areas - both, 1e-12)


def _mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None
