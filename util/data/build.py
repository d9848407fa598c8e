"""The loader for a data set of any kind."""

from util.data.loader import Loader
from util.data.samples import KeyedDataset, StreamDataset
from util.data.shard_loader import ShardLoader
from util.data.shards import Shards
from util.data.sources import Images
from util.errors import UserError
from util.parallel.distributed import get_world_size


def build_loader(
    images, transform, args, batch_size: int, train: bool, num_workers: int | None = None, split: bool = True
) -> Loader:
    """Batches of `images` (an `Images`, `Shards` or a stream of timm's). UserError when training has less than one
    batch. `num_workers` replaces the flag's. The ranks split the images among them; with `split=False` every rank reads
    all of them, which a stream of timm's cannot (ValueError)."""
    if isinstance(images, Shards):
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
