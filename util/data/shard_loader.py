"""Batches from WebDataset shards: their order, their division among data workers, and replacements of damaged images.

In every epoch the shards are joined in an order drawn from (seed, epoch), and their images are cut into equal sections,
one for every data worker of every rank; a section may begin inside a shard. A buffer shuffles within a section. All of
this follows from the image counts, so a resumed run can skip the images it has seen without decoding them, and opens
only shards that it still needs.
"""

import copy
import io
import itertools
import random
import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.filters import shuffle

from util.data.draws import SampleRng
from util.data.images import BROKEN_IMAGE, open_image, printable, read_image, reason_of, warn_unreadable
from util.data.jpeg_draft import split_crop
from util.data.loader import Loader, collate, loader_options
from util.data.samples import DRAWS, NamedSample, Sample, UnreadableData
from util.data.shard_members import BAD_SHARD, LeftOut, members_of, samples_of, warn_bad_shard
from util.data.shards import Shards, open_shard
from util.data.transforms import Converter, keeps_depth, uses_generators
from util.parallel.distributed import get_rank, get_world_size


class Record(NamedTuple):
    """One image of a shard as stored: encoded image, label as text, and a name for messages."""

    image: bytes
    label: bytes
    name: str


class Entry(NamedTuple):
    """The content of one position of a section."""

    index: int  # number of the image that belongs at this position
    record: Record | None  # this image or its replacement; None when it is unreadable and not replaced
    bad: int  # 1 when the image could not be read, else 0
    error: str = ""  # without a record: why it could not be read


_noted = set()  # shards of which this process, or the one that forked it, has reported what is left out


def read_shard(url: str) -> Generator[Record, None, None]:
    """Yield all images of a shard, in order. Images and labels that are left out are reported, once per shard and
    process. Raises BAD_SHARD."""
    left_out = LeftOut()
    try:
        with open_shard(url) as stream:
            for sample in samples_of(members_of(stream, url, left_out), left_out):
                yield Record(sample.image, b"-1" if sample.label is None else sample.label, f"{url}: {sample.name}")
    finally:  # also after the last image that is wanted
        lost = left_out.samples_only()
        if lost.counts and url not in _noted:
            _noted.add(url)
            sys.stderr.write(f"note: left out of {printable(url)}: {lost}\n")
            sys.stderr.flush()


class Section:
    """Images `start` to `stop` of the shards joined in `order`, shuffled by a buffer of `buffer` images."""

    def __init__(self, shards: Shards, order: list[int], start: int, stop: int, buffer: int, seed: int, replace: bool):
        self.shards, self.order, self.replace = shards, order, replace
        self.length, self.buffer, self.seed = stop - start, buffer, seed
        self.parts, at = [], 0  # (position in `order`, first image, last image + 1)
        for order_index, shard in enumerate(order):
            first, last = max(start - at, 0), min(stop - at, shards.counts[shard])
            if first < last:
                self.parts.append((order_index, first, last))
            at += shards.counts[shard]

    def positions(self) -> Iterator[int]:
        """Return the positions 0 to length - 1, shuffled by the buffer."""
        if self.buffer <= 1:
            return iter(range(self.length))
        return iter(shuffle(self.buffer, rng=random.Random(self.seed))(iter(range(self.length))))

    def entries(self, passed: int) -> Iterator[Entry]:
        """Yield the entries after the first `passed`. Raises UnreadableData after too many damaged shards in a row."""
        wanted, positions, held = bytearray(b"\1") * self.length, self.positions(), {}
        for position in itertools.islice(positions, passed):
            wanted[position] = 0
        arriving = self._read(wanted)
        for position in positions:
            while position not in held:
                arrived, entry = next(arriving)
                held[arrived] = entry
            yield held.pop(position)

    def _read(self, wanted: bytearray) -> Iterator[tuple[int, Entry]]:
        """Yield (position, entry) in the order of the shards. Shards without wanted entries are not opened."""
        start = 0
        for order_index, first, last in self.parts:
            end = start + last - first
            if wanted.find(1, start, end) >= 0:
                with closing(self._part(order_index, first, last)) as entries:
                    for position, entry in enumerate(entries, start):
                        if wanted[position]:
                            yield position, entry
            start = end

    def _part(self, order_index: int, first: int, last: int) -> Generator[Entry, None, None]:
        """Yield images `first` to `last` of shard `order[order_index]`. Unreadable images are replaced by images of the
        shards after it; without replacement their record is None."""
        shard = self.order[order_index]
        index, end = (self.shards.offsets[shard] + image for image in (first, last))
        failures = 0
        for donor in itertools.count(order_index):
            before, problem, url = index, None, self.shards.urls[self.order[donor % len(self.order)]]
            skip = first if donor == order_index else 0
            try:
                with closing(read_shard(url)) as records:
                    for record in itertools.islice(records, skip, skip + end - index):
                        yield Entry(index, record, int(donor != order_index))
                        index += 1
            except BAD_SHARD as error:
                problem = error
            if index == end:
                return
            if donor == order_index or problem is not None:
                lost = f"; {end - index} images are lost" if donor == order_index else ""
                lost += " and replaced by others" if lost and self.replace else ""
                reason = problem or f"it ends after {skip + index - before} images"
                warn_bad_shard(url, f"{reason}{lost}")
            if not self.replace:
                lost = f"its shard is damaged: {printable(str(reason))}"
                yield from (Entry(missing, None, 1, lost) for missing in range(index, end))
                return
            failures = 0 if index > before else failures + 1
            if failures >= min(len(self.order), DRAWS):
                raise UnreadableData(f"{failures} shards in a row could not be read, the last one {url}: {problem}")

    def after(self) -> Iterator[Entry]:
        """Yield the images of the shard after the section."""
        order_index = (self.parts[-1][0] + 1) % len(self.order)
        yield from self._part(order_index, 0, self.shards.counts[self.order[order_index]])


