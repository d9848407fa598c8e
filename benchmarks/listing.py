"""Start and memory of a run on millions of images: the list of their files, their labels and their order.

python benchmarks/listing.py --images 14000000        made-up files; about 2 GB of memory and 1 GB in a temporary folder

Makes as many class folders as `--images` / 650 (those of ImageNet-21k), which are real and empty, and an index of
made-up file names in them, as the first start would have written it. A second start reads and checks this index. Then
`--workers` forked processes each read all names and labels, in random order, as data workers do. The first start is
measured on `--files` real empty files in folders of 650, with and without the index that it writes.
"""

import argparse
import contextlib
import io
import os
import re
import tempfile
import time
from pathlib import Path

import _measure  # noqa: F401  puts the repository on the path
import numpy as np

from util.data import listing
from util.data.image_folders import class_folder
from util.data.labels import note_imbalance
from util.data.loader import EpochBatches
from util.data.sources import Files
from util.errors import UserError, user_errors
from util.report.ledger import describe_images

PER_CLASS = 650


def made_up_part(root: Path, name: str, count: int) -> listing.Part:
    """Return the part of an index for a class folder with `count` files that do not exist."""
    digits = np.arange(count)[:, None] // 10 ** np.arange(4, -1, -1) % 10 + ord("0")
    start, end = (np.frombuffer(text.encode(), np.uint8) for text in (f"{name}/{name}_", ".JPEG"))
    rows = np.hstack([np.tile(start, (count, 1)), digits.astype(np.uint8), np.tile(end, (count, 1))])
    lengths = np.full(count, rows.shape[1], np.uint16)
    return listing.Part(rows.ravel(), lengths, [name], np.array([listing.times_of(str(root / name))]))


def make_index(root: Path, index: listing.IndexFiles, images: int) -> None:
    """Make the class folders of `images` images below `root`, and write the index of the images."""
    names = [f"n{i:08d}" for i in range(-(-images // PER_CLASS))]
    for name in names:
        (root / name).mkdir(parents=True)
    counts = [min(PER_CLASS, images - PER_CLASS * i) for i in range(len(names))]
    listing._write(index.path_for(root), root, names, [made_up_part(root, *pair) for pair in zip(names, counts)])


def memory(pid: int | str = "self") -> dict[str, int]:
    """Return the resident, proportional (Pss) and private bytes of a process."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text()
    values = {name: 1024 * int(size) for name, size in re.findall(r"(\w+):\s+(\d+) kB", lines)}
    return {"rss": values["Rss"], "pss": values["Pss"], "private": values["Private_Clean"] + values["Private_Dirty"]}


class Clock:
    """Prints a row for each part of the start."""

    def __enter__(self):
        self.wall, self.processor = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall, self.processor = time.perf_counter() - self.wall, time.process_time() - self.processor

    def row(self, title: str) -> None:
        print(f"| {title} | {self.processor:.1f} | {self.wall:.1f} |", flush=True)


def measure_start(root: Path, index: listing.IndexFiles, batch_size: int) -> Files:
    """Do what a run does before its first batch, and print the seconds of each part -> images."""
    print("| second start | processor time, s | wall time, s |\n|---|---|---|")
    parts = {
        "list and labels, from the index": lambda: class_folder(root, index=index),
        "notes on the labels": lambda: note_imbalance(images, "training"),
        "hash of the record": lambda: describe_images(images, str(root)),
        "order of an epoch, first batch": lambda: next(iter(batches)),
    }
    total, images = Clock(), None
    with total:
        for title, part in parts.items():
            with Clock() as clock, contextlib.redirect_stdout(io.StringIO()):
                result = part()
            clock.row(title)
            if images is None:
                images, batches = result, EpochBatches(len(result), batch_size)
    total.row("all")
    return images


def read_all(images, order: np.ndarray) -> int:
    return sum(len(images.name(index)) + images.target(index) for index in order.tolist())


def measure_workers(images, workers: int, read: int) -> None:
    """Fork workers that each read the names and labels of `read` random images, and print their memory."""
    pipes = []
    for worker in range(workers):
        (come, done), (wait, go) = os.pipe(), os.pipe()
        if not os.fork():
            os.close(go)
            before = memory()["private"]
            for part in range(0, read, 1 << 16):  # a short list of indices at a time, as a sampler gives them
                rng = np.random.default_rng([worker, part])
                read_all(images, rng.integers(0, len(images), min(1 << 16, read - part)))
            os.write(done, str(before).encode())
            os.read(wait, 1)  # until all have been measured
            os.write(done, " ".join(map(str, (memory()["private"] - before, memory()["pss"]))).encode())
            os.read(wait, 1)
            os._exit(0)
        pipes.append((come, go))
    for come, _ in pipes:
        os.read(come, 100)
    for _, go in pipes:
        os.write(go, b".")
    rows = [tuple(map(int, os.read(come, 100).split())) for come, _ in pipes]
    for _, go in pipes:
        os.close(go)
    for _ in pipes:
        os.wait()
    grown, pss = ([row[column] for row in rows] for column in (0, 1))
    print(
        f"{workers} workers that have read {read} names and labels each: {max(grown) / 2**20:.1f} MiB more that is "
        f"their own (at most; {max(grown) / len(images):.2f} bytes an image of the set), Pss {max(pss) / 2**20:.0f} MiB"
    )


def measure_walk(root: Path, index: listing.IndexFiles, files: int, images: int) -> None:
    """Print the time of a first start on real files, and of the second."""
    for i in range(files):
        folder = root / f"n{i // PER_CLASS:08d}"
        if i % PER_CLASS == 0:
            folder.mkdir(parents=True)
        os.close(os.open(folder / f"{folder.name}_{i % PER_CLASS:05d}.JPEG", os.O_CREAT | os.O_WRONLY))
    listing.FROM, listing.SETTLED = 1, 0.0
    time.sleep(0.1)
    print("\n| real empty files | processor time, s | wall time, s |\n|---|---|---|")
    for title in ("first start: listed, index written", "second start: from the index"):
        with Clock() as clock, contextlib.redirect_stdout(io.StringIO()):
            found = class_folder(root, index=index)
        clock.row(f"{title}, {len(found)} files")
        if title.startswith("first"):
            first = clock.processor / files * images
    print(f"\nextrapolated, the first start on {images} files of a local disk takes {first:.0f} s of processor time")


def main(options) -> None:
    if options.images < 1 or options.files < 1 or options.workers < 1:
        raise UserError("--images, --files and --workers must be positive")
    with tempfile.TemporaryDirectory() as name:
        index = listing.IndexFiles(f"{name}/index")
        with contextlib.redirect_stdout(io.StringIO()):
            make_index(Path(name) / "made_up", index, options.images)
        size = index.path_for(Path(name) / "made_up").stat().st_size
        print(f"{options.images} images, index of {size / options.images:.0f} bytes an image\n", flush=True)
        before = memory()["rss"]
        images = measure_start(Path(name) / "made_up", index, 256)
        held = memory()["rss"] - before
        print(f"\nthe main process holds {held / len(images):.0f} bytes an image (with the allocator's rest)")
        measure_workers(images, options.workers, options.read or len(images))
        measure_walk(Path(name) / "real", index, options.files, options.images)


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=14_000_000)
    parser.add_argument("--files", type=int, default=200_000, help="real files that are listed")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--read", type=int, default=0, help="names that each worker reads; 0: as many as images")
    return parser


if __name__ == "__main__":
    with user_errors("listing.py"):
        main(get_args_parser().parse_args())
