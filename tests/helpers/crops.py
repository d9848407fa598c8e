"""The transforms that begin with a random resized crop."""

import main_finetune
from util.data import transforms
from util.data.image_format import IMAGENET
from util.data.presets import settle_preset


def transform_of(name: str, size: tuple[int, int]):
    """Return the transform of pretraining, probe or finetuning for images of `size` (H, W)."""
    if name == "pretraining":
        return transforms.pretrain_transform("mae", size, *IMAGENET)
    if name == "probe":
        return transforms.probe_transform("rrc", size, *IMAGENET)
    args = main_finetune.get_args_parser().parse_args([])
    args.input_size = 224
    settle_preset(args)
    return transforms.finetune_transform(args, size, *IMAGENET)