class ShardDataset(IterableDataset):
    """Transformed images of shards, in whole batches of `batch_size` from each worker.

    With `train`: shuffled; every rank gets the same number of batches and an incomplete last batch is dropped;
    unreadable images are replaced, and only then does a sample occur twice. Otherwise: every image once, in order; the
    ranks' numbers of images may differ by one; unreadable images have `bad` set. With `split=False` every rank gets all
    images. With `named` the samples are `NamedSample`s, and labels are not read.
    """

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
        pixel_range: list | None = None,
        named: bool = False,
        sample_rng: str = "v2",
    ):
        self.shards, self.batch_size, self.train, self.named = shards, batch_size, train, named
        _noted.update(shards.counted)
        self.seed, self.buffer = seed, shuffle_buffer if train else 1
        self.rng = SampleRng(seed, sample_rng, uses_generators(transform))
        self.convert = Converter(in_chans, pixel_range, keeps_depth(transform))
        self.crop, self.transform = split_crop(transform) if jpeg_draft else (None, transform)
        self.labels = range(classes) if classes else range(-1, 2**31)
        self.at = torch.zeros(2, dtype=torch.int64).share_memory_()  # epoch and first batch, shared with the workers
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
        """Return the section of one of this rank's workers, which makes every `workers`-th batch."""
        order, seed = list(range(len(self.shards.urls))), self.seed * 1_000_003 + epoch
        if self.train:
            random.Random(seed).shuffle(order)
        edges = (
            self.first + self.batch_size * (w * (self.batches // workers) + min(w, self.batches % workers))
            for w in (worker, worker + 1)
        )
        start, stop = (min(edge, self.last) for edge in edges)
        return Section(self.shards, order, start, stop, self.buffer, seed * 65_537 + start, replace=self.train)

    def __iter__(self) -> Iterator[Sample | NamedSample]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        epoch, start = self.at.tolist()
        worker = (worker + start) % workers  # DataLoader takes the first batch from worker 0
        section = self.section(epoch, worker, workers)
        passed = min(len(range(worker, start, workers)) * self.batch_size, section.length)
        (entries,) = itertools.tee(section.entries(passed), 1)  # a copy of a tee can read ahead
        for entry in entries:
            with self.rng.sample(epoch, entry.index):
                image, label, bad, error = self._read(entry, entries, section)
                image = self.transform(image)
            sample = Sample(image, label, entry.index, bad)
            yield NamedSample(*sample, self._name(entry), error) if self.named else sample

    def _name(self, entry: Entry) -> str:
        return self.shards.name(entry.index) if entry.record is None else entry.record.name

    def _read(self, entry: Entry, entries, section: Section) -> tuple[Image.Image, int, int, str]:
        """Return (image, label, number of unreadable images, why it is unreadable if it is not replaced) of `entry` or,
        if it is unreadable, of its replacement."""
        bad, reason = entry.bad, entry.error
        for other in itertools.chain([entry], itertools.islice(self._others(entries, section), DRAWS - 1)):
            if other.record is not None:
                try:
                    return *self._decoded(other.record), bad, ""
                except BROKEN_IMAGE as error:
                    warn_unreadable(other.record.name, error)
                    reason = reason_of(error)
            if not self.train:
                return self.convert(Image.new("RGB", (32, 32))), -1, 1, reason
            bad += 1
        last = printable(other.record.name)
        raise UnreadableData(f"{DRAWS} images in a row could not be read, the last one {last}")

    @staticmethod
    def _others(entries, section: Section):
        yield from copy.copy(entries)
        yield from section.after()

    def _decoded(self, record: Record) -> tuple[Image.Image, int]:
        file, label = io.BytesIO(record.image), -1 if self.named else int(record.label)
        if label not in self.labels and not self.named:
            raise ValueError(f"its label {label} is not between 0 and {self.labels[-1]}")
        if self.crop is not None:
            return self.crop(open_image(file), self.convert), label
        return self.convert(read_image(file)), label


class ShardLoader(Loader):
    """Batches of shards; iteration can start at any batch without reading those before it."""

    def __init__(self, dataset: ShardDataset, num_workers: int, pin_mem: bool = False, normalise=None):
        self.dataset, self.batch_size, self.normalise = dataset, dataset.batch_size, normalise
        self.stream, self.shuffle, self.start = True, dataset.train, 0
        options = loader_options(dataset.seed, min(num_workers, max(1, dataset.batches)), pin_mem)
        self.loader = DataLoader(dataset, batch_size=dataset.batch_size, collate_fn=collate, **options)

    def begin(self, epoch: int, start: int = 0) -> "ShardLoader":
        self.dataset.at[:] = torch.tensor([epoch, start])
        return self

    def __len__(self) -> int:
        return self.dataset.batches

    def skip_to_start(self, iterator):
        return iterator

    def order(self) -> str:
        data = self.dataset
        return (
            f"{len(data.shards.urls)} shards with {len(data)} images by {get_world_size()} x "
            f"{max(1, self.loader.num_workers)} processes, in batches of {data.batch_size}, buffer "
            f"{data.buffer}"
        )
