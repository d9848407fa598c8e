"""From images to batches: which sample comes when, on which rank, with which random numbers.

Everything is a function of (seed, epoch, sample index), so the number of workers does not matter, a run can be
resumed at any sample, and the union of the ranks' batches is the batch that one process would have had.
"""

import math
import signal
import struct
import sys
import weakref
import zlib
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from util.datasets import Images
from util.distributed import get_rank, get_world_size
from util.errors import UserError
from util.rng import seeded
from util.transforms import to_channels

# What readers raise on files that are no (whole) images; anything else is a bug and must surface.
# (pillow: UnidentifiedImageError and truncation are OSError, broken PNG chunks SyntaxError, EXIF ValueError/IndexError)
BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_DRAWS = 20  # replacements tried for one sample before the data set counts as unreadable


class UnreadableData(UserError):
    """Image after image cannot be read. Raised in a data worker, which turns it into a RuntimeError of that text."""


class Sample(NamedTuple):
    """One image, or after collation one batch."""

    image: torch.Tensor  # (C, H, W)
    target: int  # label, -1 without
    index: int  # place in the data set: the key of the sample's random numbers
    bad: int  # images that could not be read before this one was drawn in their place


class KeyedDataset(torch.utils.data.Dataset):
    """`images` through `transform`, by key (epoch, index). A plain index means epoch 0.

    An image that cannot be read is named on stderr and, in training, replaced by another draw. In evaluation
    (`replace=False`) it comes as zeros with `bad` set, so that it can be left out of the count.
    """

    def __init__(self, images: Images, transform, args, replace: bool = True):
        self.images, self.transform, self.replace = images, transform, replace
        self.seed, self.in_chans = args.seed, args.in_chans

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, epoch, index):
            image, place, bad = self._read(index)
            return Sample(self.transform(image), self.images.targets[place], index, bad)

    def _read(self, index: int) -> tuple[Image.Image, int, int]:
        """(image, its place, unreadable ones before it), for `index` or what was drawn instead."""
        place = index
        for bad in range(_DRAWS):
            try:
                return to_channels(self.images.load(place), self.in_chans), place, bad
            except BROKEN_IMAGE as error:
                print(f"unreadable image {self.images.name(place)}: {error}", file=sys.stderr, flush=True)
            if not self.replace:
                return to_channels(Image.new("RGB", (32, 32)), self.in_chans), place, 1
            place = int(torch.randint(len(self.images), ()))
        raise UnreadableData(f"{_DRAWS} images in a row could not be read, the last one {self.images.name(place)}")


class StreamDataset(IterableDataset):
    """An iterable set of timm's factory. Samples are numbered per rank and worker; order and shards are timm's."""

    def __init__(self, stream, transform, args):
        self.stream, self.transform = stream, transform
        self.seed, self.in_chans, self.epoch = args.seed, args.in_chans, 0

    def __len__(self) -> int:
        return len(self.stream)

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first, stride = get_rank() * workers + worker, get_world_size() * workers
        for count, (image, target) in enumerate(self.stream):
            index = first + count * stride
            with seeded(self.seed, self.epoch, index):
                image = self.transform(to_channels(image, self.in_chans))
            yield Sample(image, int(target), index, 0)


class EpochBatches(Sampler):
    """This rank's batches of keys (epoch, index).

    Training: a permutation from (seed, epoch), cut into global batches; rank r takes every world-size-th sample from
    r on, and what does not fill a global batch is dropped. Evaluation (`shuffle=False`): every sample exactly once
    over all ranks, in order, so ranks may differ by one sample.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, shuffle: bool = True):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world = get_rank(), get_world_size()
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin `epoch` at batch number `start`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        if self.shuffle:
            return self.length // (self.batch_size * self.world)
        return math.ceil(len(range(self.rank, self.length, self.world)) / self.batch_size)

    def __iter__(self):
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = range(self.length)
        mine = order[self.rank :: self.world]
        for batch in range(self.start, len(self)):
            indices = mine[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(self.epoch, index) for index in indices]


def _outlive_signals(_worker_id: int) -> None:
    """A scheduler signals every process of a job; only the main one answers, and it needs its workers to finish the
    step. So a worker survives a SIGTERM, for half a minute: whoever wants to end it for good does not wait forever."""
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def _end_workers(loader: DataLoader) -> None:
    """Persistent workers live as long as the loader's iterator; at exit it is dropped before python ends its children
    by SIGTERM, which they would survive."""
    loader._iterator = None


class Loader:
    """A DataLoader with `begin(epoch, batch)`; iterating starts there, `len` is the whole epoch."""

    def __init__(self, dataset, args, batch_size: int, shuffle: bool):
        self.dataset, self.batch_size = dataset, batch_size
        self.stream = isinstance(dataset, IterableDataset)
        self.start = 0
        common = dict(
            num_workers=args.num_workers,
            pin_memory=args.pin_mem and torch.cuda.is_available(),
            persistent_workers=args.num_workers > 0 and not self.stream,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator().manual_seed(args.seed),  # so that a loader never draws from the global one
        )
        if self.stream:
            self.loader = DataLoader(dataset, batch_size=batch_size, drop_last=shuffle, **common)
        else:
            self.batches = EpochBatches(len(dataset), batch_size, args.seed, shuffle)
            self.loader = DataLoader(dataset, batch_sampler=self.batches, **common)
        weakref.finalize(self, _end_workers, self.loader)

    def begin(self, epoch: int, start: int = 0) -> "Loader":
        self.start = start
        if self.stream:
            self.dataset.epoch = epoch
            if hasattr(self.dataset.stream, "set_epoch"):
                self.dataset.stream.set_epoch(epoch)
        else:
            self.batches.set_epoch(epoch, start)
        return self

    def __len__(self) -> int:
        if self.stream:
            return len(self.dataset) // (self.batch_size * get_world_size())
        return len(self.batches)

    def __iter__(self):
        if not self.stream:
            return iter(self.loader)
        # A stream cannot be entered in the middle: what a resumed run has seen is read again and passed over.
        batches = (batch for batch, _ in zip(self.loader, range(len(self))))
        return (batch for position, batch in enumerate(batches) if position >= self.start)


def build_loader(images, transform, args, batch_size: int, train: bool) -> Loader:
    """Batches of `images` (an `Images` or a stream of timm's). UserError when training has less than one batch."""
    if isinstance(images, Images):
        dataset = KeyedDataset(images, transform, args, replace=train)
    else:
        dataset = StreamDataset(images, transform, args)
    needed = batch_size * get_world_size()
    if train and len(dataset) < needed:
        raise UserError(
            f"the training set has {len(dataset)} images, fewer than one batch of {needed} "
            f"(--batch_size {batch_size} on {get_world_size()} process(es)): lower --batch_size"
        )
    return Loader(dataset, args, batch_size, train)
