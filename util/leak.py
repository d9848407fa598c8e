"""`--check_leak`: no image that a number is measured on may have been trained on."""

import hashlib
from concurrent.futures import ThreadPoolExecutor

from util.datasets import Images
from util.distributed import gather_objects, get_rank, get_world_size
from util.errors import UserError
from util.images import BROKEN_IMAGE, open_regular

SHOWN = 5


def content(images: Images, place: int) -> bytes:
    """What makes it the same image as another one: the bytes of its file, else its pixels."""
    path = images.file(place)
    if path:
        with open_regular(path) as file:
            return file.read()
    img = images.load(place)
    return f"{img.mode} {img.size}".encode() + img.tobytes()


def digests(images: Images) -> dict[int, bytes]:
    """By place, a hash of what every image holds; each process reads its share. Unreadable images are left out: they
    are counted where they are used."""

    def digest(place: int) -> tuple[int, bytes] | None:
        try:
            return place, hashlib.sha256(content(images, place)).digest()
        except BROKEN_IMAGE:
            return None

    mine = range(get_rank(), len(images), get_world_size())
    with ThreadPoolExecutor() as pool:  # reading and hashing let other threads run
        found = [pair for pair in pool.map(digest, mine, chunksize=64) if pair]
    return dict(pair for share in gather_objects(found) for pair in share)


def check_leak(train, test, name: str = "--check_leak") -> None:
    """UserError on every rank when an image of `test` is in `train`, too: the same bytes in a file, whatever its name
    and label, or the same pixels where images are not files. UserError for streams, which have no numbers to read by.
    """
    for images, split in ((train, "training"), (test, "evaluation")):
        if not isinstance(images, Images):
            raise UserError(f"{name} needs images with numbers, and the {split} ones are a stream: leave it out")
    evaluated = {digest: place for place, digest in digests(test).items()}
    both = [(place, evaluated[digest]) for place, digest in sorted(digests(train).items()) if digest in evaluated]
    if both:
        pairs = ", ".join(f"{train.name(a)} = {test.name(b)}" for a, b in both[:SHOWN])
        rest = f" and {len(both) - SHOWN} more" if len(both) > SHOWN else ""
        raise UserError(
            f"{name}: {len(both)} of {len(train)} training images are among the {len(test)} evaluation images, too "
            f"({pairs}{rest}): take them out of one of the splits"
        )
    print(f"{name}: none of {len(test)} evaluation images is among the {len(train)} training images")
