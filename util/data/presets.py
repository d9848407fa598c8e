"""`--aug_preset`: regularization of fine-tuning that suits the images.

`full` is the recipe of He et al. 2022 (Table 9) with the random erasing of their code. `small` turns mixup, cutmix and
label smoothing off; these are the two regimes of Garcia, Senel and Frantzolas ("Exploring: Masked Autoencoders Are
Scalable Vision Learners", Section 3). `tiny` is for images of a few pixels, of which RandAugment and random erasing
leave too little. A flag that is given overrides its preset.
"""

from collections.abc import Mapping
from typing import Any

from util.data.bands import many_bands
from util.parser import rare

OFFICIAL = dict(aa="rand-m9-mstd0.5-inc1", reprob=0.25, smoothing=0.1, drop_path=0.1, hflip=0.5, mixup=0.0, cutmix=0.0)
PRESETS = {
    "official": OFFICIAL,
    "small": OFFICIAL | dict(smoothing=0.0),
    "full": OFFICIAL | dict(mixup=0.8, cutmix=1.0),
    "tiny": OFFICIAL | dict(aa=None, reprob=0.0, smoothing=0.0, drop_path=0.0),
}
TINY = 32  # pixels; smaller inputs get `tiny`
# Data sets whose images mean something else when they are mirrored: their --hflip.
MIRRORED = {"digits": 0.0, "scenes": 0.0}


def augment_policy(text: str) -> str | None:
    return None if text in ("", "none", "None") else text


def add_preset_arguments(group) -> None:
    """Add `--aug_preset` and the flags that it settles."""
    group.add_argument(
        "--aug_preset",
        choices=["auto", *PRESETS],
        default="auto",
        help="defaults of the other flags; official: those of the official code; small: without label smoothing; full: "
        "with mixup and cutmix (the paper's); tiny: no --aa, erasing, smoothing and drop path; auto: tiny for digits "
        f"and inputs below {TINY} pixels, else official",
    )
    group.add_argument(
        "--aa",
        type=augment_policy,
        default="auto",
        help="timm's AutoAugment policy such as rand-m9-mstd0.5-inc1, or none",
    )
    group.add_argument("--smoothing", type=float, help="label smoothing, such as 0.1; none with --targets regression")
    group.add_argument("--reprob", type=float, help="probability of random erasing, such as 0.25")
    group.add_argument("--drop_path", type=float, help="stochastic depth: drop rate of the last block, such as 0.1")
    group.add_argument("--mixup", type=float, help="mixup alpha; 0 is off")
    group.add_argument("--cutmix", type=float, help="cutmix alpha; 0 is off")
    rare(group.add_argument("--hflip", type=float, help="probability that an image is mirrored; 0.5, for digits 0"))


def default_crop(dataset: str) -> str:
    """Return the default of `--aug` for fine-tuning and probing: "rrc" (random resized crop), or "crop" (pad and crop)
    for the small images of CIFAR and the digits."""
    return "crop" if dataset in ("cifar10", "cifar100", "digits") else "rrc"


def preset_of(args) -> str:
    """Return the preset of the flags."""
    if args.aug_preset not in (None, "auto"):  # None: in checkpoints before `auto`
        return args.aug_preset
    sides = args.input_size if isinstance(args.input_size, (list, tuple)) else [args.input_size]
    return "tiny" if args.dataset == "digits" or min(sides) < TINY else "official"


def mixes(args) -> bool:
    """Whether images are mixed, also before the flags are settled."""
    preset = PRESETS.get(args.aug_preset, OFFICIAL)
    strengths = (preset[name] if getattr(args, name) is None else getattr(args, name) for name in ("mixup", "cutmix"))
    return any(strength > 0 for strength in strengths) or args.cutmix_minmax is not None


def settle_preset(args, stored: Mapping[str, Any] = {}) -> None:
    """Settle the flags of `add_preset_arguments` that are not given: by the flags `stored` in the checkpoint of a run
    that is resumed, else by `--aug_preset`. `--input_size` must be settled."""
    many = many_bands(getattr(args, "in_chans", None) or 3)  # forks' flags may lack it
    not_given = [name for name in OFFICIAL if getattr(args, name) == ("auto" if name == "aa" else None)]
    preset = preset_of(args)
    values = PRESETS[preset] | ({"hflip": MIRRORED[args.dataset]} if args.dataset in MIRRORED else {})
    if many and values["aa"]:
        values["aa"] = None
        if "aa" in not_given and not stored:
            print(f"note: --aa none: the policies of --aa change colours, which --in_chans {args.in_chans} has not")
    if stored:  # before `auto` and `--hflip`, the official values were the defaults
        values = OFFICIAL | {name: stored[name] for name in OFFICIAL if name in stored}
    for name in not_given:
        setattr(args, name, values[name])
