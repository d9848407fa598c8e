"""From images to batches: which sample comes when, on which rank, with which random numbers.

Everything is a function of (seed, epoch, sample index), so the number of workers does not matter, a run can be
resumed at any sample, and the union of the ranks' batches is the batch that one process would have had.
"""

import atexit
import copy
import math
import signal
import weakref
from itertools import islice
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, Sampler, get_worker_info

from util import watchdog
from util.datasets import Images
from util.distributed import get_rank, get_world_size
from util.draft import split_crop
from util.errors import UserError
from util.images import BROKEN_IMAGE, say_unreadable, shown
from util.rng import seeded
from util.shards import Shards
from util.transforms import to_channels

DRAWS = 20  # replacements tried for one sample before the data set counts as unreadable


class UnreadableData(UserError):
    """Image after image cannot be read. Raised in a data worker, which turns it into a RuntimeError of that text."""


class Sample(NamedTuple):
    """One image, or after collation one batch."""

    image: torch.Tensor  # (C, H, W)
    target: int  # label, -1 without; of label sets the row of `util.labels.LabelSets.target`
    index: int  # place in the data set: the key of the sample's random numbers
    bad: int  # images that could not be read before this one was drawn in their place


class KeyedDataset(torch.utils.data.Dataset):
    """`images` through `transform`, by key (epoch, index). A plain index means epoch 0.

    An image that cannot be read is named on stderr and, in training, replaced by another draw. In evaluation
    (`replace=False`) it comes as zeros with `bad` set, so that it can be left out of the count.
    """

    def __init__(self, images: Images, transform, args, replace: bool = True):
        self.images, self.replace = images, replace
        self.crop, self.transform = split_crop(transform) if getattr(args, "jpeg_draft", False) else (None, transform)
        self.seed, self.in_chans = args.seed, args.in_chans

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        with seeded(self.seed, epoch, index):
            image, place, bad = self._read(index)
            return Sample(self.transform(image), self.images.target(place), index, bad)

    def _read(self, index: int) -> tuple[Image.Image, int, int]:
        """(image, its place, unreadable ones before it), for `index` or what was drawn instead."""
        for bad in range(DRAWS):
            place = int(torch.randint(len(self.images), ())) if bad else index
            try:
                return self._decoded(place), place, bad
            except BROKEN_IMAGE as error:
                say_unreadable(self.images.name(place), error)
            if not self.replace:
                return to_channels(Image.new("RGB", (32, 32)), self.in_chans), place, 1
        last = shown(self.images.name(place))
        raise UnreadableData(f"{DRAWS} images in a row could not be read, the last one {last}")

    def _decoded(self, place: int) -> Image.Image:
        if self.crop is not None:
            return self.crop(self.images.open(place), self.in_chans)
        return to_channels(self.images.load(place), self.in_chans)


class StreamDataset(IterableDataset):
    """An iterable set of timm's factory. Samples are numbered per rank and worker; order and shards are timm's: each
    worker reads shards of its own, and where they are not equal it repeats or leaves out a few samples."""

    def __init__(self, stream, transform, args):
        self.stream, self.transform = stream, transform
        self.seed, self.in_chans, self.epoch = args.seed, args.in_chans, 0
        if hasattr(stream.reader, "dist_rank"):  # timm's reader asked when it was made, perhaps before the ranks met
            stream.reader.dist_rank, stream.reader.dist_num_replicas = get_rank(), get_world_size()

    def __len__(self) -> int:
        """Samples of all ranks (timm's own length is one rank's)."""
        return getattr(self.stream.reader, "num_samples", None) or len(self.stream)

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first, stride = get_rank() * workers + worker, get_world_size() * workers
        # A reader sets itself up at its first use, shuffling included: a fresh copy makes every epoch start alike.
        stream = copy.copy(self.stream)
        stream.reader = copy.copy(stream.reader)
        stream.reader.worker_seed = self.seed * 1_000_003 + self.epoch  # replaced by torch's in a worker process
        for count, (image, target) in enumerate(stream):
            index = first + count * stride
            with seeded(self.seed, self.epoch, index):
                image = self.transform(to_channels(image, self.in_chans))
            yield Sample(image, -1 if target is None else int(target), index, 0)


def _regroup(batches, size: int, drop_last: bool):
    """Batches of `size` from those of several workers of a stream, each of which ends with a smaller one."""
    rest = None
    for batch in batches:
        rest = batch if rest is None else Sample(*(torch.cat(pair) for pair in zip(rest, batch)))
        while len(rest.index) >= size:
            yield Sample(*(column[:size] for column in rest))
            rest = Sample(*(column[size:] for column in rest))
        rest = rest if len(rest.index) else None
    if rest is not None and not drop_last:
        yield rest


