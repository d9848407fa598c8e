"""The format of a model's input images: height and width, per-channel mean and standard deviation."""

from collections.abc import Sequence

from util.data.bands import many_bands
from util.errors import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Per-channel mean and standard deviation of training sets, computed with tools/mean_std.py. Others use ImageNet's.
MEAN_STD = {
    "cifar10": ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    "cifar100": ((0.50707, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
    "tiny_imagenet": ((0.48024, 0.44807, 0.39755), (0.27699, 0.26906, 0.28208)),
    "digits": ((0.30543,) * 3, (0.37596,) * 3),
    "scenes": ((0.45000, 0.41798, 0.36428), (0.33391, 0.26037, 0.27709)),
}


def mean_std(
    dataset: str, in_chans: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the per-channel mean and standard deviation: `mean` and `std` where they are given, else those of
    `dataset`, for `in_chans` channels.

    Raises UserError when only one of them is given, when their number is not the number of channels, and when a
    standard deviation is not positive; and when none is given for more channels than an image has.
    """
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: give both (tools/mean_std.py computes them) or neither")
    if mean is None and many_bands(in_chans):
        raise UserError(
            f"--in_chans {in_chans} needs --mean and --std, {in_chans} numbers each: tools/mean_std.py --in_chans "
            f"{in_chans} --data_path DIR computes them from the training set"
        )
    if mean is None or std is None:
        mean, std = MEAN_STD.get(dataset, IMAGENET)
        if in_chans != 3:  # grey, or grey and alpha: the average channel; alpha counts like a colour
            mean, std = [sum(mean) / 3] * in_chans, [sum(std) / 3] * in_chans
    if len(mean) != in_chans or len(std) != in_chans:
        raise UserError(f"--mean and --std need one number per channel: --in_chans is {in_chans}")
    if min(std) <= 0:
        raise UserError("--std must be positive")
    return tuple(mean), tuple(std)


def mean_std_source(dataset: str, mean: Sequence[float] | None) -> str:
    """Return where the values of `mean_std` come from, for a reader."""
    if mean is not None:
        return "--mean, --std"
    return f"training set of {dataset}" if dataset in MEAN_STD else "ImageNet's; --mean and --std change them"


def image_shape(size: int | Sequence[int]) -> tuple[int, int]:
    """Return (H, W) of a settled `--input_size`: one number, or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
