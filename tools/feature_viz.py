"""Images that maximally activate an encoder's channels, by gradient ascent, a row for each block (after Ghiasi et al.
2022), of one checkpoint, or of several below each other.

python tools/feature_viz.py output_dir/checkpoint-799.pth --out channels.png
python tools/feature_viz.py output_dir/checkpoint-799.pth --out channels.png --blocks 0 5 11 --channels 3 140
python tools/feature_viz.py mae/checkpoint-799.pth mlo/checkpoint-199.pth --out both.pdf

The images and the activations of their channels before and after the ascent are written beside the picture (.npz); the
numbers also into a JSON file, TensorBoard and the ledger.
"""

import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

from evaluation import command_line, judging
from evaluation.feature_viz import LAYERS, FourierImages, channel_activation, excite
from util.arguments import add_show_channels
from util.data.bands import many_bands
from util.errors import UserError, user_errors
from util.parser import Parser
from util.report.ledger import Record
from util.report.pictures import rgb, shown_channels
from util.report.sheet import Row, Sheet, draw_sheet


def get_args_parser():
    parser = Parser("Draw images that maximally activate single channels of an encoder, at several depths.")
    command_line.add_checkpoint_flags(parser, several=True)
    command_line.add_out_flag(parser)
    command_line.add_tile_flag(parser)
    add_show_channels(parser)
    parser.add_argument("--blocks", type=int, nargs="+", help="blocks, from 0; without it four, evenly spaced")
    parser.add_argument("--layer", choices=LAYERS, default="mlp", help="mlp: inside the MLP; block: its output")
    parser.add_argument("--channels", type=int, nargs="+", help="channels; without it --count of them, evenly spaced")
    parser.add_argument("--count", type=int, default=6, help="number of channels of each block")
    parser.add_argument("--steps", type=int, default=256, help="steps of Adam")
    parser.add_argument(
        "--lr", type=float, default=0.05, help="learning rate; higher values give stronger colours and less shape"
    )
    parser.add_argument(
        "--tv", type=float, default=0.2, help="weight of the total variation, relative to the activation"
    )
    parser.add_argument(
        "--jitter",
        type=int,
        help="largest shift in pixels at each step; without it half a patch; smaller values show the grid of patches",
    )
    parser.add_argument("--mean", type=float, nargs="+", help="per-channel means; without it those of the run")
    parser.add_argument(
        "--std", type=float, nargs="+", help="per-channel standard deviations; without it those of the run"
    )
    parser.add_argument("--seed", default=0, type=int, help="seed of the initial images and of the shifts")
    command_line.add_device_flag(parser)
    command_line.add_model_flags(parser)
    parser.set_defaults(dataset="imagefolder", data_path="")
    return parser


def check_values(args) -> None:
    """Raise UserError for numbers out of range."""
    for name in ("count", "steps", "lr"):
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name} {getattr(args, name)} must be positive")
    command_line.check_tile(args)
    if not 0 <= args.tv < float("inf") or (args.jitter or 0) < 0:
        raise UserError("--tv and --jitter must not be negative")


def chosen(args, model) -> tuple[list[int], list[int]]:
    """Return the blocks and channels to draw. Raises UserError for any that the encoder lacks."""
    depth, block = len(model.blocks), model.blocks[0]
    width = block.mlp.fc1.out_features if args.layer == "mlp" else block.mlp.fc1.in_features
    blocks = args.blocks or sorted(set(torch.linspace(0, depth - 1, min(4, depth)).round().int().tolist()))
    channels = args.channels or torch.linspace(0, width - 1, min(args.count, width)).round().int().tolist()
    for name, values, most in (("blocks", blocks, depth), ("channels", channels, width)):
        wrong = [value for value in values if not 0 <= value < most]
        if wrong:
            raise UserError(f"--{name} {wrong[0]}: the encoder has {most} ({args.layer}), from 0 to {most - 1}")
    return blocks, channels


