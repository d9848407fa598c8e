"""What the commands in this folder share: finding the project's modules, and which model a checkpoint holds."""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import models_mae
from evaluation.encoder import infer_config_from_shapes, set_norm_eps
from util.arguments import add_data_arguments, check_numbers
from util.data.image_format import MEAN_STD, image_shape, mean_std
from util.data.readers import read_images
from util.data.samples import KeyedDataset
from util.data.sources import Files, Subset
from util.data.transforms import check_channels, eval_transform
from util.errors import UserError
from util.parser import Parser
from util.weights.load import load_into, read_weights


def parser(description: str, usual: str = "--data_path PATH") -> Parser:
    """A parser with the data flags of the mains; a tool reads every image once, so it starts few workers."""
    made = Parser(description, usual)
    add_data_arguments(made)
    made.add_argument("--seed", default=0, type=int, help="seed of everything drawn at random")
    made.set_defaults(num_workers=2)
    return made


def add_checkpoint_flags(made: Parser, several: bool = False, what: str = "") -> None:
    """CHECKPOINT, or as the mains name it; `several` may be named, or one. `named` or `all_named` reads them."""
    group = made.add_argument_group("checkpoint")
    what = (
        what
        or "a file of ours, the official MAE's, timm's or Hugging Face's; the name of a timm model; or random: an "
        "untrained encoder"
    )
    group.add_argument(
        "checkpoint", nargs="*" if several else "?", default=[] if several else "", metavar="CHECKPOINT", help=what
    )
    group.add_argument(
        "--finetune",
        nargs="+" if several else None,
        default=[] if several else "",
        metavar="CHECKPOINT",
        help="CHECKPOINT under the name that the mains use",
    )


def all_named(args: argparse.Namespace) -> list[str]:
    """The checkpoints of these flags; UserError where they are named twice."""
    given = [[names] if isinstance(names, str) else names for names in (args.checkpoint, args.finetune) if names]
    if len(given) > 1:
        one, other = (" ".join(names) for names in given)
        raise UserError(f"CHECKPOINT {one} and --finetune {other} are aliases; give one of them")
    return given[0] if given else []


def named(args: argparse.Namespace, needed: str = "") -> str:
    """The one checkpoint of these flags. Without one "" or, where one is `needed`, a UserError that says which."""
    if not all_named(args) and needed:
        raise UserError(f"name a CHECKPOINT {needed}")
    return "".join(all_named(args))


def add_model_flags(made: Parser) -> None:
    group = made.add_argument_group("model", "What the checkpoint does not say.")
    group.add_argument("--checkpoint_key", default="model", help="which weights of the file: model, or model_ema")
    group.add_argument("--model", help="e.g. mae_vit_base_patch16")
    group.add_argument("--input_size", type=int, nargs="+", metavar=("H", "W"), help="image size in pixels")
    group.add_argument("--patch_size", type=int, help="side of a patch in pixels")
    group.add_argument("--in_chans", type=int, help="channels: 1 grey, 2 grey and alpha, 3 RGB, 4 RGBA")


def add_feature_flags(made: Parser, default: str | None = None) -> None:
    """Which tokens the feature of an encoder reads; None: what its classifier reads, else [cls]."""
    own = "" if default else "; without it what the classifier reads, else [cls]"
    made.add_argument(
        "--pool", choices=["avg", "cls"], default=default, help="feature: mean of the patch tokens, or [cls]" + own
    )
    made.add_argument("--global_pool", action="store_const", const="avg", dest="pool", help="--pool avg")
    made.add_argument("--cls_token", action="store_const", const="cls", dest="pool", help="--pool cls")


def add_device_flag(made: Parser) -> None:
    made.add_argument("--device", default="auto", help="auto (CUDA if there is one), cuda, cuda:N or cpu")


def settle_pool(args: argparse.Namespace, model, path: str) -> str:
    """cls or avg for the feature of `load_encoder`'s model; UserError where `--pool` asks for another feature than the
    one that the checkpoint was trained with."""
    own = "avg" if model.global_pool else "cls"
    if args.pool not in (None, own) and (model.num_classes or model.global_pool):
        kind = "mean of the patches" if model.global_pool else "[cls] token"
        raise UserError(f"--pool {args.pool}: {path} was trained on the {kind}; leave the flag out")
    return "avg" if model.global_pool else args.pool or "cls"


def add_picture_flags(made: Parser, masked: bool = True) -> None:
    """Which images to draw, where, and, where they are `masked`, with how much removed."""
    made.add_argument(
        "--data", default="", metavar="PATH", help="an image, or a folder of images; instead of --dataset/--data_path"
    )
    made.add_argument("--out", required=True, help="PNG file to write")
    if masked:
        made.add_argument(
            "--mask_ratio",
            type=float,
            help="share of the patches that is removed; without it that of the run, else 0.75",
        )
    made.add_argument("--count", type=int, default=8, help="images, evenly spaced over the set")


