"""Pretrain a masked autoencoder: flags in, run out. The loop is in `engine_pretrain`, the methods are in `methods/`."""

import json
from functools import partial
from pathlib import Path

import torch
from timm.optim import param_groups_weight_decay

import models_mae
from engine_pretrain import train
from evaluation.monitor import Monitor
from methods import METHODS, Pretrainer, add_method_arguments, enabled_methods
from util import arguments
from util.checkpoint.resume import find_resume
from util.checkpoint.same_run import FREE_FLAGS
from util.compute.kernels import choose_attention
from util.compute.precision import choose_amp_dtype
from util.data.batch_aug import BatchTransform
from util.data.build import build_loader, check_enough
from util.data.cache import CACHES, CachedLoader, cache_images
from util.data.image_format import input_size, mean_std
from util.data.leak import check_leak
from util.data.readers import read_images
from util.data.sample_rng import seeded
from util.data.transforms import check_channels, pretrain_transform, three_augment
from util.errors import UserError, user_errors
from util.parallel.fsdp import check_sharded, gathered, shard
from util.parser import Parser, rare
from util.report.ledger import Record, strict
from util.training.finished import end_again
from util.training.run import Run, start
from util.training.run_length import settle_learning_rate, settle_length
from util.weights.load import encoder_state, load_into, read_weights, save_encoder


def get_args_parser() -> Parser:
    parser = Parser(
        "Pretrain a masked autoencoder (He et al. 2022), on its own or with one of the methods at the end.",
        usual="--data_path PATH --output_dir DIR",
    )
    arguments.add_model_arguments(parser, default_model="mae_vit_large_patch16", decoder=True)
    group = parser.add_argument_group("masked autoencoder")
    group.add_argument("--mask_ratio", default=0.75, type=float, help="share of the patches that is removed")
    group.add_argument(
        "--mask_ratio_end",
        type=float,
        metavar="RATIO",
        help="curriculum: the share changes on a straight line from --mask_ratio to this; without it the share stays",
    )
    group.add_argument(
        "--norm_pix_loss", action="store_true", help="compare patches normalised by their own mean and variance"
    )
    group.add_argument(
        "--init_from",
        default="",
        metavar="CHECKPOINT",
        help="start from the weights of this file (any MAE or ViT encoder)",
    )
    add_image_arguments(arguments.add_data_arguments(parser))
    arguments.add_optimizer_arguments(parser, batch_size=64, epochs=400, warmup=40, blr=1e-3, wd=0.05, min_lr=0.0)
    arguments.add_run_arguments(parser, save_freq=20, keep=0)
    group = parser.add_argument_group("monitoring")
    group.add_argument("--vis_freq", default=20, type=int, help="epochs between reconstruction pictures; 0: none")
    group.add_argument("--knn_freq", default=0, type=int, help="epochs between kNN accuracies on validation; 0: none")
    group.add_argument("--knn_images", default=20000, type=int, help="images of each split for kNN, evenly spaced")
    arguments.add_speed_arguments(parser, cached=True)
    arguments.add_distributed_arguments(parser, shards=True)
    add_method_arguments(parser, METHODS)
    return parser


def add_image_arguments(group) -> None:
    """The data flags of pretraining alone."""
    arguments.add_leak_argument(group)
    group.add_argument(
        "--data_cache",
        default="none",
        choices=CACHES,
        help="decode every image once, into memory that all processes of a node share, or onto the GPU (as much as N x "
        "channels x height x width bytes), and augment whole batches there",
    )
    group.add_argument(
        "--cache_size",
        type=int,
        metavar="SIDE",
        help="resize the shorter side to this and cut the longer one, for images of several sizes in a cache",
    )
    rare(
        group.add_argument(
            "--nvjpeg", action="store_true", help="decode the JPEG files of a cache on the GPU, where CPU cores are few"
        )
    )
    group.add_argument(
        "--aug",
        default="mae",
        choices=["mae", "crop", "three", "none"],
        help="mae: resized crop and flip; crop: pad, crop and flip (CIFAR); three: 3-Augment; none: the whole image",
    )


