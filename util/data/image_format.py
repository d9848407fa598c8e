"""The format of a model's input images: height and width, per-channel mean and standard deviation."""

from util.errors import UserError

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Per-channel mean and standard deviation of training sets, computed with tools/mean_std.py. Others use ImageNet's.
MEAN_STD = {
    "cifar10": ((0.49140, 0.48216, 0.44653), (0.24703, 0.24349, 0.26159)),
    "cifar100": ((0.50707, 0.48655, 0.44092), (0.26733, 0.25644, 0.27615)),
    "tiny_imagenet": ((0.48024, 0.44807, 0.39755), (0.27699, 0.26906, 0.28208)),
    "digits": ((0.30543,) * 3, (0.37596,) * 3),
}


def mean_std(args) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the per-channel mean and standard deviation: `--mean/--std`, else the data set's own for `--in_chans`.

    Raises UserError when only one of the flags is given, or their length is not the number of channels.
    """
    mean, std = args.mean, args.std
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: give both (tools/mean_std.py computes them) or neither")
    if mean is None:
        mean, std = MEAN_STD.get(args.dataset, IMAGENET)
        if args.in_chans != 3:  # grey, or grey and alpha: the average channel; alpha counts like a colour
            mean, std = ([sum(values) / 3] * args.in_chans for values in (mean, std))
    if len(mean) != args.in_chans or len(std) != args.in_chans:
        raise UserError(f"--mean and --std need one number per channel: --in_chans is {args.in_chans}")
    if min(std) <= 0:
        raise UserError("--std must be positive")
    return tuple(mean), tuple(std)


def input_size(args) -> tuple[int, int]:
    """Return (H, W) of `args.input_size`, which the mains set to the model's own size when the flag is absent."""
    size = args.input_size
    return (size, size) if isinstance(size, int) else (size[0], size[-1])
