"""Fine-tune a pretrained encoder for classification or regression, train one from scratch, or evaluate one."""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
from functools import partial
from pathlib import Path

import torch
from timm.layers import trunc_normal_

import models_vit
from engine_finetune import Classification, evaluate_once, train
from evaluation.encoder import build_encoder, count_classes, settle_model
from evaluation.regression import RegressionScores
from evaluation.scores import MultiLabel, MultiLabelSigmoid, TopK
from evaluation.summaries import finetuning_summary
from util import arguments
from util.checkpoint.resume import find_resume
from util.compute.recompute import recompute_cheap
from util.data.build import build_loader
from util.data.draws import settle_sample_rng
from util.data.label_flags import add_imbalance_arguments, add_label_arguments, check_imbalance, check_labels
from util.data.labels import class_weights, known_labels, note_imbalance, read_labelled, settle_units, with_noise
from util.data.leak import check_leak
from util.data.pixel_range import settle_pixel_range
from util.data.presets import add_preset_arguments, default_crop, mixes, settle_preset
from util.data.sample_rng import seeded
from util.data.transforms import check_channels
from util.datasets import build_transform
from util.errors import UserError, user_errors
from util.lr_decay import param_groups_lrd
from util.parser import Flags, Parser, rare
from util.report.ledger import Record
from util.speed_flags import add_speed_arguments, check_speed_flags
from util.training.best_metric import settle_best_metric
from util.training.losses import build_criterion
from util.training.mixup import Mixup
from util.training.run import Run, start
from util.training.run_length import settle_schedule
from util.weights.load import Weights, read_weights


def get_args_parser() -> Parser:
    parser = Parser(
        "Fine-tune a ViT for classification or regression, train one from scratch, or evaluate one.",
        usual="--finetune CHECKPOINT --data_path PATH",
    )
    arguments.add_model_arguments(parser, default_model=None, decoder=False)
    arguments.add_finetuning_arguments(parser, pooled=True)
    arguments.add_leak_argument(arguments.add_data_arguments(parser))
    group = parser.add_argument_group("labels")
    add_label_arguments(group)
    add_imbalance_arguments(group)
    group = arguments.add_optimizer_arguments(
        parser, batch_size=64, epochs=50, warmup=5, blr=1e-3, wd=0.05, min_lr=1e-6
    )
    group.add_argument(
        "--trainable_blocks",
        type=int,
        help="partial fine-tuning: train the last N blocks, the norm and the head; 0: the head alone",
    )
    group.add_argument(
        "--layer_decay", type=float, default=0.75, help="ratio of a block's learning rate to the next one's"
    )
    add_augmentation_arguments(parser.add_argument_group("augmentation"))
    arguments.add_run_arguments(parser, save_freq=1, keep=1)
    add_speed_arguments(parser)
    arguments.add_distributed_arguments(parser)
    return parser


def add_augmentation_arguments(group) -> None:
    add_preset_arguments(group)
    group.add_argument(
        "--aug",
        choices=["rrc", "crop"],
        help="random resized crop, or pad and crop; without it crop for CIFAR and digits, else rrc",
    )
    group.add_argument("--color_jitter", type=float, help="strength; only without --aa")
    rare(
        group.add_argument(
            "--remode",
            default="pixel",
            choices=["pixel", "rand", "const"],
            help="random erasing: content of the erased area",
        )
    )
    rare(group.add_argument("--recount", type=int, default=1, help="random erasing: number of erased areas"))
    rare(
        group.add_argument(
            "--resplit", action="store_true", help="accepted as in the official MAE, where it has no effect either"
        )
    )
    add_mixing_arguments(group)


def add_mixing_arguments(group) -> None:
    rare(
        group.add_argument(
            "--cutmix_minmax",
            type=float,
            nargs="+",
            help="range of the pasted area's side, as a share of the image's; turns cutmix on",
        )
    )
    group.add_argument("--mixup_prob", type=float, default=1.0, help="probability that a batch is mixed")
    group.add_argument("--mixup_switch_prob", type=float, default=0.5, help="probability of cutmix when both are on")
    rare(
        group.add_argument(
            "--mixup_mode",
            default="batch",
            choices=["batch", "pair", "elem"],
            help="mix whole batches, pairs or images",
        )
    )


