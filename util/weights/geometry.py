"""Width, depth, patches and patch grid of an encoder, by its tensors and the flags stored with them."""

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
    return Geometry(kernel.shape[0], depth(state, "blocks"), tuple(kernel.shape[-2:]), kernel.shape[1])


def depth(state: dict[str, Tensor], blocks: str) -> int:
    """How many of these blocks: one more than the largest number among them."""
    indices = [name.split(".")[1] for name in state if name.startswith(f"{blocks}.")]
    return 1 + max((int(index) for index in indices if index.isdecimal()), default=-1)


def source_grid(state: dict[str, Tensor], args: dict, target: tuple[int, int], path: str) -> tuple[int, int]:
    """The patch grid of the file: from its flags, else a square, else the model's own, `target`, when the count is the
    same. A table that is the sine-cosine one of a candidate settles it.

    Raises UserError, which names the file as `path`, when no grid has that many patches.
    """
    table = state.get("pos_embed")
    if table is None or table.ndim != 3:
        return target  # refused as missing or misshapen a moment later
    candidates = [grid for grid in [*patch_grids(state, args), target] if 1 < prod(grid) + 1 == table.shape[1]]
    if not candidates:
        raise UserError(
            f"{path} has {table.shape[1]} positions, which are not one for [cls] and a square grid of patches: "
            "a table with [cls], or flags in the file with its input_size, is needed"
        )
    return next((grid for grid in candidates if is_sincos(table, grid)), candidates[0])


def patch_grids(state: dict[str, Tensor], args: dict) -> list[tuple[int, int]]:
    """Grids the positions may have, whether or not their number fits: by the flags of the file, and the square."""
    (rows, columns), size = geometry(state).patch, args.get("input_size")
    size = list(size) if isinstance(size, (list, tuple)) else [size]
    stored = []
    if len(size) in (1, 2) and all(isinstance(side, int) for side in size):
        stored = [(size[0] // rows, size[-1] // columns)]
    table = state.get("pos_embed")
    side = isqrt(table.shape[1] - 1) if table is not None and table.ndim == 3 and table.shape[1] else 0
    return [*stored, (side, side)]


def is_sincos(table: Tensor | None, grid: tuple[int, int]) -> bool:
    """Whether positions (1, 1 + rows * columns, D) are the fixed ones of MAE on this grid."""
    if table is None or table.ndim != 3 or table.shape[-1] % 4 or table.shape[1] != prod(grid) + 1:
        return False
    values = torch.from_numpy(get_2d_sincos_pos_embed(table.shape[-1], grid, cls_token=True))
    return torch.allclose(table[0].double(), values, atol=1e-2)  # bfloat16 files are only that exact
