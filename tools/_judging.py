"""What the commands that judge a frozen encoder share: how checkpoint, data and feature are named, and where what came
out goes (JSON, TensorBoard, the ledger)."""

import argparse
import copy
import json
import os
from dataclasses import dataclass
from pathlib import Path

import _common
import timm
import torch

from models_vit import VisionTransformer
from util.amp import choose_amp_dtype
from util.datasets import input_size, mean_std, read_images
from util.distributed import choose_device
from util.encoder import build_encoder, count_classes, load_encoder, settle_model, token_feature
from util.errors import UserError
from util.features import extract
from util.ledger import Record, strict
from util.loading import build_loader
from util.log import Board
from util.rng import seeded
from util.transforms import check_channels, eval_transform
from util.weights import Weights, models_that_fit, read_weights, recognise


def parser(description: str, several: bool = False, features: bool = True):
    """The data flags of the mains, and those of judging: of `features`, or of a classifier. `several` checkpoints may
    be named, or one."""
    made = _common.parser(description)
    group = made.add_argument_group("what is judged")
    group.add_argument(
        "checkpoint", nargs="*" if several else "?", default=[] if several else "", metavar="CHECKPOINT",
        help="ours, the official MAE's, timm's or Hugging Face's; the name of a timm model; random: an untrained one",
    )  # fmt: skip
    if not several:
        group.add_argument("--finetune", default="", help="the same, as the mains name it; without any it is random")
    if features:
        group.add_argument("--pool", choices=["avg", "cls"], default="avg", help="feature: mean of patches, or [cls]")
        group.add_argument("--global_pool", action="store_const", const="avg", dest="pool", help="--pool avg")
        group.add_argument("--cls_token", action="store_const", const="cls", dest="pool", help="--pool cls")
    group.add_argument("--nb_classes", type=int, help="classes of the data set, which is the default")
    _common.add_model_flags(made)
    made.add_argument("--batch_size", type=int, default=256)
    made.add_argument("--device", default="auto")
    made.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    return made


@dataclass
class Judged:
    """An encoder, and the flags with which its images are read."""

    args: argparse.Namespace
    weights: Weights | None  # None: random
    model: VisionTransformer
    device: torch.device
    dtype: torch.dtype

    def features(self, images) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (M, D) float32 and labels (M,) of readable images, in their order."""
        transform = eval_transform(input_size(self.args), *mean_std(self.args), self.args.crop_pct)
        loader = build_loader(images, transform, self.args, self.args.batch_size, train=False)
        pool = self.args.pool
        return extract(lambda imgs: token_feature(self.model, imgs, pool), loader, self.device, self.dtype)


def named(args) -> str:
    """The one checkpoint of these flags, "" for a random encoder."""
    if args.checkpoint and args.finetune:
        raise UserError(f"CHECKPOINT {args.checkpoint} and --finetune {args.finetune} name one twice: give one of them")
    return args.checkpoint or args.finetune


def open_encoder(args, checkpoint: str) -> Judged:
    """The encoder of a file, of a timm name, or a random one, on its device. UserError where it cannot be had."""
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} must be positive")
    own = copy.copy(args)
    weights = None if checkpoint in ("", "random") else _weights(checkpoint, args.checkpoint_key)
    settle_model(own, weights or "")
    check_channels(own.in_chans)
    if weights is not None:
        _common.take_data_flags(own, weights.args)
    else:
        print("no checkpoint: the encoder is random")
    # The encoder's own final norm is used, whichever tokens are read.
    build = argparse.Namespace(**{**vars(own), "global_pool": False})
    with seeded(args.seed):  # as main_linprobe does: the same random encoder
        model = build_encoder(build, weights)
    device = choose_device(args.device)
    return Judged(own, weights, model.to(device).eval(), device, choose_amp_dtype(args.amp_dtype, device))


def open_classifier(args) -> Judged:
    """The classifier of a file, on its device. UserError for a file without one."""
    checkpoint = named(args)
    if checkpoint in ("", "random"):
        raise UserError("name a CHECKPOINT with a classifier: one of main_finetune.py or main_linprobe.py")
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} must be positive")
    own = copy.copy(args)
    model, weights = load_encoder(own, checkpoint)
    if not model.num_classes:
        raise UserError(f"{checkpoint} has no classifier: fine-tune it first (main_finetune.py, main_linprobe.py)")
    check_channels(own.in_chans)
    _common.take_data_flags(own, weights.args)
    device = choose_device(args.device)
    return Judged(own, weights, model.to(device), device, choose_amp_dtype(args.amp_dtype, device))


def _weights(checkpoint: str, key: str) -> Weights:
    name = checkpoint.removeprefix("timm/")
    if os.path.exists(checkpoint) or not timm.is_model(name):
        return read_weights(checkpoint, key)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # of the network, or of timm: it has no weights of that name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{checkpoint} is a model of timm's, but its weights could not be had: {reason}") from error
    config = model.pretrained_cfg
    flags = {"input_size": config["input_size"][1], "mean": list(config["mean"]), "std": list(config["std"])}
    weights = recognise({"model": model.state_dict(), "args": flags}, checkpoint)
    fitting = models_that_fit(weights)
    if not fitting:
        raise UserError(f"{checkpoint} has the size of none of our encoders: a plain ViT of timm's is needed")
    weights.args |= {"model": fitting[0], "num_heads": model.blocks[0].attn.num_heads}
    return weights


def labelled_splits(args) -> list:
    """The training and the test images; UserError where they have no labels, or not the same ones."""
    splits = [read_images(args, train=train) for train in (True, False)]
    count_classes(args, *splits)
    return splits


def check_out(args, *endings: str, flag: str = "out") -> None:
    """UserError when `--out`, or another flag, is no file of one of these endings that can be written; makes its
    folder."""
    path = Path(getattr(args, flag))
    if not getattr(args, flag):
        return
    if path.suffix.lower() not in endings or path.is_dir():
        raise UserError(f"--{flag} {path} must be a {' or '.join(endings)} file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--{flag} {path} cannot be written: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--{flag} {path} cannot be written: the folder is read-only")


def publish(judged: Judged, record: Record, metrics: dict, images_seen: int, name: str = "") -> None:
    """Metrics of one checkpoint into the ledger and TensorBoard of the folder of `--out`; nothing without it. In
    TensorBoard x is the epoch of the checkpoint, so that those of one run make a curve."""
    if not judged.args.out:
        return
    path = Path(judged.args.out)
    epoch = (judged.weights.history.get("epoch") if judged.weights else None) or 0
    board = Board(str(path.parent / f"tensorboard-{name or record.command}"))
    board.scalars({f"{record.command}/{name}": value for name, value in metrics.items()}, epoch + 1)
    board.hparams(vars(judged.args), metrics)
    board.close()
    record.enter(path.parent, metrics, images_seen, judged.device, judged.dtype)


def write_json(path: str | Path, args, **content) -> None:
    """The flags, and what came out, as strict JSON beside or at `--out`."""
    text = json.dumps(strict({**vars(args), **content}), indent=2, allow_nan=False)
    Path(path).with_suffix(".json").write_text(text + "\n", encoding="utf-8")
