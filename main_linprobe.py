"""Linear probing: a frozen encoder, BatchNorm without affine, one linear layer, LARS (He et al. 2022, Appendix A.1).

With `--head attentive`, one cross-attention of a learned query pools the patches first (`models_vit.AttentivePool`).
With `--cache_features`, every image is encoded once, and one head per learning rate is trained on the features. The
best head on a held-out part of the training set is chosen, and its test accuracy is reported.
"""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
from pathlib import Path
from textwrap import shorten

import torch
from timm.layers import trunc_normal_
from torch import nn

from engine_finetune import evaluate_once, train
from evaluation.encoder import build_encoder, count_classes, settle_model
from evaluation.features import extract
from evaluation.publish import Destination, publish
from evaluation.scores import TopK, balanced_scores
from models_vit import AttentivePool
from util import arguments
from util.checkpoint.atomic import write_tensors
from util.checkpoint.output_dir import make_output_dir
from util.checkpoint.resume import find_resume, stored_flags
from util.checkpoint.retry import GrowingFile, Saver
from util.checkpoint.same_run import plain
from util.compute.precision import choose_amp_dtype
from util.data.build import build_loader
from util.data.image_format import image_shape, mean_std
from util.data.label_flags import add_imbalance_arguments, check_imbalance
from util.data.labels import balanced_weights, class_weights, known_labels, note_imbalance
from util.data.leak import check_leak
from util.data.pixel_range import settle_pixel_range
from util.data.presets import MIRRORED
from util.data.readers import read_images
from util.data.sample_rng import seeded
from util.data.transforms import check_channels, probe_transform
from util.datasets import build_transform
from util.errors import UserError, user_errors
from util.lars import LARS
from util.lr_sched import adjust_learning_rate
from util.parallel.distributed import barrier, from_main_process, is_main_process, shut_down
from util.parser import Flags, Parser
from util.report.ledger import Record
from util.report.log import log_line
from util.training.best_metric import settle_best_metric
from util.training.losses import build_criterion
from util.training.run import Run, start
from util.training.run_length import settle_schedule
from util.weights.file import read_file


class ProbeParser(Parser):
    """The default of `--blr` depends on `--head`, which also selects the optimizer."""

    def parse_known_args(self, args=None, namespace=None):
        attentive = super().parse_known_args(args, namespace)[0].head == "attentive"
        self.set_defaults(blr=1e-3 if attentive else 0.1)
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
    arguments.add_speed_arguments(parser, trains_blocks=False)
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


CLASSIFIER = "probe.pth"  # the encoder with the chosen head of --cache_features, for --eval and tools/


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
    if args.cache_features and (args.lr is not None or args.accum_iter > 1):
        raise UserError("--lr and --accum_iter have no effect with --cache_features, which uses --probe_blrs")
    if args.head == "attentive" and (args.cache_features or args.global_pool):
        flag = "--cache_features" if args.cache_features else "--global_pool"
        raise UserError(f"{flag} has no effect with --head attentive, which pools the patches itself: leave it out")
    if args.cache_features and (args.max_steps or not isinstance(args.epochs, int)):
        raise UserError("--cache_features trains its heads for whole --epochs: leave out --max_steps and fractions")
    arguments.check_speed_flags(args, not args.eval and not args.cache_features, "with --eval or --cache_features")
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


def probe_head(linear: nn.Linear, *before: nn.Module) -> nn.Sequential:
    """Return `linear` behind a BatchNorm without affine parameters, which standardises the features; the modules
    `before` come first."""
    return nn.Sequential(*before, nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6), linear)


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


def hold_out(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices (rest, held out). About `share` of each class is held out, drawn at random: at least one image,
    unless it is the only one, which stays in the rest."""
    generator = torch.Generator().manual_seed(seed)
    rest, held = [labels.new_empty(0)], [labels.new_empty(0)]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held.append(members[:count])
        rest.append(members[count:])
    return torch.cat(rest), torch.cat(held)


def train_heads(features, labels, args, after_epoch=lambda: None) -> tuple[nn.BatchNorm1d, list[nn.Linear]]:
    """Train one linear head per base rate of `--probe_blrs` on features (M, D) and labels (M,), all on the same
    batches, by LARS. A head's learning rate is its base rate times `--lr`. `after_epoch` is called after each epoch.
    Returns the heads' common BatchNorm, and the heads."""
    device, generator = features.device, torch.Generator().manual_seed(args.seed)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6).to(device)
    heads = [nn.Linear(features.shape[1], args.nb_classes).to(device) for _ in args.probe_blrs]
    for head in heads:
        nn.init.normal_(head.weight, std=0.01, generator=torch.Generator(device).manual_seed(args.seed))
        nn.init.zeros_(head.bias)
    groups = [{"params": head.parameters(), "lr_scale": blr} for head, blr in zip(heads, args.probe_blrs)]
    optimizer = LARS(groups, weight_decay=args.weight_decay)
    weights = None if args.class_weights == "none" else balanced_weights(labels.tolist(), args.nb_classes)
    criterion = build_criterion(False, "single", 0.0, weights=weights).to(device)
    batch_size = min(args.batch_size, len(features))
    batches = len(features) // batch_size
    for epoch in range(args.epochs):
        order = torch.randperm(len(features), generator=generator).to(device)
        for i in range(batches):
            adjust_learning_rate(optimizer, epoch + i / batches, args)
            batch = order[i * batch_size : (i + 1) * batch_size]
            x = norm(features[batch])
            loss = sum(criterion(head(x), labels[batch]) for head in heads)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        after_epoch()
    return norm.eval(), heads


