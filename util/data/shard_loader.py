"""Batches from WebDataset shards: in which order, by which data worker, and what takes the place of damaged ones.

An epoch is the shards in an order drawn from (seed, epoch), end to end, cut at images (not at shards) into equal
sections, one for every data worker of every rank; a buffer shuffles within a section. The counts alone decide all that,
so a resumed run knows what has been seen, opens only shards from which something is missing, and decodes only that.
"""

import copy
import io
import itertools
import random
from collections.abc import Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from util.data.images import BROKEN_IMAGE, open_image, say_unreadable, shown
from util.data.jpeg_draft import split_crop
from util.data.loader import Loader, loader_options
from util.data.sample_rng import seeded
from util.data.samples import DRAWS, Sample, UnreadableData
from util.data.shards import BAD_SHARD, Shards, image_ending, members_of, open_shard, samples_of, say_bad_shard
from util.data.transforms import to_channels
from util.parallel.distributed import get_rank, get_world_size


class Record(NamedTuple):
    """One image of a shard as it is stored."""

    image: bytes
    label: bytes
    name: str


class Entry(NamedTuple):
    """What stands at one place of a section."""

    index: int  # the number of the image that belongs here
    record: Record | None  # it, or another one in its place
    bad: int  # 1 where it is not the one that belongs here


def read_shard(url: str) -> Iterator[Record]:
    """All images of a shard, in order. Raises BAD_SHARD."""
    with open_shard(url) as stream:
        for sample in samples_of(members_of(stream, url)):
            ending = image_ending(sample)
            yield Record(sample[ending], sample.get("cls", b"-1"), f"{url}: {sample['__key__']}.{ending}")


class Section:
    """Images `start` to `stop` of the shards in `order`, shuffled by a buffer of `buffer` images."""

    def __init__(self, shards: Shards, order: list[int], start: int, stop: int, buffer: int, seed: int, replace: bool):
        self.shards, self.order, self.replace = shards, order, replace
        self.length, self.buffer, self.seed = stop - start, buffer, seed
        self.parts, at = [], 0  # (place in `order`, first image, last image + 1)
        for place, shard in enumerate(order):
            first, last = max(start - at, 0), min(stop - at, shards.counts[shard])
            if first < last:
                self.parts.append((place, first, last))
            at += shards.counts[shard]

    def places(self) -> Iterator[int]:
        """0 to length - 1 in the order in which they are given out."""
        if self.buffer <= 1:
            return iter(range(self.length))
        return iter(shuffle(self.buffer, rng=random.Random(self.seed))(iter(range(self.length))))

    def entries(self, passed: int) -> Iterator[Entry]:
        """What is left of the section after the first `passed` entries. UnreadableData when nothing is to be had."""
        wanted, places, held = bytearray(b"\1") * self.length, self.places(), {}
        for place in itertools.islice(places, passed):
            wanted[place] = 0
        arriving = self._read(wanted)
        for place in places:
            while place not in held:
                arrived, entry = next(arriving)
                held[arrived] = entry
            yield held.pop(place)

    def _read(self, wanted: bytearray) -> Iterator[tuple[int, Entry]]:
        """(place, entry) in the order of the shards; those of which nothing is wanted are not opened."""
        place = 0
        for where, first, last in self.parts:
            end = place + last - first
            if wanted.find(1, place, end) >= 0:
                with closing(self._part(where, first, last)) as entries:
                    for here, entry in enumerate(entries, place):
                        if wanted[here]:
                            yield here, entry
            place = end

    def _part(self, where: int, first: int, last: int) -> Iterator[Entry]:
        """Images `first` to `last` of one shard. In place of what cannot be read come images of the shards after it, or
        none at all where nothing is replaced."""
        shard = self.order[where]
        index, end = (self.shards.offsets[shard] + image for image in (first, last))
        failures = 0
        for donor in itertools.count(where):
            before, problem, url = index, None, self.shards.urls[self.order[donor % len(self.order)]]
            skip = first if donor == where else 0
            try:
                with closing(read_shard(url)) as records:
                    for record in itertools.islice(records, skip, skip + end - index):
                        yield Entry(index, record, int(donor != where))
                        index += 1
            except BAD_SHARD as error:
                problem = error
            if index == end:
                return
            if donor == where or problem is not None:
                lost = f"; {end - index} images are lost" if donor == where else ""
                lost += ", and others take their place" if lost and self.replace else ""
                reason = problem or f"it ends after {skip + index - before} images"
                say_bad_shard(url, f"{reason}{lost}")
            if not self.replace:
                yield from (Entry(left, None, 1) for left in range(index, end))
                return
            failures = 0 if index > before else failures + 1
            if failures >= min(len(self.order), DRAWS):
                raise UnreadableData(f"{failures} shards in a row could not be read, the last one {url}: {problem}")

    def after(self) -> Iterator[Entry]:
        """The images of the shards that follow the section."""
        where = (self.parts[-1][0] + 1) % len(self.order)
        yield from self._part(where, 0, self.shards.counts[self.order[where]])


