"""Width, depth, patch size and patch grid of an encoder, from its tensors and the flags stored with them."""

from math import isqrt, prod
from typing import NamedTuple

import torch
from torch import Tensor

from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed


class Geometry(NamedTuple):
    width: int
    depth: int
    patch: tuple[int, int]
    channels: int

    def __str__(self):
        rows, columns = self.patch
        patch = rows if rows == columns else f"{rows}x{columns}"
        return f"width {self.width}, depth {self.depth}, patch {patch}, {self.channels} channels"


def geometry(state: dict[str, Tensor]) -> Geometry:
    kernel = state["patch_embed.proj.weight"]
    return Geometry(kernel.shape[0], depth(state, "blocks"), (kernel.shape[-2], kernel.shape[-1]), kernel.shape[1])


def depth(state: dict[str, Tensor], blocks: str) -> int:
    """Return the number of blocks named `blocks`.0, `blocks`.1, ...: one more than the largest index."""
    indices = [name.split(".")[1] for name in state if name.startswith(f"{blocks}.")]
    return 1 + max((int(index) for index in indices if index.isdecimal()), default=-1)


def source_grid(state: dict[str, Tensor], args: dict, target: tuple[int, int], path: str) -> tuple[int, int]:
    """Return the patch grid (rows, columns) of a file's positions.

    Candidates with the right number of patches are, in this order, the grid of the file's flags, a square, and the
    model's grid `target`. The first whose sine-cosine table is the file's is chosen, else the first.
    Raises UserError, with the file name `path`, when there is no candidate.
    """
    table = state.get("pos_embed")
    if table is None or table.ndim != 3:
        return target  # refused later as missing or of the wrong shape
    candidates = [grid for grid in [*patch_grids(state, args), target] if 1 < prod(grid) + 1 == table.shape[1]]
    if not candidates:
        raise UserError(
            f"{path} has {table.shape[1]} positions, which are not [cls] and a square grid of patches: "
            "positions with [cls], or the input_size among the file's flags, are needed"
        )
    return next((grid for grid in candidates if is_sincos(table, grid)), candidates[0])


def patch_grids(state: dict[str, Tensor], args: dict) -> list[tuple[int, int]]:
    """Return possible grids of the positions: from the file's flags, and a square. Their number of patches may be
    wrong."""
    (rows, columns), size = geometry(state).patch, args.get("input_size")
    size = list(size) if isinstance(size, (list, tuple)) else [size]
    stored = []
    if len(size) in (1, 2) and all(isinstance(side, int) for side in size):
        stored = [(size[0] // rows, size[-1] // columns)]
    table = state.get("pos_embed")
    side = isqrt(table.shape[1] - 1) if table is not None and table.ndim == 3 and table.shape[1] else 0
    return [*stored, (side, side)]


def is_sincos(table: Tensor | None, grid: tuple[int, int]) -> bool:
    """Whether positions (1, 1 + rows * columns, D) are MAE's fixed sine-cosine table for this grid."""
    if table is None or table.ndim != 3 or table.shape[-1] % 4 or table.shape[1] != prod(grid) + 1:
        return False
    values = torch.from_numpy(get_2d_sincos_pos_embed(table.shape[-1], grid, cls_token=True))
    return torch.allclose(table[0].double(), values, atol=1e-2)  # the precision of bfloat16 files
