"""What the commands that judge a checkpoint share: how it is opened, with which images and feature, and where what came
out goes (JSON, TensorBoard, the ledger)."""

import argparse
import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from evaluation import command_line
from evaluation.encoder import build_encoder, count_classes, load_encoder, settle_model, token_feature
from evaluation.features import extract
from models_vit import VisionTransformer
from util.arguments import check_numbers
from util.compute.precision import choose_amp_dtype
from util.data.build import build_loader
from util.data.image_format import image_shape, mean_std
from util.data.leak import check_leak
from util.data.readers import read_images
from util.data.sample_rng import seeded
from util.data.transforms import check_channels, eval_transform
from util.errors import UserError
from util.parallel.distributed import choose_device
from util.report.ledger import Record
from util.report.tensorboard import Board
from util.weights.load import Weights, models_that_fit, read_weights, recognise


def parser(description: str, several: bool = False, features: bool = True):
    """The data flags of the mains, and those of judging: of `features`, or of a classifier. `several` checkpoints may
    be named, or one."""
    made = command_line.parser(description)
    command_line.add_checkpoint_flags(made, several)
    if features:
        command_line.add_feature_flags(made, default="avg")
    made.add_argument("--nb_classes", type=int, help="classes; without it the data set's")
    command_line.add_model_flags(made)
    made.add_argument("--batch_size", type=int, default=256, help="images per forward pass")
    command_line.add_device_flag(made)
    made.add_argument(
        "--amp_dtype",
        default="auto",
        choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 where the hardware multiplies it fast, fp16 on older GPUs, else fp32",
    )
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
        """Features (M, D) float32 and labels (M,) of readable images, in their order. UserError as of
        `check_readable`."""
        args = self.args
        stats = mean_std(args.dataset, args.in_chans, args.mean, args.std)
        transform = eval_transform(image_shape(args.input_size), *stats, args.crop_pct)
        loader = build_loader(images, transform, self.args, self.args.batch_size, train=False)
        pool = self.args.pool
        found = extract(lambda imgs: token_feature(self.model, imgs, pool), loader, self.device, self.dtype)
        check_readable(self.args, images, len(found[0]))
        return found


def check_readable(args, images, readable: int, name: str = "the data set") -> None:
    """UserError when more than `--max_bad_fraction` of the `images`, or all of them, could not be read."""
    total = len(images) if hasattr(images, "load") else readable  # of a stream the length is a guess
    if not readable or total - readable > args.max_bad_fraction * total:
        raise UserError(
            f"{total - readable} of the {total} images of {name} are unreadable, more than --max_bad_fraction "
            f"{args.max_bad_fraction:g} allows; their names are above"
        )


def open_encoder(args, checkpoint: str) -> Judged:
    """The encoder of a file, of a timm name, or a random one, on its device. UserError where it cannot be had."""
    check_numbers(args)
    own = copy.copy(args)
    weights = read(checkpoint, args.checkpoint_key)
    settle_model(own, weights or "")
    check_channels(own.in_chans)
    if weights is not None:
        command_line.take_data_flags(own, weights.args)
    else:
        print("no checkpoint: the encoder is random")
    # The encoder's own final norm is used, whichever tokens are read.
    build = argparse.Namespace(**{**vars(own), "global_pool": False})
    with seeded(args.seed):  # as main_linprobe does: the same random encoder
        model = build_encoder(build, weights)
    device = choose_device(args.device)
    return Judged(own, weights, model.to(device).eval(), device, choose_amp_dtype(args.amp_dtype, device))


def open_trained(args, checkpoint: str, head: bool = True) -> Judged:
    """The model of a file or of a timm name as it was trained: with its own final norm and, with `head`, its classifier
    if it has one; or a random encoder. In float32. UserError where it cannot be had."""
    check_numbers(args)
    own = copy.copy(args)
    weights = read(checkpoint, args.checkpoint_key)
    device = choose_device(args.device)
    if weights is None:
        print("no checkpoint: the encoder is random")
        settle_model(own, "")
        own.global_pool = False
        with seeded(args.seed):
            model = build_encoder(own, None).eval()
    else:
        model, weights = load_encoder(own, weights, head)
        command_line.take_data_flags(own, weights.args)
    check_channels(own.in_chans)
    return Judged(own, weights, model.to(device), device, torch.float32)