class ShardDataset(IterableDataset):
    """`shards` through `transform`, in whole batches of `batch_size` of each worker. `train`: shuffled, every rank gets
    equally many batches, what fills none is left out, and what cannot be read is replaced (a sample comes twice only
    then). Else: everything once, in order, ranks may differ by one image, and what cannot be read has `bad` set. With
    `split=False` every rank gets all images."""

    def __init__(
        self,
        shards: Shards,
        transform,
        batch_size: int,
        train: bool,
        seed: int,
        in_chans: int,
        shuffle_buffer: int = 1,
        jpeg_draft: bool = False,
        classes: int | None = None,
        split: bool = True,
    ):
        self.shards, self.batch_size, self.train = shards, batch_size, train
        self.seed, self.in_chans, self.buffer = seed, in_chans, shuffle_buffer if train else 1
        self.crop, self.transform = split_crop(transform) if jpeg_draft else (None, transform)
        self.labels = range(classes) if classes else range(-1, 2**31)
        self.at = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch and first batch; workers outlive an epoch
        rank, world = (get_rank(), get_world_size()) if split else (0, 1)
        if train:
            mine = len(shards) // (batch_size * world) * batch_size
            self.first, self.last = rank * mine, (rank + 1) * mine
        else:
            self.first, self.last = (len(shards) * edge // world for edge in (rank, rank + 1))
        self.batches = -(-(self.last - self.first) // batch_size)

    def __len__(self) -> int:
        return len(self.shards)

    def section(self, epoch: int, worker: int, workers: int) -> Section:
        """The share of one of this rank's workers, which reads every `workers`-th batch of it."""
        order, seed = list(range(len(self.shards.urls))), self.seed * 1_000_003 + epoch
        if self.train:
            random.Random(seed).shuffle(order)
        edges = (
            self.first + self.batch_size * (w * (self.batches // workers) + min(w, self.batches % workers))
            for w in (worker, worker + 1)
        )
        start, stop = (min(edge, self.last) for edge in edges)
        return Section(self.shards, order, start, stop, self.buffer, seed * 65_537 + start, replace=self.train)

    def __iter__(self) -> Iterator[Sample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, start = self.at.tolist()
        worker = (worker + start) % workers  # the loader asks its first worker first
        section = self.section(epoch, worker, workers)
        passed = min(len(range(worker, start, workers)) * self.batch_size, section.length)
        (entries,) = itertools.tee(section.entries(passed), 1)  # of which a copy looks ahead
        for entry in entries:
            with seeded(self.seed, epoch, entry.index):
                image, label, bad = self._read(entry, entries, section)
                image = self.transform(image)
            yield Sample(image, label, entry.index, bad)

    def _read(self, entry: Entry, entries, section: Section) -> tuple[Image.Image, int, int]:
        """(image, label, how many could not be read), of `entry` or of what comes after it."""
        bad = entry.bad
        for other in itertools.chain([entry], itertools.islice(self._others(entries, section), DRAWS - 1)):
            if other.record is not None:
                try:
                    return *self._decoded(other.record), bad
                except BROKEN_IMAGE as error:
                    say_unreadable(other.record.name, error)
            if not self.train:
                return to_channels(Image.new("RGB", (32, 32)), self.in_chans), -1, 1
            bad += 1
        last = shown(other.record.name)
        raise UnreadableData(f"{DRAWS} images in a row could not be read, the last one {last}")

    @staticmethod
    def _others(entries, section: Section):
        yield from copy.copy(entries)
        yield from section.after()

    def _decoded(self, record: Record) -> tuple[Image.Image, int]:
        image, label = open_image(io.BytesIO(record.image)), int(record.label)
        if label not in self.labels:
            raise ValueError(f"its label {label} is none from 0 to {self.labels[-1]}")
        if self.crop is not None:
            return self.crop(image, self.in_chans), label
        image.load()
        return to_channels(image, self.in_chans), label


class ShardLoader(Loader):
    """Batches of shards; entered at any batch."""

    def __init__(self, dataset: ShardDataset, num_workers: int, pin_mem: bool = False):
        self.dataset, self.batch_size = dataset, dataset.batch_size
        self.stream, self.shuffle, self.start = True, dataset.train, 0
        options = loader_options(dataset.seed, min(num_workers, max(1, dataset.batches)), pin_mem)
        self.loader = DataLoader(dataset, batch_size=dataset.batch_size, **options)

    def begin(self, epoch: int, start: int = 0) -> "ShardLoader":
        self.dataset.at[:] = torch.tensor([epoch, start])
        return self

    def __len__(self) -> int:
        return self.dataset.batches

    def entered(self, iterator):
        return iterator

    def order(self) -> str:
        data = self.dataset
        return (
            f"{len(data.shards.urls)} shards with {len(data)} images by {get_world_size()} x "
            f"{max(1, self.loader.num_workers)} processes, in batches of {data.batch_size}, buffer "
            f"{data.buffer}"
        )
