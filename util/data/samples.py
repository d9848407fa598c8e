"""Samples: images with their labels and indices, transformed with random numbers keyed by sample."""

import copy
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from util.data.bands import black, many_bands
from util.data.draws import REPLACEMENT, SampleRng, current_draws
from util.data.images import BROKEN_IMAGE, printable, reason_of, warn_unreadable
from util.data.jpeg_draft import split_crop
from util.data.sources import Images
from util.data.transforms import Converter, keeps_depth, uses_generators
from util.errors import UserError
from util.parallel.distributed import get_rank, get_world_size

DRAWS = 20  # images that are tried for one sample before UnreadableData is raised


class UnreadableData(UserError):
    """Too many images in a row cannot be read. When a data worker raises it, the main process raises it again, with the
    worker's traceback in the message."""


class BadAnnotation(UnreadableData):
    """An annotation that can be read but does not fit its image or the classes. It is not replaced: a mistake of this
    kind is in many files, and the scores would be wrong."""


class Sample(NamedTuple):
    """One image, or after collation one batch."""

    image: torch.Tensor  # (C, H, W); from a worker pixels in 0..255, from a `Loader` normalised (`util.data.pixels`)
    # Label, or -1 if there is none; for label sets the row of `util.data.labels.LabelSets.target`; of dense data sets
    # what the transforms of `util.data.dense.transforms` return: a mask, or a dict of boxes (in a batch a list).
    target: Any
    index: Any  # int, in a batch (N,) int64: index in the data set, from which the sample's random numbers are seeded
    # int, in a batch (N,) int64: number of unreadable images that this one replaces; in evaluation 1 for one that is
    # unreadable itself.
    bad: Any


class NamedSample(NamedTuple):
    """A `Sample` with the name of the image and, if it is unreadable and was not replaced, the reason."""

    image: torch.Tensor
    target: Any
    index: Any
    bad: Any
    name: Any  # str, in a batch a list
    error: Any


class KeyedDataset(torch.utils.data.Dataset):
    """Transformed images by key (epoch, index), or (epoch, index, place) where an index may occur several times in an
    epoch. A plain index means epoch 0.

    An unreadable image is reported on stderr and, in training, replaced by a random draw. In evaluation
    (`replace=False`) it becomes a black image with `bad` set, so that the scores can leave it out. With `named` the
    samples are `NamedSample`s.
    """

    def __init__(
        self,
        images: Images,
        transform,
        seed: int,
        in_chans: int,
        jpeg_draft: bool = False,
        replace: bool = True,
        pixel_range: list | None = None,
        named: bool = False,
        sample_rng: str = "v2",
    ):
        self.images, self.replace, self.named = images, replace, named
        images.expect_bands(in_chans)
        self.rng = SampleRng(seed, sample_rng, uses_generators(transform))
        self.convert = Converter(in_chans, pixel_range, keeps_depth(transform))
        self.crop, self.transform = split_crop(transform) if jpeg_draft else (None, transform)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key) -> Sample | NamedSample:
        epoch, index, *place = key if isinstance(key, tuple) else (0, key)
        with self.rng.sample(epoch, index, *place):
            decoded, chosen, bad, error = self._read(index)
            sample = Sample(*self._transformed(decoded, chosen), index, bad)
            return NamedSample(*sample, self.images.name(index), error) if self.named else sample

    def _transformed(self, image: Image.Image, index: int) -> tuple[torch.Tensor, Any]:
        """Return the tensor of an image that was decoded, and its target."""
        return self.transform(image), self.images.target(index)

    def _read(self, index: int) -> tuple[Any, int, int, str]:
        """Return (image, its index, number of unreadable images before it, why it is unreadable if it is not replaced)
        for `index` or its replacement."""
        for bad in range(DRAWS):
            chosen = self._replacement(bad) if bad else index
            try:
                return self._decoded(chosen), chosen, bad, ""
            except BadAnnotation:
                raise
            except BROKEN_IMAGE as error:
                warn_unreadable(self.images.name(chosen), error)
                reason = reason_of(error)
            if not self.replace:
                return self._blank(chosen), chosen, 1, reason
        last = printable(self.images.name(chosen))
        raise UnreadableData(f"{DRAWS} images in a row could not be read, the last one {last}")

    def _replacement(self, bad: int) -> int:
        """Draw the index of another image, after `bad` unreadable ones."""
        draws, count = current_draws(), len(self.images)
        return int(torch.randint(count, ())) if draws is None else draws.below(REPLACEMENT + 2 * bad, count)

    def _blank(self, index: int) -> Image.Image:
        """Return what stands for an unreadable image in evaluation."""
        channels = self.convert.in_chans
        return black(channels) if many_bands(channels) else self.convert(Image.new("RGB", (32, 32)))

    def _decoded(self, index: int) -> Image.Image:
        if self.crop is not None:
            return self.crop(self.images.open(index), self.convert)
        return self.convert(self.images.load(index))


class StreamDataset(IterableDataset):
    """An iterable data set of timm's factory. Every rank and worker numbers its samples without overlap. timm chooses
    their order and assigns shards to workers; if shards differ in size, it repeats or leaves out a few samples."""

    def __init__(
        self, stream, transform, seed: int, in_chans: int, pixel_range: list | None = None, sample_rng: str = "v2"
    ):
        self.stream, self.transform, self.seed, self.epoch = stream, transform, seed, 0
        self.rng = SampleRng(seed, sample_rng, uses_generators(transform))
        self.convert = Converter(in_chans, pixel_range, keeps_depth(transform))
        if hasattr(stream.reader, "dist_rank"):  # set by timm before the process group may exist
            stream.reader.dist_rank, stream.reader.dist_num_replicas = get_rank(), get_world_size()

    def __len__(self) -> int:
        """Return the number of samples of all ranks (timm's length is that of one rank)."""
        return getattr(self.stream.reader, "num_samples", None) or len(self.stream)

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        first, stride = get_rank() * workers + worker, get_world_size() * workers
        # A reader initialises its shuffling at its first use. With a fresh copy every epoch starts in the same state.
        stream = copy.copy(self.stream)
        stream.reader = copy.copy(stream.reader)
        stream.reader.worker_seed = self.seed * 1_000_003 + self.epoch  # replaced by torch's in a worker process
        for count, (image, target) in enumerate(stream):
            index = first + count * stride
            with self.rng.sample(self.epoch, index):
                image = self.transform(self.convert(image))
            yield Sample(image, -1 if target is None else int(target), index, 0)
