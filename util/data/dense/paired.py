"""Samples of images with dense annotations, and loaders of them."""

from typing import Any

import torch
from PIL import Image
from torch.utils.data import default_collate

from util.data.build import check_enough
from util.data.dense.annotated import Annotated
from util.data.draws import sample_rng_of
from util.data.loader import Loader, in_shared_memory
from util.data.pixels import bytes_per_value, split_normalisation
from util.data.samples import KeyedDataset
from util.data.shared_memory import check_shared_memory
from util.errors import UserError


class PairedDataset(KeyedDataset):
    """Images and annotations by key, as in `KeyedDataset`: an unreadable image or annotation is reported and, in
    training, replaced; an annotation that does not fit ends the run (`BadAnnotation`). `transform(image, annotation)`
    returns the tensor and the target."""

    images: Annotated

    def _decoded(self, index):
        image = self.images.load(index)
        return self.convert(image), self.images.annotation(index, image.size)

    def _blank(self, index):
        size = 32, 32
        return self.convert(Image.new("RGB", size)), self.images.blank(index, size)

    def _transformed(self, decoded, index):
        return self.transform(*decoded)

    @staticmethod
    def collate(samples: list[Any]):
        """Make a batch: targets that are dicts become a list, everything else tensors. Raises UserError for images of
        several sizes."""
        images, targets, *rest = zip(*samples)
        if len({image.shape for image in images}) > 1 or (
            not isinstance(targets[0], dict) and len({target.shape for target in targets}) > 1
        ):
            raise UserError("images of several sizes form no batch: evaluate one image at a time")
        targets = list(targets) if isinstance(targets[0], dict) else torch.stack(targets)
        return in_shared_memory(type(samples[0])(torch.stack(images), targets, *map(default_collate, rest)))


def build_paired_loader(
    images: Annotated,
    transform,
    args,
    batch_size: int,
    train: bool,
    num_workers: int | None = None,
    seed: int | None = None,
) -> Loader:
    """Return a loader of batches of annotated images for the flags `args`; `num_workers` and `seed` override the flags.
    In evaluation, unreadable images are black, without labels, and marked by `bad`.

    Raises UserError when the training set is smaller than one batch, or a batch does not fit into shared memory.
    """
    workers = args.num_workers if num_workers is None else num_workers
    seed = args.seed if seed is None else seed
    pixels = {"pixel_range": getattr(args, "pixel_range", None), "sample_rng": sample_rng_of(args)}
    # A target of 8 bytes per pixel, a mask, is as large as two channels of float32.
    targets = 4 * getattr(transform, "target_channels", 2)
    size, (transform, normalise) = getattr(transform, "size", None), split_normalisation(transform)
    per_pixel = args.in_chans * bytes_per_value(normalise, pixels["pixel_range"]) + targets
    check_shared_memory(workers, min(batch_size, len(images)), 1, size, per_pixel)
    data = PairedDataset(images, transform, seed, args.in_chans, replace=train, **pixels)
    loader = Loader(data, batch_size, train, seed, workers, args.pin_mem, normalise=normalise)
    if train:
        check_enough(len(images), batch_size)
    return loader
