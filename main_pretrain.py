"""Pretrain a masked autoencoder. The training step is in `engine_pretrain`, the methods are in `methods/`."""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
import json
from functools import partial
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train
from evaluation.monitor import Monitor
from evaluation.runs import columns, hparams_of
from evaluation.summaries import pretraining_summary
from methods import METHODS, Method, Pretrainer, add_method_arguments, enabled_methods
from util import arguments
from util.checkpoint.resume import find_resume, stored_flags
from util.checkpoint.same_run import FREE_FLAGS
from util.compute.kernels import choose_attention
from util.compute.precision import choose_amp_dtype
from util.compute.recompute import recompute_cheap
from util.data.bands import many_bands
from util.data.batch_aug import BatchTransform
from util.data.build import build_loader, check_enough
from util.data.cache import CACHES, CachedLoader, cache_images
from util.data.draws import settle_sample_rng
from util.data.image_format import image_shape, mean_std
from util.data.leak import check_leak
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.sample_rng import seeded
from util.data.transforms import check_channels, pretrain_transform, three_augment
from util.errors import UserError, user_errors
from util.parallel.fsdp import check_sharded, gathered, shard
from util.parser import Flags, Parser, rare
from util.report.ledger import Record, strict
from util.report.pictures import shown_channels
from util.speed_flags import add_speed_arguments
from util.training.finished import end_again
from util.training.run import Run, start
from util.training.run_length import settle_schedule
from util.weights.load import Weights, encoder_state, load_into, read_weights, save_encoder


def get_args_parser() -> Parser:
    parser = Parser(
        "Pretrain a masked autoencoder (He et al. 2022), on its own or with one of the methods at the end.",
        usual="--data_path PATH --output_dir DIR",
    )
    arguments.add_model_arguments(parser, default_model="mae_vit_large_patch16", decoder=True)
    group = parser.add_argument_group("masked autoencoder")
    group.add_argument("--mask_ratio", default=0.75, type=float, help="share of the patches to remove")
    group.add_argument(
        "--mask_ratio_end",
        type=float,
        metavar="RATIO",
        help="curriculum: the mask ratio changes linearly from --mask_ratio to this; without it, it is constant",
    )
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="predict patches normalised by their own mean and variance"
    )
    group.add_argument(
        "--init_from",
        default="",
        metavar="CHECKPOINT",
        help="start from the weights in this file (any MAE or ViT encoder)",
    )
    add_image_arguments(arguments.add_data_arguments(parser))
    arguments.add_optimizer_arguments(parser, batch_size=64, epochs=400, warmup=40, blr=1e-3, wd=0.05, min_lr=0.0)
    arguments.add_run_arguments(parser, save_freq=20, keep=0)
    group = parser.add_argument_group("monitoring")
    group.add_argument("--vis_freq", default=20, type=int, help="epochs between reconstruction pictures; 0: none")
    rare(arguments.add_show_channels(group))
    group.add_argument("--knn_freq", default=0, type=int, help="epochs between kNN scores; 0: none")
    group.add_argument("--probe_freq", default=0, type=int, help="epochs between probe scores; 0: none")
    rare(
        group.add_argument("--knn_images", default=20000, type=int, help="images of each split for both, evenly spaced")
    )
    add_speed_arguments(parser, cached=True)
    arguments.add_distributed_arguments(parser, shards=True)
    add_method_arguments(parser, METHODS)
    return parser


def add_image_arguments(group) -> None:
    """Add the data flags that the other mains do not have."""
    arguments.add_leak_argument(group)
    group.add_argument(
        "--data_cache",
        default="none",
        choices=CACHES,
        help="decode every image once and keep it as N x channels x height x width bytes: in memory shared by all "
        "processes of a node (ram) or on the GPU (device); whole batches are augmented there",
    )
    group.add_argument(
        "--cache_size",
        type=int,
        metavar="SIDE",
        help="resize the shorter side to this and crop the longer one, for images of several sizes in a cache; this "
        "changes the images: their borders are lost, and random crops see the reduced image",
    )
    rare(
        group.add_argument(
            "--nvjpeg",
            action="store_true",
            help="with --data_cache: decode JPEG files on the GPU; for machines with few CPU cores; pixels differ "
            "slightly from pillow's",
        )
    )
    group.add_argument(
        "--aug",
        default="mae",
        choices=["mae", "crop", "three", "none"],
        help="mae: resized crop and flip; crop: pad, crop and flip (CIFAR); three: 3-Augment; none: the whole image",
    )


