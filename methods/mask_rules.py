"""Masks by rule: blocks, a grid, squares of several patches, or masks from files, in place of single patches at random.

Sources: random, block-wise and grid-wise sampling are compared by He et al. 2022 (MAE, Section 4.1 and Figure 6).
Blocks are drawn as in Bao et al. 2022 (BEiT, Algorithm 1) with ranges of size and aspect ratio as in Assran et al. 2023
(I-JEPA); squares of several patches are Pixio's granularity. A rule ranks all patches of an image, so any mask ratio is
met exactly: the last block is removed in part.

Shapes: N images, L = rows * columns patches, B blocks.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from methods.base import Method
from methods.options import Option
from models_mae import MaskedAutoencoderViT
from util.checkpoint.same_run import plain
from util.data.sample_rng import redrawn
from util.errors import UserError

RULES = ("random", "block", "grid", "list")
BLOCKS = 64  # drawn for an image; only as many are removed as the mask ratio needs
_PICTURES = (".png", ".bmp", ".gif", ".tif", ".tiff", ".jpg", ".jpeg", ".webp")


def ranked(values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Return the rank of each patch of an image by `values` (N, L), from 0, and among equal values by `noise` (N, L):
    (N, L) float32."""
    by_noise = noise.argsort(dim=1)
    order = by_noise.gather(1, values.gather(1, by_noise).argsort(dim=1, stable=True))
    ranks = torch.arange(values.shape[1], dtype=torch.float32, device=values.device).expand(values.shape)
    return torch.empty_like(ranks, memory_format=torch.contiguous_format).scatter_(1, order, ranks)