def check(args) -> None:
    """Raise UserError for flags that are out of range or contradict each other."""
    arguments.check_values(args)
    for name in ("drop_path", "smoothing", "reprob", "hflip", "mixup_prob", "mixup_switch_prob", "label_noise"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name} {getattr(args, name)} must lie in [0, 1]")
    if args.aa not in ("auto", None) and not args.aa.startswith(("rand", "augmix", "original", "v0", "3a")):
        raise UserError(
            f"--aa {args.aa!r} is not a policy of timm: give rand-m9-mstd0.5-inc1, augmix-m5, original, v0 or none"
        )
    if args.recount < 1:
        raise UserError(f"--recount {args.recount} must be positive; --reprob 0 turns random erasing off")
    for name in ("mixup", "cutmix", "color_jitter"):
        if (getattr(args, name) or 0) < 0:
            raise UserError(f"--{name} {getattr(args, name)} must not be negative")
    sides = args.cutmix_minmax
    if sides is not None and not (len(sides) == 2 and 0 <= sides[0] < sides[1] <= 1):
        raise UserError(f"--cutmix_minmax {' '.join(map(str, sides))} must be two increasing numbers in [0, 1]")
    if not 0 < args.layer_decay <= 1:
        raise UserError(f"--layer_decay {args.layer_decay} must lie in (0, 1]")
    if mixes(args) and args.batch_size % 2:
        raise UserError(f"--batch_size {args.batch_size} must be even with --mixup or --cutmix, which pair images")
    check_labels(args, mixes(args))
    check_imbalance(args, trains=not args.eval)
    check_speed_flags(args, not args.eval, "with --eval")
    if args.trainable_blocks is not None and args.eval:
        raise UserError("--trainable_blocks has no effect with --eval")
    if args.check_leak and args.eval:
        raise UserError("--check_leak has no effect with --eval, which reads no training images")
    if args.best_metric and args.eval:
        raise UserError("--best_metric has no effect with --eval, which writes no checkpoint")
    if args.eval and not (args.resume or args.finetune):
        raise UserError("--eval needs weights: give --resume or --finetune")


def build_mixup(args) -> Mixup | None:
    """Return mixup and cutmix of a batch, None if both are off."""
    if not mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=args.nb_classes,
    )


def settle_from_checkpoint(args, path: Path) -> Weights:
    """Set the flags of model and augmentation of a resumed run that are not given to those of its checkpoint, which is
    returned. `Run` compares the others."""
    weights = settle_model(args, read_weights(path))
    settle_preset(args, weights.args)
    return weights


def settle_loss(args, weights: Weights) -> None:
    """With `--eval`, take `--multilabel_loss` from the checkpoint: it decides what the outputs mean."""
    stored = weights.args.get("multilabel_loss")
    if args.targets == "multilabel" and stored and stored != args.multilabel_loss:
        print(f"note: {weights.path} was trained with --multilabel_loss {stored}, and is evaluated with it")
        args.multilabel_loss = stored


def read_starting_weights(args, resume: Path | None) -> tuple[Weights | None, Weights | None]:
    """Read the initial weights, and settle the flags of model and augmentation and the meaning of the outputs. Returns
    the weights to start from or to evaluate (None: random ones) and those of the checkpoint to resume; at least one of
    the two is None."""
    resumed = settle_from_checkpoint(args, resume) if resume is not None and not args.eval else None
    source = str(resume) if args.eval and resume else args.finetune
    weights = settle_model(args, source if args.eval or resume is None else "")
    settle_preset(args)
    settle_sample_rng(args, resumed and resumed.args)
    settle_units(args, weights if args.eval else resumed)
    if args.eval:
        assert weights is not None  # `check` demands a file
        settle_loss(args, weights)
    check_channels(args.in_chans)
    args.aug = args.aug or default_crop(args.dataset)
    arguments.check_crop_flags(args, args.aug == "rrc" and not args.eval)
    return weights, resumed


