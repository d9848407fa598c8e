"""How images are read for a checkpoint: size and channels of its model, normalisation of its training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torchvision import transforms

from util.data.image_format import MEAN_STD, mean_std
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.samples import KeyedDataset
from util.data.sources import Files, Subset
from util.data.transforms import Converter, Resize, check_channels, eval_transform
from util.errors import MissingSplit, UserError
from util.report.pictures import denormalized, shown_channels


@dataclass
class ImageOptions:
    """The flags that `util.data` reads, resolved for one checkpoint. Its functions take them in place of the flags.
    Nothing changes but `pixel_range`, which `settle_pixel_range` sets when the first images are read."""

    in_chans: int
    input_size: tuple[int, int]
    mean: list[float] | None
    std: list[float] | None
    dataset: str
    crop_pct: float | None = None
    interpolation: transforms.InterpolationMode = transforms.InterpolationMode.BICUBIC
    squash: bool = False  # whether both sides are resized alike, without keeping the proportions
    seed: int = 0
    num_workers: int = 0
    pin_mem: bool = False
    shuffle_buffer: int = 1
    nb_classes: int | None = None
    jpeg_draft: bool = False
    pixel_range: list | None = None

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Per-channel mean and standard deviation. Raises UserError if --mean and --std do not fit the channels."""
        return mean_std(self.dataset, self.in_chans, self.mean, self.std)

    @property
    def converter(self) -> Converter:
        """The conversion of an image to 8 bits and the channels of the model."""
        return Converter(self.in_chans, self.pixel_range)

    def transform(self, crop_pct: float | None = None) -> transforms.Compose:
        """Return the transform of evaluation; `crop_pct` replaces that of the flags."""
        crop_pct = crop_pct or self.crop_pct
        made = eval_transform(self.input_size, *self.mean_std, crop_pct)
        if self.squash:
            made.transforms[0] = Resize(tuple(int(side / (crop_pct or 1.0)) for side in self.input_size))
        made.transforms[0].interpolation = self.interpolation
        return made


def image_options(args, in_chans: int, size: tuple[int, int], stored: Mapping[str, Any] = {}) -> ImageOptions:
    """Return the options for a model of these channels and image size, and with the `stored` flags of its file; flags
    that a command lacks keep their defaults. Raises UserError for a number of channels that images cannot have."""
    check_channels(in_chans)
    mean, std = _normalisation(args, stored)
    names = ("dataset", "crop_pct", "seed", "num_workers", "pin_mem", "shuffle_buffer", "nb_classes", "jpeg_draft")
    flags = {name: getattr(args, name) for name in names if hasattr(args, name)}
    given, known = getattr(args, "pixel_range", None), stored.get("pixel_range")
    flags["pixel_range"] = known if given in (None, ["auto"]) and known else given
    return ImageOptions(in_chans, (size[0], size[1]), mean, std, **flags)


def _normalisation(args, stored: Mapping[str, Any]) -> tuple:
    """Return --mean and --std, else those of the run that wrote the file, else (None, None): the data set's own."""
    if args.mean is not None or args.std is not None:
        return args.mean, args.std
    if stored.get("mean") is None and stored.get("dataset") and args.dataset == "imagefolder":
        return MEAN_STD.get(stored["dataset"], (None, None))
    return stored.get("mean"), stored.get("std")


@dataclass(frozen=True)
class SampledImages:
    """Images (N, C, H, W), normalised by `mean` and `std`, and the `subset` of the data set that they are, which also
    has the unreadable ones. `source` are the flags --dataset and --data_path that read the same data set."""

    imgs: torch.Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    subset: Subset
    source: dict[str, str]
    channels: tuple[int, ...] | None = None  # that are shown as red, green and blue, see `shown_channels`

    @property
    def colours(self) -> torch.Tensor:
        """The images in [0, 1], as they are shown."""
        return denormalized(self.imgs, self.mean, self.std, self.channels)


def sample_images(args, options: ImageOptions, model, mask_ratio: float = 0.0) -> SampledImages:
    """Read `--count` images, evenly spaced over `--data` or the data set. Raises UserError if none can be read, and if
    `mask_ratio` leaves no visible patch."""
    if args.count < 1:
        raise UserError(f"--count {args.count} must be positive")
    patches = model.patch_embed.num_patches
    if int(patches * (1 - mask_ratio)) < 1:
        raise UserError(f"--mask_ratio {mask_ratio} leaves no visible patch of {patches}: lower it")
    transform, (mean, std) = options.transform(), options.mean_std
    channels = shown_channels(options.in_chans, args.show_channels)
    images, source = _open_images(args)
    images.expect_bands(options.in_chans, getattr(args, "band_axis", None))
    settle_pixel_range(options, images)
    pixels = {"in_chans": options.in_chans, "pixel_range": options.pixel_range}
    dataset = KeyedDataset(images, transform, options.seed, replace=False, **pixels)
    indices = torch.linspace(0, len(images) - 1, min(args.count, len(images))).long().tolist()
    samples = [sample for sample in (dataset[index] for index in indices) if not sample.bad]
    if not samples:
        raise UserError("none of the chosen images could be read; their names are above")
    imgs = torch.stack([sample.image for sample in samples])
    return SampledImages(imgs, mean, std, Subset(images, indices), source, channels)


def _open_images(args):
    """Open `--data`, else the validation images of the data set, else its training images -> images, source flags."""
    source = {"dataset": args.dataset, "data_path": args.data_path}
    if not args.data:
        try:
            return read_images(args, train=False), source
        except MissingSplit:
            return read_images(args, train=True), source
    path = Path(args.data)
    if path.is_file():
        return Files([str(path)], [-1], None), source
    if not path.is_dir():
        raise UserError(f"--data {path} does not exist: an image or a folder of images is needed")
    source = {"dataset": "folder", "data_path": str(path)}
    return read_images(SimpleNamespace(**source), train=True), source