def open_classifier(args) -> Judged:
    """The classifier of a file or of a timm name, on its device. UserError where there is none, or one of another size
    than `--nb_classes`."""
    need = "with a classifier: one of main_finetune.py or main_linprobe.py"
    checkpoint = command_line.named(args, need)
    if checkpoint == "random":
        raise UserError(f"name a CHECKPOINT {need}")
    judged = open_trained(args, checkpoint)
    count = judged.model.num_classes
    if not count:
        raise UserError(f"{checkpoint} has no classifier: fine-tune it first (main_finetune.py, main_linprobe.py)")
    if args.nb_classes not in (None, count):
        raise UserError(f"--nb_classes {args.nb_classes}: the classifier of {checkpoint} tells {count} classes apart")
    judged.dtype = choose_amp_dtype(args.amp_dtype, judged.device)
    return judged


def like(judged: Judged) -> dict:
    """Flags with which a random encoder is of the same model as this one, on images normalised alike."""
    flags = {name: getattr(judged.args, name) for name in ("model", "patch_size", "in_chans", "mean", "std")}
    size = judged.args.input_size
    return flags | {"input_size": [size] if isinstance(size, int) else size}


def open_each(args, open_one: Callable[..., Judged]) -> list[Judged]:
    """`open_one(args, checkpoint)` of every checkpoint of the flags, in their order. A random encoder is of the model
    of the first that is not, unless --model says else."""
    names, found, same = command_line.all_named(args), {}, {}
    if not names:
        raise UserError("name one CHECKPOINT or more (a file, a timm model, or random)")
    for i in sorted(range(len(names)), key=lambda i: names[i] == "random"):
        alike = same if names[i] == "random" and not args.model else {}
        own = argparse.Namespace(**{**vars(args), **alike, "checkpoint": names[i], "finetune": ""})
        found[i] = open_one(own, names[i])
        same = same or like(found[i])
    return [found[i] for i in range(len(names))]


def read(checkpoint: str, key: str) -> Weights | None:
    """What a file or a timm name holds; None for a random encoder."""
    if checkpoint in ("", "random"):
        return None
    name = checkpoint.removeprefix("timm/")
    if not os.path.exists(checkpoint) and not timm.is_model(name) and not set("/.") & set(name):
        raise UserError(f"{checkpoint} is neither a file nor a model of timm's: a checkpoint is needed")
    if os.path.exists(checkpoint) or not timm.is_model(name):
        return read_weights(checkpoint, key)
    try:
        model = timm.create_model(name, pretrained=True)
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
    if args.check_leak:
        check_leak(*splits)
    count_classes(args, *splits)
    return splits


def publish(
    judged: Judged, record: Record, metrics: dict, images_seen: int, name: str = "", picture: Mapping = {}
) -> None:
    """Metrics, and pictures (3, H, W) in [0, 1] by name, of one checkpoint into the ledger and TensorBoard of the
    folder of `--out`; nothing without it. In TensorBoard x is the epoch of the checkpoint, so that those of one run
    make a curve."""
    if not judged.args.out:
        return
    path = Path(judged.args.out)
    epoch = (judged.weights.history.get("epoch") if judged.weights else None) or 0
    board = Board(str(path.parent / f"tensorboard-{name or record.command}"))
    board.scalars({f"{record.command}/{name}": value for name, value in metrics.items()}, epoch + 1)
    for title, image in picture.items():
        board.image(f"{record.command}/{title}", image, epoch + 1)
    board.hparams(vars(judged.args), metrics)
    board.close()
    record.enter(path.parent, metrics, images_seen, judged.device, judged.dtype)
