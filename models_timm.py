"""Any encoder of timm's behind the interface of `models_vit.VisionTransformer` that judging commands use.

Shapes: N images, C channels, L patches in a grid of rows and columns, P prefix tokens ([cls], registers), D width.
"""

from functools import cached_property
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from util.errors import UserError


class PatchGrid(NamedTuple):
    """The part of timm's `PatchEmbed` that describes the patches."""

    img_size: tuple[int, int]
    grid_size: tuple[int, int]  # rows, columns

    @property
    def num_patches(self) -> int:
        return prod(self.grid_size)

    @property
    def patch_size(self) -> tuple[int, int]:
        return self.img_size[0] // self.grid_size[0], self.img_size[1] // self.grid_size[1]


class TimmEncoder(nn.Module):
    """A model of timm's in eval mode. Its own feature (`pool` own) is what its classifier reads:
    `forward_head(forward_features(x), pre_logits=True)`. `name` is for messages."""

    global_pool = False
    default_pool = "own"

    network: Any  # an nn.Module with timm's methods
    num_classes: int

    def __init__(self, network: nn.Module, name: str, img_size: tuple[int, int], in_chans: int = 3):
        super().__init__()
        self.network, self.name, self.img_size, self.in_chans = (
            network.eval(),
            name,
            (img_size[0], img_size[1]),
            in_chans,
        )
        self.num_classes = network.num_classes
        self.num_prefix_tokens = getattr(network, "num_prefix_tokens", 0)

    @property
    def has_cls(self) -> bool:
        """Whether the first token is [cls]."""
        return self.num_prefix_tokens > 0 and getattr(self.network, "cls_token", None) is not None

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, whose tokens are prefix and patches in the order of the grid. Raises UserError for an
        architecture without them."""
        if not hasattr(self.network, "blocks") or not hasattr(self.network, "num_prefix_tokens"):
            raise UserError(
                f"{self.name} has no attention over all patches to draw, but stages or convolutions: a ViT is needed"
            )
        return self.network.blocks

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, num_classes)."""
        return self.network(imgs)

    def forward_tokens(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> the output of timm's `forward_features`: tokens (N, P + L, D) or a map."""
        return self.network.forward_features(imgs)

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> the model's own features (N, D)."""
        return self.network.forward_head(self.forward_tokens(imgs), pre_logits=True)

    def feature(self, imgs: Tensor, pool: str) -> Tensor:
        """Images (N, C, H, W) -> features (N, D): `pool` own, cls (the [cls] token) or avg (the mean of the patches),
        the latter two of `forward_features`. Raises UserError for cls without such a token."""
        if pool == "own":
            return self.forward_features(imgs)
        if pool == "cls" and not self.has_cls:
            raise UserError(f"--pool cls: {self.name} has no [cls] token; leave the flag out, or give --pool avg")
        if pool == "cls":
            return self.forward_tokens(imgs)[:, 0]
        return self._patches(self.forward_tokens(imgs)).mean(dim=1)

    def forward_patches(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> patch tokens (N, L, D) of `forward_features`, in rows of the grid."""
        return self._patches(self.forward_tokens(imgs))

    def _patches(self, tokens: Tensor) -> Tensor:
        """Return the patches (N, L, D) of tokens (N, P + L, D), or of a map (N, D, rows, columns), or of one with its
        channels last if the network says so."""
        if tokens.ndim == 4:
            last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
            return tokens.flatten(1, 2) if last else tokens.flatten(2).transpose(1, 2)
        if tokens.ndim == 3:
            return tokens[:, self.num_prefix_tokens :]
        raise UserError(f"{self.name} gives one feature for a whole image, not a grid of patches")

    @cached_property
    def patch_embed(self) -> PatchGrid:
        """The grid of `forward_patches`, found with an empty image. Raises UserError for an encoder without one, and if
        the image is no whole number of patches."""
        parameter = next(self.parameters())
        with torch.no_grad():
            tokens = self.forward_tokens(parameter.new_zeros(1, self.in_chans, *self.img_size))
            patches = self._patches(tokens)
        grid = self._grid(tokens, patches.shape[1])
        if any(side % count for side, count in zip(self.img_size, grid)):
            own = getattr(getattr(self.network, "patch_embed", None), "patch_size", (0, 0))
            advice = f"a multiple of {own[0]}" if own[0] else "another one"
            raise UserError(
                f"--input_size {' '.join(map(str, self.img_size))}: the {grid[0]}x{grid[1]} patches of {self.name} do "
                f"not cover the image evenly: give {advice}"
            )
        return PatchGrid(self.img_size, grid)

    def _grid(self, tokens: Tensor, count: int) -> tuple[int, int]:
        """Return the rows and columns of `count` patches: those of a map, of timm's patch embedding, or with the
        proportions of the image."""
        if tokens.ndim == 4:
            last = str(getattr(self.network, "output_fmt", "NCHW")).endswith("NHWC")
            return (tokens.shape[1], tokens.shape[2]) if last else (tokens.shape[2], tokens.shape[3])
        own = tuple(getattr(getattr(self.network, "patch_embed", None), "grid_size", None) or ())
        if len(own) == 2 and prod(own) == count:
            return own
        rows = isqrt(count * self.img_size[0] // self.img_size[1])
        columns = count // rows if rows else 0
        if count < 2 or rows * columns != count or rows * self.img_size[1] != columns * self.img_size[0]:
            raise UserError(f"{self.name} gives {count} tokens for an image, which are no grid of patches")
        return rows, columns


class ProbedTimmEncoder(nn.Module):
    """A `TimmEncoder` of which one feature is read by a head that is trained apart."""

    def __init__(self, encoder: TimmEncoder, pool: str):
        super().__init__()
        self.encoder, self.pool, self.head = encoder, pool, nn.Identity()

    def forward_features(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> features (N, D)."""
        return self.encoder.feature(imgs, self.pool)