def check(args) -> list:
    """Refuse what can be refused before anything is read or written; returns the enabled methods' classes."""
    arguments.check_values(args)
    check_channels(args.in_chans)
    for name in ("vis_freq", "knn_freq"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)} must not be negative")
    if args.knn_images < 1:
        raise UserError(f"--knn_images {args.knn_images} must be positive")
    if args.cache_size is not None and (args.data_cache == "none" or args.cache_size < 1):
        raise UserError(f"--cache_size {args.cache_size} must be positive, and needs --data_cache ram or device")
    if args.nvjpeg and args.data_cache == "none":
        raise UserError("--nvjpeg fills a cache: it needs --data_cache ram or device")
    arguments.check_draft(args, args.aug in ("mae", "three") and args.data_cache == "none")
    if args.aug == "three":
        three_augment(args.in_chans)
    for name in ("mask_ratio", "mask_ratio_end"):
        ratio = getattr(args, name)
        if ratio is not None and not 0 < ratio < 1:
            raise UserError(f"--{name} {ratio} must lie between 0 and 1, both excluded")
    if args.init_from and args.resume and args.resume != "auto":
        raise UserError("--init_from and --resume contradict each other: weights only, or the whole run")
    chosen = enabled_methods(args, METHODS)
    if chosen and args.max_steps:
        raise UserError(
            f"--max_steps and {chosen[0].flag} exclude each other, because a method's schedule is in epochs: give "
            f"--epochs, which may be a fraction"
        )
    check_decoder(args, chosen)
    return chosen


def check_decoder(args, chosen: list) -> None:
    """Settle `--decoder_fraction`. UserError where it has no effect, or not one it should have."""
    fraction = args.decoder_fraction
    if fraction is not None and args.decoder != "cross":
        raise UserError("--decoder_fraction has no effect without --decoder cross: MAE's predicts every removed patch")
    if fraction is not None and not 0 < fraction <= 1:
        raise UserError(f"--decoder_fraction {fraction} must lie in (0, 1]")
    if args.decoder == "cross":
        by_chance = all(method.slot != "mask" for method in chosen)
        args.decoder_fraction = fraction or (1 / 3 if by_chance else 1.0)
        if args.decoder_fraction < 1 and not by_chance:
            raise UserError(
                f"--decoder_fraction {fraction} would not choose by chance among patches that a learned mask removes: "
                f"give 1"
            )


def build(args) -> models_mae.MaskedAutoencoderViT:
    """The model of these flags; UserError when the mask ratio leaves it nothing to see."""
    overrides = ("patch_size", "in_chans", "decoder", "decoder_fraction", "decoder_embed_dim", "decoder_depth")
    overrides += ("decoder_num_heads", "norm_pix_loss")
    model = models_mae.build_model(
        args.model, img_size=input_size(args), **{name: getattr(args, name) for name in overrides}
    )
    patches = model.patch_embed.num_patches
    for name in ("mask_ratio", "mask_ratio_end"):
        ratio = getattr(args, name)
        visible = 1 if ratio is None else int(patches * (1 - ratio))
        if not 0 < visible < patches:
            what = "leaves no visible patch" if visible < 1 else "removes no patch"
            raise UserError(f"--{name} {ratio} {what} of {patches}: {'lower' if visible < 1 else 'raise'} it")
    return model


def validation_images(args, images):
    """The images to look at while training, None where there are none; UserError when --knn_freq needs them."""
    if args.knn_freq and getattr(images, "classes", None) is None:
        raise UserError(f"--knn_freq needs labels, and --dataset {args.dataset} has none")
    if not args.vis_freq and not args.knn_freq:
        return None
    try:
        held_out = read_images(args, train=False)
    except UserError as error:  # pretraining needs no validation images, looking at them is a courtesy
        if args.knn_freq:
            raise
        print(f"note: {error}; reconstructions are shown on training images")
        return None
    if args.knn_freq and getattr(held_out, "classes", None) is None:
        raise UserError("--knn_freq needs labels, and the validation images have none")
    return held_out


def split_images(methods, args, images):
    """The images to pretrain on and those to look at: the methods' division of the training set, if one makes any."""
    divided = next((d for d in (method.split_images(images) for method in methods) if d is not None), None)
    if divided and args.knn_freq and getattr(divided[0], "classes", None) != divided[1].classes:
        raise UserError(
            "--knn_freq needs one set of labels, and the held-out images have others than those pretrained on"
        )
    return divided or (images, validation_images(args, images))


