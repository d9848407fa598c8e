"""Write a data set as WebDataset shards (tar files), for sets of many files on network disks and for object stores.

python tools/make_shards.py --data_path IMAGENET --out SHARDS          both splits of train/<class>/ and val/<class>/
python tools/make_shards.py --data_path IMAGENET --out SHARDS --resize 256 --quality 90 --workers 16
python main_pretrain.py --dataset wds --data_path SHARDS …

Files are stored unchanged, images in memory as PNG, in random order, so that each shard is a sample of all classes.
With `--resize` images with a longer shorter side are made smaller (`util.data.reencode`). Unreadable images are named
and left out. `_info.json` (timm's format) has the number of images of each shard, and the names of the classes. The
files do not depend on the number of workers.
"""

import io
import json
import os
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from evaluation import command_line
from util.data.images import BROKEN_IMAGE, reason_of, warn_unreadable
from util.data.loader import loader_options, read_batches
from util.data.readers import read_images
from util.data.reencode import shrinks, smaller
from util.data.sources import Images
from util.data.transforms import to_channels
from util.errors import UserError, user_errors

QUALITY = 90
AT_ONCE = 16  # images that a worker passes on together


def get_args_parser():
    parser = command_line.data_parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", required=True, help="folder for the shards, which is created")
    parser.add_argument("--name", default="images", help="prefix of the files: <name>-<split>-000000.tar")
    parser.add_argument(
        "--splits",
        nargs="+",
        default=["train", "validation"],
        choices=["train", "validation"],
        metavar="SPLIT",
        help="train, validation or both",
    )
    parser.add_argument(
        "--images_per_shard",
        type=int,
        default=2000,
        help="should give at least as many shards as processes times --num_workers, else several workers read the same "
        "one; shards of 100 to 300 MB are usual",
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="resize the shorter side to this and encode the image anew; images that are not larger are stored "
        "unchanged; 256 is usual for training at 224: decoding takes less than half of the time, and small crops are "
        "enlarged",
    )
    parser.add_argument(
        "--quality", type=int, metavar="1..100", help=f"JPEG quality of the resized images; without it {QUALITY}"
    )
    parser.add_argument(
        "--workers", type=int, dest="num_workers", metavar="N", help="--num_workers: processes that read and resize"
    )
    return parser


class Stored(NamedTuple):
    """An image as it is written into a shard; `error` is why it cannot be read, else ""."""

    index: int
    ending: str = ""
    data: bytes = b""
    target: int = -1
    resized: bool = False
    error: str = ""


class Content(Dataset):
    """The images of a split as they are written, by index."""

    def __init__(self, images: Images, side: int | None, quality: int):
        self.images, self.side, self.quality = images, side, quality

    def __getitem__(self, index: int) -> Stored:
        try:
            image = self.images.load(index)  # decoded, so that a broken image is detected now
            resized = self.side is not None and shrinks(image, self.side)
            ending, data = smaller(image, self.side, self.quality) if resized else self._unchanged(image, index)
            return Stored(index, ending, data, self.images.target(index), resized)
        except BROKEN_IMAGE as error:
            return Stored(index, error=reason_of(error))

    def _unchanged(self, image, index: int) -> tuple[str, bytes]:
        """Return the ending and the bytes of an image's file or, if it is in memory, of a file without loss."""
        path = Path(self.images.file(index))
        if path.suffix.lower() in IMG_EXTENSIONS:
            return path.suffix.lower().removeprefix("."), path.read_bytes()
        file = io.BytesIO()
        if image.mode in ("I", "F"):
            image.save(file, "TIFF")  # keeps its values
            return "tif", file.getvalue()
        kept = image.mode in ("L", "LA", "RGB", "RGBA") or image.mode.startswith("I;16")
        (image if kept else to_channels(image, 3)).save(file, "PNG")
        return "png", file.getvalue()


def read_in_order(images: Images, order: torch.Tensor, args) -> Iterator[Stored]:
    """Yield the images at the indices `order` (N,), which `--num_workers` processes read."""
    options = loader_options(args.seed, args.num_workers, pin_mem=False, persistent=False)
    options["worker_init_fn"] = partial(_begin_worker, options["worker_init_fn"], os.getpid())
    batches = DataLoader(
        Content(images, args.resize, args.quality or QUALITY),
        batch_sampler=(part.tolist() for part in order.split(AT_ONCE)),
        collate_fn=list,
        **options,
    )
    for batch in read_batches(batches):
        yield from batch