def ascend(judged: judging.Judged, blocks: list[int], channels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images in [0, 1] (blocks, channels, C, H, W) and activations before and after (blocks, 2, channels)."""
    args, config, model, device = judged.args, judged.config, judged.model.requires_grad_(False), judged.device
    stats = judged.images.mean_std
    if many_bands(config.in_chans):  # as they are shown: pixels from two deviations below to two above the mean
        stats = [[value] * config.in_chans for value in (0.5, 0.25)]
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in stats)
    jitter = config.patch_size // 2 if args.jitter is None else args.jitter
    shape, indices = (len(channels), config.in_chans, *config.input_size), torch.tensor(channels, device=device)
    images, activations = [], []
    for block in blocks:
        random = torch.Generator().manual_seed(args.seed)  # each block starts from the same noise
        activation = channel_activation(model, block, args.layer)
        imgs, values = excite(
            lambda imgs, activation=activation: activation(imgs, indices),
            FourierImages(shape, random).to(device),
            lambda imgs: (imgs - mean) / std,
            args.steps,
            args.lr,
            args.tv,
            jitter,
            random,
        )
        images.append(imgs.cpu())
        activations.append(values.cpu())
        lost = int((values[1] <= values[0]).sum())
        hint = f"; {lost} of {len(channels)} no more than by grey: try --jitter 0, more --steps" if lost else ""
        print(
            f"{judged.path}, block {block}: mean activation {values[0].mean():.3g} -> {values[1].mean():.3g}{hint}",
            flush=True,
        )
    return torch.stack(images), torch.stack(activations)


def metrics_of(blocks: list[int], activations: torch.Tensor) -> dict[str, float]:
    """Return the mean activation of each block's channels for a grey image and for the optimised images, and the share
    of channels that these activate more."""
    metrics = {"excited_share": (activations[:, 1] > activations[:, 0]).float().mean().item()}
    for block, (grey, excited) in zip(blocks, activations.mean(dim=-1).tolist()):
        metrics |= {f"block{block}_grey": grey, f"block{block}_excited": excited}
    return metrics


@dataclass
class Excited:
    """The result of `ascend` for one checkpoint."""

    judged: judging.Judged
    images: torch.Tensor  # (blocks, channels, C, H, W), in [0, 1]
    activations: torch.Tensor  # (blocks, 2, channels): for grey, and for the images

    @property
    def shown(self) -> tuple[int, ...] | None:
        return shown_channels(self.judged.images.in_chans, self.judged.args.show_channels)


def drawing(results: list[Excited], labels, blocks: list[int], channels: list[int], side=None) -> Sheet:
    """Draw the images of each checkpoint, whose rows begin with its label."""
    rows = []
    for own, label in zip(results, labels):
        for i, block in enumerate(blocks):
            notes = [f"{before:.2g} to {after:.2g}" for before, after in own.activations[i].T.tolist()]
            opens = i == 0 and len(rows) > 0
            rows.append(Row(rgb(own.images[i], own.shown), f"{label} block {block}".strip(), notes, opens))
    return draw_sheet(rows, [f"channel {i}" for i in channels], caption(own.judged.args.layer), None, side)


def caption(layer: str) -> str:
    where = "inside the MLP" if layer == "mlp" else "at the output of the block"
    return (
        f"Images that excite single channels {where}, by gradient ascent. Below each: the channel's mean activation "
        "for a grey image, and for this one."
    )


def open_alike(args) -> tuple[list[judging.Judged], list[int], list[int]]:
    """Open the checkpoints of the flags -> models, blocks and channels to draw. Raises UserError if one lacks them or
    has images of another shape, and if without --blocks and --channels they would differ."""
    command_line.checkpoints_of(args, "(a file, a timm model, or random)")
    opened = judging.open_each(args, partial(judging.open_trained, head=False, only_plain="feature_viz.py reads"))
    judging.check_same_images(opened, lambda judged: (Fraction(*judged.images.input_size),))
    each = [chosen(args, judged.model) for judged in opened]
    for judged, own in zip(opened, each):
        if own != each[0]:
            raise UserError(
                f"{judged.path} has another depth or width than {opened[0].path}: give --blocks and --channels "
                "that both have"
            )
    return opened, *each[0]


def main(args) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Draw and return the images and activations of `ascend` for each checkpoint."""
    check_values(args)
    out = command_line.needed_picture(args)
    opened, blocks, channels = open_alike(args)
    records = [judged.record("feature_viz") for judged in opened]
    results = [Excited(judged, *ascend(judged, blocks, channels)) for judged in opened]
    labels = command_line.titles_of([judged.path for judged in opened]) if len(opened) > 1 else [""]
    drawing(results, labels, blocks, channels, args.tile_size).save(out)
    arrays = {}
    for i, (record, own) in enumerate(zip(records, results)):
        number = f"_{i}" if len(results) > 1 else ""
        arrays |= {f"images{number}": own.images.numpy(), f"activations{number}": own.activations.numpy()}
        publish(record, own, blocks, channels, out.with_stem(out.stem + number), number)
    np.savez(out.with_suffix(".npz"), **arrays, blocks=blocks, channels=channels)
    print(f"{out}: {caption(args.layer)}")
    return [(own.images, own.activations) for own in results]


def publish(record: Record, own: Excited, blocks: list[int], channels: list[int], out: Path, number: str) -> None:
    """Publish the result of one checkpoint; `number` tells it from others in the name of its TensorBoard folder."""
    own.judged.publish(
        record,
        metrics_of(blocks, own.activations),
        len(blocks) * len(channels) * (own.judged.args.steps + 2),  # one more before and after the steps
        name=f"feature_viz{number.replace('_', '-')}",
        json=out,
        pictures={"images": drawing([own], [""], blocks, channels).tensor()},
        caption=caption(own.judged.args.layer),
        shown_blocks=blocks,
        shown_channels=channels,
        activations=own.activations.tolist(),
    )


if __name__ == "__main__":
    with user_errors("feature_viz.py"):
        main(get_args_parser().parse_args())
