"""Random numbers of one sample by position, and the versions of a run's random numbers (`--sample_rng`).

Number i of a sample is a function of (seed, epoch, index, i). No generator has a state to seed, and a step of a
transform gets the same numbers whatever the other steps draw. `BatchTransform` reads the same numbers at the same
positions.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from util.data.sample_rng import GOLDEN, MASK32, generators_seeded, mix, seeded
from util.parser import rare, settled_later

VERSIONS = ("v1", "v2")
STREAM = 16  # of `sample_noise`; masks use the first few streams
# Positions of the numbers.
CROP = 0  # 40: area, aspect ratio, top, left of ten random resized crops
FLIP = 40  # 1
SHIFT = 41  # 2: top, left of a crop of a padded image
COLOUR = 42  # 6: of 3-Augment: which operation, radius of the blur, three factors, their order
COUNT = 48
REPLACEMENT = 48  # 2 for each image that replaces an unreadable one
_SEEDS = 1 << 20  # 3: seeds of the generators of Python, NumPy and torch

_COUNTERS = tuple(mix(position + 1) for position in range(COUNT))


@lru_cache(maxsize=8)
def _start(seed: int, epoch: int) -> int:
    """Return the key of an epoch's samples."""
    key = seed & MASK32
    for word in (epoch, STREAM):
        key = _join(key, word)
    return key


def _join(key: int, word: int) -> int:
    return mix(((key + GOLDEN) & MASK32) ^ mix(word & MASK32))


class Draws:
    """The numbers of a sample: `draws[i]` in [0, 1), those of `sample_noise(seed, epoch, index, ..., STREAM)`. A sample
    that occurs several times in an epoch has other numbers in each `place`."""

    __slots__ = ("key",)

    def __init__(self, seed: int, epoch: int, index: int, place: int | None = None):
        key = _join(_join(_start(seed, epoch), index >> 32), index)
        self.key = key if place is None else _join(key, place)

    def bits(self, position: int) -> int:
        """Return 32 random bits."""
        counter = _COUNTERS[position] if position < COUNT else mix(position + 1)
        return mix((mix(self.key ^ counter) + self.key) & MASK32)

    def __getitem__(self, position: int) -> float:
        return (self.bits(position) >> 8) * 2.0**-24

    def below(self, position: int, limit: int) -> int:
        """Return a number from 0 to `limit` - 1, of the 64 bits at `position` and the one after it."""
        return ((self.bits(position) << 32) + self.bits(position + 1)) * limit >> 64


_current: ContextVar[Draws | None] = ContextVar("draws", default=None)


def current_draws() -> Draws | None:
    """Return the numbers of the sample that is being transformed; None outside of samples and in version v1, where
    steps draw from the generators of Python, NumPy and torch."""
    return _current.get()


class SampleRng:
    """The random numbers of the samples of a data set.

    v2: steps draw by position (`current_draws`). With `generators`, for steps of other libraries, the generators of
    Python, NumPy and torch are seeded, too. v1, the numbers of earlier revisions: all steps draw from these generators,
    which are seeded anew for each sample.
    """

    def __init__(self, seed: int, version: str = "v2", generators: bool = True):
        self.seed, self.version, self.generators = seed, version, generators

    @contextmanager
    def sample(self, epoch: int, index: int, *place: int) -> Iterator[None]:
        """Draw the numbers of this sample inside the block; `place` tells apart several in one epoch."""
        if self.version == "v1":
            with seeded(self.seed, epoch, index, *place):
                yield
            return
        draws = Draws(self.seed, epoch, index, *place)
        before = _current.set(draws)
        try:
            if self.generators:
                with generators_seeded(*map(draws.bits, range(_SEEDS, _SEEDS + 3))):
                    yield
            else:
                yield
        finally:
            _current.reset(before)


def add_sample_rng(group) -> None:
    """Add `--sample_rng`, which `settle_sample_rng` settles."""
    action = group.add_argument(
        "--sample_rng",
        choices=VERSIONS,
        help="random numbers of crops, flips and colours; v1: those of revisions before this flag, with which a run of "
        "theirs is resumed; a resumed run keeps its version",
    )
    rare(settled_later(action, VERSIONS[-1]))


def settle_sample_rng(args, stored: Mapping[str, Any] | None) -> None:
    """Settle `args.sample_rng` where it is not given: by the flags `stored` in the checkpoint of the run that is
    resumed, v1 if it is older than the flag; for a new run (None) the newest version."""
    if args.sample_rng is not None:
        return
    args.sample_rng = VERSIONS[-1] if stored is None else stored.get("sample_rng", "v1")
    if args.sample_rng != VERSIONS[-1]:
        print(f"--sample_rng {args.sample_rng}, from the checkpoint: the run keeps its crops, flips and colours")


def sample_rng_of(args) -> str:
    """Return the version of the flags; the newest for a command that lacks the flag."""
    return getattr(args, "sample_rng", None) or VERSIONS[-1]
