"""Evaluation of checkpoints by the tools: opening them, reading their images and features, publishing the results."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evaluation import command_line
from evaluation.checkpoint import load_autoencoder, read_checkpoint
from evaluation.encoder import build_vit, count_classes, load_encoder, token_feature, with_inferred_flags
from evaluation.features import extract
from evaluation.image_options import ImageOptions, image_options
from evaluation.publish import Destination, publish
from evaluation.timm_encoder import load_timm_encoder
from util.arguments import check_numbers
from util.compute.precision import choose_amp_dtype
from util.data.build import build_loader
from util.data.labels import note_imbalance
from util.data.leak import check_leak
from util.data.list_flags import note_other_split
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.sample_rng import seeded
from util.errors import UserError
from util.parallel.distributed import choose_device
from util.parser import Parser
from util.report.ledger import Record, hardware
from util.weights.load import Weights, read_weights
from util.weights.model_config import DEFAULT_ENCODER, ModelConfig, resolve_config
from util.weights.names import DENSE_USES
from util.weights.timm_models import TimmModel, timm_model


def evaluation_parser(
    description: str, several: bool = False, features: bool = True, datasets: Sequence[str] = ()
) -> Parser:
    """Return a parser with the data flags of the mains and the flags of an evaluation: of `features`, or of a
    classifier; of one checkpoint, or of `several`; on the `datasets`, () for all."""
    parser = command_line.data_parser(description, datasets=datasets)
    command_line.add_checkpoint_flags(parser, several)
    if features:
        command_line.add_feature_flags(parser, default="avg")
    parser.add_argument("--nb_classes", type=int, help="classes; without it those of the data set")
    command_line.add_model_flags(parser)
    parser.add_argument("--batch_size", type=int, default=256, help="images per forward pass")
    command_line.add_device_flag(parser)
    parser.add_argument(
        "--amp_dtype",
        default="auto",
        choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 where the hardware multiplies it fast, fp16 on older GPUs, else fp32",
    )
    return parser


@dataclass(frozen=True)
class Judged:
    """A model on its device, with everything that was resolved for its checkpoint."""

    args: argparse.Namespace  # the flags of the command, as they were given
    resolved: Mapping[str, Any]  # flags that records have instead of the given ones
    path: str
    weights: Weights | None  # None: random
    config: Any  # ModelConfig, or TimmModel
    images: ImageOptions
    model: Any  # VisionTransformer, MaskedAutoencoderViT or TimmEncoder, by the function that opened it
    device: torch.device
    dtype: torch.dtype

    @property
    def flags(self) -> dict[str, Any]:
        """The flags as JSON files, TensorBoard and the ledger record them."""
        return {**vars(self.args), **self.resolved, "pixel_range": self.images.pixel_range}

    def features(self, images, split: str = "images") -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (M, D) float32 and labels (M,) of the readable images, in their order; `split` names them
        beside the progress bar. Raises UserError as `check_readable` does."""
        settle_pixel_range(self.images, images)
        loader = build_loader(images, self.images.transform(), self.images, self.args.batch_size, train=False)
        pool = self.resolved["pool"]
        features, labels = extract(
            lambda imgs: token_feature(self.model, imgs, pool), loader, self.device, self.dtype, f"encoding {split}"
        )
        check_readable(self.args.max_bad_fraction, images, len(features))
        return features, labels

    def record(self, command: str, **images) -> Record:
        """Return the record of an evaluation of this checkpoint on `images`, by split."""
        record = Record(command, argparse.Namespace(**self.flags), self.weights, **images)
        record.hardware = hardware(self.device, self.dtype)
        return record

    def publish(
        self,
        record: Record,
        metrics: Mapping[str, float],
        images_seen: int,
        *,
        name: str = "",
        json: str | Path | None = None,
        pictures: Mapping[str, torch.Tensor] = {},
        **content,
    ) -> None:
        """Publish `metrics` (as `eval/<name>`) and `pictures` by name, see `evaluation.publish`, into the folder of
        `--out`; without --out nothing. `name` (the command's by default) is that of the TensorBoard folder."""
        if not self.args.out:
            return
        folder, command = Path(self.args.out).parent, record.command
        publish(
            record,
            {f"eval/{metric}": value for metric, value in metrics.items()},
            images_seen,
            Destination(json, folder / f"tensorboard-{name or command}", folder),
            pictures={f"{command}/{title}": picture for title, picture in pictures.items()},
            **content,
        )