class EpochBatches(Sampler):
    """This rank's batches of keys (epoch, index).

    Training: a permutation from (seed, epoch), cut into global batches; rank r takes every world-size-th sample from
    r on, and what does not fill a global batch is dropped. Evaluation (`shuffle=False`): every sample exactly once
    over all ranks, in order, so ranks may differ by one sample, and a rank has none where samples are fewer than ranks.
    With `split=False` every rank gets all samples.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, shuffle: bool = True, split: bool = True):
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world = (get_rank(), get_world_size()) if split else (0, 1)
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
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


_working = weakref.WeakSet()  # iterators that have workers


@atexit.register
def _end_workers() -> None:
    """At exit, whoever still holds an iterator (a traceback, say): before python ends its children by SIGTERM, which
    they would survive."""
    for iterator in list(_working):
        iterator._shutdown_workers()


class Loader:
    """A DataLoader with `begin(epoch, batch)`; iterating starts there, `len` is the whole epoch. `num_workers` replaces
    the flag's; `split=False` gives every rank all samples (not of a stream)."""

    def __init__(self, dataset, args, batch_size: int, shuffle: bool, num_workers: int | None = None, split=True):
        self.dataset, self.batch_size = dataset, batch_size
        self.stream, self.shuffle = isinstance(dataset, IterableDataset), shuffle
        self.start = 0
        common = self.options(args, args.num_workers if num_workers is None else num_workers)
        if self.stream:
            self.loader = DataLoader(dataset, batch_size=batch_size, **common)
        else:
            self.batches = EpochBatches(len(dataset), batch_size, args.seed, shuffle, split)
            self.loader = DataLoader(dataset, batch_sampler=self.batches, **common)

    def options(self, args, workers: int) -> dict:
        """Of every DataLoader."""
        return dict(
            num_workers=workers,
            pin_memory=args.pin_mem and torch.cuda.is_available(),
            persistent_workers=workers > 0 and not self.stream,
            worker_init_fn=_outlive_signals,
            generator=torch.Generator().manual_seed(args.seed),  # so that a loader never draws from the global one
        )

    def begin(self, epoch: int, start: int = 0) -> "Loader":
        self.start = start
        if self.stream:
            self.dataset.epoch = epoch
            self.loader.generator.manual_seed(self.dataset.seed * 1_000_003 + epoch)  # timm shuffles by worker seeds
            if hasattr(self.dataset.stream, "set_epoch"):
                self.dataset.stream.set_epoch(epoch)
        else:
            self.batches.set_epoch(epoch, start)
        return self

    def __len__(self) -> int:
        if not self.stream:
            return len(self.batches)
        size = self.batch_size * get_world_size()
        return len(self.dataset) // size if self.shuffle else math.ceil(len(self.dataset) / size)

    def order(self) -> str:
        """What the order of an epoch depends on beside the seed, in words; empty where nothing matters."""
        return ""

    def __iter__(self):
        iterator = iter(self.loader)
        if self.loader.num_workers:
            _working.add(iterator)
        return watchdog.reading(self.entered(iterator))

    def entered(self, iterator):
        """The batches of a DataLoader's iterator from `self.start` on."""
        if not self.stream:
            return iterator
        # A stream cannot be entered in the middle: what a resumed run has seen is read again and passed over.
        batches = _regroup(iterator, self.batch_size, drop_last=self.shuffle)
        return islice(batches, self.start, len(self) if self.shuffle else None)


def next_batch(batches) -> Sample:
    """The next batch; UserError, in one sentence, where image after image is unreadable (from a data worker that comes
    with the worker's traceback in its text)."""
    try:
        return next(batches)
    except UnreadableData as error:
        raise UserError(str(error).strip().splitlines()[-1].split("UnreadableData: ")[-1]) from None


class Endless:
    """Batches of a training loader one after the other, epoch after epoch, from any number on."""

    def __init__(self, loader: Loader):
        self.loader, self._next, self._batches = loader, -1, None

    def batch(self, number: int) -> Sample:
        """Batch `number`, counted from 0 over all epochs; asking for them in order reads ahead."""
        epoch, start = divmod(number, len(self.loader))
        if number != self._next or not start:
            self._batches = iter(self.loader.begin(epoch, start))
        self._next = number + 1
        return next_batch(self._batches)


def build_loader(
    images, transform, args, batch_size: int, train: bool, num_workers: int | None = None, split: bool = True
) -> Loader:
    """Batches of `images` (an `Images`, `Shards` or a stream of timm's). UserError when training has less than one
    batch. `num_workers` replaces the flag's. The ranks split the images among them; with `split=False` every rank reads
    all of them, which a stream of timm's cannot (ValueError)."""
    if isinstance(images, Shards):
        from util.shard_loading import ShardLoader

        loader = ShardLoader(images, transform, args, batch_size, train, num_workers, split)
    elif isinstance(images, Images):
        data = KeyedDataset(images, transform, args, replace=train)
        loader = Loader(data, args, batch_size, train, num_workers, split)
    elif split:
        loader = Loader(StreamDataset(images, transform, args), args, batch_size, train, num_workers)
    else:
        raise ValueError("the reader of a stream splits its images among the ranks by itself")
    if train:
        check_enough(len(loader.dataset), batch_size)
    return loader


def check_enough(images: int, batch_size: int) -> None:
    """UserError when training has less than one batch."""
    needed = batch_size * get_world_size()
    if images < needed:
        raise UserError(
            f"the training set has {images} images, fewer than one batch of {needed} "
            f"(--batch_size {batch_size} on {get_world_size()} process(es)): lower --batch_size"
        )
