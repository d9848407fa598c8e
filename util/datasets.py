"""`build_dataset` and `build_transform`, under the names that forks of the official repository import."""

from util.data import transforms
from util.data.image_format import input_size, mean_std
from util.data.readers import read_images
from util.data.samples import KeyedDataset


def build_transform(is_train: bool, args):
    """The fine-tuning transform (`is_train`) or the evaluation transform of these flags."""
    mean, std = mean_std(args)
    if is_train:
        return transforms.finetune_transform(args, input_size(args), mean, std)
    return transforms.eval_transform(input_size(args), mean, std, args.crop_pct)


def build_dataset(is_train: bool, args):
    """Images of one split with `build_transform`'s transform, ready for a loader (`util.data.loader`)."""
    return KeyedDataset(read_images(args, is_train), build_transform(is_train, args), args)