def check_readable(max_bad_fraction: float, images, readable: int, name: str = "the data set") -> None:
    """Raise UserError if more than `max_bad_fraction` of the `images`, or all of them, could not be read."""
    total = len(images) if hasattr(images, "load") else readable  # the length of a stream is an estimate
    if not readable or total - readable > max_bad_fraction * total:
        raise UserError(
            f"{total - readable} of the {total} images of {name} are unreadable, more than --max_bad_fraction "
            f"{max_bad_fraction:g} allows; their names are above"
        )


def check_random_access(dataset: str, images) -> None:
    """Raise UserError if the images of `--dataset` are a stream, which cannot be read by index."""
    if not hasattr(images, "load"):
        raise UserError(f"--dataset {dataset} is a stream, from which no images can be drawn")


# Opening --------------------------------------------------------------------------------------------------------------


def open_encoder(args, checkpoint: str, like: Judged | None = None) -> Judged:
    """Open the encoder of a file or of a timm name, or a random one of the same model as `like`, with its own final
    norm for either feature; or any of timm's encoders. Raises UserError if it cannot be read or does not fit the
    flags."""
    check_numbers(args)
    source = _timm_source(args, checkpoint, like)
    if source is not None:
        judged = _open_timm(args, checkpoint, source)
        return replace(judged, dtype=choose_amp_dtype(args.amp_dtype, judged.device))
    weights = _read(args, checkpoint)
    config, images = _resolve(args, weights, like)
    with seeded(args.seed):  # as in main_linprobe: the same random encoder
        model = build_vit(config, False, weights, verbose=getattr(args, "verbose", False))
    device = choose_device(args.device)
    dtype = choose_amp_dtype(args.amp_dtype, device)
    resolved = _recorded(config, images) | {"pool": getattr(args, "pool", None) or "avg"}
    return Judged(args, resolved, checkpoint, weights, config, images, model.to(device).eval(), device, dtype)


def open_trained(args, checkpoint: str, like: Judged | None = None, head: bool = True, only_plain: str = "") -> Judged:
    """Open the model of a file or of a timm name as it was trained, with the final norm of its feature and, with
    `head`, its classifier if there is one; or a random encoder of the same model as `like`; or any of timm's models.
    In float32. Raises UserError if it cannot be read or does not fit the flags, and for a model of timm's if only plain
    ViTs can be used, for what `only_plain` names."""
    check_numbers(args)
    source = _timm_source(args, checkpoint, like)
    if source is not None and only_plain:
        raise UserError(f"{checkpoint}: {only_plain} plain ViTs only, not timm's {source.architecture}")
    if source is not None:
        return _open_timm(args, checkpoint, source)
    weights = _read(args, checkpoint)
    device = choose_device(args.device)
    if weights is None:
        config, images = _resolve(args, None, like)
        with seeded(args.seed):
            model = build_vit(config, False, None).eval()
    else:
        weights = with_inferred_flags(weights)
        model, config = load_encoder(weights, vars(args), head)
        images = image_options(args, config.in_chans, config.input_size, weights.args)
    resolved = _recorded(config, images) | {"global_pool": model.global_pool}
    return Judged(args, resolved, checkpoint, weights, config, images, model.to(device), device, torch.float32)


def open_autoencoder(args, weights: Weights) -> Judged:
    """Open the whole autoencoder in `weights`, on the CPU and in float32. Raises UserError as `load_autoencoder`."""
    model, config = load_autoencoder(weights, vars(args))
    images = image_options(args, config.in_chans, config.input_size, weights.args)
    resolved = _recorded(config, images) | {"model": config.autoencoder_name}
    return Judged(args, resolved, weights.path, weights, config, images, model, torch.device("cpu"), torch.float32)


def open_autoencoders(args, required: str) -> tuple[list[Judged], float]:
    """Open the whole autoencoders of the flags, to draw them under the same masks -> models, mask ratio. Raises
    UserError as `load_autoencoder`, `check_picture_flags` and `check_same_images`; `required` says what is needed."""
    weights = [read_weights(path, args.checkpoint_key) for path in command_line.checkpoints_of(args, required)]
    ratio = command_line.check_picture_flags(args, {own.path: own.args.get("mask_ratio", 0.75) for own in weights})
    opened = [open_autoencoder(args, own) for own in weights]
    check_same_images(opened, lambda judged: (*judged.images.input_size, judged.images.in_chans))
    return opened, ratio


def check_same_images(opened: list[Judged], shape: Callable[[Judged], tuple]) -> None:
    """Raise UserError if the images of two checkpoints differ in their `shape`, and so are no rows of one picture."""
    for judged in opened[1:]:
        if shape(judged) != shape(opened[0]):
            one, other = (
                f"{own.path} takes images of {own.images.input_size[0]}x{own.images.input_size[1]} pixels and "
                f"{own.images.in_chans} channels"
                for own in (opened[0], judged)
            )
            raise UserError(f"{one}, {other}: they do not fit into one picture; draw each by itself")


