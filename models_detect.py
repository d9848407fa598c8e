"""Detection and instance segmentation on a vision transformer: torchvision's Faster R-CNN and Mask R-CNN heads (Ren et
al. 2015, He et al. 2017) on the simple feature pyramid of ViTDet (Li et al. 2022), or on the four-level FPN of
"Benchmarking detection transfer learning with vision transformers" (Li et al. 2021).

Both papers' heads: an RPN with two convolutions, a box head with four convolutions and a linear layer, a mask head with
four convolutions, with norms. Boxes are (x1, y1, x2, y2) in pixels, half-open, label 0 is the background. Shapes: N
images, M objects or detections of one image, K classes with the background, D encoder width.
"""

from collections import OrderedDict
from collections.abc import Sequence
from math import ceil, floor, gcd

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN, FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import resize_boxes
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from models_grid import GridViT, build_grid, choose_norm, quarters
from util.compute.precision import widened
from util.errors import UserError
from util.weights.names import DENSE_MODELS

# Flags that checkpoints store, and their defaults.
SETTINGS = dict(detector="mask", pyramid="simple", head_width=256, head_norm="layer", window=14)
SETTINGS |= dict(global_blocks=None, rel_pos=True, anchors=None)
TASK, DENSE_MODEL = "detection", DENSE_MODELS["roi_heads."]  # for messages: the task, and what a file of it is
DETECTORS = ["mask", "faster"]  # values of --detector
PYRAMIDS = ["simple", "fpn"]  # values of --pyramid
SCORE_THRESH = 0.05  # score below which a detection is left out, as in COCO's and ViTDet's evaluations
ROIS = 512  # regions of an image on which the heads are trained, in COCO's recipes
RATIOS = (0.5, 1.0, 2.0)  # height / width of the anchors


def _double(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 2, stride=2)


