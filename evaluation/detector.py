"""Detectors of main_detect.py: the objects that they find in an image, those that are annotated, and loading them."""

from collections.abc import Sequence

import numpy as np
import torch

import models_detect
from evaluation.dense_pictures import to_show
from evaluation.dense_trained import Trained
from util.data.dense.annotated import Detected
from util.data.dense.detection import read_detection
from util.data.dense.rle import encode_segmentation
from util.data.dense.transforms import DetectionEvaluation
from util.data.images import printable
from util.errors import UserError
from util.weights.load import Weights


def detect(model, imgs: torch.Tensor, size: Sequence[int], resize: DetectionEvaluation) -> dict[str, torch.Tensor]:
    """Return what `models_detect.Detector` finds in an image whose original size is `size` (H, W), in its pixels:
    `boxes` (M, 4), `labels` (M,), `scores` (M,), the highest first, and `masks` (M, H, W) bool of a detector of masks.
    `imgs` (1, C, h, w) is the network's input, which `resize` made."""
    (found,) = model(imgs, [{"size": resize.shape(*size), "original_size": tuple(size)}])
    return found


def truth_of(images: Detected, index: int, size: Sequence[int], masks: bool) -> dict:
    """Return the objects of an image of `size` (H, W) as `evaluation.detect_scores` takes them, with crowds and
    difficult ones, and `size`; with `masks` their run-length codes. Raises UserError for a mask that does not fit the
    image."""
    record = images.record(index)
    objects = record["objects"]
    truth = {
        "image_id": record["id"],
        "size": tuple(size),
        "boxes": np.array([each["box"] for each in objects], np.float64).reshape(-1, 4),
        "labels": np.array([each["label"] for each in objects], np.int64),
        "iscrowd": np.array([each["crowd"] for each in objects], bool),
        "difficult": np.array([each["difficult"] for each in objects], bool),
        "area": np.array([each["area"] for each in objects], np.float64),
    }
    if masks:
        try:
            truth["rles"] = [encode_segmentation(each["segmentation"] or [], (size[1], size[0])) for each in objects]
        except ValueError as error:
            raise UserError(f"an object of {printable(images.name(index))}: {error}") from error
    return truth


class TrainedDetector(Trained):
    """A detector of boxes or, with `masks`, of boxes and masks."""

    def __init__(self, args, weights: Weights):
        super().__init__(args, weights, models_detect)
        self.masks = self.stored.get("detector", models_detect.DETECTORS[0]) == "mask"
        self.resize = DetectionEvaluation(self.size, *self.options.mean_std)

    def read(self, args):
        return read_detection(args, False, self.masks, self.categories)

    def show(self, sample, index, images):
        size = tuple(sample.target["size"].tolist())
        found = detect(self.model, sample.image[None].to(self.model.pos_embed.device), size, self.resize)
        truth = truth_of(images, index, size, self.masks)
        return to_show(sample.image, size, self.resize, {name: value.cpu() for name, value in found.items()}, truth)
