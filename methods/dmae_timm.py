"""Teachers for DMAE from timm: any encoder whose blocks or stages give maps of features.

A ViT of timm's that can drop patches encodes the visible tokens only; any other architecture encodes the whole image,
and its features are taken at the student's visible patches.

Shapes: N images, V visible patches, T teacher width, R x C grid of the student's patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models_encoder import gather_tokens
from util.compute.ema import Frozen
from util.data.image_format import mean_std
from util.data.sample_rng import seeded
from util.errors import UserError
from util.weights.timm_models import TimmModel, state_sha256


def resized(imgs: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images or maps (N, C, H, W) bilinearly, with antialiasing if they shrink."""
    if tuple(imgs.shape[-2:]) == tuple(size):
        return imgs
    shrinks = imgs.shape[-2] > size[0] or imgs.shape[-1] > size[1]
    return F.interpolate(imgs, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


def pixel_conversion(args, network: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and shift (1, C, 1, 1) from the student's normalised pixels to those of a model of timm's: with
    x = (p - m) / s of the student, (p - m') / s' = x * s / s' + (m - m') / s'."""
    config = resolve_model_data_config(network)
    theirs = [config[name] for name in ("mean", "std")]
    if len(theirs[0]) != args.in_chans:
        theirs = [[sum(values) / len(values)] * args.in_chans for values in theirs]
    ours = mean_std(args.dataset, args.in_chans, args.mean, args.std)
    mean, std, mean_t, std_t = (
        torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (*ours, *theirs)
    )
    return (std / std_t).float(), ((mean - mean_t) / std_t).float()


class VisiblePatches(nn.Module):
    """In the place of timm's `patch_drop`: keeps the prefix tokens and the patches at `ids` (N, V), in their order."""

    def __init__(self, prefix: int):
        super().__init__()
        self.prefix, self.ids = prefix, None

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([tokens[:, : self.prefix], gather_tokens(tokens[:, self.prefix :], self.ids)], dim=1)


class TimmTeacher(Frozen):
    """A frozen model of timm's. `levels` are its blocks, or the stages of an architecture that has stages."""

    scale: Tensor
    shift: Tensor

    def __init__(self, args, source: TimmModel, grid: tuple[int, int], pick):
        """`pick(number of levels)` returns the aligned (student, teacher) pairs, from 0. Raises UserError if the model
        has no maps of features, or if they cannot meet the student's `grid`."""
        self.name, self.grid = source.name, (grid[0], grid[1])
        with seeded(args.seed):
            network: Any = source.create(None, args.in_chans)
        if not hasattr(network, "forward_intermediates") or not getattr(network, "feature_info", None):
            raise UserError(
                f"--dmae_teacher {source.name}: {source.architecture} gives no maps of its blocks or stages"
            )
        info = list(network.feature_info)
        self.pairs = pick(len(info))
        self.levels = sorted({level for _, level in self.pairs})
        self.widths = {level: info[level]["num_chs"] for level in self.levels}
        self.size = self._image_size(args.dmae_teacher_size, [info[level]["reduction"] for level in self.levels])
        if not source.takes_any_size:
            with seeded(args.seed):
                network = source.create(self.size, args.in_chans)
        super().__init__(network)
        self.sha256 = state_sha256(network)
        prefix = getattr(network, "num_prefix_tokens", 0)
        self.has_cls = prefix > 0 and getattr(network, "cls_token", None) is not None
        self.visible_only = isinstance(network, VisionTransformer) and self._meets_exactly(info)
        if self.visible_only:
            network.patch_drop = VisiblePatches(prefix)
        for name, values in zip(("scale", "shift"), pixel_conversion(args, network)):
            self.register_buffer(name, values)
        if not self.visible_only:
            self._check_maps(args.in_chans)

    def _image_size(self, given: int | None, reductions: Sequence[int]) -> tuple[int, int]:
        """Return the size of the teacher's images: --dmae_teacher_size, else that at which the coarsest aligned level
        has the student's grid."""
        return (given, given) if given else (self.grid[0] * max(reductions), self.grid[1] * max(reductions))

    def _meets_exactly(self, info: Sequence[dict]) -> bool:
        """Whether all aligned levels have the student's grid."""
        steps = {info[level]["reduction"] for level in self.levels}
        return all(tuple(side // step for side in self.size) == self.grid for step in steps)

    def __str__(self) -> str:
        what = "the visible patches" if self.visible_only else "the whole image"
        cls = "with" if self.has_cls else "without"
        return f"encodes {what} at {self.size[0]}x{self.size[1]} pixels, {cls} [cls]"

    def images(self, imgs: Tensor) -> Tensor:
        """Return the student's normalised images (N, C, H, W) in the teacher's normalisation and size."""
        return resized(imgs * self.scale + self.shift, self.size)

    @torch.no_grad()
    def _check_maps(self, in_chans: int) -> None:
        """Raise UserError if the maps of an image are no maps, too coarse, or of other proportions than the grid."""
        for level, (tokens, _) in self._maps(torch.zeros(1, in_chans, *self.size)).items():
            shape = tuple(tokens.shape[2:])
            if len(shape) != 2 or shape[0] * self.grid[1] != shape[1] * self.grid[0] or max(shape) < 2 < max(self.grid):
                raise UserError(
                    f"--dmae_teacher {self.name}: at images of {self.size[0]}x{self.size[1]} pixels block or stage "
                    f"{level + 1} gives {'x'.join(map(str, shape))} features, which cannot meet the student's "
                    f"{self.grid[0]}x{self.grid[1]} patches: give another --dmae_teacher_size or --dmae_blocks"
                )

    def _maps(self, imgs: Tensor, fmt: str = "NCHW") -> dict[int, tuple[Tensor, Tensor | None]]:
        """Return {level: (features, prefix tokens or None)}."""
        more = {"return_prefix_tokens": True} if self.has_cls else {}
        try:
            outputs = self.network.forward_intermediates(
                imgs, indices=self.levels, norm=False, stop_early=True, output_fmt=fmt, intermediates_only=True, **more
            )
        except (AssertionError, RuntimeError) as error:
            if self.visible_only:
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise UserError(
                f"--dmae_teacher {self.name} does not take images of {self.size[0]}x{self.size[1]} pixels ({reason}): "
                "give another --dmae_teacher_size"
            ) from error
        return {level: out if self.has_cls else (out, None) for level, out in zip(self.levels, outputs)}

    @torch.no_grad()
    def features(self, imgs: Tensor, ids_keep: Tensor) -> dict[int, Tensor]:
        """Return {level: features} at the patches `ids_keep` (N, V) that the student sees, in the same order: (N, 1 +
        V, T) with [cls] first if the teacher has one, else (N, V, T)."""
        imgs = self.images(imgs)
        if self.visible_only:
            self.network.patch_drop.ids = ids_keep
            maps = self._maps(imgs, "NLC")
        else:
            maps = {
                level: (gather_tokens(resized(features, self.grid).flatten(2).transpose(1, 2), ids_keep), prefix)
                for level, (features, prefix) in self._maps(imgs).items()
            }
        return {
            level: tokens if prefix is None else torch.cat([prefix[:, :1], tokens], dim=1)
            for level, (tokens, prefix) in maps.items()
        }
