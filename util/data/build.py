"""Choice of the loader for a data set: images by index, WebDataset shards or a stream of timm."""

from collections.abc import Sequence
from typing import Any

from util.data.draws import sample_rng_of
from util.data.fast_resize import with_fast_resize
from util.data.loader import Loader
from util.data.pixels import bytes_per_value, split_normalisation
from util.data.samples import KeyedDataset, StreamDataset
from util.data.shard_loader import ShardDataset, ShardLoader
from util.data.shards import Shards
from util.data.shared_memory import check_shared_memory
from util.data.sources import Images
from util.errors import UserError
from util.parallel.distributed import get_world_size


def build_loader(
    images,
    transform,
    args,
    batch_size: int,
    train: bool,
    num_workers: int | None = None,
    split: bool = True,
    seed: int | None = None,
    named: bool = False,
    labels: Sequence[int] | None = None,
) -> Loader:
    """Return a loader of batches of `images` (an `Images`, `Shards` or a stream of timm) for the flags `args`;
    `num_workers` and `seed` override the flags of these names. The ranks split the images among themselves; with
    `split=False` every rank reads all of them. With `named` the batches are of `NamedSample`s. With `labels`, those of
    the images, every class is drawn equally often. Workers hand over bytes where `transform` ends with the
    normalisation, and the loader normalises (`util.data.pixels`).

    Raises UserError when the training set is smaller than one batch, or a batch does not fit into the shared memory
    by which workers pass it on; ValueError for a stream with `split=False` or `named`.
    """
    pixels = {"seed": args.seed if seed is None else seed, "in_chans": args.in_chans}
    pixels["pixel_range"] = getattr(args, "pixel_range", None)
    pixels["sample_rng"] = sample_rng_of(args)
    transform, normalise = split_normalisation(transform)
    if getattr(args, "fast_resize", False) and train:
        transform = with_fast_resize(transform)
    draft = getattr(args, "jpeg_draft", False)
    workers = args.num_workers if num_workers is None else num_workers
    check_shared_memory(
        workers,
        min(batch_size, len(images)) if hasattr(images, "__len__") else batch_size,
        args.in_chans,
        getattr(args, "input_size", None),
        bytes_per_value(normalise, pixels["pixel_range"]),
    )
    if isinstance(images, Shards):
        classes = getattr(args, "nb_classes", None)
        options: dict[str, Any] = dict(
            shuffle_buffer=args.shuffle_buffer, jpeg_draft=draft, classes=classes, split=split, named=named
        )
        data = ShardDataset(images, transform, batch_size, train, **pixels, **options)
        loader = ShardLoader(data, workers, args.pin_mem, normalise)
    else:
        if isinstance(images, Images):
            data = KeyedDataset(images, transform, **pixels, jpeg_draft=draft, replace=train, named=named)
        elif named:
            raise ValueError("the images of a stream have no names")
        elif split:
            data = StreamDataset(images, transform, **pixels)
        else:
            raise ValueError("split=False does not work for a stream: timm's reader splits it among the ranks")
        loader = Loader(data, batch_size, train, pixels["seed"], workers, args.pin_mem, split, labels, normalise)
    if train:
        check_enough(len(loader.dataset), batch_size)
    return loader


def check_enough(images: int, batch_size: int) -> None:
    """Raise UserError when the training set is smaller than one batch."""
    needed = batch_size * get_world_size()
    if images < needed:
        raise UserError(
            f"the training set has {images} images, fewer than one batch of {needed} "
            f"(--batch_size {batch_size} on {get_world_size()} process(es)): lower --batch_size"
        )