def read_splits(args, evaluated: Weights | None, stored: Weights | None):
    """Read the training images (None with `--eval`) and the validation images; settle the flags that depend on them.
    `evaluated` are the weights of `--eval`, `stored` those whose flags describe the images. Raises UserError for
    mistakes in flags and files."""
    vocabulary = evaluated.classes if evaluated else []
    images = None if args.eval else read_labelled(args, True)
    held_out = read_labelled(args, False, vocabulary or None)
    if evaluated and vocabulary and args.targets == "multilabel" and held_out.classes != vocabulary:
        raise UserError(f"--label_vocab {args.label_vocab} is not the vocabulary of {evaluated.path}: leave it out")
    if args.check_leak:
        check_leak(images, held_out)
    args.nb_classes = count_classes(args, images, held_out)
    settle_pixel_range(args, images or held_out, lambda: stored.args if stored else {})
    scores = SCORES[args.targets]
    classes = args.nb_classes if args.targets == "single" else None
    settle_best_metric(args, scores.metrics, scores.headline, classes)
    for split, listed in (("training", images), ("evaluation", held_out)):
        note_imbalance(listed, split)
    return images, held_out


def training_loader(args, images):
    """Return the loader of augmented batches of `images`."""
    labels = known_labels(images, "--balanced_sampler") if args.balanced_sampler else None
    return build_loader(images, build_transform(True, args), args, args.batch_size, train=True, labels=labels)


def build(args, weights: Weights | None) -> models_vit.VisionTransformer:
    """Build the classifier. `weights` (None: random ones) are loaded into its encoder and, with `--eval`, its head."""
    with seeded(args.seed):
        model = build_encoder(args, weights, args.nb_classes, args.drop_path, ignore_head=not args.eval, like_mae=False)
        if weights is not None and not args.eval:
            trunc_normal_(model.head.weight, std=2e-5)  # near zero, so the encoder's first gradients are small
    if args.trainable_blocks is not None:
        freeze_encoder(model, args.trainable_blocks)
    model.set_grad_checkpointing(args.grad_checkpoint)
    if args.recompute == "cheap":
        recompute_cheap(model)
    return model


def freeze_encoder(model: models_vit.VisionTransformer, trainable_blocks: int) -> None:
    """Freeze the encoder except for its last `trainable_blocks` blocks and, unless there are none, its norm. Raises
    UserError for more blocks than the encoder has."""
    model.train_last_blocks(trainable_blocks)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"--trainable_blocks {trainable_blocks}: {count / 1e6:.2f} M parameters are trained")


SCORES = {"single": TopK, "multilabel": MultiLabel, "regression": RegressionScores}


def scores_of(args):
    """Return what makes the scores of an evaluation, given a device."""
    if args.targets == "regression":
        return partial(RegressionScores, mean=args.target_mean, std=args.target_std)
    return MultiLabelSigmoid if args.multilabel_loss == "bce" else SCORES[args.targets]


def main(args) -> dict[str, float]:
    """Fine-tune or evaluate once. Return the scores of the last evaluation. Raises UserError for mistakes in flags and
    files."""
    args = Flags.of(args)
    check(args)
    device = start(args)
    resume = find_resume(args.resume, args.output_dir, needed=args.eval) if args.resume else None
    weights, resumed = read_starting_weights(args, resume)
    images, held_out = read_splits(args, weights if args.eval else None, resumed or weights)
    if not args.eval:
        noisy = with_noise(images, args)
        loader, weights_of_classes = training_loader(args, noisy), class_weights(args, noisy)
        settle_schedule(args, len(loader))
    args.freeze()

    model = build(args, weights).to(device)
    val_loader = build_loader(held_out, build_transform(False, args), args, args.batch_size, train=False)
    recorded = arguments.flags_of_evaluation(args) if args.eval else args
    record = Record("main_finetune" + " --eval" * args.eval, recorded, weights, train=images, test=held_out)
    summary = finetuning_summary(args, model, images, held_out)
    if args.eval:
        task = Classification(score_type=scores_of(args))
        names = getattr(held_out, "classes", None)
        return evaluate_once(args, model, val_loader, device, record, task, names, summary)
    groups = param_groups_lrd(model, args.weight_decay, model.no_weight_decay(), args.layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, fused=True)
    names = getattr(images, "classes", None)
    run = Run(args, device, loader, model, optimizer, resume=resume, record=record, classes=names, summary=summary)
    criterion = build_criterion(mixes(args), args.targets, args.smoothing, args.multilabel_loss, weights_of_classes)
    task = Classification(criterion.to(device), build_mixup(args), scores_of(args), args.targets)
    return train(args, run, val_loader, task)


if __name__ == "__main__":
    with user_errors("main_finetune.py"):
        main(get_args_parser().parse_args())
