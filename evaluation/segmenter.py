"""Segmenters of main_segment.py: loading them, and the classes that they predict for images of any size."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten

import torch

import models_segment
from evaluation.encoder import set_norm_eps
from evaluation.image_options import ImageOptions, image_options
from evaluation.slide import labels_at_size, slide
from util.data.dense.transforms import SegmentationEvaluation
from util.errors import UserError
from util.weights.load import Weights
from util.weights.model_config import resolve_config


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


@dataclass(frozen=True)
class Trained:
    """A segmenter, and how its run evaluated it."""

    model: models_segment.Segmenter
    categories: list[str]
    images: ImageOptions
    resize: SegmentationEvaluation
    stride: int | None
    flip: bool


def open_segmenter(args, weights: Weights, state: Mapping[str, torch.Tensor]) -> Trained:
    """Build the segmenter of a file, whose tensors are `state`, on the CPU, in eval mode, with the windows of its run.
    Raises UserError for a file that lacks the names of the classes, and for tensors that do not fit the flags."""
    if not weights.classes:
        raise UserError(f"{weights.path} does not name its classes: give a checkpoint of main_segment.py")
    stored, config = weights.args, resolve_config(weights, vars(args))
    head = {name: stored[name] for name in models_segment.SETTINGS if name in stored}
    count, sizes = len(weights.classes), config.encoder_arguments()
    model = models_segment.build_model(config.encoder_name, count, **sizes, **head)
    set_norm_eps(model, config.layer_norm_eps)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = shorten(str(error).strip().splitlines()[-1], 200)
        raise UserError(f"{weights.path} does not fit these flags: {reason}") from error
    images = image_options(args, config.in_chans, config.input_size, stored)
    size, slides = min(config.input_size), stored.get("eval_mode", "slide") == "slide"
    short, stride = stored.get("short_side") or size, stored.get("stride") or max(1, 2 * size // 3)
    resize = SegmentationEvaluation(config.input_size, *images.mean_std, short if slides else None)
    flip = bool(stored.get("eval_flip"))
    return Trained(model.eval(), weights.classes, images, resize, stride if slides else None, flip)