class SimplePyramid(nn.ModuleList):
    """ViTDet's pyramid: the encoder's last map (N, D, h, w) resized by 4, 2, 1 and 1/2, each followed by a 1x1 and a
    3x3 convolution with layer norm."""

    def __init__(self, dim: int, width: int):
        quadruple = [_double(dim, dim // 2), LayerNorm2d(dim // 2), nn.GELU(), _double(dim // 2, dim // 4)]
        resizes = [quadruple, [_double(dim, dim // 2)], [nn.Identity()], [nn.MaxPool2d(2)]]
        super().__init__(
            nn.Sequential(
                *resize,
                nn.Conv2d(inputs, width, 1, bias=False),
                LayerNorm2d(width),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                LayerNorm2d(width),
            )
            for resize, inputs in zip(resizes, (dim // 4, dim // 2, dim, dim))
        )

    def forward(self, maps):
        """[map] -> {"0" ... "3": map (N, width, ...), the finest first, "pool": the coarsest, every second row and
        column}."""
        levels = [level(maps[-1]) for level in self]
        levels.append(F.max_pool2d(levels[-1], 1, stride=2))
        return OrderedDict(zip(["0", "1", "2", "3", "pool"], levels))


class ClassicPyramid(nn.Module):
    """The pyramid of "Benchmarking": four blocks' maps, resized by 4, 2, 1 and 1/2, and an FPN (Lin et al. 2017)."""

    def __init__(self, dim: int, width: int, norm: type[nn.Module]):
        super().__init__()
        groups = nn.GroupNorm(gcd(32, dim), dim)
        quadruple = nn.Sequential(_double(dim, dim), groups, nn.GELU(), _double(dim, dim))
        self.resizes = nn.ModuleList([quadruple, _double(dim, dim), nn.Identity(), nn.MaxPool2d(2)])
        self.fpn = FeaturePyramidNetwork([dim] * 4, width, LastLevelMaxPool(), norm)

    def forward(self, maps):
        """Four maps (N, D, h, w) -> the same dictionary as `SimplePyramid` gives."""
        return self.fpn(OrderedDict((str(i), resize(x)) for i, (resize, x) in enumerate(zip(self.resizes, maps))))


class _Anchors(AnchorGenerator):
    """Anchors of one size at each level, in float32. torchvision derives the strides from the sizes of the maps, which
    is wrong where a map has an odd side."""

    def __init__(self, sizes: Sequence[int], finest_stride: int):
        super().__init__(tuple((size,) for size in sizes), (RATIOS,) * len(sizes))
        self.strides = [finest_stride * 2**level for level in range(len(sizes))]

    def forward(self, images, maps):
        device = maps[0].device
        self.set_cell_anchors(torch.float32, device)
        strides = [[stride, stride] for stride in self.strides]
        anchors = torch.cat(self.grid_anchors([x.shape[-2:] for x in maps], strides))
        return [anchors] * len(images.image_sizes)


class _RoIAlign(MultiScaleRoIAlign):
    """RoIAlign for padded images of one size. torchvision derives the strides, once, from the sizes without padding of
    the first images."""

    def __init__(self, padded_size: Sequence[int], output_size: int):
        super().__init__(["0", "1", "2", "3"], output_size, sampling_ratio=2)
        self.padded_size = tuple(padded_size)

    def forward(self, maps, boxes, sizes):
        return super().forward(maps, boxes, [self.padded_size])


# Boxes are decoded, compared and sampled in the type of these outputs. In bf16 a coordinate near 1,000 is a multiple of
# 4 pixels, so the outputs are widened to float32.


class _RPNHead(RPNHead):
    def forward(self, x):
        return tuple([widened(output) for output in outputs] for outputs in super().forward(x))


class _BoxPredictor(FastRCNNPredictor):
    def __init__(self, inputs: int, classes: int):
        super().__init__(inputs, classes)
        for layer, std in ((self.cls_score, 0.01), (self.bbox_pred, 0.001)):  # as in detectron2
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return tuple(widened(output) for output in super().forward(x))


class _MaskPredictor(MaskRCNNPredictor):
    def forward(self, x):
        return widened(super().forward(x))


class _MaskHead(MaskRCNNHeads):
    def forward(self, x):
        """RoIs (R, C, 14, 14) -> (R, width, 14, 14). Of images without objects R is 0, of which plain batch norm cannot
        take statistics."""
        if len(x) or not any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            return super().forward(x)
        mode = self.training
        x = super(_MaskHead, self.eval()).forward(x)
        self.train(mode)
        return x


def _rcnn(model: GridViT, detector: str, classes: int, width: int, anchors: Sequence[int], norm, options: dict):
    """Return torchvision's detector on pyramids of `model`; only its RPN and its RoI heads are used."""
    backbone, size = nn.Identity(), model.patch_embed.img_size
    backbone.out_channels = width
    options = dict(
        rpn_anchor_generator=_Anchors(anchors, model.patch_embed.patch_size[0] // 4),
        rpn_head=_RPNHead(width, len(RATIOS), conv_depth=2),
        box_roi_pool=_RoIAlign(size, 7),
        box_head=FastRCNNConvFCHead((width, 7, 7), [width] * 4, [4 * width], norm),
        box_predictor=_BoxPredictor(4 * width, classes),
        **{"rpn_post_nms_top_n_train": 1000, **options},
    )
    if detector == "faster":
        return FasterRCNN(backbone, **options)
    return MaskRCNN(
        backbone,
        mask_roi_pool=_RoIAlign(size, 14),
        mask_head=_MaskHead(width, [width] * 4, 1, norm),
        mask_predictor=_MaskPredictor(width, width, classes),
        **options,
    )


class Detector(GridViT):
    """Encoder, pyramid and R-CNN heads.

    `classes` (K) counts the background. `detector` is "mask" (boxes and masks) or "faster" (boxes). `pyramid` "simple"
    reads the last block, "fpn" the last blocks of the quarters. Blocks other than `global_blocks` (None: the last
    blocks of the quarters) attend inside windows of `window` patches, 0 for none. `anchors` are the anchors' sides in
    pixels, of the finest level first (None: 2 patches, doubled from level to level). `rcnn` are arguments of
    torchvision's `FasterRCNN`, such as `box_score_thresh`.
    """

    def __init__(
        self,
        classes: int,
        detector: str = "mask",
        pyramid: str = "simple",
        head_width: int = 256,
        head_norm: str = "layer",
        window: int = 14,
        global_blocks: Sequence[int] | None = None,
        rel_pos: bool = True,
        anchors: Sequence[int] | None = None,
        rcnn: dict | None = None,
        **encoder,
    ):
        depth = encoder.get("depth", 12)
        super().__init__(
            [depth - 1] if pyramid == "simple" else quarters(depth),
            "decomposed" if rel_pos else None,
            window,
            quarters(depth) if global_blocks is None else global_blocks,
            with_cls=False,
            **encoder,
        )
        norm, patch = choose_norm(head_norm), self.patch_embed.patch_size[0]
        _check_grid(self.patch_embed.grid_size, patch)
        anchors = anchors or [2 * patch * 2**level for level in range(5)]
        if len(anchors) != 5:
            raise UserError(f"--anchors {' '.join(map(str, anchors))}: the pyramid needs 5 sizes, one for each level")
        simple, dim = pyramid == "simple", self.embed_dim
        self.pyramid = SimplePyramid(dim, head_width) if simple else ClassicPyramid(dim, head_width, norm)
        parts = _rcnn(self, detector, classes, head_width, anchors, norm, rcnn or {})
        self.rpn, self.roi_heads = parts.rpn, parts.roi_heads

    def head_modules(self) -> list[nn.Module]:
        return [self.pyramid, self.rpn, self.roi_heads]

    def forward(self, imgs, targets: list[dict]):
        """Images (N, C, H, W), normalised and padded below and on the right, and a dict for each image.

        In training, return the losses by name. Keys of a target: `boxes` (M, 4) float32, `labels` (M,) int64 from 1
        and, for masks, `masks` (M, H, W) uint8, 1 inside; M may be 0. `size` (h, w), optional, is the image's size
        without padding.

        In evaluation, return a dict for each image with `boxes` (M, 4), `labels` (M,), `scores` (M,), the highest
        first, and `masks` (M, H, W) bool, in pixels of the image before it was resized: `original_size` (H, W) is
        another optional key.
        """
        sizes = [_pair(target.get("size", imgs.shape[-2:])) for target in targets]
        images = ImageList(imgs, sizes)
        features = self.pyramid(self.forward_maps(imgs, self.feature_blocks))
        features = OrderedDict((name, widened(x)) for name, x in features.items())
        if self.training:
            proposals, losses = self.rpn(images, features, targets)
            return {**self.roi_heads(features, proposals, sizes, targets)[1], **losses}
        proposals, _ = self.rpn(images, features)
        found, _ = self.roi_heads(features, proposals, sizes)
        originals = [_pair(target.get("original_size", size)) for target, size in zip(targets, sizes)]
        return [at_original_size(*each) for each in zip(found, sizes, originals)]


def _pair(size) -> tuple[int, int]:
    return int(size[0]), int(size[1])


def at_original_size(detections: dict, size: tuple[int, int], original: tuple[int, int]) -> dict:
    """Return detections in an image of `size` (h, w) in pixels of the image of the `original` size (H, W). Masks (M, 1,
    28, 28), inside their boxes, become (M, H, W) bool."""
    boxes = resize_boxes(detections["boxes"], size, original)
    resized = {**detections, "boxes": boxes}
    if "masks" in detections:
        masks = [paste_mask(mask[0], box, original) for mask, box in zip(detections["masks"], boxes.tolist())]
        resized["masks"] = torch.stack(masks) if masks else boxes.new_zeros(0, *original, dtype=torch.bool)
    return resized


def paste_mask(mask: torch.Tensor, box: Sequence[float], size: tuple[int, int]) -> torch.Tensor:
    """Return the pixels (H, W) bool of an image of `size` whose centres are where a mask (h, w) in [0, 1], stretched
    over `box` and interpolated bilinearly, is above a half. torchvision rounds boxes to whole pixels instead, which
    makes small masks larger by up to a pixel at each side."""
    pasted = torch.zeros(size, dtype=torch.bool, device=mask.device)
    areas, positions = [], []
    for low, high, side in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        first, last = max(0, floor(low)), min(side, ceil(high))
        centres = torch.arange(first, last, device=mask.device) + 0.5
        areas.append(slice(first, last))
        positions.append(2 * (centres - low) / max(high - low, 1e-6) - 1)  # -1 and 1 are the borders of the box
    if all(len(each) for each in positions):
        grid = torch.stack(torch.meshgrid(*positions, indexing="ij")[::-1], dim=-1)
        pasted[*areas] = F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0] > 0.5
    return pasted


def _check_grid(grid: Sequence[int], patch: int) -> None:
    if patch % 4:
        raise UserError(f"--patch_size {patch} must be a multiple of 4: the finest level has 4 rows for each patch")
    if any(side % 2 for side in grid):
        sides = " ".join(str(side * patch) for side in grid)
        raise UserError(
            f"--input_size {sides} must be a multiple of two patches, {2 * patch}: a level has half the grid"
        )


def build_model(name: str, classes: int, **options) -> Detector:
    """Build a detector with the encoder called `name`, such as `vit_base_patch16`, for `classes` kinds of objects,
    without the background. `options` are arguments of `Detector` and of the encoder; None keeps the default. Raises
    UserError for an unknown name, detector, pyramid or norm, and for sizes that do not fit together."""
    for flag, known in (("detector", DETECTORS), ("pyramid", PYRAMIDS)):
        if (options.get(flag) or known[0]) not in known:
            raise UserError(f"--{flag} {options[flag]!r} is not known; use {' or '.join(known)}")
    return build_grid(Detector, name, classes=classes + 1, **options)
