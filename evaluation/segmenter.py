"""Segmenters of main_segment.py: the classes that they predict for images of any size, and loading them."""

from argparse import Namespace
from collections.abc import Mapping, Sequence

import torch

import models_segment
from evaluation.dense_pictures import to_show
from evaluation.dense_trained import Trained
from evaluation.slide import labels_at_size, slide
from util.data.dense.segmentation import read_segmentation
from util.data.dense.transforms import SegmentationEvaluation
from util.data.image_format import image_shape
from util.errors import UserError
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


def settle_evaluation(args, stored: Mapping) -> None:
    """Settle the flags of the evaluation: those that are not given are the ones `stored` with the weights of `--eval`,
    so that it gives the numbers of the run, else the defaults. Raises UserError for windows that leave gaps."""
    names = ["eval_flip", "short_side", *(["stride", "eval_mode"] if args.eval_mode is None else [])]
    for name in names:
        setattr(args, name, stored.get(name) if getattr(args, name) is None else getattr(args, name))
    args.eval_mode, args.eval_flip = args.eval_mode or "slide", bool(args.eval_flip)
    size = image_shape(args.input_size)
    args.short_side = args.short_side or min(size)
    if args.eval_mode == "slide":
        args.stride = args.stride or max(1, 2 * min(size) // 3)
        if args.stride > min(size):
            raise UserError(f"--stride {args.stride} is larger than the window of {min(size)} pixels: it leaves gaps")


class TrainedSegmenter(Trained):
    """A segmenter, with the windows and flips of its run. `stride` None: images are segmented as a whole."""

    def __init__(self, args, weights: Weights):
        super().__init__(args, weights, models_segment)
        flags = Namespace(input_size=self.size, **dict.fromkeys(["eval_mode", "stride", "short_side", "eval_flip"]))
        settle_evaluation(flags, self.stored)
        slides = flags.eval_mode == "slide"
        self.stride, self.flip = flags.stride if slides else None, flags.eval_flip
        self.resize = SegmentationEvaluation(self.size, *self.options.mean_std, flags.short_side if slides else None)

    def read(self, args):
        if args.zero_is_ignored is None:  # the meaning of the masks is that of the training
            args.zero_is_ignored = self.stored.get("zero_is_ignored")
        return read_segmentation(args, False, self.categories)

    def show(self, sample, index, images):
        img, size = sample.image, sample.target.shape
        device = self.model.pos_embed.device
        predicted = predict_labels(self.model, img.to(device), size, self.resize, self.stride, self.flip)
        return to_show(img, size, self.resize, predicted.cpu(), sample.target)