def check(args) -> list[type[Method]]:
    """Check the flags before anything is read or written, and settle the options of the methods. Returns the classes of
    the enabled methods. Raises UserError for flags that are out of range or contradict each other."""
    arguments.check_values(args)
    check_channels(args.in_chans)
    mean_std(args.dataset, args.in_chans, args.mean, args.std)
    shown_channels(args.in_chans, args.show_channels)
    for name in ("vis_freq", "knn_freq", "probe_freq"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)} must not be negative")
    if args.knn_images < 1:
        raise UserError(f"--knn_images {args.knn_images} must be positive")
    if args.cache_size is not None and (args.data_cache == "none" or args.cache_size < 1):
        raise UserError(f"--cache_size {args.cache_size} must be positive, and needs --data_cache ram or device")
    if args.data_cache != "none" and many_bands(args.in_chans):
        raise UserError(f"--data_cache {args.data_cache} keeps 8 bits, and is for images of 1 to 4 channels: remove it")
    if args.nvjpeg and args.data_cache == "none":
        raise UserError("--nvjpeg has no effect without --data_cache ram or device")
    arguments.check_crop_flags(args, args.aug in ("mae", "three"), cached=args.data_cache)
    if args.aug == "three":
        three_augment(args.in_chans)
    for name in ("mask_ratio", "mask_ratio_end"):
        ratio = getattr(args, name)
        if ratio is not None and not 0 < ratio < 1:
            raise UserError(f"--{name} {ratio} must lie between 0 and 1, both excluded")
    if args.init_from and args.resume and args.resume != "auto":
        raise UserError("--init_from loads weights only and --resume continues a whole run: give one of them")
    chosen = enabled_methods(args, METHODS)
    in_epochs = next((method for method in chosen if method.schedule_in_epochs(args)), None)
    if in_epochs and args.max_steps:
        raise UserError(
            f"--max_steps and {in_epochs.flag} exclude each other, because the schedule of {in_epochs.flag} is in "
            f"epochs: give --epochs, which may be a fraction"
        )
    check_decoder(args.decoder, args.decoder_fraction, mask_method(chosen))
    return chosen


def check_decoder(decoder: str, fraction: float | None, masks: type[Method] | None) -> None:
    """Raise UserError where `--decoder_fraction` has no effect or is out of range. `masks` is the method that decides
    the mask, if there is one."""
    if fraction is None:
        return
    if decoder != "cross":
        raise UserError(
            "--decoder_fraction has no effect without --decoder cross: MAE's decoder predicts every removed patch"
        )
    if not 0 < fraction <= 1:
        raise UserError(f"--decoder_fraction {fraction} must lie in (0, 1]")
    if fraction < 1 and masks:
        raise UserError(
            f"--decoder_fraction {fraction} would predict not a random part of the removed patches, but those that "
            f"{masks.flag}, which decides the mask, scores lowest: give 1"
        )


def mask_method(chosen: list[type[Method]]) -> type[Method] | None:
    """Return which of the methods decides the mask; None if masks are random."""
    return next((method for method in chosen if method.slot == "mask"), None)


def settle(args) -> list[type[Method]]:
    """Check the flags and settle those that depend on flags alone. Returns the classes of the enabled methods."""
    chosen = check(args)
    if args.decoder == "cross" and args.decoder_fraction is None:
        args.decoder_fraction = 1.0 if mask_method(chosen) else 1 / 3
    config = models_mae.look_up(models_mae.MODELS, args.model).config
    args.input_size = arguments.compact_size(args.input_size or [config["img_size"]])
    return chosen


def build(args) -> models_mae.MaskedAutoencoderViT:
    """Build the model. Raises UserError when a mask ratio leaves or removes no patch."""
    overrides = ("patch_size", "in_chans", "decoder", "decoder_fraction", "decoder_embed_dim", "decoder_depth")
    overrides += ("decoder_num_heads", "norm_pix_loss")
    model = models_mae.build_model(
        args.model, img_size=image_shape(args.input_size), **{name: getattr(args, name) for name in overrides}
    )
    patches = model.patch_embed.num_patches
    for name in ("mask_ratio", "mask_ratio_end"):
        ratio = getattr(args, name)
        visible = 1 if ratio is None else int(patches * (1 - ratio))
        if not 0 < visible < patches:
            effect = "leaves no visible patch" if visible < 1 else "removes no patch"
            raise UserError(f"--{name} {ratio} {effect} of {patches}: {'lower' if visible < 1 else 'raise'} it")
    return model


def read_starting_weights(args, model) -> tuple[Path | None, Weights | None]:
    """Load the weights of `--init_from` into `model`, unless a run is resumed. Return the checkpoint to resume and
    these weights; at least one of the two is None."""
    resume = find_resume(args.resume, args.output_dir) if args.resume else None
    weights = read_weights(args.init_from) if args.init_from and resume is None else None
    if weights is not None:
        print(load_into(model, weights, adapt_channels=True).shown(args.verbose))
    return resume, weights


def read_training_images(args):
    """Return the images of the training split. Raises UserError if `--check_leak` detects images of the validation
    split among them."""
    images = read_images(args, train=True)
    if args.check_leak:
        check_leak(images, read_images(args, train=False))
    return images


def labels_for(args) -> str:
    """Return the flag that needs labels, "" if none does."""
    return "--knn_freq" if args.knn_freq else "--probe_freq" if args.probe_freq else ""


