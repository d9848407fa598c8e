"""What the mains of dense prediction share: flags of fine-tuning and their checks, and the weights that a run starts
from or evaluates."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any

from evaluation.encoder import set_norm_eps, settle_model
from models_grid import RELATIVE, GridViT
from util import arguments
from util.checkpoint.resume import stored_flags
from util.checkpoint.same_run import plain
from util.compute.recompute import recompute_cheap
from util.data.dense.annotated import Annotated
from util.data.draws import settle_sample_rng
from util.data.image_format import image_shape
from util.data.leak import check_leak
from util.data.pixel_range import settle_pixel_range
from util.data.sample_rng import seeded
from util.data.transforms import check_channels
from util.errors import UserError
from util.lr_sched import SCHEDULES
from util.parser import rare
from util.speed_flags import add_speed_arguments, check_speed_flags
from util.weights.geometry import source_grid
from util.weights.load import Weights, load_into, read_weights

_TYPES = {"pretrained": "a pretrained encoder", "finetuned": "a fine-tuned classifier"}  # by value of --expects


def add_training_arguments(
    parser, dataset: str, batch_size: int, epochs: int, wd: float, schedule: str, warmup: int, layer_decay: float
) -> None:
    """Add the flags of training and of the run. All arguments are defaults; `warmup` is that of `--warmup_steps`."""
    group = arguments.add_optimizer_arguments(parser, batch_size, epochs, warmup=0, blr=1e-3, wd=wd, min_lr=0.0)
    _add_schedule_arguments(group, schedule, warmup)
    _add_decay_arguments(group, layer_decay)
    parser.set_defaults(lr=1e-4, dataset=dataset, best_metric=None)
    arguments.add_run_arguments(parser, save_freq=1, keep=1)
    add_speed_arguments(parser)
    arguments.add_distributed_arguments(parser)


def _add_schedule_arguments(group, schedule: str, warmup: int) -> None:
    """Add the flags of learning-rate schedules in steps; `util.training.run_length.settle_schedule` settles
    `--warmup_steps`."""
    group.add_argument(
        "--lr_schedule",
        choices=SCHEDULES,
        default=schedule,
        help="after the warm-up: half a cosine, or a line, to --min_lr; step: a tenth of the rate after each of "
        "--lr_steps; constant: no change",
    )
    group.add_argument(
        "--lr_steps",
        type=float,
        nargs="+",
        default=[0.889, 0.963],
        metavar="SHARE",
        help="--lr_schedule step: where the rate drops, as shares of the run",
    )
    group.add_argument(
        "--warmup_steps",
        type=int,
        help=f"linear warm-up in steps, instead of --warmup_epochs; without both {warmup}, at most a tenth of the run",
    )


def _add_decay_arguments(group, layer_decay: float) -> None:
    group.add_argument(
        "--layer_decay", type=float, default=layer_decay, help="ratio of a block's rate to the next one's; 1: none"
    )
    group.add_argument("--drop_path", type=float, default=0.1, help="stochastic depth: drop rate of the last block")
    group.add_argument("--trainable_blocks", type=int, help="train the last N blocks and the head; 0: the head alone")
    rare(
        group.add_argument(
            "--expects",
            choices=["pretrained", "finetuned"],
            help="print a note if --finetune is not a checkpoint of this type: numbers of papers depend on it",
        )
    )


def check_flags(args) -> None:
    """Raise UserError for flags of both mains that are out of range or contradict each other."""
    arguments.check_values(args)
    if not 0 <= args.drop_path <= 1:
        raise UserError(f"--drop_path {args.drop_path} must lie in [0, 1]")
    if not 0 < args.layer_decay <= 1:
        raise UserError(f"--layer_decay {args.layer_decay} must lie in (0, 1]")
    if args.check_leak and args.eval:
        raise UserError("--check_leak has no effect with --eval, which reads no training images")
    for name in ("voc_year", "train_split", "val_split"):
        if args.dataset != "voc" and getattr(args, name):
            raise UserError(f"--{name} has no effect with --dataset {args.dataset}: it is for voc")
    for name in ("jpeg_draft", "fast_resize"):
        if getattr(args, name):
            raise UserError(f"--{name} has no effect here: it is for random resized crops of whole images")
    if args.trainable_blocks is not None and args.eval:
        raise UserError("--trainable_blocks has no effect with --eval")
    check_speed_flags(args, not args.eval, "with --eval")
    if args.eval and not (args.resume or args.finetune):
        raise UserError("--eval needs a finished run: give its checkpoint as --resume or --finetune")


def check_range(flag: str, low: float, high: float) -> None:
    """Raise UserError for a range of factors that is none."""
    if not 0 < low <= high:
        raise UserError(f"{flag} {low:g} {high:g} must be two positive numbers, the lower one first")


def check_positive(args, *names: str) -> None:
    """Raise UserError for flags that were given, and are not positive."""
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)} must be positive")


def read_starting_weights(args, resume: Path | None, models: ModuleType) -> Weights | None:
    """Settle the flags of the encoder and those of the head, which are in `models` (models_segment or models_detect).
    Returns the weights to start from or to evaluate; None for random ones and for a run that is resumed. Raises
    UserError for a file to evaluate that has no such head."""
    source, key = resume or args.finetune, "model" if resume else args.checkpoint_key
    weights = settle_model(args, read_weights(source, key, RELATIVE) if source else None)
    settle_sample_rng(args, weights.args if weights and resume and not args.eval else None)
    if not args.eval and resume is None:
        note_start(args.expects, weights)
    if args.eval and weights and weights.dense_model != models.DENSE_MODEL:
        raise UserError(f"{weights.path} has no {models.TASK} head: give the checkpoint of a finished run")
    _settle_head(args, models.SETTINGS, weights)
    check_channels(args.in_chans, bands=False)
    return weights if args.eval or resume is None else None


def _settle_head(args, settings: Mapping[str, Any], weights: Weights | None) -> None:
    """Settle the flags `settings`: those that are not given are, with `--eval`, the ones stored with the `weights`,
    else the defaults. Raises UserError for a given flag that contradicts the file."""
    stored = weights.args if weights and args.eval else {}
    for name, default in settings.items():
        given = getattr(args, name)
        if given is None:
            setattr(args, name, stored.get(name, default))
        elif weights and name in stored and plain(given) != plain(stored[name]):
            raise UserError(
                f"--{name} {as_given(given)} contradicts {weights.path}, which was trained with "
                f"{as_given(stored[name])}: leave it out"
            )


def as_given(value) -> str:
    """Return the value of a flag as it is given; None is the model's own."""
    if value is None:
        return "the model's own"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def note_start(expected: str | None, weights: Weights | None) -> None:
    """Print a note if `weights` (None: random ones) are not of the type of `--expects`. Fine-tuned ones have a
    classifier."""
    if expected is None:
        return
    fine_tuned = weights is not None and any(name.startswith(("head.", "fc_norm.")) for name in weights.state)
    if weights is None:
        print(f"note: the encoder is random: the protocol starts from {_TYPES[expected]}, given as --finetune")
    elif weights.dense_model or fine_tuned != (expected == "finetuned"):
        is_one = weights.dense_model or _TYPES["finetuned" if fine_tuned else "pretrained"]
        print(f"note: {weights.path} is {is_one}: the protocol starts from {_TYPES[expected]}")


