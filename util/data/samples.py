"""One sample: an image with its label, its index and the random numbers that belong to it."""

import copy
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from util.data.images import BROKEN_IMAGE, say_unreadable, shown
from util.data.jpeg_draft import split_crop
from util.data.sample_rng import seeded
from util.data.sources import Images
from util.data.transforms import to_channels
from util.errors import UserError
from util.parallel.distributed import get_rank, get_world_size

DRAWS = 20  # replacements tried for one sample before the data set counts as unreadable


class UnreadableData(UserError):
    """Image after image cannot be read. Raised in a data worker, which turns it into a RuntimeError of that text."""


class Sample(NamedTuple):
    """One image, or after collation one batch."""

    image: torch.Tensor  # (C, H, W)
    target: int  # label, -1 without; of label sets the row of `util.data.labels.LabelSets.target`
    index: int  # place in the data set: the key of the sample's random numbers
    bad: int  # images that could not be read before this one was drawn in their place


class KeyedDataset(torch.utils.data.Dataset):
    """`images` through `transform`, by key (epoch, index). A plain index means epoch 0.

    An image that cannot be read is named on stderr and, in training, replaced by another draw. In evaluation
    (`replace=False`) it comes as zeros with `bad` set, so that it can be left out of the count.
    """

    def __init__(
        self, images: Images, transform, seed: int, in_chans: int, jpeg_draft: bool = False, replace: bool = True
    ):
        self.images, self.seed, self.in_chans, self.replace = images, seed, in_chans, replace
        self.crop, self.transform = split_crop(transform) if jpeg_draft else (None, transform)

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

    def __init__(self, stream, transform, seed: int, in_chans: int):
        self.stream, self.transform, self.seed, self.in_chans, self.epoch = stream, transform, seed, in_chans, 0
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