def training_loader(args, images, device):
    """Augmented batches of `images`, from files or from a cache."""
    (mean, std), size = mean_std(args), input_size(args)
    if args.data_cache == "none":
        transform = pretrain_transform(args.aug, size, mean, std, args.crop_pct)
        return build_loader(images, transform, args, args.batch_size, train=True)
    check_enough(len(images), args.batch_size)
    transform = BatchTransform(args.aug, size, mean, std, args.seed, args.crop_pct)
    return CachedLoader(cache_images(images, args, device), transform, args, args.batch_size)


def move_or_shard(pretrainer: Pretrainer, args, device) -> None:
    """Move it to this process's device: all of it, or with `--fsdp` its share."""
    dtype = choose_amp_dtype(args.amp_dtype, device)
    if args.fsdp:
        check_sharded(args, device, dtype)
        shard(pretrainer, pretrainer.model, pretrainer.external_networks(), device, dtype)
    pretrainer.to(device)


def encoders(run: Run) -> dict[Path, torch.nn.Module]:
    """The models whose encoders a run leaves at its end, its own and what the methods export, by file."""
    models = {"model": run.saved_model, **run.exported()}
    folder = Path(run.args.output_dir)
    return {folder / f"encoder{key.removeprefix('model')}.safetensors": model for key, model in models.items()}


def write_results(run: Run, metrics: dict[str, float]) -> None:
    """What a run leaves at its end, but for its line in the ledger: encoders alone, as safetensors, and flags and
    metrics for TensorBoard."""
    args = run.record.args
    origin = {"epoch": run.epoch if run.position else run.epoch - 1, **run.record.state(run.images_seen())}
    flags = {name: value for name, value in vars(args).items() if name not in FREE_FLAGS}
    metadata = {name: json.dumps(strict(value)) for name, value in {**flags, "origin": origin}.items()}
    for path, model in encoders(run).items():
        state = gathered(encoder_state(model.state_dict()))
        run.checkpoints.saver.insist(path.name, partial(save_encoder, state, path, metadata))
    run.board.hparams(vars(args), metrics)


def main(args) -> None:
    """One pretraining run. UserError for mistakes in flags and files."""
    chosen = check(args)
    args.log_dir = args.output_dir if args.log_dir is None else args.log_dir
    arguments.settle_input_size(args, models_mae.look_up(models_mae.MODELS, args.model).config)
    with seeded(args.seed):
        model = build(args)
    device = start(args)
    choose_attention(args, device, model)
    model.set_grad_checkpointing(args.grad_checkpoint)
    mean_std(args)
    images = read_images(args, train=True)
    if args.check_leak:
        check_leak(images, read_images(args, train=False))
    resume = find_resume(args.resume, args.output_dir) if args.resume else None
    weights = read_weights(args.init_from) if args.init_from and resume is None else None
    if weights is not None:
        print(load_into(model, weights))
    with seeded(args.seed, 1):
        methods = [method(args, model) for method in chosen]
        images, held_out = split_images(methods, args, images)
        loader = training_loader(args, images, device)
        pretrainer = Pretrainer(model, methods, settle_length(args, len(loader)))
    settle_learning_rate(args)
    move_or_shard(pretrainer, args, device)
    groups = param_groups_weight_decay(pretrainer, args.weight_decay, no_weight_decay_list=pretrainer.no_weight_decay())
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    pretrainer.attach(optimizer)
    record = Record("main_pretrain", args, weights, train=images, test=held_out if args.knn_freq else None)
    run = Run(args, device, loader, model, optimizer, pretrainer, resume, record)
    if run.resumed_at_end:
        end_again(run, list(encoders(run)), partial(write_results, run))
        return
    run.begin()
    row = train(pretrainer, run, args, Monitor(args, run, pretrainer, images, held_out))
    if not run.stopped and args.output_dir:
        write_results(run, {**run.reporter.last_means, **row})
    run.append_to_ledger()
    run.close()


if __name__ == "__main__":
    with user_errors("main_pretrain.py"):
        main(get_args_parser().parse_args())
