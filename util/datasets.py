"""`build_dataset` and `build_transform`, as forks of the official repository import them."""

from util.data import transforms
from util.data.image_format import input_size, mean_std
from util.data.readers import read_images
from util.data.samples import KeyedDataset


def build_transform(is_train: bool, args):
    """Return the fine-tuning transform (`is_train`) or the evaluation transform for the flags `args`."""
    mean, std = mean_std(args)
    if is_train:
        return transforms.finetune_transform(args, input_size(args), mean, std)
    return transforms.eval_transform(input_size(args), mean, std, args.crop_pct)


def build_dataset(is_train: bool, args):
    """Return the images of one split with the transform of `build_transform`, ready for a loader
    (`util.data.loader`)."""
    return KeyedDataset(read_images(args, is_train), build_transform(is_train, args), args)
