"""Memory and FLOPs of training for segmentation and detection, from simulated steps of the real models.

Of detection the parts are left out that depend on values and need no gradient: matching, sampling, non-maximum
suppression. The heads get as many regions as the samplers take at most.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import roi_align

from planning.footprint import Setup
from planning.simulate import Build, Losses, Simulation, simulate
from util.compute.precision import widened
from util.compute.recompute import recompute_cheap

OBJECTS = 10  # in an image, whose masks are on the device; COCO has 7 on average


def segmentation_loss(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """Return the loss of a `models_segment.Segmenter`."""
    labels = torch.zeros(len(imgs), *imgs.shape[-2:], dtype=torch.long)
    return sum(model(imgs, labels).values())


def detection_loss(model: Any, imgs: torch.Tensor) -> torch.Tensor:
    """Return a loss that keeps what the losses of a `models_detect.Detector` keep."""
    maps = model.pyramid(model.forward_maps(imgs, model.feature_blocks))
    maps = OrderedDict((name, widened(x)) for name, x in maps.items())
    objectness, deltas = concat_box_prediction_layers(*model.rpn.head(list(maps.values())))
    chosen = torch.arange(len(imgs) * model.rpn.fg_bg_sampler.batch_size_per_image)
    loss = _zero_one(objectness[chosen]) + _smooth(deltas[chosen])
    heads = model.roi_heads
    regions = len(imgs) * heads.fg_bg_sampler.batch_size_per_image
    logits, boxes = heads.box_predictor(heads.box_head(_regions(maps, regions, heads.box_roi_pool)))
    loss = loss + F.cross_entropy(logits, torch.zeros(regions, dtype=torch.long)) + _smooth(boxes)
    if heads.has_mask():
        objects = int(regions * heads.fg_bg_sampler.positive_fraction)
        masks = heads.mask_predictor(heads.mask_head(_regions(maps, objects, heads.mask_roi_pool)))
        _targets(imgs, masks.shape[-1])
        loss = loss + _zero_one(masks[torch.arange(objects), 0])
    return loss


def _zero_one(logits: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.zeros_like(logits))


def _smooth(boxes: torch.Tensor) -> torch.Tensor:
    return F.smooth_l1_loss(boxes, torch.zeros_like(boxes))


def _regions(maps: OrderedDict, count: int, pool: Any) -> torch.Tensor:
    """Return `count` regions (R, C, h, w) of the maps that `pool` reads, the same number of each."""
    levels = [maps[name] for name in pool.featmap_names]
    boxes = torch.zeros(count, 5).tensor_split(len(levels))
    regions = [roi_align(x, rois, pool.output_size, 1.0, pool.sampling_ratio) for x, rois in zip(levels, boxes)]
    return torch.cat(regions)


def _targets(imgs: torch.Tensor, side: int) -> None:
    """Cut masks out of those of an image's objects, as the loss does for one image after the other."""
    masks = torch.zeros(OBJECTS, 1, *imgs.shape[-2:])
    roi_align(masks, torch.zeros(OBJECTS, 5), side, 1.0)


class DenseTraining:
    """Training of a model for a dense task, which `build` makes on images of `shape` (C, H, W); a workload of
    `planning.plan`. `losses` is one of the functions above."""

    def __init__(self, build: Build, losses: Losses, shape: tuple[int, int, int]):
        self.build, self.losses, self.shape = build, losses, shape
        with torch.device("meta"):
            model: Any = build()
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.frozen = sum(p.numel() for p in model.parameters()) - self.trained
        self.fixed_bytes = sum(buffer.nbytes for buffer in model.buffers())
        self.blocks = len(model.blocks)
        self._simulations: dict[tuple[int, bool, bool], Simulation] = {}

    def teacher_weights(self, teacher: str) -> int:
        """Return 0: there is none."""
        return 0

    def simulation(self, element: int, grad_checkpoint: bool = False, recompute: bool = False) -> Simulation:
        """Return the simulated step with `element` bytes of a number in matrix products."""

        def build() -> nn.Module:
            model: Any = self.build()
            model.set_grad_checkpointing(grad_checkpoint)
            if recompute:
                recompute_cheap(model)
            return model

        key = element, grad_checkpoint, recompute
        if key not in self._simulations:
            self._simulations[key] = simulate(build, self.losses, self.shape, element)
        return self._simulations[key]

    def flops(self, setup: Setup) -> dict[str, int]:
        """Return the FLOPs of matrix products per image and step, by pass."""
        plain = self.simulation(setup.element).flops()
        if not setup.grad_checkpoint:
            return {"forward and backward": plain}
        return {"forward and backward": plain, "recomputed": self.simulation(setup.element, True).flops() - plain}

    def moments(self, setup: Setup) -> Mapping[str, Mapping[str, float]]:
        """Return the bytes of a process by content, at the peak of the passes and in the optimizer's step."""
        channels, height, width = self.shape
        held = {
            "weights": 4 * (self.trained + self.frozen) + self.fixed_bytes,
            "AdamW": 8 * self.trained,
            "images": 4 * setup.batch * channels * height * width,
        }
        persist = setup.accum > 1 or setup.gpus > 1
        simulation = self.simulation(setup.element, setup.grad_checkpoint, setup.recompute)
        moment, contents = simulation.peak(setup.batch, persist)
        return {moment: held | contents, "optimizer": held | {"gradients": 4 * self.trained}}
