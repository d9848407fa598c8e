"""The flags that the mains share, in titled groups, and the checks on their values. Names and defaults are the official
MAE's wherever it has the flag."""

import argparse
import math
from collections.abc import Sequence

from util.data.dense.scenes import add_scene_arguments
from util.data.draws import add_sample_rng
from util.data.image_folders import add_folder_arguments, check_folder_flags
from util.data.list_flags import add_list_arguments, check_columns
from util.data.pixel_range import check_pixel_range
from util.data.readers import READERS
from util.data.reading_flags import CHANNELS, add_reading_arguments
from util.errors import UserError
from util.parser import rare
from util.report.loggers import add_logger_arguments, check_loggers
from util.speed_flags import check_recompute
from util.training.best_metric import add_best_metric


def add_model_arguments(parser, default_model: str | None, decoder: bool):
    group = parser.add_argument_group("model")
    from_checkpoint = "; without it the checkpoint's" * (not decoder)
    group.add_argument("--model", default=default_model, help="name; an unknown one prints all names" + from_checkpoint)
    group.add_argument(
        "--input_size", type=int, nargs="+", metavar=("H", "W"), help="image size in pixels; without it the model's own"
    )
    group.add_argument("--patch_size", type=int, help="in pixels; without it the model's own")
    group.add_argument(
        "--in_chans",
        type=int,
        default=3 if decoder else None,
        help=CHANNELS + from_checkpoint,
    )
    if decoder:
        group.add_argument(
            "--decoder",
            default="self",
            choices=["self", "cross"],
            help="self: MAE's decoder; cross: CrossMAE's, which has other weights, and in which mask tokens "
            "cross-attend to visible tokens and not to each other",
        )
        rare(
            group.add_argument(
                "--decoder_fraction",
                type=float,
                metavar="SHARE",
                help="with --decoder cross: share of the removed patches to predict; without it 1/3, which is the "
                "paper's 25%% of all patches at --mask_ratio 0.75; 1 is slower and gave about the same accuracy in the "
                "paper",
            )
        )
        for name, what in (("embed_dim", "width"), ("depth", "blocks"), ("num_heads", "heads")):
            rare(group.add_argument(f"--decoder_{name}", type=int, help=f"decoder {what}; without it the model's own"))
    return group


def add_data_arguments(parser, datasets: Sequence[str] = ()):
    """Add the flags of data sets. `datasets` are the names that a command with annotated images can read; without them
    it reads all images."""
    group = parser.add_argument_group("data")
    names, path = ", ".join(datasets), "folder of the data set"
    if not datasets:
        names = f"{', '.join(READERS)} (WebDataset shards), or a name of timm's factory: hfds/..., tfds/..."
        path += (
            "; with train/ and val/ for imagefolder. wds: a folder or http(s) URL with shards and their _info.json, or "
            "a pattern: DIR/x-{000..012}.tar, http://..., 'pipe:COMMAND x-{000..012}.tar'"
        )
    group.add_argument("--dataset", default="imagefolder", metavar="NAME", help=names)
    group.add_argument("--data_path", default="", help=path)
    add_folder_arguments(group)
    add_list_arguments(group)
    add_scene_arguments(group)
    add_reading_arguments(group)
    return group


def add_show_channels(group) -> argparse.Action:
    """Add `--show_channels`, for commands that draw images, and return it; `util.report.pictures.shown_channels` checks
    it."""
    return group.add_argument(
        "--show_channels",
        type=int,
        nargs=3,
        metavar=("R", "G", "B"),
        help="channels, numbered from 0, that are red, green and blue in pictures; black is two standard deviations "
        "below the mean, white two above; without it the first three of more than four channels",
    )


def add_leak_argument(group) -> None:
    """Add `--check_leak`, for commands that train on one split and evaluate on another."""
    group.add_argument(
        "--check_leak",
        action="store_true",
        help="compare both splits before training, and fail if an image of the training split is in the other",
    )