def _begin_worker(begin, parent: int, worker: int) -> None:
    """Call `begin(worker)`, and end this worker if its parent is killed: it may be waiting to pass on bytes that nobody
    reads any more."""
    begin(worker)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to the archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, stored: Iterator[Stored], images: Images, progress) -> tuple[int, int]:
    """Write images to a shard -> the number of readable ones, and of those that were resized. The file gets its name
    once it is complete."""
    count, resized, part = 0, 0, path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for image in stored:
            progress.update()
            if image.error:
                with progress.external_write_mode(sys.stderr):
                    warn_unreadable(images.name(image.index), OSError(image.error), "; left out")
                continue
            add(tar, f"{image.index:09d}.{image.ending}", image.data)
            add(tar, f"{image.index:09d}.cls", str(image.target).encode())
            count, resized = count + 1, resized + image.resized
    part.rename(path)
    return count, resized


def read_splits(args) -> dict[str, Images]:
    """Return the images of `--splits`, all of which are read before a file is written. Raises UserError for a split
    that is missing or cannot be read in random order, and for splits of different classes."""
    splits = {}
    for split in args.splits:
        try:
            splits[split] = read_images(args, train=split == "train")
        except UserError as error:
            others = " ".join(other for other in args.splits if other != split)
            hint = f"; or give --splits {others}" if others else ""
            raise UserError(f"{error}; nothing was written{hint}") from error
        if not isinstance(splits[split], Images):
            raise UserError(f"--dataset {args.dataset} is a stream, which cannot be read in random order")
    classes = [images.classes for images in splits.values()]
    if any(names != classes[0] for names in classes):
        raise UserError(f"the splits of --dataset {args.dataset} have different classes: write them to two folders")
    return splits


def write_split(args, split: str, images: Images) -> dict:
    """Write all shards of one split -> its entry in `_info.json`."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))
    stored, filenames, lengths, resized = read_in_order(images, order, args), [], [], 0
    with tqdm(total=len(images), desc=split, unit=" images", disable=None) as progress:
        for _ in range(0, len(order), args.images_per_shard):
            name = f"{args.name}-{split}-{len(filenames):06d}.tar"
            part = islice(stored, args.images_per_shard)
            count, smaller_ones = write_shard(Path(args.out) / name, part, images, progress)
            filenames.append(name)
            lengths.append(count)
            resized += smaller_ones
    total = sum(lengths)
    if not total:
        raise UserError(f"no image of {split} could be read; their names are above")
    bad = f", {len(order) - total} unreadable" * (total < len(order))
    kept = f", {resized} of them resized, {total - resized} unchanged" * (args.resize is not None)
    print(f"{split}: {total} images in {len(lengths)} shards{kept}{bad}")
    return {"name": split, "num_samples": total, "filenames": filenames, "shard_lengths": lengths}


def check(args) -> None:
    """Raise UserError for bad flags and for a folder that is not empty."""
    if args.images_per_shard < 1:
        raise UserError(f"--images_per_shard {args.images_per_shard} must be positive")
    if args.resize is not None and args.resize < 1:
        raise UserError(f"--resize {args.resize} must be positive: the shorter side in pixels")
    if args.quality is not None and args.resize is None:
        raise UserError(f"--quality {args.quality} has no effect without --resize: files are stored unchanged")
    if args.quality is not None and not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality} must lie between 1 and 100")
    if args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers} must not be negative; 0 reads in the main process")
    if not args.name or "/" in args.name or "-" in args.name:
        raise UserError(f"--name {args.name!r} must be a name without / and -: timm splits file names at dashes")
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is not a folder")
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"--out {args.out} is not empty: give another folder")


def main(args) -> None:
    """Write the shards of `--splits`. Raises UserError for bad flags and for a folder that is not empty."""
    check(args)
    args.splits = list(dict.fromkeys(args.splits))
    images = read_splits(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    index = {"splits": {split: write_split(args, split, images[split]) for split in args.splits}}
    classes = images[args.splits[0]].classes
    index |= {"classes": list(classes)} if classes else {}
    (Path(args.out) / "_info.json").write_text(json.dumps(index, indent=2) + "\n")
    print(f"train with: --dataset wds --data_path {args.out}")


if __name__ == "__main__":
    with user_errors("make_shards.py"):
        main(get_args_parser().parse_args())
