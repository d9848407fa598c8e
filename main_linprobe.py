"""Linear probing: a frozen encoder, BatchNorm without affine, one linear layer, LARS (He et al. 2022, Appendix A.1).

With `--head attentive`, one cross-attention of a learned query pools the patches first (`models_vit.AttentivePool`).
With `--cache_features`, every image is encoded once, and one head per learning rate is trained on the features. The
best head on a held-out part of the training set is chosen, and its test accuracy is reported.
"""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
from functools import partial
from pathlib import Path
from textwrap import shorten

import torch
from timm.layers import trunc_normal_
from torch import nn

from engine_finetune import Classification, evaluate_once, train
from evaluation.cached_probe import probe_head, run_cached
from evaluation.encoder import build_encoder, count_classes, settle_model
from evaluation.scores import TopK
from evaluation.summaries import probe_summary, timm_probe_summary
from evaluation.timm_encoder import load_timm_encoder
from models_timm import ProbedTimmEncoder
from models_vit import AttentivePool
from util import arguments
from util.checkpoint.resume import find_resume, stored_flags
from util.data.build import build_loader
from util.data.draws import settle_sample_rng
from util.data.image_format import image_shape, mean_std
from util.data.label_flags import add_imbalance_arguments, check_imbalance
from util.data.labels import class_weights, known_labels, note_imbalance
from util.data.leak import check_leak
from util.data.pixel_range import settle_pixel_range
from util.data.presets import MIRRORED, default_crop
from util.data.readers import read_images
from util.data.sample_rng import seeded
from util.data.transforms import check_channels, probe_transform
from util.datasets import build_transform
from util.errors import UserError, user_errors
from util.lars import LARS
from util.parser import Flags, Parser
from util.report.ledger import Record
from util.speed_flags import add_speed_arguments, check_speed_flags
from util.training.best_metric import settle_best_metric
from util.training.losses import build_criterion
from util.training.run import Run, start
from util.training.run_length import settle_schedule
from util.weights.file import read_file
from util.weights.timm_models import TimmModel, timm_model

LINEAR_BLR = 0.1  # the default of --blr with --head linear


class ProbeParser(Parser):
    """The default of `--blr` depends on `--head`, which also selects the optimizer."""

    def parse_known_args(self, args=None, namespace=None):
        attentive = super().parse_known_args(args, namespace)[0].head == "attentive"
        self.set_defaults(blr=1e-3 if attentive else LINEAR_BLR)
        return super().parse_known_args(args, namespace)


def get_args_parser() -> Parser:
    parser = ProbeParser(
        "Probe a frozen encoder with a linear classifier.", usual="--finetune CHECKPOINT --data_path PATH"
    )
    arguments.add_model_arguments(parser, default_model=None, decoder=False)
    arguments.add_finetuning_arguments(parser, pooled=False)
    group = arguments.add_data_arguments(parser)
    arguments.add_leak_argument(group)
    arguments.add_optimizer_arguments(parser, batch_size=512, epochs=90, warmup=10, blr=0.1, wd=0.0, min_lr=0.0)
    group.add_argument(
        "--aug",
        choices=["rrc", "crop", "none"],
        help="random resized crop, or pad and crop; without it none for digits, crop for CIFAR, else rrc",
    )
    group = parser.add_argument_group("head")
    group.add_argument(
        "--head",
        choices=["linear", "attentive"],
        default="linear",
        help="attentive: one cross-attention of a learned query to the patches, then linear; trained by AdamW at "
        "--blr 1e-3, where linear is trained by LARS",
    )
    add_imbalance_arguments(group)
    add_cache_arguments(parser.add_argument_group("cached features"))
    arguments.add_run_arguments(parser, save_freq=10, keep=1)
    add_speed_arguments(parser, trains_blocks=False)
    arguments.add_distributed_arguments(parser)
    return parser


def add_cache_arguments(group) -> None:
    group.add_argument(
        "--cache_features",
        action="store_true",
        help="encode every image once, without augmentation, and train heads on the features",
    )
    group.add_argument(
        "--probe_blrs",
        type=float,
        nargs="+",
        default=[0.1, 0.3, 1.0, 3.0, 10.0, 30.0],
        help="base learning rates, one head each",
    )
    group.add_argument(
        "--probe_holdout", type=float, default=0.1, help="share of the training images held out to choose the head"
    )


