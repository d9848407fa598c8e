"""The tasks of dense prediction for the loop of `engine_finetune`: what is learned from an image, and how it is
scored."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from engine_finetune import train
from evaluation.dense_pictures import Shown, detection_sheet, segmentation_sheet, to_show
from evaluation.detect_scores import CocoScores, Detections, VocScores
from evaluation.detector import detect, truth_of
from evaluation.segment_scores import SegmentScores
from evaluation.segmenter import predict_labels
from util.compute.precision import autocast
from util.data.dense.annotated import Detected
from util.data.dense.transforms import DetectionEvaluation, SegmentationEvaluation
from util.data.samples import Sample
from util.lr_decay import param_groups_lrd
from util.parallel.distributed import is_main_process
from util.report.ledger import Record
from util.training.announcements import Summary
from util.training.run import Run

SHOWN = 4  # images of the pictures in TensorBoard


class Segmentation:
    """Semantic segmentation: a class for every pixel.

    `categories` are the names of the classes. `resize` is the transform of the evaluation, which knows where an image
    lies in the network's input. With `stride` the image is segmented in windows of the training size, one every so
    many pixels, and the logits are averaged; None passes it through the network as a whole. With `flip` the logits of
    the mirrored image are averaged in. Predictions are scored at the size of the original image.
    """

    NAMES: ClassVar = {"pixel_loss": "segmentation", "auxiliary_loss": "auxiliary"}  # in the log

    def __init__(
        self, categories: Sequence[str], resize: SegmentationEvaluation, stride: int | None, flip: bool, ignore: int
    ):
        self.categories, self.resize, self.stride, self.flip, self.ignore = categories, resize, stride, flip, ignore
        self.shown: list[Shown] = []

    def losses(self, model, samples: Sample, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the weighted losses of a micro-batch by name: images (N, C, H, W), labels (N, H, W)."""
        imgs, labels = (each.to(device, non_blocking=True) for each in (samples.image, samples.target))
        return {self.NAMES[name]: loss for name, loss in model(imgs, labels).items()}

    def score(self, loader, model, device: torch.device, amp_dtype: torch.dtype) -> SegmentScores:
        """Return the scores of all images of this rank; the loader must give one image at a time."""
        model.eval()
        scores, self.shown = SegmentScores(device, len(self.categories), self.ignore), []
        for samples in loader.begin(0):
            labels = samples.target[0].to(device, non_blocking=True)
            with autocast(device, amp_dtype):
                predicted = self.predict(model, samples.image[0].to(device, non_blocking=True), labels.shape)
            scores.add([predicted], [labels], samples.bad == 0)
            if is_main_process() and len(self.shown) < SHOWN and not samples.bad.any():
                self.shown.append(to_show(samples.image[0], labels.shape, self.resize, predicted.cpu(), labels.cpu()))
        return scores

    def predict(self, model, img: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return the classes (H, W) of an image whose original size is `size` (H, W), from the network's input (C, h,
        w)."""
        return predict_labels(model, img, size, self.resize, self.stride, self.flip)

    def pictures(self) -> dict[str, torch.Tensor]:
        """Return images beside their predictions and labels (3, H, W), of the last evaluation; {} without any."""
        if not self.shown:
            return {}
        return {"segmentation": segmentation_sheet({"": self.shown}, self.categories, self.ignore).tensor()}


class Detection:
    """Detection of objects: boxes and, with `masks`, masks.

    `images` are those of the evaluation, whose annotations are the truth. `resize` is the transform of the evaluation.
    `voc_metric` "07" or "area" scores as Pascal VOC does, "" as COCO does.
    """

    NAMES: ClassVar = {  # in the log
        "loss_objectness": "proposal_objectness",
        "loss_rpn_box_reg": "proposal_boxes",
        "loss_classifier": "classes",
        "loss_box_reg": "boxes",
        "loss_mask": "masks",
    }

    def __init__(self, images: Detected, resize: DetectionEvaluation, masks: bool, voc_metric: str = ""):
        self.images, self.resize, self.masks, self.voc_metric = images, resize, masks, voc_metric
        self.shown: list[Shown] = []

    def losses(self, model, samples: Sample, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the losses of a micro-batch by name: images (N, C, H, W), targets of `DetectionTraining`."""
        names = ("boxes", "labels", "masks")[: 2 + self.masks]
        targets = [
            {name: target[name].to(device, non_blocking=True) for name in names} | {"size": target["covered"]}
            for target in samples.target
        ]
        losses = model(samples.image.to(device, non_blocking=True), targets)
        return {name: losses[key] for key, name in self.NAMES.items() if key in losses}

    def score(self, loader, model, device: torch.device, amp_dtype: torch.dtype) -> Detections:
        """Return the scores of all images of this rank; the loader must give one image at a time."""
        model.eval()
        scores = VocScores(device, self.voc_metric) if self.voc_metric else CocoScores(device, self.masks)
        self.shown = []
        for samples in loader.begin(0):
            if samples.bad.any():
                scores.add([{}], [{}], samples.bad == 0)
                continue
            size = tuple(samples.target[0]["size"].tolist())
            with autocast(device, amp_dtype):
                found = detect(model, samples.image.to(device, non_blocking=True), size, self.resize)
            truth = truth_of(self.images, int(samples.index), size, self.masks)
            scores.add([found], [truth], samples.bad == 0)
            if is_main_process() and len(self.shown) < SHOWN:
                found = {name: value.cpu() for name, value in found.items()}
                self.shown.append(to_show(samples.image[0], size, self.resize, found, truth))
        return scores

    def pictures(self) -> dict[str, torch.Tensor]:
        """Return detections beside the truth (3, H, W), of the last evaluation; {} without any."""
        if not self.shown:
            return {}
        return {"detection": detection_sheet({"": self.shown}, self.images.categories).tensor()}


def fine_tune(
    args, device: torch.device, model, loaders: tuple, task, resume, record: Record, names: list[str], summary: Summary
) -> dict[str, float]:
    """Fine-tune `model` on a dense task with AdamW and layer decay; return the scores of the last evaluation. `loaders`
    are those of training and evaluation, `names` the categories."""
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    run = Run(args, device, loaders[0], model, optimizer, resume=resume, record=record, classes=names, summary=summary)
    return train(args, run, loaders[1], task)