def square_ranks(noise: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """Rank patches by squares of `side` x `side` patches, which come one after the other: noise (N, L) -> (N, L). At
    the lower and right edge squares may be cut off."""
    rows, columns = (torch.arange(length, device=noise.device) // side * side for length in grid)
    first = (rows[:, None] * grid[1] + columns[None]).flatten()  # (L,): the first patch of each patch's square
    return ranked(noise[:, first], noise)


def block_ranks(
    noise: torch.Tensor, grid: tuple[int, int], scale: tuple[float, float], aspect: tuple[float, float]
) -> torch.Tensor:
    """Rank patches by blocks, rectangles that are drawn one after the other: noise (N, L) -> (N, L). A patch in an
    earlier block has a higher rank; those that no block covers have the lowest. `scale` is the range of a block's share
    of the patches, `aspect` that of height / width, drawn log-uniformly. Blocks lie inside the grid."""
    area, shape, top, left = (redrawn(noise, stream)[:, :BLOCKS] for stream in (1, 2, 3, 4))  # each (N, B) in [0, 1)
    area = (scale[0] + (scale[1] - scale[0]) * area) * math.prod(grid)
    shape = torch.exp(math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * shape)
    inside = []
    for length, share, start in ((grid[0], area * shape, top), (grid[1], area / shape, left)):
        extent = share.sqrt().round().clamp(1, length)
        first = (start * (length - extent + 1)).floor()
        place = torch.arange(length, device=noise.device)
        inside.append((place >= first[..., None]) & (place < (first + extent)[..., None]))  # (N, B, length)
    covered = inside[0][..., :, None] & inside[1][..., None, :]  # (N, B, rows, columns)
    number = torch.arange(covered.shape[1], 0, -1, device=noise.device)[
        :, None, None
    ]  # the first block has the highest
    return ranked((covered * number).amax(dim=1).flatten(1).float(), noise)


def grid_ranks(noise: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Rank patches so that those that stay lie evenly: noise (N, L) -> (N, L). Of every 2 x 2 patches one stays at a
    mask ratio of 0.75, two on a diagonal at 0.5, and so on for finer ratios (ordered dithering, Bayer 1973). The
    pattern is shifted at random."""
    levels = max(1, math.ceil(math.log2(max(grid))))
    bayer = torch.zeros(1, 1, dtype=torch.long, device=noise.device)
    for _ in range(levels):
        bayer = torch.cat([torch.cat([4 * bayer, 4 * bayer + 2], 1), torch.cat([4 * bayer + 3, 4 * bayer + 1], 1)])
    side = len(bayer)
    shift = (redrawn(noise, 1)[:, :2] * side).long()  # (N, 2); redrawn, since the noise itself breaks ties
    rows, columns = ((torch.arange(grid[i], device=noise.device) + shift[:, i, None]) % side for i in (0, 1))
    return ranked(bayer[rows[:, :, None], columns[:, None, :]].flatten(1).float(), noise)


def read_masks(path: str, grid: tuple[int, int]) -> torch.Tensor:
    """Read masks, of which the brightest or highest patches are removed first -> (M, L) float32. `path` is an array
    (M, height, width) in a .npy file, a picture, or a folder of pictures. They are averaged over the patches of the
    `grid`. Raises UserError for a file that is none of these."""
    source = Path(path)
    try:
        if source.suffix == ".npy":
            array = np.load(source, allow_pickle=False)
            masks = [torch.from_numpy(np.ascontiguousarray(array)).float()]
        else:
            files = (
                sorted(each for each in source.iterdir() if each.suffix.lower() in _PICTURES)
                if source.is_dir()
                else [source]
            )
            masks = [torch.from_numpy(np.array(Image.open(file).convert("L"))).float()[None] for file in files]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--mask_file {path} is neither an array (.npy) nor pictures: {error}") from error
    if not masks or any(mask.ndim != 3 or not mask.numel() for mask in masks):
        shape = "no picture" if not masks else f"the shape {tuple(masks[0].shape)}"
        raise UserError(f"--mask_file {path} has {shape}: an array (masks, height, width) or pictures are needed")
    if not all(mask.isfinite().all() for mask in masks):
        raise UserError(f"--mask_file {path} has values that are not finite")
    return torch.cat([F.adaptive_avg_pool2d(mask[:, None], grid).flatten(1) for mask in masks])


def list_ranks(noise: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Rank the patches of each image by one of the `masks` (M, L), drawn at random: noise (N, L) -> (N, L)."""
    index = (redrawn(noise, 1)[:, 0] * len(masks)).long()
    return ranked(masks[index], noise)


class MaskRule(Method):
    """Removes patches by a rule. It has no parameters; masks from files are kept in checkpoints."""

    name, slot = "mask", "mask"
    switch = Option("mask", "random", "which patches are removed", choices=RULES)
    title = "Masks by rule (He et al. 2022, Section 4.1)"
    summary = (
        "block: rectangles, for a lower mask ratio (0.5). grid: evenly spaced patches stay. list: masks from "
        "--mask_file. Choose it as a baseline of learned masks, or for a known prior; random was MAE's best."
    )
    options = (
        Option("mask_block", 1, "random: side of squares in patches"),
        Option("mask_scale", (0.1, 0.3), "--mask block: range of a block's share of the patches",
               nargs=2, type=float, rare=True),
        Option("mask_aspect", (0.3, 3.33), "--mask block: range of a block's height / width",
               nargs=2, type=float, rare=True),
        Option("mask_file", "", "--mask list: .npy (masks, height, width), a picture, or a folder of them"),
    )  # fmt: skip

    @classmethod
    def enabled(cls, args) -> bool:
        return args.mask != "random" or getattr(args, "mask_block", 1) != 1

    @staticmethod
    def check(args) -> None:
        needed = {"mask_block": "random", "mask_scale": "block", "mask_aspect": "block", "mask_file": "list"}
        for option in MaskRule.options:
            given = getattr(args, option.name)
            if args.mask != needed[option.name] and plain(given) != plain(option.default):
                raise UserError(f"--{option.name} has no effect with --mask {args.mask}")
        if args.mask_block < 1:
            raise UserError(f"--mask_block {args.mask_block} must be positive: 2 removes squares of 2 x 2 patches")
        if not 0 < args.mask_scale[0] <= args.mask_scale[1] <= 1:
            raise UserError(
                f"--mask_scale {shown(args.mask_scale)} must be two shares from 0 to 1, the lower one first"
            )
        if not 0 < args.mask_aspect[0] <= args.mask_aspect[1] < math.inf:
            raise UserError(
                f"--mask_aspect {shown(args.mask_aspect)} must be two positive numbers, the lower one first"
            )
        if args.mask == "list" and not args.mask_file:
            raise UserError("--mask list needs --mask_file")

    def __init__(self, args, model: MaskedAutoencoderViT, masks: torch.Tensor | None = None):
        super().__init__()
        self.rule, self.side = args.mask, args.mask_block
        self.scale, self.aspect = tuple(args.mask_scale), tuple(args.mask_aspect)
        if self.rule == "random" and self.side >= max(model.patch_embed.grid_size):
            sides = " x ".join(map(str, model.patch_embed.grid_size))
            raise UserError(f"--mask_block {self.side} is as large as the image of {sides} patches: give a smaller one")
        if self.rule == "list" and masks is None:
            masks = read_masks(args.mask_file, model.patch_embed.grid_size)
        self.register_buffer("masks", masks)

    @classmethod
    def from_checkpoint(cls, path, args, model, state):
        method = cls(args, model, state.get("masks"))  # --mask_file may be gone
        method.load_state_dict(state)
        return method

    def scores(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        grid = model.patch_embed.grid_size
        if self.rule == "block":
            return block_ranks(noise, grid, self.scale, self.aspect)
        if self.rule == "grid":
            return grid_ranks(noise, grid)
        if self.rule == "list":
            return list_ranks(noise, self.masks)
        return square_ranks(noise, grid, self.side)


def shown(values) -> str:
    return " ".join(f"{value:g}" for value in values)