def validation_images(args, images):
    """Return the validation images for monitoring, None if there are none or none are needed. Raises UserError if
    `--knn_freq` or `--probe_freq` needs images or labels that are missing."""
    flag = labels_for(args)
    if flag and getattr(images, "classes", None) is None:
        raise UserError(f"{flag} needs labels, and --dataset {args.dataset} has none")
    if not args.vis_freq and not flag:
        return None
    try:
        held_out = read_images(args, train=False)
    except UserError as error:  # pretraining itself needs no validation images
        if flag:
            raise
        print(f"note: {error}; reconstructions are shown on training images")
        return None
    if flag and getattr(held_out, "classes", None) is None:
        raise UserError(f"{flag} needs labels, and the validation images have none")
    return held_out


def split_images(methods, args, images):
    """Return the images for pretraining and those for monitoring. The latter are images that a method holds out of the
    training set, or else the validation split."""
    splits = (method.split_images(images) for method in methods)
    split = next((split for split in splits if split is not None), None)
    flag = labels_for(args)
    if split and flag and split[1].classes is None:
        raise UserError(f"{flag} needs labels, and the images that are held out have masks")
    if split and flag and getattr(split[0], "classes", None) != split[1].classes:
        raise UserError(f"{flag} needs one set of labels, and the held-out images and the others differ in theirs")
    return split or (images, validation_images(args, images))


def training_loader(args, images, device):
    """Return the loader of augmented batches of `images`, from files or from a cache."""
    mean, std = mean_std(args.dataset, args.in_chans, args.mean, args.std)
    options = args.aug, image_shape(args.input_size), mean, std
    if args.data_cache == "none":
        transform = pretrain_transform(*options, args.crop_pct)
        return build_loader(images, transform, args, args.batch_size, train=True)
    check_enough(len(images), args.batch_size)
    transform = BatchTransform(*options, args.seed, args.crop_pct)
    images = cache_images(images, args, device)
    return CachedLoader(images, transform, args.batch_size, args.num_workers, args.pin_mem)


def move_or_shard(pretrainer: Pretrainer, device: torch.device, dtype: torch.dtype, fsdp: bool) -> None:
    """Move `pretrainer` to `device`, or with `fsdp` only this process's share of it."""
    if fsdp:
        check_sharded(dtype)
        shard(pretrainer, pretrainer.model, pretrainer.external_networks(), device, dtype)
    pretrainer.to(device)


def encoders(run: Run) -> dict[Path, torch.nn.Module]:
    """Return {file: model} of the encoders that are exported at the end of a run: that of its model, and those of the
    methods."""
    models = {"model": run.saved_model, **run.exported()}
    folder = Path(run.args.output_dir)
    return {folder / f"encoder{key.removeprefix('model')}.safetensors": model for key, model in models.items()}


def write_results(run: Run) -> None:
    """Write the results of a finished run, except its line in the ledger: encoders as safetensors, and flags for
    TensorBoard's HPARAMS tab."""
    args = run.record.args
    origin = {"epoch": run.last_epoch, **run.record.state(run.images_seen())}
    flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    metadata = {name: json.dumps(strict(value)) for name, value in {**flags, "origin": origin}.items()}
    for path, model in encoders(run).items():
        state = gathered(encoder_state(model.state_dict()))
        run.checkpoints.saver.insist(path.name, partial(save_encoder, state, path, metadata))
    run.board.hparams(hparams_of(run.record), columns())


def main(args) -> None:
    """Pretrain once. Raises UserError for mistakes in flags and files."""
    args = Flags.of(args)
    chosen = settle(args)
    with seeded(args.seed):
        model = build(args)
    device = start(args)
    dtype = choose_amp_dtype(args.amp_dtype, device)
    choose_attention(args.attention, device, dtype, model)
    model.set_grad_checkpointing(args.grad_checkpoint)
    if args.recompute == "cheap":
        recompute_cheap(model)
    images = read_training_images(args)
    resume, weights = read_starting_weights(args, model)
    settle_sample_rng(args, stored_flags(resume, None))
    settle_pixel_range(args, images, lambda: stored_flags(resume, weights.args if weights else {}))
    with seeded(args.seed, 1):
        methods = [method(args, model) for method in chosen]
        images, held_out = split_images(methods, args, images)
        loader = training_loader(args, images, device)
        steps = settle_schedule(args, len(loader))
        args.freeze()
        pretrainer = Pretrainer(model, methods, steps)
    move_or_shard(pretrainer, device, dtype, args.fsdp)
    groups = param_groups_weight_decay(pretrainer, args.weight_decay, no_weight_decay_list=pretrainer.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    pretrainer.attach(optimizer)
    record = Record("main_pretrain", args, weights, train=images, test=held_out if labels_for(args) else None)
    summary = pretraining_summary(args, model, chosen, images, held_out)
    run = Run(args, device, loader, model, optimizer, pretrainer, resume, record, summary=summary)
    if run.resumed_at_end:
        end_again(run, list(encoders(run)), lambda: write_results(run))
        return
    run.begin()
    train(pretrainer, run, args, Monitor(args, run, pretrainer, images, held_out))
    if not run.stopped and args.output_dir:
        write_results(run)
    run.append_to_ledger()
    run.close()


if __name__ == "__main__":
    with user_errors("main_pretrain.py"):
        main(get_args_parser().parse_args())
