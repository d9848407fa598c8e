"""The value range of a data set (`--pixel_range`): which stored values are black and white.

8-bit images have the range 0..255 and 16-bit images 0..65535. Images of 32-bit integers, of floats and of signed
integers do not say their range, so one range is settled for the whole data set: the one that is given, the one that the
checkpoint stores, or the one that a sample of the training images agrees on.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from util.data.band_checks import BandSample
from util.data.bands import Bands, many_bands
from util.data.images import BROKEN_IMAGE, printable
from util.errors import UserError
from util.parallel.distributed import from_main_process

# Ranges of types of storage. A value outside is an error; a range LOW HIGH is a window, and values outside are clipped.
NAMED = {"unit": (0.0, 1.0), "8bit": (0.0, 255.0), "16bit": (0.0, 65535.0)}
SAMPLE = 64  # images of which the range is settled
FEW = 64  # of 256 grey levels; a note is printed for images that use fewer
_SIXTEEN_BITS = ("PNG", "PPM", "JPEG2000")  # formats whose integers have at most 16 bits, also in pillow's mode I


def range_word(text: str) -> str | float:
    """Return one value of `--pixel_range`: a number, or a word. Raises ValueError for anything else."""
    return text if text == "auto" or text in NAMED else float(text)


def check_pixel_range(value: list | None) -> None:
    """Raise UserError unless `--pixel_range` is a word, or two increasing numbers."""
    if not value or (len(value) == 1 and isinstance(value[0], str)):
        return
    numbers = len(value) == 2 and not any(isinstance(word, str) for word in value)
    if not numbers or not np.isfinite(value).all() or not value[0] < value[1]:
        raise UserError(
            f"--pixel_range {' '.join(map(str, value))} must be two increasing numbers (the values that become black "
            f"and white), auto, or one of {', '.join(NAMED)}"
        )


def limits(pixel_range: list) -> tuple[float, float]:
    """Return the values that become black and white."""
    return NAMED[pixel_range[0]] if isinstance(pixel_range[0], str) else tuple(pixel_range)


# One image ------------------------------------------------------------------------------------------------------------


def is_wide(img: Image.Image) -> bool:
    """Whether a grey image, or one of bands, has more than 8 bits."""
    if isinstance(img, Bands):
        return img.values.dtype != np.uint8
    return img.mode.startswith("I") or img.mode == "F"


def has_fixed_range(img: Image.Image) -> bool:
    """Whether the type of a wide image determines its range, 0..65535."""
    if isinstance(img, Bands):
        return img.values.dtype == np.uint16
    return img.mode.startswith("I;16") or (img.mode == "I" and img.format in _SIXTEEN_BITS)


def scaled_values(img: Image.Image, pixel_range: list | None) -> np.ndarray:
    """Return the values (H, W) of a wide image, (C, H, W) of bands, in 0..255, float32. Raises ValueError for NaN, for
    values outside the range of a type, and for an image whose type has no fixed range if `pixel_range` is None or
    empty."""
    values = np.asarray(img)
    lowest, highest = values.min(), values.max()  # NaN if any value is NaN
    if not (np.isfinite(lowest) and np.isfinite(highest)):
        raise ValueError("it has values that are NaN or infinite")
    name = "16bit" if has_fixed_range(img) else None
    if pixel_range and not (name and isinstance(pixel_range[0], str)):
        name = pixel_range[0] if isinstance(pixel_range[0], str) else None
    elif not name:
        raise ValueError(f"its values are {values.dtype}, whose range is not known: give --pixel_range LOW HIGH")
    low, high = limits([name] if name else pixel_range)
    if name and not (low <= lowest and highest <= high):
        raise ValueError(
            f"its values range from {lowest:g} to {highest:g}, outside {low:g}..{high:g}: "
            f"give --pixel_range LOW HIGH, and values outside are clipped"
        )
    scaled = values.astype(np.float32)  # 4 bytes per pixel: there may be 179 million
    if low:
        scaled -= low
    scaled *= np.float32(255.0 / (high - low))
    return np.clip(scaled, 0, 255, out=scaled)


def check_depth(img: Image.Image, pixel_range: list | None) -> None:
    """Raise ValueError for a colour image of 16 bits per channel where `pixel_range` is a window LOW HIGH: pillow has
    read its upper 8 bits only."""
    if img.info.get("bits_per_channel") == 16 and pixel_range and not isinstance(pixel_range[0], str):
        raise ValueError("it has 16 bits per channel in colour, which --pixel_range LOW HIGH cannot scale: convert it")


# A data set -----------------------------------------------------------------------------------------------------------


@dataclass
class Sample:
    """What a sample of images says: values of images without a fixed range by file, and those of other images with 16
    bits."""

    free: dict[str, tuple[float, float, str]] = field(default_factory=dict)  # name -> lowest, highest, type
    fixed: list[tuple[float, float]] = field(default_factory=list)
    colour: list[tuple[int, int]] = field(default_factory=list)  # the upper 8 of 16 bits per channel
    in_chans: int = 3

    def add(self, name: str, img: Image.Image) -> None:
        if not is_wide(img):
            if img.info.get("bits_per_channel") == 16:
                self.colour.append((int(np.asarray(img).min()), int(np.asarray(img).max())))
            return
        values = np.asarray(img)
        lowest, highest = float(values.min()), float(values.max())
        if not (np.isfinite(lowest) and np.isfinite(highest)):
            return  # counted as unreadable when it is used
        if has_fixed_range(img):
            self.fixed.append((lowest, highest))
        else:
            self.free[name] = lowest, highest, str(values.dtype)

    @property
    def is_wide(self) -> bool:
        return bool(self.fixed or self.free)

    @property
    def extremes(self) -> tuple[float, float]:
        """The lowest and the highest value of all grey images."""
        both = [*self.fixed, *((low, high) for low, high, _ in self.free.values())]
        return min(low for low, _ in both), max(high for _, high in both)


def settle_pixel_range(args, images, stored: Callable[[], Mapping[str, Any]] = dict) -> None:
    """Settle `args.pixel_range` for a data set: what is given, else what the flags `stored` in a checkpoint say, else
    what a sample of `images` agrees on; None for a set without wide images. The main process reads the sample for all.
    Raises UserError if the images disagree."""

    def find():
        try:
            return _find(args.pixel_range, images, stored, getattr(args, "in_chans", None) or 3), ""
        except UserError as error:
            return None, str(error)

    args.pixel_range, problem = from_main_process(find)
    if problem:
        raise UserError(problem)


def _find(given: list | None, images, stored, in_chans: int) -> list | None:
    if many_bands(in_chans) and not hasattr(images, "expect_bands"):
        raise UserError(f"--in_chans {in_chans}: files of bands are read from folders and lists, not from shards")
    is_given, automatic = given is not None and given != ["auto"], given == ["auto"]
    if not hasattr(images, "sampled"):
        known = given if is_given else stored().get("pixel_range")
        if automatic and not known:
            raise UserError("--pixel_range auto needs images that can be sampled, not a stream: give LOW HIGH")
        return known
    sample = read_sample(images, in_chans)
    _check_colour(sample, given if is_given else None)
    if not sample.is_wide:
        if given is not None:
            print(f"note: --pixel_range {_shown(given)} has no effect on the images, which have 8 bits")
        return given if is_given else None
    known = None if is_given else stored().get("pixel_range")
    if known:
        print(f"--pixel_range {_shown(known)}, from the checkpoint{'; auto has no effect' * automatic}")
    found = given if is_given else known or (_extremes if automatic else _agreed)(sample)
    if is_given and sample.fixed and found[0] in ("unit", "8bit"):
        raise UserError(
            f"--pixel_range {found[0]} does not apply to 16-bit images, whose range is 0..65535: give LOW HIGH, such "
            f"as --pixel_range {limits(found)[0]:g} {limits(found)[1]:g}"
        )
    _check_fit(sample, found)
    return found


def _shown(pixel_range: list) -> str:
    return " ".join(word if isinstance(word, str) else f"{word:g}" for word in pixel_range)


def _check_fit(sample: Sample, found: list | None) -> None:
    """Print notes about grey images that use few levels of their range, or have most of their values outside. Raises
    UserError if most images without a fixed range contradict a named range."""
    window = found if found and not isinstance(found[0], str) else None
    rounded = not many_bands(sample.in_chans)  # bands keep the precision of the file
    if sample.fixed:
        _note_few_levels(sample.fixed, limits(window or ["16bit"]), rounded)
    spans = [(low, high) for low, high, _ in sample.free.values()]
    if not spans:
        return
    low, high = limits(found)
    outside = [(name, *span) for name, span in zip(sample.free, spans) if span[0] < low or span[1] > high]
    if not window and 2 * len(outside) > len(spans):
        name, lowest, highest = outside[0]
        raise UserError(
            f"--pixel_range {found[0]} is {low:g}..{high:g}, but {printable(name)} has values of "
            f"{lowest:g}..{highest:g}: give --pixel_range LOW HIGH"
        )
    _note_few_levels(spans, (low, high), rounded)


def read_sample(images, in_chans: int = 3) -> Sample:
    """Return the values of up to 64 images, evenly spaced over the set; of shards the first ones. Images of 8 bits are
    not decoded. Raises UserError as `BandSample.check`, for a model of `in_chans` channels."""
    sample, bands = Sample(in_chans=in_chans), BandSample(in_chans)
    if hasattr(images, "expect_bands"):
        images.expect_bands(in_chans)
    for name, img in images.sampled(SAMPLE):
        bands.add(name, img)
        try:
            if is_wide(img) or img.info.get("bits_per_channel") == 16:
                img.load()
                sample.add(name, img)
        except BROKEN_IMAGE:
            continue  # reported and counted when it is used
    if hasattr(images, "expect_bands"):
        bands.check(images)
    return sample


def _extremes(sample: Sample) -> list:
    """Return the range of `auto`: from the lowest to the highest value of the sample."""
    low, high = sample.extremes
    if low == high:
        raise UserError(f"--pixel_range auto: all values of the sampled images are {low:g}: give LOW and HIGH")
    count = len(sample.fixed) + len(sample.free)
    print(f"--pixel_range auto: {low:g} to {high:g}, from {count} images; values outside are clipped")
    return [low, high]


def _agreed(sample: Sample) -> list | None:
    """Return the named range, in a list, that is the smallest one with the values of each image without a fixed range;
    None without such images. Raises UserError if there is none, or if the images differ in it."""
    guesses, varied = {}, any(low < high for low, high, _ in sample.free.values())
    for name, (lowest, highest, dtype) in sample.free.items():
        if lowest == highest and varied:
            continue  # a blank tile, which would fit the smallest range
        names = [key for key in NAMED if key != "unit" or dtype.startswith("float")]
        fitting = (key for key in names if NAMED[key][0] <= lowest and highest <= NAMED[key][1])
        guesses.setdefault(next(fitting, ""), []).append((name, lowest, highest, dtype))
    if not guesses:
        return ["16bit"] if many_bands(sample.in_chans) else None  # the memory of a batch depends on it
    if len(guesses) > 1 or "" in guesses:
        examples = [found[0] for found in guesses.values()]
        values = " and ".join(f"{low:g}..{high:g} ({dtype}, {printable(name)})" for name, low, high, dtype in examples)
        raise UserError(
            f"the images have values of {values}, and their type does not say which value is white: give "
            f"--pixel_range LOW HIGH, the values that become black and white, or --pixel_range auto for the lowest and "
            f"the highest of a sample"
        )
    (key, found), *_ = guesses.items()
    low, high = NAMED[key]
    print(
        f"{len(found)} of the sampled images are {found[0][3]} with values in {low:g}..{high:g}; read as "
        f"--pixel_range {key}"
    )
    return [key]


def _note_few_levels(spans: list[tuple[float, float]], pixel_range: tuple[float, float], rounded: bool) -> None:
    """Print a note if grey images with values in `spans` use few of the 256 levels of the range, and may be `rounded`
    to them, or if less than half of their values' range lies in it."""
    (low, high), darkest, brightest = pixel_range, min(span[0] for span in spans), max(span[1] for span in spans)
    inside = max(0.0, min(high, brightest) - max(low, darkest))
    if 2 * inside < brightest - darkest:
        print(
            f"note: the values of the images range from {darkest:g} to {brightest:g}, most of it outside "
            f"--pixel_range {low:g} {high:g}, where values are clipped"
        )
        return
    levels = 255 * (brightest - darkest) / (high - low)
    if rounded and levels < FEW:
        print(
            f"note: the values of the images range from {darkest:g} to {brightest:g}, about {levels + 1:.0f} of 256 "
            f"grey levels of {low:g}..{high:g}: --pixel_range {darkest:g} {brightest:g} would use all"
        )


def _check_colour(sample: Sample, given: list | None) -> None:
    """Print a note if sampled colour images have 16 bits per channel. Raises UserError if a window is `given`, which
    cannot be applied to them."""
    if not sample.colour:
        return
    if given and not isinstance(given[0], str):
        raise UserError(
            f"--pixel_range {_shown(given)} cannot be applied: {len(sample.colour)} of the sampled images have 16 bits "
            f"per channel in colour, of which only the upper 8 can be read: convert them"
        )
    levels = max(high for _, high in sample.colour) - min(low for low, _ in sample.colour) + 1
    few = f", which use {levels} of 256 levels" if levels < FEW else ""
    print(
        f"note: {len(sample.colour)} of the sampled images have 16 bits per channel in colour, of which the upper 8 "
        f"are read{few}"
    )