def number(text: str) -> float:
    """Return the number in `text`: an int where it is whole, else a float."""
    value = float(text)
    return int(value) if value.is_integer() else value


def add_optimizer_arguments(parser, batch_size: int, epochs: int, warmup: int, blr: float, wd: float, min_lr: float):
    group = parser.add_argument_group("optimization")
    group.add_argument("--batch_size", default=batch_size, type=int, help="images per process and forward pass")
    group.add_argument("--epochs", default=epochs, type=number, help="may be a fraction: 0.1, 2.5")
    group.add_argument(
        "--max_steps",
        type=int,
        help="train for this many optimizer steps instead of --epochs; all schedules end there too",
    )
    group.add_argument(
        "--accum_iter", default=1, type=int, help="forward passes per step; the gradient is the exact mean over them"
    )
    group.add_argument("--weight_decay", type=float, default=wd, help="weight decay; biases and norms have none")
    group.add_argument("--lr", type=float, help="absolute learning rate; overrides --blr")
    group.add_argument(
        "--blr", type=float, default=blr, help="lr = blr * effective batch / 256 (batch_size * accum_iter * processes)"
    )
    group.add_argument("--min_lr", type=float, default=min_lr, help="rate at the end of the cosine and the line")
    group.add_argument("--warmup_epochs", type=number, default=warmup, help="epochs of linear warm-up")
    group.add_argument("--clip_grad", type=float, help="maximum gradient norm; against loss spikes, try 1 to 3")
    return group


def add_run_arguments(parser, save_freq: int, keep: int) -> None:
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", default="./output_dir", help="checkpoints and log.txt; empty writes nothing")
    add_logger_arguments(group)
    group.add_argument("--device", default="auto", help="auto (CUDA if there is one), cuda, cuda:N, mps or cpu")
    group.add_argument("--seed", default=0, type=int, help="seed of weights, masks, augmentation and image order")
    add_sample_rng(group)
    group.add_argument(
        "--amp_dtype",
        default="auto",
        choices=["auto", "bf16", "fp16", "fp32"],
        help="auto: bf16 on hardware that multiplies it fast, fp16 with loss scaling on older GPUs, else fp32",
    )
    _add_checkpoint_arguments(group, save_freq, keep)
    group.add_argument(
        "--print_freq", default=20, type=int, help="steps between progress lines and between TensorBoard points"
    )
    group.add_argument(
        "--spike_factor",
        type=float,
        metavar="FACTOR",
        help="list in spikes.jsonl the images of each step whose loss is more than FACTOR times the median of the 100 "
        "steps before; off without it; try 2",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="use only deterministic algorithms, which are slower on GPUs: two runs with the same flags, hardware and "
        "software versions are then bit-identical",
    )
    add_verbose_argument(group)
    group.add_argument(
        "--print_config", action="store_true", help="print what the run would use, and all its flags, and end"
    )


def add_verbose_argument(group) -> None:
    """Add `--verbose`, for commands that load weights; `util.weights.report.LoadReport.shown` takes its value."""
    rare(
        group.add_argument(
            "--verbose",
            action="store_true",
            help="list the tensors of a checkpoint that are loaded, missing or not used; without it one line counts "
            "them",
        )
    )


def _add_checkpoint_arguments(group, save_freq: int, keep: int) -> None:
    group.add_argument(
        "--resume",
        default="",
        metavar="CHECKPOINT",
        help="continue a run exactly: a checkpoint, or 'auto' for the newest undamaged one in --output_dir",
    )
    group.add_argument("--overwrite", action="store_true", help="delete the run in --output_dir")
    rare(group.add_argument("--start_epoch", default=0, type=int, help="first epoch, when not resuming"))
    group.add_argument("--save_freq", default=save_freq, type=int, help="epochs between checkpoints")
    group.add_argument(
        "--save_steps", default=0, type=int, help="optimizer steps between temporary checkpoints; 0: none"
    )
    group.add_argument("--keep", default=keep, type=int, help="epoch checkpoints to keep, the newest ones; 0: all")
    rare(
        group.add_argument(
            "--save_patience",
            default=10.0,
            type=float,
            metavar="MINUTES",
            help="how long writing the last checkpoint is retried while the disk is full or unmounted, before the run "
            "fails; earlier checkpoints are retried while the run continues",
        )
    )


