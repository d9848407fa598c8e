"""Flags that the tools share, and checks of their values."""

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from util.arguments import add_data_arguments, add_show_channels, add_verbose_argument, check_numbers
from util.data.reading_flags import CHANNELS
from util.errors import UserError
from util.parser import Parser
from util.report.sheet import PICTURES, SIDE


def data_parser(description: str, usual: str = "--data_path PATH", datasets: Sequence[str] = ()) -> Parser:
    """Return a parser with the data flags of the mains. By default a tool starts two data workers, since it reads every
    image once. `usual` are the flags that its usage line shows, `datasets` the data sets that it reads, () for all."""
    parser = Parser(description, usual)
    add_data_arguments(parser, datasets)
    parser.add_argument("--seed", default=0, type=int, help="seed of all random draws")
    parser.set_defaults(num_workers=2)
    return parser


ANY_CHECKPOINT = (
    "a file of this project, the official MAE, timm, Hugging Face, torchvision or mmpretrain; a Hugging Face folder; "
    "the name of a timm model; random (an untrained encoder); or any of timm's encoders: timm:NAME, "
    "timm:ARCHITECTURE=FILE, timm:ARCHITECTURE=random, or timm's own folder"
)


def add_checkpoint_flags(parser: Parser, several: bool = False, what: str = ANY_CHECKPOINT) -> None:
    """Add CHECKPOINT and its alias --finetune, for one checkpoint or for `several`. `checkpoint_of` and
    `checkpoints_of` return their values; `what` is the help text."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument(
        "checkpoint", nargs="*" if several else "?", default=[] if several else "", metavar="CHECKPOINT", help=what
    )
    group.add_argument(
        "--finetune",
        nargs="+" if several else None,
        default=[] if several else "",
        metavar="CHECKPOINT",
        help="alias of CHECKPOINT, as in the mains",
    )
    add_verbose_argument(group)


def checkpoints_of(args: argparse.Namespace, required: str = "") -> list[str]:
    """Return the checkpoints that were given. Raises UserError if both aliases were used, and if there is none where
    one is `required`, which completes the message "give a CHECKPOINT ..."."""
    given = [[names] if isinstance(names, str) else names for names in (args.checkpoint, args.finetune) if names]
    if len(given) > 1:
        one, other = (" ".join(names) for names in given)
        raise UserError(f"CHECKPOINT {one} and --finetune {other} are aliases; give one of them")
    if required and not given:
        raise UserError(f"give a CHECKPOINT {required}")
    return given[0] if given else []


def checkpoint_of(args: argparse.Namespace, required: str = "(a file, a timm model, or random)") -> str:
    """Return the checkpoint that was given. Raises UserError if there is none; `required` completes its message "give a
    CHECKPOINT ..."."""
    return checkpoints_of(args, required)[0]


def titles_of(checkpoints: Sequence[str]) -> list[str]:
    """Return short titles of checkpoints: folder and name without its ending, and as many more folders as tell them
    apart; a model of timm's and `random` keep their names."""
    paths = [Path(name).with_suffix("") if os.path.exists(name) else Path(name) for name in checkpoints]
    most = max((len(path.parts) for path in paths), default=0)
    for parts in range(2, max(3, most + 1)):
        titles = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(titles)) == len(set(checkpoints)):
            break
    return titles


def add_model_flags(parser: Parser) -> None:
    """Add the flags that describe the model. A given flag replaces the value that the checkpoint stores."""
    group = parser.add_argument_group(
        "model", "Needed only for values that the checkpoint does not store. A flag replaces the stored value."
    )
    group.add_argument(
        "--checkpoint_key",
        default="model",
        help="weights to read from the file: model, model_ema, or a part of the tensors' names (teacher)",
    )
    group.add_argument("--model", help="e.g. mae_vit_base_patch16")
    group.add_argument("--input_size", type=int, nargs="+", metavar=("H", "W"), help="image size in pixels")
    group.add_argument("--patch_size", type=int, help="side of a patch in pixels")
    group.add_argument("--in_chans", type=int, help=CHANNELS)


def add_feature_flags(parser: Parser, default: str | None = None) -> None:
    """Add the flags that choose an encoder's feature. Without them it is `default`, or if that is None the choice of
    `settle_pool`; of a timm: encoder its own."""
    trained = "the feature that the checkpoint was trained with, else [cls]"
    parser.add_argument(
        "--pool",
        choices=["avg", "cls"],
        help=f"feature: mean of the patch tokens, or [cls]; without it {default or trained}; of a timm: encoder what "
        "its own classifier reads",
    )
    parser.add_argument("--global_pool", action="store_const", const="avg", dest="pool", help="--pool avg")
    parser.add_argument("--cls_token", action="store_const", const="cls", dest="pool", help="--pool cls")