def read_splits(
    args, weights: Weights | None, resume: Path | None, read: Callable[[bool, list[str] | None], Annotated]
) -> tuple[Annotated | None, Annotated]:
    """Return the training images (None with `--eval`) and the evaluation images, and settle `args.nb_classes` and
    `args.pixel_range`. `read(train, categories)` reads one of them; the evaluation images must have the categories of
    the training images, with `--eval` those of `weights`. Raises UserError if `--check_leak` finds an image in both."""
    images = None if args.eval else read(True, None)
    known = images.categories if images is not None else (weights and weights.classes) or None
    held_out = read(False, known)
    if args.check_leak:
        check_leak(images, held_out)
    args.nb_classes = len(held_out.categories)
    settle_pixel_range(args, images or held_out, lambda: stored_flags(resume, weights.args if weights else {}))
    return images, held_out


def build_model(models: ModuleType, args, weights: Weights | None, **options) -> GridViT:
    """Build the model of the module `models` (models_segment or models_detect) for the flags, with further `options`.
    `weights` (None: random ones) are loaded into its encoder, with `--eval` into all of it."""
    names = (*models.SETTINGS, "patch_size", "in_chans")
    sizes = {"img_size": image_shape(args.input_size), **{name: getattr(args, name) for name in names}}
    with seeded(args.seed):
        model = models.build_model(args.model, args.nb_classes, drop_path_rate=args.drop_path, **sizes, **options)
    load_start(model, args, weights)
    return model


def load_start(model: GridViT, args, weights: Weights | None) -> None:
    """Load `weights` (None: random ones) into the encoder of `model`, with `--eval` into all of it, and freeze blocks.
    Raises UserError for a file that does not fit."""
    set_norm_eps(model, getattr(args, "layer_norm_eps", None))
    if weights is not None and args.eval:
        load_whole(model, weights)
    elif weights is not None:
        print(load_into(model, with_relative(weights, model), ignore_head=True).shown(args.verbose))
    if args.trainable_blocks is not None:
        model.train_last_blocks(args.trainable_blocks)
    model.set_grad_checkpointing(args.grad_checkpoint)
    if args.recompute == "cheap":
        recompute_cheap(model)


def with_relative(weights: Weights, model: GridViT) -> Weights:
    """Return `weights` with their relative positions resampled to the windows and the grid of `model`. Raises UserError
    if the model lacks them, or has other ones: attention would not be that of the file."""
    own, shape = model.state_dict(), tuple(model.patch_embed.grid_size)
    tables = model.fit_relative(weights.state, source_grid(weights.state, weights.args, shape, weights.path))
    lost = next((name for name in tables if name not in own), "")
    if lost:
        others = any(RELATIVE in name for name in own)
        advice = "those of this model are of another kind" if others else "this model has none: give --rel_pos"
        what = weights.dense_model or "a model"
        raise UserError(f"{weights.path} is {what} with relative positions ({lost}), and {advice}")
    resized = [name for name, table in tables.items() if table.shape != weights.state[name].shape]
    note = [f"{len(resized)} tables of relative positions interpolated"] if resized else []
    return replace(weights, state={**weights.state, **tables}, notes=weights.notes + note)


def load_whole(model: GridViT, weights: Weights) -> None:
    """Load all tensors of a file. Raises UserError for one of another model, head or input size."""
    try:
        model.load_state_dict(weights.tensors)
    except RuntimeError as error:
        reason = shorten(str(error).strip().splitlines()[-1], 200)
        raise UserError(f"{weights.path} does not fit these flags: {reason}") from error
