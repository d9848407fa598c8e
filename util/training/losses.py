"""Losses of fine-tuning and probing."""

import torch
import torch.nn.functional as F
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import nn


class LabelSetCrossEntropy(nn.Module):
    """Cross-entropy of logits (N, classes) with label probabilities (N, classes), whose rows sum to one. A row of
    zeros, an image without labels, has the loss 0."""

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.smoothing > 0:
            share = (self.smoothing / targets.shape[1]) * (targets.sum(dim=1, keepdim=True) > 0)
            targets = targets * (1 - self.smoothing) + share
        return F.cross_entropy(logits, targets)


class LabelSetBinaryCrossEntropy(nn.Module):
    """Mean binary cross-entropy of logits (N, classes): 1 for the labels of an image, whose `targets` (N, classes) are
    positive, and 0 for the others. Smoothing moves both towards 1/2. `weights` (classes,) multiply the loss of labels
    that hold."""

    def __init__(self, smoothing: float = 0.0, weights: torch.Tensor | None = None):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weights", weights)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        labels = (targets > 0).to(logits.dtype) * (1 - self.smoothing) + self.smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=self.weights)


class MeanSquaredError(nn.Module):
    """Mean squared error of outputs and targets (N, outputs), in float32."""

    def forward(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs.float(), targets)


class WeightedCrossEntropy(nn.Module):
    """Mean over images of cross-entropy times the weight of the image's class: logits (N, classes), targets (N,), or
    (N, classes) for mixed images, whose weight is the mean over their classes. `weights` (classes,).

    The sum is divided by N and not, as in torch, by the sum of the weights in a batch, so that the gradient does not
    depend on how a batch is divided into micro-batches and among processes."""

    weights: torch.Tensor

    def __init__(self, weights: torch.Tensor, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("weights", weights)

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.ndim == 2:  # `Mixup` has smoothed them
            return (F.cross_entropy(logits, targets, reduction="none") * (targets * self.weights).sum(dim=1)).mean()
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)
        return (losses * self.weights[targets]).mean()


# Names of the loss in the log by `--targets`: their values cannot be compared.
LOSS_NAMES = {"single": "classification", "multilabel": "multilabel", "regression": "regression"}


def build_criterion(
    mixing: bool,
    targets: str,
    smoothing: float,
    multilabel_loss: str = "softmax",
    weights: torch.Tensor | None = None,
) -> nn.Module:
    """Return the loss: cross-entropy with soft targets if images are mixed, one of label sets for `--targets
    multilabel`, the mean squared error for `--targets regression` (without smoothing), else cross-entropy with one
    label per image. `weights` (classes,) are those of `--class_weights`."""
    if targets == "regression":
        return MeanSquaredError()
    if targets == "multilabel":
        if multilabel_loss == "bce":
            return LabelSetBinaryCrossEntropy(smoothing, weights)
        return LabelSetCrossEntropy(smoothing)
    if weights is not None:
        return WeightedCrossEntropy(weights, smoothing)
    if mixing:
        return SoftTargetCrossEntropy()  # `Mixup` has smoothed the targets
    return LabelSmoothingCrossEntropy(smoothing) if smoothing > 0 else nn.CrossEntropyLoss()