def add_device_flag(parser: Parser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA if available), cuda, cuda:N, mps or cpu")


def settle_pool(args: argparse.Namespace, model, path: str) -> str:
    """Return the feature (cls or avg) of a model from `load_encoder`: the one it was trained with, else `--pool`, else
    cls. Raises UserError if `--pool` contradicts the feature that the checkpoint `path` was trained with."""
    own = model.default_pool
    if own == "own":  # of a timm: encoder
        return args.pool or own
    if args.pool not in (None, own) and (model.num_classes or model.global_pool):
        trained = "mean of the patches" if model.global_pool else "[cls] token"
        raise UserError(f"--pool {args.pool}: {path} was trained on the {trained}; leave the flag out")
    return "avg" if model.global_pool else args.pool or "cls"


def add_picture_flags(parser: Parser, masked: bool = True) -> None:
    """Add the flags of a tool that draws images: the images, the file, the size of a tile and, if they are `masked`,
    the mask ratio."""
    parser.add_argument(
        "--data", default="", metavar="PATH", help="an image or a folder of images, instead of --dataset/--data_path"
    )
    add_out_flag(parser)
    add_tile_flag(parser)
    add_show_channels(parser)
    if masked:
        parser.add_argument(
            "--mask_ratio",
            type=float,
            help="share of the patches to remove; without it that of the pretraining run, else 0.75",
        )
    parser.add_argument("--count", type=int, default=8, help="number of images, taken at equal distances from the set")


def add_out_flag(parser: Parser, more: str = "") -> None:
    """Add `--out` of a tool that draws; `more` completes its help. `check_picture` checks it."""
    parser.add_argument("--out", required=True, help=f"picture to write: a .png, .pdf or .svg file{more}")


def add_tile_flag(parser, side: int = SIDE, largest: str = "its own size") -> None:
    """Add `--tile_size` of a tool that draws images in a grid: without it small images are enlarged up to `side`, and
    others have the size that `largest` names. `check_tile` checks it."""
    parser.add_argument(
        "--tile_size",
        type=int,
        metavar="PIXELS",
        help=f"longer side of an image in the picture; without it {largest}, and small images are enlarged by a whole "
        f"factor, up to {side}",
    )


def needed_picture(args: argparse.Namespace) -> Path:
    """Return the path of the picture that `--out` names, as `needed_out`."""
    return needed_out(args, *PICTURES)


def check_picture(args: argparse.Namespace, flag: str = "out") -> Path | None:
    """Return the path of the picture that `--out`, or another `flag`, names, as `check_out`; None without it."""
    return check_out(args, *PICTURES, flag=flag)


def check_tile(args: argparse.Namespace) -> None:
    """Raise UserError if tiles of `--tile_size` would be too small for a title, or too large for the memory."""
    if args.tile_size is not None and not 32 <= args.tile_size <= 2048:
        raise UserError(f"--tile_size {args.tile_size} must lie between 32 and 2048 pixels")


def check_picture_flags(args: argparse.Namespace, stored_ratios: Mapping[str, float]) -> float:
    """Return the mask ratio: that of --mask_ratio, else the stored one of all checkpoints, by path. Raises UserError
    for invalid values of the flags of `add_picture_flags`, and if the stored ratios differ."""
    check_numbers(args)
    ratios = {args.mask_ratio: ""} if args.mask_ratio is not None else {r: path for path, r in stored_ratios.items()}
    if len(ratios) > 1:
        (one, path), (other, second) = list(ratios.items())[:2]
        raise UserError(f"{path} was trained with --mask_ratio {one}, {second} with {other}: give one --mask_ratio")
    (ratio,) = ratios
    if not 0 < ratio < 1:
        raise UserError(f"--mask_ratio {ratio} must lie between 0 and 1, both excluded")
    check_tile(args)
    check_picture(args)
    return ratio


def needed_out(args: argparse.Namespace, *endings: str) -> Path:
    """Return the value of a required `--out`, as `check_out`. Raises UserError also for an empty one."""
    path = check_out(args, *endings)
    if path is None:
        raise UserError(f"--out is empty: give the {' or '.join(endings) or 'file'} to write")
    return path


def check_out(args: argparse.Namespace, *endings: str, flag: str = "out") -> Path | None:
    """Return the value of `--out`, or of another `flag`, as a path, and create its folder; return None if the flag is
    not given. Raises UserError if the file has none of the `endings`, and if it cannot be written."""
    if not getattr(args, flag):
        return None
    path = Path(getattr(args, flag))
    if endings and (path.suffix.lower() not in endings or path.is_dir()):
        names = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise UserError(f"--{flag} {path} must be a {names} file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "its folder is a file"
        raise UserError(f"--{flag} {path} cannot be written: {reason}") from error
    return path
