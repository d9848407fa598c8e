"""Per-channel means and standard deviations of a training set, printed as the flags of the mains.

python tools/mean_std.py --data_path DIR
python tools/mean_std.py --dataset folder --data_path DIR --in_chans 1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torchvision import transforms
from tqdm import tqdm

from evaluation import command_line
from util.data.loader import collate, loader_options, read_batches
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.reading_flags import CHANNELS
from util.data.samples import KeyedDataset
from util.data.sources import Images
from util.data.transforms import ToPixels, check_channels
from util.errors import UserError, user_errors


def get_args_parser():
    parser = command_line.data_parser("Per-channel means and standard deviations of a training set.")
    parser.add_argument("--in_chans", type=int, default=3, help=CHANNELS)
    parser.add_argument("--limit", type=int, default=0, help="number of images to read, evenly spaced; 0: all")
    return parser


def moments(pixels: torch.Tensor) -> torch.Tensor:
    """Return the sums of 1, x and x * x over pixels (C, H, W) in 0..255, x = pixel / 255: (3, C) float64."""
    x = pixels.flatten(1).double() / 255
    return torch.stack([torch.full((len(x),), x.shape[1], dtype=torch.float64), x.sum(1), (x * x).sum(1)])


def _shown(value: float) -> str:
    """Return a number with five decimals; a small one, as of bands of 16 bits, with five digits."""
    return f"{value:.5f}" if value >= 0.1 or not value else f"{value:.5g}"


def main(args) -> tuple[list[float], list[float]]:
    """Return means and standard deviations over all pixels of all images at their own size: a large image has more
    weight, as in training crops."""
    check_channels(args.in_chans)
    images = read_images(args, train=True)
    if not isinstance(images, Images):
        raise UserError(f"--dataset {args.dataset} is a stream; compute its statistics on a folder of samples")
    settle_pixel_range(args, images)
    pixels = {"in_chans": args.in_chans, "pixel_range": args.pixel_range}
    transform = transforms.Compose([ToPixels(args.in_chans), moments])
    dataset = KeyedDataset(images, transform, args.seed, replace=False, **pixels)
    count = min(args.limit or len(images), len(images))
    indices = torch.linspace(0, len(images) - 1, count).long().tolist()
    options = loader_options(args.seed, args.num_workers, pin_mem=False, persistent=False)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(dataset, indices), batch_size=64, collate_fn=collate, **options
    )
    total, bad = torch.zeros(3, args.in_chans, dtype=torch.float64), 0
    batches = tqdm(read_batches(loader), total=len(loader), desc="reading", unit=" batches", disable=None)
    for batch in batches:
        total += batch.image[batch.bad == 0].sum(dim=0)
        bad += int(batch.bad.sum())
    if total[0].min() == 0:
        raise UserError("no image could be read; their names are above")
    mean = total[1] / total[0]
    std = (total[2] / total[0] - mean**2).clamp(min=0).sqrt()
    print(f"{count - bad} images" + (f", {bad} unreadable" if bad else ""))
    text = [" ".join(_shown(value) for value in values) for values in (mean, std)]
    print(f"--mean {text[0]} --std {text[1]}")
    return mean.tolist(), std.tolist()


if __name__ == "__main__":
    with user_errors("mean_std.py"):
        main(get_args_parser().parse_args())
