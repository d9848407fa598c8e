"""Segmenters of main_segment.py: the classes that they predict for images of any size, and loading them."""

from collections.abc import Mapping, Sequence

import torch

import models_segment
from evaluation.dense_pictures import shown
from evaluation.dense_trained import Trained
from evaluation.slide import labels_at_size, slide
from util.data.dense.segmentation import read_segmentation
from util.data.dense.transforms import SegmentationEvaluation
from util.weights.load import Weights


def predict_labels(
    model, img: torch.Tensor, size: Sequence[int], resize: SegmentationEvaluation, stride: int | None, flip: bool
) -> torch.Tensor:
    """Return the classes (H, W) of an image whose original size is `size` (H, W), from the network's input (C, h, w),
    which `resize` made. With `stride` windows of the training size, one every so many pixels, are averaged; None passes
    the image through the network as a whole. With `flip` the logits of the mirrored image are averaged in."""
    logits = _logits(model, img, resize, stride)
    if flip:
        logits = (logits + _logits(model, img.flip(-1), resize, stride).flip(-1)) / 2
    rows, columns = resize.shape(*size)  # without the padding
    return labels_at_size(logits[:, :rows, :columns], size)


def _logits(model, img, resize, stride):
    if stride is None:
        return model(img[None])[0].float()
    return slide(lambda windows: model(windows).float(), img, resize.size, stride)


class TrainedSegmenter(Trained):
    """A segmenter, with the windows and flips of its run. `stride` None: images are segmented as a whole."""

    def __init__(self, args, weights: Weights, state: Mapping[str, torch.Tensor]):
        super().__init__(args, weights, state, models_segment)
        shorter, slides = min(self.size), self.stored.get("eval_mode", "slide") == "slide"
        short = self.stored.get("short_side") or shorter
        self.stride = (self.stored.get("stride") or max(1, 2 * shorter // 3)) if slides else None
        self.flip = bool(self.stored.get("eval_flip"))
        self.resize = SegmentationEvaluation(self.size, *self.options.mean_std, short if slides else None)

    def read(self, args):
        if args.zero_is_ignored is None:  # the meaning of the masks is that of the training
            args.zero_is_ignored = self.stored.get("zero_is_ignored")
        return read_segmentation(args, False, self.categories)

    def show(self, sample, index, images):
        img, size = sample.image, sample.target.shape
        device = self.model.pos_embed.device
        predicted = predict_labels(self.model, img.to(device), size, self.resize, self.stride, self.flip)
        return shown(img, size, self.resize, predicted.cpu(), sample.target)
