"""Choice of the loader for a data set: images by index, WebDataset shards or a stream of timm."""

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
    """Return a loader of batches of `images` (an `Images`, `Shards` or a stream of timm). `num_workers` overrides the
    flag. The ranks split the images among themselves; with `split=False` every rank reads all of them.

    Raises UserError when the training set is smaller than one batch, ValueError for a stream with `split=False`.
    """
    if isinstance(images, Shards):
        loader = ShardLoader(images, transform, args, batch_size, train, num_workers, split)
    elif isinstance(images, Images):
        data = KeyedDataset(images, transform, args, replace=train)
        loader = Loader(data, args, batch_size, train, num_workers, split)
    elif split:
        loader = Loader(StreamDataset(images, transform, args), args, batch_size, train, num_workers)
    else:
        raise ValueError("split=False does not work for a stream: timm's reader splits it among the ranks")
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