@torch.no_grad()
def accuracy(norm, head, features, labels) -> tuple[float, float]:
    """Return the top-1 and top-5 accuracy in percent."""
    ranked = head(norm(features)).topk(min(5, head.out_features), dim=1).indices == labels[:, None]
    return 100 * ranked[:, 0].float().mean().item(), 100 * ranked.any(dim=1).float().mean().item()


def encode(model, loader, args, device, split: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the features (M, D) of all readable images, on the main process (None on the others), and their labels
    (M,), on all; both on the CPU. `split` names the images beside the progress bar."""
    dtype = choose_amp_dtype(args.amp_dtype, device)
    return extract(model.forward_features, loader, device, dtype, f"encoding {split} images")


def split_and_settle(args, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the images that train the heads, and of those that are held out to choose one. Settles
    `--lr` and freezes the flags. Raises UserError when there are too few images to hold any out."""
    rest, held = hold_out(labels, args.probe_holdout, args.seed)
    if len(rest) < 2 or not len(held):
        raise UserError(
            f"--probe_holdout {args.probe_holdout} of {len(labels)} training images leaves {len(held)} to choose a "
            f"head and {len(rest)} to train it: more images per class are needed"
        )
    args.lr = min(args.batch_size, len(rest)) / 256  # each head multiplies it by its base rate
    args.freeze()
    return rest, held


def train_and_choose(train, test, rest, held, args, device) -> tuple[nn.Sequential, dict]:
    """Train the heads on the images `rest` of `train` and choose one on the images `held`; `train` and `test` are
    (features, labels). Returns the chosen head and the scores. All ranks call it; the main process, which holds the
    features, trains, and the others receive the head and the scores."""

    def choose():
        (features, labels), (test_features, test_labels) = train, test
        norm, heads = train_heads(features[rest].to(device), labels[rest].to(device), args, after_epoch=barrier)
        held_x, held_y = features[held].to(device), labels[held].to(device)
        held_acc1 = [accuracy(norm, head, held_x, held_y)[0] for head in heads]
        best = max(range(len(heads)), key=held_acc1.__getitem__)
        top1, top5 = accuracy(norm, heads[best], test_features.to(device), test_labels.to(device))
        with torch.no_grad():
            logits = heads[best](norm(test_features.to(device))).cpu().numpy()
        scores = {"acc1": top1, "acc5": top5, **balanced_scores(logits, test_labels.numpy())}
        head = probe_head(heads[best])
        head[0].load_state_dict(norm.state_dict())
        return head.cpu(), held_acc1, best, scores

    if not is_main_process():  # the ranks stay in step, so that none times out
        for _ in range(args.epochs):
            barrier()
    head, held_acc1, best, scores = from_main_process(choose)
    for blr, value in zip(args.probe_blrs, held_acc1):
        print(f"blr {blr:g}: {value:.2f} % on {len(held)} held-out training images")
    if len(held_acc1) > 1 and best in (0, len(held_acc1) - 1):
        print(f"note: the best rate, {args.probe_blrs[best]:g}, is at the end of --probe_blrs; try a wider list")
    scores = {f"test_{name}": value for name, value in scores.items()}
    scores |= {"holdout_acc1": held_acc1[best], "blr": args.probe_blrs[best]}
    return head.to(device), scores


def probe_cached(model, train_loader, test_loader, args, device) -> dict:
    """Encode both splits, train the heads, choose one on the held-out images, and make it the head of `model`. Returns
    its test accuracy in percent, its base rate, and the numbers of images. Raises UserError when too few images can be
    read."""
    model.to(device).eval()
    loaders = ((train_loader, "training"), (test_loader, "test"))
    train, test = (encode(model, loader, args, device, split) for loader, split in loaders)
    rest, held = split_and_settle(args, train[1])
    if not len(test[1]):
        raise UserError(f"none of the {len(test_loader.dataset)} test images could be read; their names are above")
    model.head, scores = train_and_choose(train, test, rest, held, args, device)
    return {**scores, "train_images": len(rest), "test_images": len(test[1])}


def run_cached(args, model, images, test_loader, device, record: Record) -> dict:
    """Probe with `--cache_features`, write the results, and return them."""
    transform = build_transform(False, args)
    train_loader = build_loader(images, transform, args, args.batch_size, train=False)
    result = probe_cached(model, train_loader, test_loader, args, device)
    make_output_dir(args.output_dir, args.log_dir, args.overwrite)
    print(
        f"linear probe: top-1 {result['test_acc1']:.2f} %  top-5 {result['test_acc5']:.2f} %  (blr {result['blr']:g})"
    )
    saver = Saver(args.output_dir or ".", args.save_patience)
    images_seen = len(train_loader.dataset) + len(test_loader.dataset)
    if args.output_dir and is_main_process():
        write_cached(args, model, result, record.state(images_seen), saver, getattr(images, "classes", None))
    to = Destination(Path(args.output_dir) / "probe.json" if args.output_dir else None, args.log_dir, args.output_dir)
    hardware = device, choose_amp_dtype(args.amp_dtype, device)
    publish(record, result, images_seen, hardware, to, attempt=saver.insist)
    shut_down()
    return result


def write_cached(args, model, result: dict, origin: dict, saver: Saver, names: list[str] | None) -> None:
    """Write log.txt, and the encoder with the chosen head."""
    content = {
        "model": model.state_dict(),
        "args": {name: plain(value) for name, value in vars(args).items()},
        "origin": origin,
        **({"classes": list(names)} if names else {}),
    }
    folder = Path(args.output_dir)
    log = GrowingFile(folder / "log.txt")
    log.add(log_line(result))
    saver.insist(log.path.name, log.write)
    saver.insist(CLASSIFIER, lambda: write_tensors(folder / CLASSIFIER, content))


def read_weights_and_images(args, resume: Path | None):
    """Read the weights and the images of both splits; settle the model's flags, `--aug` and `--nb_classes`. Returns the
    weights (None: random ones), the training images and the test images. Raises UserError for mistakes in flags and
    files."""
    weights = settle_model(args, str(resume) if args.eval and resume else args.finetune)
    check_channels(args.in_chans)
    args.aug = args.aug or ("none" if args.dataset in MIRRORED else arguments.default_crop(args.dataset))
    arguments.check_draft(args.jpeg_draft, args.aug == "rrc" and not args.eval and not args.cache_features)
    known = weights.classes if args.eval and weights else []
    images = None if args.eval else read_images(args, train=True)
    held_out = read_images(args, False, known or None)
    if args.check_leak:
        check_leak(images, held_out)
    args.nb_classes = count_classes(args, images, held_out)
    settle_pixel_range(args, images or held_out, lambda: stored_flags(resume, weights.args if weights else {}))
    settle_best_metric(args, TopK.metrics, TopK.headline, args.nb_classes)
    for split, listed in (("training", images), ("test", held_out)):
        note_imbalance(listed, split)
    return weights, images, held_out


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
    resume = find_resume(args.resume, args.output_dir, needed=args.eval) if args.resume else None
    weights, images, held_out = read_weights_and_images(args, resume)
    with seeded(args.seed):
        model = build_encoder(args, None if args.eval else weights, args.nb_classes)
    if weights is None and resume is None:
        print("no --finetune: the encoder is random")
    test_loader = build_loader(held_out, build_transform(False, args), args, args.batch_size, train=False)
    command = "main_linprobe" + " --eval" * args.eval
    if args.cache_features:  # --lr is settled later, when the number of readable images is known
        record = Record(command, args, weights, train=images, test=held_out)
        return run_cached(args, model, images, test_loader, device, record)
    if not args.eval:
        loader = training_loader(args, images)
        settle_schedule(args, len(loader))
    args.freeze()

    record = Record(command, args, weights, train=images, test=held_out)
    probe = Probe(model, attentive=args.head == "attentive").to(device)
    if args.eval:
        load_probe(probe, resume or Path(args.finetune), "--resume" if resume else "--finetune")
        return evaluate_once(args, probe, test_loader, device, record, names=getattr(held_out, "classes", None))
    optimizer_type = torch.optim.AdamW if args.head == "attentive" else LARS
    optimizer = optimizer_type(model.head.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    names = getattr(images, "classes", None)
    run = Run(args, device, loader, model, optimizer, probe, resume, record, classes=names)
    criterion = build_criterion(False, "single", 0.0, weights=class_weights(args, images)).to(device)
    return train(args, run, test_loader, criterion)


if __name__ == "__main__":
    with user_errors("main_linprobe.py"):
        main(get_args_parser().parse_args())