def open_classifier(args, numbers: bool = False) -> Judged:
    """Open the classifier of a file or of a timm name; with `numbers` a regression is accepted, too. Raises UserError
    if there is none, or if it has not `--nb_classes` outputs."""
    need = "with a classifier: one of main_finetune.py or main_linprobe.py"
    checkpoint = command_line.checkpoint_of(args, need)
    if checkpoint == "random":
        raise UserError(f"give a CHECKPOINT {need}")
    judged = open_trained(args, checkpoint)
    count = judged.model.num_classes
    stored = judged.weights.args if judged.weights is not None else {}
    if stored.get("targets") == "regression" and not numbers:
        raise UserError(f"{checkpoint} was trained with --targets regression: it predicts numbers, not classes")
    if not count and judged.weights is not None and judged.weights.dense_model:
        raise UserError(f"{checkpoint} is {judged.weights.dense_model}, which classifies no images: {DENSE_USES}")
    if not count:
        raise UserError(f"{checkpoint} has no classifier: fine-tune it first (main_finetune.py, main_linprobe.py)")
    if args.nb_classes not in (None, count):
        raise UserError(f"--nb_classes {args.nb_classes}: the classifier of {checkpoint} has {count} classes")
    return replace(judged, dtype=choose_amp_dtype(args.amp_dtype, judged.device))


def open_each(args, open_one: Callable[[argparse.Namespace, str, Judged | None], Judged]) -> list[Judged]:
    """Open every checkpoint of the flags with `open_one`, in their order. A random encoder is of the model of the first
    checkpoint that is not random, unless --model is given."""
    names, opened, first = command_line.checkpoints_of(args), {}, None
    if not names:
        raise UserError("give a CHECKPOINT, or several (each a file, a timm model, or random)")
    for i in sorted(range(len(names)), key=lambda i: names[i] == "random"):
        judged = open_one(args, names[i], None if args.model else first)
        own_name = {"checkpoint": names[i], "finetune": ""}
        opened[i] = replace(judged, resolved={**judged.resolved, **own_name})
        first = first or opened[i]
    return [opened[i] for i in range(len(names))]


def _timm_source(args, checkpoint: str, like: Judged | None) -> TimmModel | None:
    """Return the model of timm's that `checkpoint` names, or for a random encoder the one of `like`, untrained; None
    for an encoder of ours."""
    if checkpoint == "random":
        return like.config.like_untrained() if like is not None and isinstance(like.config, TimmModel) else None
    return timm_model(checkpoint, args.checkpoint_key)


def _open_timm(args, checkpoint: str, source: TimmModel) -> Judged:
    """Open any of timm's models, in float32."""
    model, images, weights = load_timm_encoder(args, source)
    resolved = {
        "model": source.architecture,
        "in_chans": images.in_chans,
        "input_size": images.input_size[0] if len({*images.input_size}) == 1 else list(images.input_size),
        "mean": images.mean,
        "std": images.std,
        "crop_pct": images.crop_pct,
        "pool": getattr(args, "pool", None) or model.default_pool,
    }
    device = choose_device(args.device)
    return Judged(args, resolved, checkpoint, weights, source, images, model.to(device), device, torch.float32)


def _read(args, checkpoint: str) -> Weights | None:
    """Read a checkpoint; None for a random encoder."""
    weights = read_checkpoint(checkpoint, args.checkpoint_key)
    if weights is not None:
        note_other_split(args, weights.path, weights.args)
    return weights


def _resolve(args, weights: Weights | None, like: Judged | None) -> tuple[Any, ImageOptions]:
    """Resolve the model and the images of an encoder; without weights those of `like`, else those of the flags."""
    if weights is None:
        print("random: the encoder is random, not trained")
        if like is not None:
            return replace(like.config, layer_norm_eps=None), like.images
    config = resolve_config(weights, vars(args), default=DEFAULT_ENCODER)
    return config, image_options(args, config.in_chans, config.input_size, weights.args if weights else {})


def _recorded(config: ModelConfig, images: ImageOptions) -> dict[str, Any]:
    return config.encoder_flags() | {"mean": images.mean, "std": images.std}


def labelled_splits(args) -> list:
    """Read the training and the test images. Raises UserError if they have no labels or different classes."""
    splits = [read_images(args, train=train) for train in (True, False)]
    if args.check_leak:
        check_leak(splits[0], splits[1])
    count_classes(args, *splits)
    for split, images in zip(("training", "test"), splits):
        note_imbalance(images, split)
    return splits