def add_distributed_arguments(parser, shards: bool = False) -> None:
    group = parser.add_argument_group("several processes (set by torchrun)")
    if shards:
        group.add_argument(
            "--fsdp",
            action="store_true",
            help="shard weights, gradients and optimizer states over the processes (FSDP2), for models that do not "
            "fit on one GPU; checkpoints become folders, which tools/unshard.py converts to single files",
        )
    rare(group.add_argument("--world_size", default=1, type=int, help="set by the launcher"))
    rare(group.add_argument("--local_rank", "--local-rank", default=-1, type=int, help="set by the launcher"))
    rare(group.add_argument("--dist_on_itp", action="store_true", help="read Open MPI's environment"))
    rare(group.add_argument("--dist_url", default="env://", help="address for initialising the process group"))
    rare(
        group.add_argument(
            "--dist_backend", default="auto", choices=["auto", "nccl", "gloo"], help="auto: gloo, and nccl between GPUs"
        )
    )
    group.add_argument(
        "--timeout_s",
        default=1800.0,
        type=float,
        help="seconds to wait for another rank; after them the run names the hanging rank and aborts",
    )


def add_transfer_arguments(parser):
    """Add the flags of every main that starts from a pretrained encoder, and return their group."""
    group = parser.add_argument_group("transfer")
    group.add_argument(
        "--finetune", default="", metavar="CHECKPOINT", help="weights of the encoder; without it they are random"
    )
    group.add_argument(
        "--checkpoint_key",
        default="model",
        help="weights in that file: model, model_ema (RC-MAE's teacher), or a part of the tensors' names (teacher)",
    )
    group.add_argument(
        "--eval",
        action="store_true",
        help="evaluate the finished run of --resume or --finetune (--resume goes first), do not train",
    )
    group.add_argument(
        "--eval_freq", type=int, default=1, help="epochs between evaluations; the last epoch always has one"
    )
    return group


def add_finetuning_arguments(parser, pooled: bool) -> None:
    """Add the flags that fine-tuning and probing share. `pooled`: the default of `--global_pool`."""
    group = add_transfer_arguments(parser)
    group.add_argument("--global_pool", action="store_true", help="feature: mean of the patch tokens")
    group.add_argument("--cls_token", action="store_false", dest="global_pool", help="feature: the [cls] token")
    group.set_defaults(global_pool=pooled)
    group.add_argument("--nb_classes", type=int, help="number of classes; without it the data set's")
    add_best_metric(group, pooled)
    rare(
        group.add_argument(
            "--dist_eval", action="store_true", help="accepted; evaluation is always distributed and exact"
        )
    )


