"""Write a data set as WebDataset shards (tar files), for sets of many files on network disks and for object stores.

python tools/make_shards.py --data_path IMAGENET --out SHARDS          both splits of train/<class>/ and val/<class>/
python main_pretrain.py --dataset wds --data_path SHARDS …

Files are stored unchanged, images in memory as PNG, in random order, so that each shard is a sample of all classes.
Unreadable images are named and left out. `_info.json` (timm's format) has the number of images of each shard, and the
names of the classes.
"""

import io
import json
import os
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from evaluation import command_line
from util.data.images import BROKEN_IMAGE, warn_unreadable
from util.data.readers import read_images
from util.data.sources import Images
from util.data.transforms import to_channels
from util.errors import UserError, user_errors


def get_args_parser():
    parser = command_line.data_parser(__doc__.split("\n")[0])
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
    return parser


def content(images: Images, index: int) -> tuple[str, bytes]:
    """Return the ending and the bytes of an image. Raises one of `BROKEN_IMAGE` if it cannot be read."""
    image = images.load(index)  # decoded, so that a broken image is detected now
    path = Path(images.file(index))
    if path.suffix.lower() in IMG_EXTENSIONS:
        return path.suffix.lower().removeprefix("."), path.read_bytes()
    file = io.BytesIO()
    if image.mode in ("I", "F"):
        image.save(file, "TIFF")  # keeps its values
        return "tif", file.getvalue()
    kept = image.mode in ("L", "LA", "RGB", "RGBA") or image.mode.startswith("I;16")
    (image if kept else to_channels(image, 3)).save(file, "PNG")
    return "png", file.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    """Add a file to the archive."""
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, images: Images, indices: list[int], progress) -> int:
    """Write the images at `indices` -> the number of readable ones. The file gets its name once it is complete."""
    count, part = 0, path.with_suffix(".part")
    with tarfile.open(part, "w") as tar:
        for index in indices:
            progress.update()
            try:
                ending, data = content(images, index)
            except BROKEN_IMAGE as error:
                with progress.external_write_mode(sys.stderr):
                    warn_unreadable(images.name(index), error, "; left out")
                continue
            add(tar, f"{index:09d}.{ending}", data)
            add(tar, f"{index:09d}.cls", str(images.target(index)).encode())
            count += 1
    part.rename(path)
    return count


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
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed)).tolist()
    filenames, lengths = [], []
    with tqdm(total=len(images), desc=split, unit=" images", disable=None) as progress:
        for first in range(0, len(order), args.images_per_shard):
            name = f"{args.name}-{split}-{len(filenames):06d}.tar"
            count = write_shard(Path(args.out) / name, images, order[first : first + args.images_per_shard], progress)
            filenames.append(name)
            lengths.append(count)
    if not sum(lengths):
        raise UserError(f"no image of {split} could be read; their names are above")
    bad = len(order) - sum(lengths)
    print(f"{split}: {sum(lengths)} images in {len(lengths)} shards" + (f", {bad} unreadable" if bad else ""))
    return {"name": split, "num_samples": sum(lengths), "filenames": filenames, "shard_lengths": lengths}


def main(args) -> None:
    """Write the shards of `--splits`. Raises UserError for bad flags and for a folder that is not empty."""
    if args.images_per_shard < 1:
        raise UserError(f"--images_per_shard {args.images_per_shard} must be positive")
    if not args.name or "/" in args.name or "-" in args.name:
        raise UserError(f"--name {args.name!r} must be a name without / and -: timm splits file names at dashes")
    if os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise UserError(f"--out {args.out} is not a folder")
    if os.path.isdir(args.out) and os.listdir(args.out):
        raise UserError(f"--out {args.out} is not empty: give another folder")
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