def check_picture_flags(args: argparse.Namespace, stored_ratio: float) -> float:
    """The mask ratio; UserError for bad values of `add_picture_flags`."""
    check_numbers(args)
    ratio = args.mask_ratio if args.mask_ratio is not None else stored_ratio
    if not 0 < ratio < 1:
        raise UserError(f"--mask_ratio {ratio} must lie between 0 and 1, both excluded")
    check_out(args, ".png")
    return ratio


def check_out(args: argparse.Namespace, *endings: str, flag: str = "out") -> Path | None:
    """`--out`, or another flag, as a path, None without it; makes its folder. UserError when it is no file of one of
    these endings, and when nothing can be written there."""
    if not getattr(args, flag):
        return None
    path = Path(getattr(args, flag))
    if endings and (path.suffix.lower() not in endings or path.is_dir()):
        raise UserError(f"--{flag} {path} must be a {' or '.join(endings)} file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        reason = error.strerror
        if isinstance(error, (FileExistsError, NotADirectoryError)):
            reason = "what should be its folder is a file"
        raise UserError(f"--{flag} {path} cannot be written: {reason}") from error
    return path


def images_of(args: argparse.Namespace):
    """`--data`, else the validation images of the data set, else its training images."""
    if args.data:
        path = Path(args.data)
        if path.is_file():
            return Files([str(path)], [-1], None)
        if not path.is_dir():
            raise UserError(f"--data {path} does not exist: an image or a folder of images is needed")
        args.dataset, args.data_path = "folder", str(path)
        return read_images(args, train=True)
    try:
        return read_images(args, train=False)
    except UserError:
        return read_images(args, train=True)


def chosen_images(args: argparse.Namespace, model, ratio: float = 0.0) -> tuple[torch.Tensor, tuple, tuple, Subset]:
    """`--count` images (N, C, H, W), evenly spaced over the set, with the mean and deviation they were normalised by;
    last which part of the set they are, the unreadable ones with them.

    UserError when none can be read, and when `ratio` leaves the model nothing to see.
    """
    check_channels(args.in_chans)
    if args.count < 1:
        raise UserError(f"--count {args.count} must be positive")
    if int(model.patch_embed.num_patches * (1 - ratio)) < 1:
        raise UserError(f"--mask_ratio {ratio} leaves no visible patch of {model.patch_embed.num_patches}: lower it")
    mean, std = mean_std(args.dataset, args.in_chans, args.mean, args.std)
    images = images_of(args)
    transform = eval_transform(image_shape(args.input_size), mean, std, args.crop_pct)
    dataset = KeyedDataset(images, transform, args.seed, args.in_chans, replace=False)
    places = torch.linspace(0, len(images) - 1, min(args.count, len(images))).long().tolist()
    part = Subset(images, places)
    samples = [sample for sample in (dataset[place] for place in places) if not sample.bad]
    if not samples:
        raise UserError("none of the chosen images could be read; their names are above")
    return torch.stack([sample.image for sample in samples]), mean, std, part


def load_autoencoder(path: str, args: argparse.Namespace) -> models_mae.MaskedAutoencoderViT:
    """The whole autoencoder in `path`, in eval mode; settles the model and data flags that the checkpoint knows.

    UserError for a file without a decoder, and when neither the file nor the flags say which model it is.
    """
    weights = read_weights(path, args.checkpoint_key)
    if not weights.has_decoder:
        raise UserError(
            f"{path} holds an encoder without a decoder ({weights.origin}), so there is nothing to reconstruct with: "
            f"give a full pretraining checkpoint (checkpoint-*.pth, or the official mae_visualize_* files)"
        )
    stored = infer_config_from_shapes(weights) | {
        key: value for key, value in weights.args.items() if value is not None
    }
    name = args.model or stored.get("model")
    if name is None:
        raise UserError(f"{path} does not say which model it is: give --model")
    name = name if name.startswith("mae_") else f"mae_{name}"
    args.model, config = name, models_mae.look_up(models_mae.MODELS, name).config
    size = args.input_size or stored.get("input_size") or config["img_size"]
    args.input_size = [size] if isinstance(size, int) else list(size)
    args.in_chans = args.in_chans or stored.get("in_chans") or 3
    decoder = ("decoder", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
    model = models_mae.build_model(
        name,
        img_size=image_shape(args.input_size),
        patch_size=args.patch_size or stored.get("patch_size"),
        in_chans=args.in_chans,
        norm_pix_loss=stored.get("norm_pix_loss"),
        **{flag: stored.get(flag) for flag in decoder},
    )
    set_norm_eps(model, stored.get("layer_norm_eps"))
    load_into(model, weights)
    take_data_flags(args, stored)
    return model.eval()


def take_data_flags(args: argparse.Namespace, stored: dict) -> None:
    """The mean and deviation that the run was trained with, unless flags say otherwise."""
    if args.mean is None and args.std is None:
        args.mean, args.std = stored.get("mean"), stored.get("std")
        if args.mean is None and stored.get("dataset") and args.dataset == "imagefolder":
            args.mean, args.std = MEAN_STD.get(stored["dataset"], (None, None))
