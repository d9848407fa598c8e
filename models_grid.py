"""Vision transformer that gives feature maps: the encoder of segmenters and detectors, with relative positions and
attention in windows.

Relative position bias follows BEiT (Bao et al. 2022), as in MAE's transfer to segmentation (He et al. 2022, Appendix
A.4). Windows and decomposed relative positions follow ViTDet (Li et al. 2022). The parameters of the encoder have the
names of `VisionTransformer`, so weights, layer-wise learning-rate decay, frozen blocks, gradient checkpointing and
compiled blocks work as there. Parameters of relative positions are zero at the start: attention is then as pretrained.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from math import ceil
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.layers.pos_embed_rel import RelPosBias
from torch import nn

from models_vit import VisionTransformer
from util.architectures import ENCODERS, check_geometry, look_up
from util.errors import UserError
from util.parallel.distributed import get_world_size

RELATIVE = "rel_pos"  # part of the names of relative positions, which plain encoders lack
Grid = TypeVar("Grid", bound="GridViT")
HEAD_NORMS = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}  # values of --head_norm


class PlainAttention(nn.Module):
    """Self-attention with the weights of `attention`, timm's; a base class of attentions with relative positions."""

    num_heads: int
    scale: float
    fused_attn: bool
    qkv: nn.Linear
    proj: nn.Linear

    def __init__(self, attention: Any):
        super().__init__()
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.fused_attn = attention.fused_attn
        self.qkv, self.proj = attention.qkv, attention.proj

    def heads(self, x):
        """Tokens (B, M, D) -> queries, keys and values, each (B, heads, M, D / heads)."""
        return self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def attend(self, queries, keys, values, scale: float, bias=None):
        """Queries and keys (B, heads, M, E), values (B, heads, M, D / heads), bias (1, heads, M, M) -> (B, M, D)."""
        if self.fused_attn:
            attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale)
        else:
            weights = queries * scale @ keys.transpose(-2, -1)
            attended = (weights if bias is None else weights + bias).softmax(dim=-1) @ values
        return self.proj(attended.transpose(1, 2).flatten(2))


class BiasAttention(PlainAttention):
    """Attention with BEiT's relative position bias: a learned number for each head and each distance in rows and
    columns between two patches, and three for pairs with [cls]; zero at the start."""

    def __init__(self, attention: Any, grid: tuple[int, int]):
        super().__init__(attention)
        self.rel_pos_bias = RelPosBias(grid, self.num_heads, prefix_tokens=1)
        nn.init.zeros_(self.rel_pos_bias.relative_position_bias_table)

    def forward(self, x, attn_mask=None, is_causal=False):
        """Tokens (N, 1 + L, D), [cls] first -> (N, 1 + L, D). Masks, arguments of timm's blocks, are not used."""
        queries, keys, values = self.heads(x)
        return self.attend(queries, keys, values, self.scale, self.rel_pos_bias.get_bias().to(queries.dtype))


class GridAttention(PlainAttention):
    """Attention among all patches of a grid, or inside windows of `window` x `window` patches, with ViTDet's decomposed
    relative positions if `rel_pos`.

    A query q adds q·R_h[its row - the key's row] + q·R_w[its column - the key's column] to the logit of a key. As a
    scalar product this is [q / sqrt(d), q·R_h, q·R_w]·[k, one-hot row, one-hot column]: exact, and the L x L bias is
    never stored, so fused kernels need no mask.
    """

    one_hot: torch.Tensor

    def __init__(self, attention: Any, grid: tuple[int, int], window: int = 0, rel_pos: bool = True):
        super().__init__(attention)
        self.grid, self.window = grid, window
        self.size = (window, window) if window else grid  # of the grid inside which patches attend to each other
        self.rel_pos_h = self.rel_pos_w = None
        if rel_pos:
            width = self.qkv.in_features // self.num_heads
            self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.zeros(2 * side - 1, width)) for side in self.size)
            self.register_buffer("one_hot", self._one_hot(width), persistent=False)

    def _one_hot(self, width: int) -> torch.Tensor:
        """Return one-hot rows and columns of the patches (L, rows + columns), with zeros up to a multiple of 8 for keys
        of this width: fused kernels on GPUs need it."""
        rows, columns = self.size
        patches = torch.cat([torch.eye(rows).repeat_interleave(columns, 0), torch.eye(columns).repeat(rows, 1)], dim=1)
        return F.pad(patches, (0, -(width + rows + columns) % 8))

    def forward(self, x, attn_mask=None, is_causal=False):
        """Patch tokens (N, L, D) -> (N, L, D). Masks, arguments of timm's blocks, are not used."""
        if self.window:
            x = to_windows(x, self.grid, self.window)
        queries, keys, values = self.heads(x)
        scale = self.scale
        if self.rel_pos_h is not None:
            queries, keys, scale = *self._extended(queries, keys), 1.0
        x = self.attend(queries, keys, values, scale)
        return from_windows(x, self.grid, self.window) if self.window else x

    def _extended(self, queries, keys):
        """Return queries and keys (B, heads, M, d) with the products and one-hot vectors of the relative positions."""
        assert self.rel_pos_h is not None and self.rel_pos_w is not None
        rows, columns = self.size
        on_grid = queries.unflatten(2, self.size)
        by_row = torch.einsum("bhrcd,rkd->bhrck", on_grid, _differences(self.rel_pos_h, rows)).flatten(2, 3)
        by_column = torch.einsum("bhrcd,ckd->bhrck", on_grid, _differences(self.rel_pos_w, columns)).flatten(2, 3)
        products = F.pad(torch.cat([by_row, by_column], dim=-1), (0, self.one_hot.shape[1] - rows - columns))
        one_hot = self.one_hot.to(keys.dtype).expand(*keys.shape[:2], -1, -1)
        return torch.cat([queries * self.scale, products], dim=-1), torch.cat([keys, one_hot], dim=-1)


