"""Shards of smaller images: the time to write them, and to read crops of 224 pixels from them.

python benchmarks/shards.py --data DIR         DIR: any folder of images; Tiny ImageNet will do

Makes JPEGs of 375 x 500 pixels from DIR's images in a temporary folder. Then `tools/make_shards.py` writes them with
`--resize 256`, by one and by two workers, and unchanged. Each set is read as pretraining does (random resized crop,
flip, normalised) in one process, beside torchvision's ImageFolder and DataLoader on the JPEGs, in rounds that visit
every way; the first passes warm up.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import _measure  # puts the repository on the path
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from util.data.build import build_loader
from util.data.image_format import IMAGENET
from util.data.readers import read_images
from util.data.transforms import BICUBIC, pretrain_transform
from util.errors import UserError, user_errors

SIDE, HEIGHT, WIDTH = 224, 375, 500


def make_photographs(sources: list[Path], folder: Path) -> None:
    """Write JPEGs of 375 x 500 pixels in two classes of an image folder."""
    for index, source in enumerate(sources):
        target = folder / "train" / f"class{index % 2}" / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        resized = Image.open(source).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        resized.save(target, quality=90)


def write_shards(folder: Path, name: str, *flags: str) -> tuple[float, int]:
    """Write shards of all images -> seconds (wall time), bytes."""
    tool = [sys.executable, str(_measure.ROOT / "tools" / "make_shards.py"), "--splits", "train"]
    words = ["--data_path", str(folder), "--out", str(folder / name), "--images_per_shard", "200", *flags]
    began = time.perf_counter()
    subprocess.run([*tool, *words], check=True, capture_output=True)
    return time.perf_counter() - began, sum(path.stat().st_size for path in (folder / name).glob("*.tar"))


def ways_to_read(folder: Path, batch_size: int) -> dict:
    """Return by name a function that makes one pass over the set."""
    steps = [transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=BICUBIC)]
    steps += [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    plain = DataLoader(
        ImageFolder(folder / "train", transforms.Compose(steps)), batch_size, shuffle=True, drop_last=True
    )
    ways = {"torchvision, the JPEGs": lambda _: plain}
    args = SimpleNamespace(seed=0, in_chans=3, num_workers=0, pin_mem=False, shuffle_buffer=1000, shard_samples=None)
    args.dataset, args.jpeg_draft = "wds", False
    sets = {"shards, unchanged": ("unchanged", False), "shards, --resize 256": ("two", False)}
    for title, (name, fast) in (sets | {"shards, --resize 256, --fast_resize": ("two", True)}).items():
        args.data_path, args.fast_resize = str(folder / name), fast
        transform = pretrain_transform("mae", (SIDE, SIDE), *IMAGENET)
        ways[title] = build_loader(read_images(args, train=True), transform, args, batch_size, True).begin
    return ways


def main(options) -> None:
    files = sorted(p for p in Path(options.data).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise UserError(f"--data {options.data} holds no images")
    sources = files[:: max(1, len(files) // options.count)][: options.count]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_photographs(sources, folder)
        start = min(write_shards(folder, "none", "--help")[0] for _ in range(3))  # imports, which no worker shortens
        resize = ("--resize", "256", "--workers")
        one, two = (write_shards(folder, name, *resize, str(n)) for n, name in ((1, "one"), (2, "two")))
        _, unchanged = write_shards(folder, "unchanged")
        print(
            f"{len(sources)} JPEGs of {HEIGHT} x {WIDTH} written with --resize 256: wall time {one[0]:.1f} s with one "
            f"worker, {two[0]:.1f} s with two, {start:.1f} s of it the start; {one[1] / unchanged:.2f} of the bytes\n"
        )
        ways = ways_to_read(folder, options.batch_size)
        speeds = {way: [] for way in ways}
        for epoch in range(options.rounds + 1):
            for way, begin in ways.items():
                began = time.process_time()
                count = sum(1 for _ in begin(epoch)) * options.batch_size
                if epoch:
                    speeds[way].append(count / (time.process_time() - began))
    print("| read from | images/s (processor time) | torchvision = 1 | quartiles |\n|---|---|---|---|")
    for way, values in speeds.items():
        ratios = sorted(a / b for a, b in zip(values, speeds["torchvision, the JPEGs"]))
        low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
        print(
            f"| {way} | {statistics.median(values):.0f} | {statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} |"
        )


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a folder of images, at any depth")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    return parser


if __name__ == "__main__":
    with user_errors("shards.py"):
        main(get_args_parser().parse_args())
