"""`build_dataset` and `build_transform`, as forks of the official repository import them."""

import copy

from util.data import transforms
from util.data.draws import sample_rng_of
from util.data.image_format import image_shape, mean_std
from util.data.presets import settle_preset
from util.data.readers import read_images
from util.data.samples import KeyedDataset


def build_transform(is_train: bool, args):
    """Return the fine-tuning transform (`is_train`) or the evaluation transform for the flags `args`."""
    shape, stats = image_shape(args.input_size), mean_std(args.dataset, args.in_chans, args.mean, args.std)
    if is_train:
        if getattr(args, "aa", None) == "auto":  # of a fork that calls this with flags as they were parsed
            args = copy.copy(args)
            settle_preset(args)
        return transforms.finetune_transform(args, shape, *stats)
    return transforms.eval_transform(shape, *stats, args.crop_pct)


def build_dataset(is_train: bool, args):
    """Return the images of one split with the transform of `build_transform`, ready for a loader
    (`util.data.loader`)."""
    images, transform = read_images(args, is_train), build_transform(is_train, args)
    draft, pixel_range = (getattr(args, name, None) for name in ("jpeg_draft", "pixel_range"))
    options = {"pixel_range": pixel_range, "sample_rng": sample_rng_of(args)}
    return KeyedDataset(images, transform, args.seed, args.in_chans, bool(draft), **options)