def _differences(table: torch.Tensor, size: int) -> torch.Tensor:
    """Return the vectors (size, size, d) for query i and key j from a table (2 * size - 1, d) over i - j."""
    index = torch.arange(size, device=table.device)
    return table[index[:, None] - index + size - 1]


def resize_table(table: torch.Tensor, length: int) -> torch.Tensor:
    """Resample a table of relative positions (M, d) to (length, d), linearly, as ViTDet does."""
    if len(table) == length:
        return table
    return F.interpolate(table.T[None].float(), size=length, mode="linear")[0].T.to(table)


def resize_bias(table: torch.Tensor, source: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Resample a table of BEiT's bias (M, heads) from a grid of patches to another one, bilinearly over the differences
    in rows and columns; its last three rows, for pairs with [cls], stay."""
    before, after = ([2 * side - 1 for side in grid] for grid in (source, target))
    if source == target or len(table) != before[0] * before[1] + 3:
        return table
    pairs = table[:-3].T.unflatten(1, before)[None].float()
    pairs = F.interpolate(pairs, size=after, mode="bilinear")[0].flatten(1).T
    return torch.cat([pairs.to(table), table[-3:]])


def to_windows(x: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """Cut tokens (N, rows * columns, D) into windows (N * windows, window * window, D). The grid is padded with zeros
    below and on the right, to multiples of the window."""
    rows, columns = (ceil(side / window) for side in grid)
    x = F.pad(x.unflatten(1, grid), (0, 0, 0, columns * window - grid[1], 0, rows * window - grid[0]))
    return x.unflatten(2, (columns, window)).unflatten(1, (rows, window)).transpose(2, 3).flatten(3, 4).flatten(0, 2)


def from_windows(x: torch.Tensor, grid: tuple[int, int], window: int) -> torch.Tensor:
    """Undo `to_windows`, dropping the padding: (N * windows, window * window, D) -> (N, rows * columns, D)."""
    rows, columns = (ceil(side / window) for side in grid)
    x = x.unflatten(1, (window, window)).unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    return x[:, : grid[0], : grid[1]].flatten(1, 2)


class GridViT(VisionTransformer):
    """Encoder that gives feature maps, for images of one size `img_size` (H, W).

    `rel_pos` is None, "bias" (BEiT's, with [cls]) or "decomposed" (ViTDet's). With `window`, blocks other than
    `global_blocks` attend inside windows. Windows and decomposed positions leave out the [cls] token, whose parameter
    is kept, untrained, so that the encoder stays complete. `feature_blocks` are the blocks whose outputs are used;
    later blocks are not run, nor trained. Without `final_norm` the encoder has no norm after its last block.
    """

    compiled_parts = ()  # its images have several sizes, and its blocks differ: each is compiled

    def __init__(
        self,
        feature_blocks: Sequence[int],
        rel_pos: str | None = None,
        window: int = 0,
        global_blocks: Sequence[int] = (),
        with_cls: bool = True,
        final_norm: bool = False,
        **encoder,
    ):
        super().__init__(num_classes=0, **encoder)
        check_blocks("--feature_blocks", feature_blocks, len(self.blocks))
        check_blocks("--global_blocks", global_blocks, len(self.blocks))
        if with_cls and (window or rel_pos == "decomposed"):
            raise ValueError("windows and decomposed relative positions have no place for [cls]: with_cls=False")
        if not with_cls and rel_pos == "bias":
            raise ValueError("the relative position bias is made for tokens with [cls]: with_cls=True")
        self.feature_blocks, self.with_cls = list(feature_blocks), with_cls
        if not final_norm:
            self.norm = nn.Identity()  # a norm that is not used would get no gradient, which DDP reports as an error
        for index, block in enumerate(self.blocks):
            block.attn = self._attention(block.attn, rel_pos, 0 if index in global_blocks else window)
        self._freeze_unused()

    def _attention(self, attention: Any, rel_pos: str | None, window: int) -> nn.Module:
        grid = tuple(self.patch_embed.grid_size)
        if rel_pos == "bias":
            return BiasAttention(attention, grid)
        return attention if self.with_cls else GridAttention(attention, grid, window, rel_pos == "decomposed")

    def _freeze_unused(self) -> None:
        self.cls_token.requires_grad_(self.cls_token.requires_grad and self.with_cls)
        for block in self.blocks[max(self.feature_blocks) + 1 :]:
            block.requires_grad_(False)

    def train_last_blocks(self, count: int) -> None:
        super().train_last_blocks(count)
        self._freeze_unused()

    def forward_maps(self, x, blocks: Sequence[int]) -> list[torch.Tensor]:
        """Images (N, C, H, W) -> the outputs of the blocks with these indices, before any norm, without [cls], as maps
        (N, D, H / p, W / p). Raises UserError for images of another size: their positions would be wrong."""
        if tuple(x.shape[-2:]) != tuple(self.patch_embed.img_size):
            sizes = ["x".join(map(str, size)) for size in (x.shape[-2:], self.patch_embed.img_size)]
            raise UserError(f"images are {sizes[0]}, but the model has positions for {sizes[1]} (--input_size)")
        x, outputs = self.patch_embed(x), {}
        if self.with_cls:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        else:
            x = x + self.pos_embed[:, 1:]
        for index, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = self.run_block(block, x)
            if index in blocks:
                outputs[index] = x
        return [self._map(outputs[index]) for index in blocks]

    def fit_relative(self, state: Mapping[str, torch.Tensor], source: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return the relative positions among the tensors of another model of this kind, whose grid of patches is
        `source`, resampled to the windows and the grid of this one. Empty for a state without any."""
        own, fitted = self.state_dict(), {}
        for name in (name for name in state if RELATIVE in name):
            table, target = state[name], tuple(self.patch_embed.grid_size)
            if name in own and "rel_pos_bias" in name:
                table = resize_bias(table, source, target)
            elif name in own and table.ndim == 2:
                table = resize_table(table, len(own[name]))
            fitted[name] = table
        return fitted

    def _map(self, tokens):
        """Tokens (N, [1 +] L, D) -> a map (N, D, rows, columns)."""
        patches = tokens[:, 1:] if self.with_cls else tokens
        return patches.transpose(1, 2).unflatten(2, tuple(self.patch_embed.grid_size))


def quarters(depth: int) -> list[int]:
    """Return the last block of each quarter of the blocks: 2, 5, 8, 11 of 12."""
    return [ceil(depth * part / 4) - 1 for part in (1, 2, 3, 4)]


def check_blocks(flag: str, blocks: Sequence[int], depth: int) -> None:
    """Raise UserError for indices of blocks that the encoder lacks."""
    wrong = [index for index in blocks if not 0 <= index < depth]
    if wrong:
        raise UserError(f"{flag} {wrong[0]}: the encoder has the blocks 0 to {depth - 1}")


def build_grid(cls: type[Grid], name: str, **options) -> Grid:
    """Build `cls`, a `GridViT`, with the encoder called `name`. `options` replace arguments of its constructor; None
    keeps the model's value.

    Raises UserError for an unknown name and for sizes that do not fit together.
    """
    name = name.removeprefix("mae_").removesuffix("_dec512d8b")
    config = {**look_up(ENCODERS, name), **{key: value for key, value in options.items() if value is not None}}
    check_geometry(config)
    return cls(norm_layer=partial(nn.LayerNorm, eps=1e-6), **config)


def choose_norm(name: str) -> type[nn.Module]:
    """Return the norm of convolutional heads for `--head_norm`. Raises UserError for an unknown name."""
    return look_up(HEAD_NORMS, name, "--head_norm")


def sync_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` with batch statistics over the images of all ranks. torch has them on GPUs only: on several CPU
    processes each rank keeps its own, and a note says so."""
    if get_world_size() == 1 or not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return model
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    print("note: on CPUs batch norm uses the images of each process alone; --head_norm layer does not depend on them")
    return model
