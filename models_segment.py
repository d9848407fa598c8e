"""Semantic segmentation on a vision transformer: UPerNet (Xiao et al. 2018), as BEiT and MAE use it, or a linear head.

UPerNet needs four scales, but a ViT has one: the neck resizes the outputs of four blocks by 4, 2, 1 and 1/2 (Li et al.
2021, "Benchmarking detection transfer learning"; BEiT's code). Shapes: N images, K classes, D encoder width, (h, w)
the patch grid.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from models_grid import GridViT, build_grid, choose_norm, quarters
from util.compute.precision import widened
from util.errors import UserError
from util.weights.names import DENSE_MODELS

TASK, DENSE_MODEL = "segmentation", DENSE_MODELS["decode_head."]  # for messages: the task, and what a file of it is
HEADS = ["upernet", "linear"]  # values of --head
# Flags that checkpoints store, and their defaults.
SETTINGS = dict(head="upernet", head_width=None, head_norm="batch", feature_blocks=None, rel_pos=False, aux_weight=0.4)


def upsample(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize maps (N, C, H, W) to `size` (rows, columns), bilinearly."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def conv(inputs: int, outputs: int, kernel: int, norm: type[nn.Module]) -> nn.Sequential:
    """Return a convolution that keeps the size, with a norm and ReLU."""
    kernels = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(kernels.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(kernels, norm(outputs), nn.ReLU())


def classifier(width: int, classes: int) -> nn.Conv2d:
    """Return the 1x1 convolution that gives logits; its weights are small at the start."""
    layer = nn.Conv2d(width, classes, 1)
    assert layer.bias is not None  # the default of Conv2d
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class Neck(nn.ModuleList):
    """Resizes four maps (N, D, h, w) by 4, 2, 1 and 1/2."""

    def __init__(self, dim: int, norm: type[nn.Module]):
        def double():
            return nn.ConvTranspose2d(dim, dim, 2, stride=2)

        quadruple = nn.Sequential(double(), norm(dim), nn.GELU(), double())
        super().__init__([quadruple, double(), nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps):
        return [scale(features) for scale, features in zip(self, maps)]


class UPerNet(nn.Module):
    """The decode head: pyramid pooling (Zhao et al. 2017) of the coarsest map, a feature pyramid, and a classifier."""

    def __init__(self, dim: int, width: int, classes: int, norm: type[nn.Module], dropout=0.1, pools=(1, 2, 3, 6)):
        super().__init__()
        self.pools = nn.ModuleList([nn.Sequential(nn.AdaptiveAvgPool2d(p), conv(dim, width, 1, norm)) for p in pools])
        self.bottleneck = conv(dim + len(pools) * width, width, 3, norm)
        self.laterals = nn.ModuleList([conv(dim, width, 1, norm) for _ in range(3)])
        self.smooth = nn.ModuleList([conv(width, width, 3, norm) for _ in range(3)])
        self.fuse = conv(4 * width, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = classifier(width, classes)

    def forward(self, maps):
        """Four maps (N, D, ...), the finest first -> logits (N, K, ...) at the size of the finest."""
        *finer, coarsest = maps
        pooled = [upsample(pool(coarsest), coarsest.shape[-2:]) for pool in self.pools]
        levels = [lateral(x) for lateral, x in zip(self.laterals, finer)]
        levels.append(self.bottleneck(torch.cat([coarsest, *pooled], dim=1)))
        for index in (2, 1, 0):
            levels[index] = levels[index] + upsample(levels[index + 1], levels[index].shape[-2:])
        levels = [smooth(x) for smooth, x in zip(self.smooth, levels)] + levels[-1:]
        together = [upsample(x, levels[0].shape[-2:]) for x in levels]
        return self.classifier(self.dropout(self.fuse(torch.cat(together, dim=1))))


class Segmenter(GridViT):
    """Encoder, neck and head that classify every pixel.

    `head` is "upernet" or "linear" (batch norm and a 1x1 convolution on the patch tokens after the encoder's norm).
    `feature_blocks` are four blocks for UPerNet, one for the linear head; None chooses them (`default_blocks`).
    `head_width` None is the encoder's width. `aux_weight` weighs the loss of an auxiliary head on the third map; 0
    leaves it out. Labels equal to `ignore_label` have no loss.
    """

    def __init__(
        self,
        classes: int,
        head: str = "upernet",
        head_width: int | None = None,
        head_norm: str = "batch",
        feature_blocks: Sequence[int] | None = None,
        rel_pos: bool = False,
        aux_weight: float = 0.4,
        aux_width: int = 256,
        dropout: float = 0.1,
        ignore_label: int = 255,
        **encoder,
    ):
        linear, norm = head == "linear", choose_norm(head_norm)
        blocks = feature_blocks or default_blocks(head, encoder.get("depth", 12))
        if len(blocks) != (1 if linear else 4):
            raise UserError(f"--feature_blocks: --head {head} needs {1 if linear else 4}, not {len(blocks)}")
        super().__init__(blocks, "bias" if rel_pos else None, final_norm=linear, **encoder)
        self.aux_weight, self.ignore_label = aux_weight, ignore_label
        self.neck = self.auxiliary_head = None
        if linear:
            self.decode_head = nn.Sequential(norm(self.embed_dim), classifier(self.embed_dim, classes))
            return
        self.neck = Neck(self.embed_dim, norm)
        self.decode_head = UPerNet(self.embed_dim, head_width or self.embed_dim, classes, norm, dropout)
        if aux_weight:
            features = conv(self.embed_dim, aux_width, 3, norm)
            self.auxiliary_head = nn.Sequential(features, nn.Dropout2d(dropout), classifier(aux_width, classes))

    def head_modules(self) -> list[nn.Module]:
        return [module for module in (self.neck, self.decode_head, self.auxiliary_head) if module is not None]

    def _features(self, imgs) -> list[torch.Tensor]:
        """Images (N, C, H, W) -> the maps that the heads read."""
        maps = self.forward_maps(imgs, self.feature_blocks)
        if self.neck is not None:
            return self.neck(maps)
        return [self.norm(maps[0].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)]

    def forward(self, imgs, labels=None):
        """Images (N, C, H, W) -> logits (N, K, H, W), at least float32.

        With labels (N, H, W) int64, return the losses instead, by name and weighted: `pixel_loss` and, with an
        auxiliary head, `auxiliary_loss`. A loss is the sum over labelled pixels divided by the number of all pixels,
        which is the same for every image: so it is exact over ranks and accumulated batches. Raises UserError for
        training with one image and batch norm, which the 1x1 pool makes impossible.
        """
        if self.training and len(imgs) == 1 and self.neck is not None and _has_batch_norm(self.decode_head):
            raise UserError(
                "--batch_size 1 cannot be trained with batch norm in the head, whose 1x1 pool has one value per image: "
                "give --head_norm layer, or at least 2 images per process"
            )
        features = self._features(imgs)
        logits = self.decode_head(features if self.neck is not None else features[0])
        if labels is None:
            return self._resized(logits, imgs)
        losses = {"pixel_loss": self.loss(self._resized(logits, imgs), labels)}
        if self.auxiliary_head is not None:
            logits = self._resized(self.auxiliary_head(features[2]), imgs)
            losses["auxiliary_loss"] = self.aux_weight * self.loss(logits, labels)
        return losses

    def _resized(self, logits, imgs):
        return upsample(widened(logits), imgs.shape[-2:])

    def loss(self, logits, labels):
        """Cross-entropy of logits (N, K, H, W) and labels (N, H, W), over all pixels."""
        return F.cross_entropy(logits, labels, ignore_index=self.ignore_label, reduction="sum") / labels.numel()


def _has_batch_norm(module: nn.Module) -> bool:
    return any(isinstance(part, nn.BatchNorm2d) for part in module.modules())  # SyncBatchNorm counts all ranks' images


def default_blocks(head: str, depth: int) -> list[int]:
    """Return the blocks that a head reads: the last, or for UPerNet those that BEiT and MAE read, 3, 5, 7, 11 of 12. An
    encoder that is too shallow for four of them gives the ends of its quarters."""
    if head == "linear":
        return [depth - 1]
    blocks = [depth * part // 12 - 1 for part in (4, 6, 8, 12)]
    return blocks if len(set(blocks)) == 4 and min(blocks) >= 0 else quarters(depth)


def build_model(name: str, classes: int, **options) -> Segmenter:
    """Build a segmenter with the encoder called `name`, such as `vit_base_patch16`. `options` are arguments of
    `Segmenter` and of the encoder; None keeps the default. Raises UserError for an unknown name, head or norm, and for
    sizes that do not fit together."""
    if (options.get("head") or HEADS[0]) not in HEADS:
        raise UserError(f"--head {options['head']!r} is not known; use {' or '.join(HEADS)}")
    return build_grid(Segmenter, name, classes=classes, **options)