def check(args) -> None:
    """Raise UserError for flags that are out of range or contradict each other."""
    arguments.check_values(args)
    if args.eval and not (args.resume or args.finetune):
        raise UserError("--eval needs a finished probe: give its checkpoint as --resume or --finetune")
    if args.eval and args.cache_features:
        raise UserError("--eval evaluates a finished probe, and --cache_features trains one: give one of them")
    if args.resume and args.cache_features:
        raise UserError("--resume has no effect with --cache_features, which takes minutes and always starts afresh")
    if args.check_leak and args.eval:
        raise UserError("--check_leak has no effect with --eval, which reads no training images")
    if args.head == "attentive" and (args.cache_features or args.global_pool):
        flag = "--cache_features" if args.cache_features else "--global_pool"
        raise UserError(f"{flag} has no effect with --head attentive, which pools the patches itself: leave it out")
    if args.cache_features:
        check_cached(args)
    if args.cache_features and (args.max_steps or not isinstance(args.epochs, int)):
        raise UserError("--cache_features trains its heads for whole --epochs: leave out --max_steps and fractions")
    check_speed_flags(args, not args.eval and not args.cache_features, "with --eval or --cache_features")
    if args.best_metric and (args.eval or args.cache_features):
        flag = "--eval" if args.eval else "--cache_features"
        raise UserError(f"--best_metric has no effect with {flag}, which writes no checkpoint-best.pth")
    condition = "with --eval" if args.eval else "with --cache_features"
    check_imbalance(args, not args.eval, not args.cache_features, condition)
    if args.batch_size == 1 and not args.eval:
        raise UserError("--batch_size 1 is too small for the probe's BatchNorm: give 2 or more")
    if not 0 < args.probe_holdout < 1:
        raise UserError(f"--probe_holdout {args.probe_holdout} must lie between 0 and 1, both excluded")
    if min(args.probe_blrs) <= 0:
        raise UserError("--probe_blrs must be positive")


def check_cached(args) -> None:
    """Raise UserError for flags without effect on `--cache_features`."""
    if args.lr is not None or args.accum_iter > 1:
        raise UserError("--lr and --accum_iter have no effect with --cache_features, which uses --probe_blrs")
    if args.blr not in (None, LINEAR_BLR):
        raise UserError(f"--blr {args.blr} has no effect with --cache_features, which uses --probe_blrs")
    if args.clip_grad is not None:
        raise UserError(f"--clip_grad {args.clip_grad} has no effect with --cache_features")
    if args.aug not in (None, "none"):
        raise UserError(
            f"--aug {args.aug} has no effect with --cache_features, which encodes images without augmentation"
        )


class Probe(nn.Module):
    """A `VisionTransformer` of which only the head is trained; the encoder stays in eval mode."""

    def __init__(self, vit, attentive: bool = False):
        super().__init__()
        self.vit, self.features = vit.requires_grad_(False), vit.forward_patches if attentive else vit.forward_features
        trunc_normal_(vit.head.weight, std=0.01)
        before = [AttentivePool(vit.embed_dim, vit.blocks[0].attn.num_heads)] if attentive else []
        vit.head = probe_head(vit.head, *before).requires_grad_(True)

    def train(self, mode: bool = True):
        self.vit.eval()
        self.vit.head.train(mode)
        self.training = mode
        return self

    def forward(self, imgs):
        """(N, C, H, W) -> logits (N, classes)."""
        with torch.no_grad():
            features = self.features(imgs)
        with torch.autocast(imgs.device.type, enabled=False):
            return self.vit.head(features.float())


def load_probe(probe: Probe, path: Path, flag: str = "--resume") -> None:
    """Load a checkpoint of this program, the value of `flag`, into `probe`. Raises UserError for a checkpoint of
    another program, of another head, or of another number of classes."""
    state = read_file(path)["model"]
    name = f"head.{len(probe.vit.head) - 1}"
    head, classes = state.get(f"{name}.weight"), probe.vit.head[-1].out_features
    if head is None:
        raise UserError(
            f"{flag} {path} has no classifier of this probe ({name}): give a checkpoint of main_linprobe.py with the "
            f"same --head"
        )
    if len(head) != classes:
        raise UserError(f"{flag} {path} is a probe of {len(head)} classes, but the data set has {classes}")
    try:
        probe.vit.load_state_dict(state)
    except RuntimeError as error:
        reason = shorten(str(error).strip().splitlines()[-1], 200)
        raise UserError(f"{flag} {path} does not fit these flags: {reason}") from error


def read_weights_and_images(args, resume: Path | None):
    """Read the weights and the images of both splits; settle the model's flags, `--aug` and `--nb_classes`. Returns the
    weights (None: random ones), the training images and the test images. Raises UserError for mistakes in flags and
    files."""
    weights = settle_model(args, str(resume) if args.eval and resume else args.finetune)
    return weights, *read_splits(args, weights, resume)


