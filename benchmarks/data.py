"""Images per second of every way to read batches, compared with torchvision's ImageFolder and DataLoader.

python benchmarks/data.py --data DIR         DIR: any folder of images; CIFAR-10 or Tiny ImageNet will do

Makes JPEGs of 32, 64 and about 500 pixels from DIR's images in a temporary folder and reads each set in every way, as
pretraining does (random resized crop to 32, 64, 96 and 224 pixels, flip, normalised), in rounds that visit every way;
the first passes warm up. `torchvision`, `from files`, `fast_resize` and `jpeg_draft` (the same with these flags) and
`shards` (the same images in tar files) decode with `--num_workers` processes; `data_cache ram` decodes before the
measurement.
"""

import argparse
import contextlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import _measure  # puts the repository on the path
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from util.data.batch_aug import BatchTransform
from util.data.build import build_loader
from util.data.cache import CachedLoader, cache_images
from util.data.image_format import IMAGENET
from util.data.readers import read_images
from util.data.transforms import BICUBIC, pretrain_transform
from util.errors import UserError, user_errors

# Side of the crop: (height, width) of the JPEGs.
SETS = {32: (32, 32), 64: (64, 64), 96: (375, 500), 224: (375, 500)}


def make_set(sources: list[Path], folder: Path, size: tuple[int, int]) -> None:
    """Write JPEGs of `size` in two classes of an image folder, and shards of them."""
    for index, source in enumerate(sources):
        target = folder / "train" / f"class{index % 2}" / f"{index}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).convert("RGB").resize(size[::-1], Image.Resampling.BICUBIC).save(target, quality=90)
    tool = [sys.executable, str(_measure.ROOT / "tools" / "make_shards.py"), "--splits", "train"]
    flags = ["--data_path", str(folder), "--out", str(folder / "shards"), "--images_per_shard", "200"]
    subprocess.run([*tool, *flags], check=True, capture_output=True)


def paths(folder: Path, side: int, options) -> dict:
    """Return by name a function that makes one pass over the set."""
    args = SimpleNamespace(
        dataset="imagefolder",
        data_path=str(folder),
        num_workers=options.num_workers,
        pin_mem=False,
        seed=0,
        in_chans=3,
        data_cache="ram",
        cache_size=None,
        jpeg_draft=False,
        nvjpeg=False,
        shuffle_buffer=1000,
        shard_samples=None,
    )
    images = read_images(args, train=True)
    common = [transforms.RandomHorizontalFlip(), transforms.ToTensor(), transforms.Normalize(*IMAGENET)]
    crop = transforms.RandomResizedCrop(side, scale=(0.2, 1.0), interpolation=BICUBIC)
    plain = DataLoader(
        ImageFolder(folder / "train", transforms.Compose([crop, *common])),
        options.batch_size,
        shuffle=True,
        num_workers=options.num_workers,
        drop_last=True,
        persistent_workers=options.num_workers > 0,
    )
    transform = pretrain_transform("mae", (side, side), *IMAGENET)
    files = build_loader(images, transform, args, options.batch_size, True)
    in_tars = changed(args, dataset="wds", data_path=str(folder / "shards"))
    shards = build_loader(read_images(in_tars, train=True), transform, in_tars, options.batch_size, True)
    drafts = build_loader(images, transform, changed(args, jpeg_draft=True), options.batch_size, True)
    cache = cached_loader(images, args, side, options.batch_size)
    passes = {"torchvision": lambda _: plain, "from files": files.begin}
    if min(SETS[side]) > side:
        passes["fast_resize"] = build_loader(
            images, transform, changed(args, fast_resize=True), options.batch_size, True
        ).begin
    if min(SETS[side]) >= 2 * side:
        passes["jpeg_draft"] = drafts.begin
    return passes | {"shards": shards.begin, "data_cache ram": cache.begin}


def cached_loader(images, args, side: int, batch_size: int) -> CachedLoader:
    with contextlib.redirect_stdout(io.StringIO()):
        cached = cache_images(images, args, torch.device("cpu"))
    return CachedLoader(cached, BatchTransform("mae", (side, side), *IMAGENET, 0), batch_size, args.num_workers)


def changed(args, **flags):
    return SimpleNamespace(**{**vars(args), **flags})


def one_pass(begin, epoch: int, options) -> float:
    """Return the images per second of one pass."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    began = clock()
    count = sum(1 for _ in begin(epoch))
    return count * options.batch_size / (clock() - began)


def main(options) -> None:
    options.num_workers = 0 if options.cpu_time else options.num_workers
    files = sorted(p for p in Path(options.data).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not files:
        raise UserError(f"--data {options.data} holds no images")
    sources = files[:: max(1, len(files) // options.count)][: options.count]
    print(
        f"{len(sources)} images, batch {options.batch_size}, {options.num_workers} workers, {options.rounds} rounds, "
        f"torch {torch.__version__}\n"
    )
    print("| crop, pixels | JPEGs | path | images/s | torchvision = 1 | quartiles |\n|---|---|---|---|---|---|")
    for side in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            make_set(sources, Path(name), SETS[side])
            ways = paths(Path(name), side, options)
            speeds = {way: [] for way in ways}
            for epoch in range(options.rounds + 1):
                for way, begin in ways.items():
                    speed = one_pass(begin, epoch, options)
                    if epoch:
                        speeds[way].append(speed)
            for way, values in speeds.items():
                ratios = sorted(a / b for a, b in zip(values, speeds["torchvision"]))
                low, high = ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
                height, width = SETS[side]
                print(
                    f"| {side} | {height}x{width} | {way} | {statistics.median(values):.0f} | "
                    f"{statistics.median(ratios):.2f} | {low:.2f} to {high:.2f} |",
                    flush=True,
                )


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", required=True, help="a folder of images, at any depth")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=100)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument(
        "--cpu_time", action="store_true", help="measure processor time of this process, for a busy machine; no workers"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SETS), choices=list(SETS))
    return parser


if __name__ == "__main__":
    with user_errors("data.py"):
        main(get_args_parser().parse_args())
