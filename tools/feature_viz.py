"""Images that maximally activate an encoder's channels, by gradient ascent, a row for each block (after Ghiasi et al.
2022).

python tools/feature_viz.py output_dir/checkpoint-799.pth --out channels.png
python tools/feature_viz.py output_dir/checkpoint-799.pth --out channels.png --blocks 0 5 11 --channels 3 140

The images and the activations of their channels before and after the ascent are written beside the picture (.npz); the
numbers also into a JSON file, TensorBoard and the ledger.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torchvision.transforms.functional import to_pil_image, to_tensor

from evaluation import command_line, judging
from evaluation.feature_viz import LAYERS, FourierImages, channel_activation, excite
from util.errors import UserError, user_errors
from util.parser import Parser
from util.report.pictures import captioned, grid, labelled, rgb


def get_args_parser():
    parser = Parser("Draw images that maximally activate single channels of an encoder, at several depths.")
    command_line.add_checkpoint_flags(parser)
    parser.add_argument("--out", required=True, help="PNG file to write")
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
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in judged.images.mean_std)
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
        print(f"block {block}: mean activation {values[0].mean():.3g} -> {values[1].mean():.3g}{hint}", flush=True)
    return torch.stack(images), torch.stack(activations)


def metrics_of(blocks: list[int], activations: torch.Tensor) -> dict[str, float]:
    """Return the mean activation of each block's channels for a grey image and for the optimised images, and the share
    of channels that these activate more."""
    metrics = {"excited_share": (activations[:, 1] > activations[:, 0]).float().mean().item()}
    for block, (grey, excited) in zip(blocks, activations.mean(dim=-1).tolist()):
        metrics |= {f"block{block}_grey": grey, f"block{block}_excited": excited}
    return metrics


def main(args) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw and return the images and activations of `ascend`."""
    check_values(args)
    out = command_line.check_out(args, ".png")
    judged = judging.open_trained(args, command_line.checkpoint_of(args), head=False)
    blocks, channels = chosen(args, judged.model)
    record = judged.record("feature_viz")
    images, activations = ascend(judged, blocks, channels)
    where = "in the MLP" if args.layer == "mlp" else "behind the block"
    text = f"images that excite single channels {where}, of blocks {' '.join(map(str, blocks))}"
    picture = to_pil_image(grid(torch.stack([rgb(row) for row in images]), per_row=1))
    picture = labelled(picture, [f"channel {i}" for i in channels], [f"block {i}" for i in blocks])
    captioned(picture, text).save(out)
    arrays = dict(images=images.numpy(), activations=activations.numpy(), blocks=blocks, channels=channels)
    np.savez(out.with_suffix(".npz"), **arrays)
    metrics = metrics_of(blocks, activations)
    shown = dict(shown_blocks=blocks, shown_channels=channels, activations=activations.tolist())
    images_seen = len(blocks) * len(channels) * (args.steps + 2)  # one more before and after the steps
    pictures = {"images": to_tensor(picture)}
    judged.publish(record, metrics, images_seen, json=out, pictures=pictures, caption=text, **shown)
    print(f"{out}: {text}")
    return images, activations


if __name__ == "__main__":
    with user_errors("feature_viz.py"):
        main(get_args_parser().parse_args())
