"""Fixed two-dimensional sine-cosine position tables, and their interpolation to another grid."""

import numpy as np
import torch
import torch.nn.functional as F


def get_1d_sincos_pos_embed_from_grid(embed_dim: int, pos: np.ndarray) -> np.ndarray:
    """Return the sines, then the cosines, of the positions `pos` (any shape, M entries) at `embed_dim // 2`
    frequencies: (M, embed_dim) float64.

    The frequencies are 10000^(-k / (embed_dim / 2)) (Vaswani et al. 2017, Section 3.5).
    """
    frequency = 10000.0 ** (-np.arange(embed_dim // 2, dtype=np.float64) / (embed_dim / 2))
    angle = np.outer(np.asarray(pos, dtype=np.float64).reshape(-1), frequency)  # (M, embed_dim / 2)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def get_2d_sincos_pos_embed(embed_dim: int, grid_size: int | tuple[int, int], cls_token: bool = False) -> np.ndarray:
    """Return the position table of a grid: (rows * columns, embed_dim) float64, with a row of zeros first for
    `cls_token`.

    `grid_size` is (rows, columns) or the side of a square. The first half of the channels encodes the column, the
    second half the row: this is the order of the released MAE checkpoints. Raises ValueError if `embed_dim` is not a
    multiple of 4.
    """
    if embed_dim % 4:
        raise ValueError(f"embed_dim {embed_dim} must be a multiple of 4")
    rows, columns = (grid_size, grid_size) if isinstance(grid_size, int) else grid_size
    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    table = np.concatenate([get_1d_sincos_pos_embed_from_grid(embed_dim // 2, axis) for axis in (column, row)], axis=1)
    return np.concatenate([np.zeros((1, embed_dim)), table]) if cls_token else table


def interpolate_grid(table: torch.Tensor, source: tuple[int, int], target: tuple[int, int]) -> torch.Tensor:
    """Resample a position table (1, E + rows * columns, D) bicubically; the E extra tokens at the start are copied."""
    if source == target:
        return table
    count = source[0] * source[1]
    extra, grid = table[:, :-count], table[:, -count:]
    grid = grid.reshape(1, *source, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=target, mode="bicubic", align_corners=False)
    return torch.cat([extra, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def interpolate_pos_embed(model, checkpoint_model: dict, source_grid: tuple[int, int] | None = None) -> None:
    """Resample `checkpoint_model["pos_embed"]` in place to the patch grid of `model`.

    The table's grid is `source_grid` or else a square. Raises ValueError if the number of positions does not match it.
    """
    if "pos_embed" not in checkpoint_model:
        return
    table = checkpoint_model["pos_embed"]
    target = tuple(model.patch_embed.grid_size)
    extra = model.pos_embed.shape[1] - model.patch_embed.num_patches
    count = table.shape[1] - extra
    if source_grid is None:
        side = round(count**0.5)
        source_grid = target if count == target[0] * target[1] else (side, side)
    if source_grid[0] * source_grid[1] != count:
        raise ValueError(f"a table of {count} positions is not a {source_grid[0]}x{source_grid[1]} grid")
    checkpoint_model["pos_embed"] = interpolate_grid(table, tuple(source_grid), target)
