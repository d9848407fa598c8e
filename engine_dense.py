"""The tasks of dense prediction for the loop of `engine_finetune`: what is learned from an image, and how it is
scored."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from evaluation.dense_pictures import figure_tensor, segmentation_figure
from evaluation.segment_scores import SegmentScores
from evaluation.segmenter import predict_labels
from util.compute.precision import autocast
from util.data.dense.transforms import SegmentationEvaluation
from util.data.samples import Sample
from util.parallel.distributed import is_main_process

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
        self.shown: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # image, prediction, labels

    def losses(self, model, samples: Sample, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the weighted losses of a micro-batch by name: images (N, C, H, W), labels (N, H, W)."""
        imgs, labels = (each.to(device, non_blocking=True) for each in (samples.image, samples.target))
        return {self.NAMES[name]: loss for name, loss in model(imgs, labels).items()}

    def score(self, loader, model, device: torch.device, amp_dtype: torch.dtype) -> SegmentScores:
        """Return the scores of all images of this rank; the loader must give one image at a time."""
        model.eval()
        scores, self.shown = SegmentScores(device, len(self.categories)), []
        for samples in loader.begin(0):
            labels = samples.target[0].to(device, non_blocking=True)
            with autocast(device, amp_dtype):
                predicted = self.predict(model, samples.image[0].to(device, non_blocking=True), labels.shape)
            scores.add([predicted], [labels], samples.bad == 0)
            if is_main_process() and len(self.shown) < SHOWN and not samples.bad.any():
                self.shown.append((samples.image[0], predicted.cpu(), labels.cpu()))
        return scores

    def predict(self, model, img: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return the classes (H, W) of an image whose original size is `size` (H, W), from the network's input (C, h,
        w)."""
        return predict_labels(model, img, size, self.resize, self.stride, self.flip)

    def pictures(self) -> dict[str, torch.Tensor]:
        """Return images beside their predictions and labels (3, H, W), of the last evaluation; {} without any."""
        if not self.shown:
            return {}
        figure = segmentation_figure(self.shown, self.resize, self.categories, self.ignore)
        return {"segmentation": figure_tensor(figure)}