def read_splits(args, weights, resume: Path | None):
    """Read the training and the test images; settle `--aug` and `--nb_classes`. Raises UserError for mistakes in flags
    and files."""
    check_channels(args.in_chans)
    if args.cache_features:
        args.aug, args.blr = "none", None  # neither is used
    args.aug = args.aug or ("none" if args.dataset in MIRRORED else default_crop(args.dataset))
    arguments.check_crop_flags(args, args.aug == "rrc" and not args.eval and not args.cache_features)
    known = weights.classes if args.eval and weights else []
    settle_sample_rng(args, None if args.eval else stored_flags(resume, None))
    images = None if args.eval else read_images(args, train=True)
    held_out = read_images(args, False, known or None)
    if args.check_leak:
        check_leak(images, held_out)
    args.nb_classes = count_classes(args, images, held_out)
    settle_pixel_range(args, images or held_out, lambda: stored_flags(resume, weights.args if weights else {}))
    settle_best_metric(args, TopK.metrics, TopK.headline, args.nb_classes)
    for split, listed in (("training", images), ("test", held_out)):
        note_imbalance(listed, split)
    return images, held_out


def probe_timm(args, source: TimmModel, device) -> dict:
    """Probe any of timm's encoders on cached features: its own, or by --global_pool the mean of its patches. Raises
    UserError for mistakes in flags and files."""
    if not args.cache_features:
        raise UserError(f"--finetune {source.name}: timm's encoders are probed with --cache_features only: add it")
    encoder, options, weights = load_timm_encoder(args, source)
    args.model, args.in_chans, args.input_size = source.architecture, options.in_chans, list(options.input_size)
    args.mean, args.std, args.crop_pct = options.mean, options.std, options.crop_pct
    images, held_out = read_splits(args, weights, None)
    transform = options.transform()
    loader = build_loader(held_out, transform, args, args.batch_size, train=False)
    record = Record("main_linprobe", args, weights, train=images, test=held_out)
    pool = "avg" if args.global_pool else encoder.default_pool
    summary = timm_probe_summary(args, encoder, pool, images, held_out)
    probed = ProbedTimmEncoder(encoder, pool)
    return run_cached(args, probed, images, loader, transform, device, record, summary, classifier=False)


def training_loader(args, images):
    """Return the loader of augmented batches of `images`."""
    stats = mean_std(args.dataset, args.in_chans, args.mean, args.std)
    transform = probe_transform(args.aug, image_shape(args.input_size), *stats)
    labels = known_labels(images, "--balanced_sampler") if args.balanced_sampler else None
    return build_loader(images, transform, args, args.batch_size, train=True, labels=labels)


def main(args) -> dict:
    """Probe or evaluate once. Return the scores on the test split. Raises UserError for mistakes in flags and files."""
    args = Flags.of(args)
    check(args)
    device = start(args)
    source = timm_model(args.finetune, args.checkpoint_key) if args.finetune and not args.eval else None
    if source is not None:
        return probe_timm(args, source, device)
    resume = find_resume(args.resume, args.output_dir, needed=args.eval) if args.resume else None
    weights, images, held_out = read_weights_and_images(args, resume)
    with seeded(args.seed):
        model = build_encoder(args, None if args.eval else weights, args.nb_classes)
    transform = build_transform(False, args)
    test_loader = build_loader(held_out, transform, args, args.batch_size, train=False)
    command = "main_linprobe" + " --eval" * args.eval
    summary = probe_summary(args, model, images, held_out)
    if args.cache_features:  # --lr is settled later, when the number of readable images is known
        record = Record(command, args, weights, train=images, test=held_out)
        return run_cached(args, model, images, test_loader, transform, device, record, summary)
    if not args.eval:
        loader = training_loader(args, images)
        settle_schedule(args, len(loader))
    args.freeze()

    recorded = arguments.flags_of_evaluation(args) if args.eval else args
    record = Record(command, recorded, weights, train=images, test=held_out)
    probe = Probe(model, attentive=args.head == "attentive").to(device)
    if args.eval:
        load_probe(probe, resume or Path(args.finetune), "--resume" if resume else "--finetune")
        names = getattr(held_out, "classes", None)
        return evaluate_once(args, probe, test_loader, device, record, names=names, summary=summary)
    optimizer_type = partial(torch.optim.AdamW, fused=True) if args.head == "attentive" else LARS
    optimizer = optimizer_type(model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    names = getattr(images, "classes", None)
    run = Run(args, device, loader, model, optimizer, probe, resume, record, classes=names, summary=summary)
    criterion = build_criterion(False, "single", 0.0, weights=class_weights(args, images)).to(device)
    return train(args, run, test_loader, Classification(criterion))


if __name__ == "__main__":
    with user_errors("main_linprobe.py"):
        main(get_args_parser().parse_args())