def check_numbers(args) -> None:
    """Raise UserError for a number out of range, and for columns without a list. Flags that a command does not have are
    skipped."""
    _check_finite(args)
    positive = "batch_size epochs accum_iter save_freq print_freq timeout_s clip_grad patch_size in_chans"
    positive += " decoder_embed_dim decoder_num_heads nb_classes eval_freq shuffle_buffer shard_samples max_steps"
    not_negative = "warmup_epochs num_workers save_steps keep start_epoch seed weight_decay min_lr blr lr decoder_depth"
    not_negative += " warmup_steps"
    for name in positive.split():
        value = getattr(args, name, None)
        if value is not None and value <= 0:
            raise UserError(f"--{name} {value} must be positive; leave it out for the default")
    for name in not_negative.split():
        value = getattr(args, name, None)
        if value is not None and value < 0:
            raise UserError(f"--{name} {value} must not be negative")
    if args.seed >= 2**31:  # numpy's seeds have 32 bits, and each rank adds its index
        raise UserError(f"--seed {args.seed} must be below {2**31}")
    if getattr(args, "crop_pct", None) is not None and not 0 < args.crop_pct <= 1:
        raise UserError(f"--crop_pct {args.crop_pct} must lie in (0, 1]")
    check_pixel_range(getattr(args, "pixel_range", None))
    check_folder_flags(args)
    if not 0 <= getattr(args, "max_bad_fraction", 0) <= 1:
        raise UserError(f"--max_bad_fraction {args.max_bad_fraction} must lie in [0, 1]")
    if getattr(args, "save_patience", 0) < 0:
        raise UserError(f"--save_patience {args.save_patience} must not be negative; 0 tries once")
    if (getattr(args, "spike_factor", None) or 2) <= 1:
        raise UserError(f"--spike_factor {args.spike_factor} must be above 1, for example 2")
    if args.input_size is not None and len(args.input_size) > 2:
        raise UserError("--input_size takes one number, or height and width")
    if args.input_size is not None and min(args.input_size) < 1:
        raise UserError(f"--input_size {' '.join(map(str, args.input_size))} must be positive")
    check_columns(args)


def check_values(args) -> None:
    """Check the flags that all mains have. Raises UserError for a number out of range, and for contradictions."""
    check_numbers(args)
    if args.start_epoch >= args.epochs and not args.resume and not getattr(args, "eval", False):
        raise UserError(f"--start_epoch {args.start_epoch} leaves none of the --epochs {args.epochs} to train")
    if args.resume and args.overwrite:
        raise UserError("--resume and --overwrite contradict each other: give one of them")
    check_recompute(args)
    check_loggers(args)


# Flags without effect on an evaluation, by group: optimization, partial fine-tuning, augmentation, labels, run, probe.
_TRAINING_FLAGS = "epochs max_steps accum_iter weight_decay lr blr min_lr warmup_epochs clip_grad "
_TRAINING_FLAGS += "trainable_blocks layer_decay aug_preset aa smoothing reprob drop_path mixup cutmix hflip aug "
_TRAINING_FLAGS += "color_jitter remode recount resplit cutmix_minmax mixup_prob mixup_switch_prob mixup_mode "
_TRAINING_FLAGS += "label_noise balanced_sampler class_weights save_freq save_steps keep save_patience start_epoch "
_TRAINING_FLAGS += "lr_schedule lr_steps warmup_steps expects scale flip distort head_dropout lsj sample_rng "
_TRAINING_FLAGS += "print_freq spike_factor eval_freq best_metric overwrite cache_features probe_blrs probe_holdout"


def flags_of_evaluation(args) -> argparse.Namespace:
    """Return the flags without those that only training uses: an evaluation records the ones that made its checkpoint
    instead (`source` in the ledger)."""
    left_out = _TRAINING_FLAGS.split()
    return argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in left_out})


def check_crop_flags(args, crops: bool, cached: str = "none") -> None:
    """Raise UserError for `--jpeg_draft` and `--fast_resize` where they have no effect. `crops`: whether random resized
    crops are drawn, of images that are `cached`: none, ram or device."""
    if args.jpeg_draft and not (crops and cached == "none"):
        raise UserError("--jpeg_draft has no effect here: it needs random resized crops of image files")
    if args.fast_resize and not (crops and cached != "device"):
        raise UserError("--fast_resize has no effect here: it needs random resized crops on the CPU")
    if args.fast_resize and args.jpeg_draft:
        raise UserError("--fast_resize and --jpeg_draft exclude each other: choose one")


def _check_finite(args) -> None:
    """Raise UserError for a flag that is infinite or NaN."""
    for name, value in vars(args).items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            raise UserError(f"--{name} {' '.join(str(number) for number in numbers)} is not finite")


def compact_size(size: list[int]) -> int | list[int]:
    """Return the image size [side] or [H, W] as flags and checkpoints store it: an int, or [H, W] where they differ."""
    return size[0] if len(size) == 1 or size[0] == size[1] else list(size)
