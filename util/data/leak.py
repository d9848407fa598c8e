"""`--check_leak`: refuse training images that are also evaluation images."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from tqdm import tqdm

from util.data.images import BROKEN_IMAGE, open_regular
from util.data.sources import Images
from util.errors import UserError
from util.parallel.distributed import gather_objects, get_rank, get_world_size, is_main_process

SHOWN = 5  # pairs in the message
SLICE = 64  # images per task of a thread


def content(images: Images, index: int) -> bytes:
    """Return the bytes by which two images are compared: those of the file, or the pixels if there is no file."""
    path = images.file(index)
    if path:
        with open_regular(path) as file:
            return file.read()
    img = images.load(index)
    return f"{img.mode} {img.size}".encode() + img.tobytes()


def digests(images: Images) -> Iterator[tuple[int, bytes]]:
    """Yield index and hash of every image in this process's share. Unreadable images are skipped here: they are counted
    when they are used."""

    def hash_slice(indices: range) -> list[tuple[int, bytes]]:
        hashes = []
        for index in indices:
            with suppress(*BROKEN_IMAGE):
                hashes.append((index, hashlib.sha256(content(images, index)).digest()))
        return hashes

    mine = range(get_rank(), len(images), get_world_size())
    with ThreadPoolExecutor() as pool:  # reading and hashing release the GIL
        slices = [mine[start : start + SLICE] for start in range(0, len(mine), SLICE)]
        hidden = None if is_main_process() else True  # None: shown on a terminal
        bar = tqdm(pool.map(hash_slice, slices), "comparing splits", len(slices), disable=hidden, leave=False)
        for hashes in bar:
            yield from hashes


def check_leak(train, test, name: str = "--check_leak") -> None:
    """Raise UserError on every rank when an image of `test` is also in `train`: a file with the same content, even
    under another name or label, or the same pixels where images are not files. Also raises it for streams, whose images
    cannot be indexed."""
    for images, split in ((train, "training"), (test, "evaluation")):
        if not isinstance(images, Images):
            raise UserError(
                f"{name} needs images that can be indexed, but the {split} set is a stream: remove --check_leak"
            )
    evaluated = {digest: index for share in gather_objects(list(digests(test))) for index, digest in share}
    matches = [(index, evaluated[digest]) for index, digest in digests(train) if digest in evaluated]
    leaks = sorted(pair for share in gather_objects(matches) for pair in share)
    if leaks:
        pairs = ", ".join(f"{train.name(a)} = {test.name(b)}" for a, b in leaks[:SHOWN])
        rest = f" and {len(leaks) - SHOWN} more" if len(leaks) > SHOWN else ""
        raise UserError(
            f"{name}: {len(leaks)} of {len(train)} training images are also among the {len(test)} evaluation images "
            f"({pairs}{rest}): remove them from one of the splits"
        )
    print(f"{name}: none of {len(test)} evaluation images is among the {len(train)} training images")
