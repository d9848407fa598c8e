"""`--check_leak`: no image that a number is measured on may have been trained on."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from util.data.images import BROKEN_IMAGE, open_regular
from util.data.sources import Images
from util.errors import UserError
from util.parallel.distributed import gather_objects, get_rank, get_world_size

SHOWN = 5  # pairs in the message
SLICE = 64  # images that a thread takes at a time


def content(images: Images, place: int) -> bytes:
    """What makes it the same image as another one: the bytes of its file, else its pixels."""
    path = images.file(place)
    if path:
        with open_regular(path) as file:
            return file.read()
    img = images.load(place)
    return f"{img.mode} {img.size}".encode() + img.tobytes()


def digests(images: Images) -> Iterator[tuple[int, bytes]]:
    """Place and hash of what every image of this process's share holds. Unreadable images are left out: they are
    counted where they are used."""

    def some(places: range) -> list[tuple[int, bytes]]:
        found = []
        for place in places:
            with suppress(*BROKEN_IMAGE):
                found.append((place, hashlib.sha256(content(images, place)).digest()))
        return found

    mine = range(get_rank(), len(images), get_world_size())
    with ThreadPoolExecutor() as pool:  # reading and hashing let other threads run
        for found in pool.map(some, [mine[start : start + SLICE] for start in range(0, len(mine), SLICE)]):
            yield from found


def check_leak(train, test, name: str = "--check_leak") -> None:
    """UserError on every rank when an image of `test` is in `train`, too: the same bytes in a file, whatever its name
    and label, or the same pixels where images are not files. UserError for streams, which have no numbers to read by.
    """
    for images, split in ((train, "training"), (test, "evaluation")):
        if not isinstance(images, Images):
            raise UserError(f"{name} needs images with numbers, and the {split} ones are a stream: leave it out")
    evaluated = {digest: place for share in gather_objects(list(digests(test))) for place, digest in share}
    found = [(place, evaluated[digest]) for place, digest in digests(train) if digest in evaluated]
    both = sorted(pair for share in gather_objects(found) for pair in share)
    if both:
        pairs = ", ".join(f"{train.name(a)} = {test.name(b)}" for a, b in both[:SHOWN])
        rest = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
        raise UserError(
            f"{name}: {len(both)} of {len(train)} training images are among the {len(test)} evaluation images, too "
            f"({pairs}{rest}): take them out of one of the splits"
        )
    print(f"{name}: none of {len(test)} evaluation images is among the {len(train)} training images")
