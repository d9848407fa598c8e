"""Segmentation by a frozen encoder: nearest neighbours and a linear head on its patch tokens, without training it.

python tools/dense_probe.py output_dir/checkpoint-399.pth random --dataset ade20k --data_path DIR --out dense.json

A part of the training images is held out and chooses the number of neighbours and the L2 penalty of the head; the
chosen ones are evaluated once. The encoder sees whole images, which are made to fit into its input size.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from evaluation import command_line, judging
from evaluation.dense_probe import LinearHeads, Neighbours, collect, segment
from evaluation.publish import write_comparison
from util.arguments import add_leak_argument
from util.compute.precision import autocast
from util.data.dense.annotated import Segmented, SegmentedPart
from util.data.dense.flags import add_dense_data_arguments
from util.data.dense.paired import build_paired_loader
from util.data.dense.segmentation import SEGMENTATION, read_segmentation
from util.data.dense.transforms import SegmentationBatches, SegmentationInput
from util.data.leak import check_leak
from util.data.pixel_range import settle_pixel_range
from util.errors import UserError, user_errors

FLAGS = {"knn": "--k", "linear": "--penalty"}  # that list the settings


def get_args_parser():
    description = "Segmentation by the patch tokens of a frozen encoder."
    parser = judging.evaluation_parser(description, True, features=False, datasets=SEGMENTATION)
    add_dense_data_arguments(parser.add_argument_group("masks"), "segmentation")
    add_leak_argument(parser)
    parser.add_argument(
        "--k", type=int, nargs="+", default=[1, 5, 20, 50], help="numbers of neighbours, of which one is chosen"
    )
    parser.add_argument(
        "--penalty",
        type=float,
        nargs="+",
        default=[1e-5, 1e-4, 1e-3, 1e-2, 1e-1],
        help="L2 penalties of the linear head, of which one is chosen; higher regularises more",
    )
    parser.add_argument("--bank", type=int, default=50_000, help="most training patches to learn from, drawn by --seed")
    parser.add_argument(
        "--holdout", type=float, default=0.1, help="share of the training images that chooses --k and --penalty"
    )
    parser.add_argument("--out", default="", help="JSON file for the result; the ledger is in its folder")
    parser.set_defaults(dataset="ade20k")
    return parser


def check(args) -> Path | None:
    """Return --out as a path. Raises UserError for bad values."""
    for name, lowest in (("k", 1), ("penalty", 0)):
        values = getattr(args, name)
        if not all(lowest <= value < math.inf for value in values) or len(set(values)) < len(values):
            shown = " ".join(f"{value:g}" for value in values)
            kind = "positive" if lowest else "finite, not negative"
            raise UserError(f"--{name} {shown} must be {kind} numbers, each once")
    if args.bank < 1:
        raise UserError(f"--bank {args.bank} must be positive")
    if args.batch_size < 1:
        raise UserError(f"--batch_size {args.batch_size} must be positive")
    if not 0 < args.holdout < 1:
        raise UserError(f"--holdout {args.holdout:g} must lie between 0 and 1, both excluded")
    for name in ("crop_pct", "jpeg_draft", "fast_resize"):
        if getattr(args, name):
            raise UserError(f"--{name} has no effect here: images are made to fit into the input as a whole")
    return command_line.check_out(args, ".json")


def read_splits(args) -> tuple[Segmented, Segmented]:
    """Return training and evaluation images with their masks. Raises UserError if their classes differ."""
    images = read_segmentation(args, True)
    held_out = read_segmentation(args, False, images.categories)
    classes = len(images.categories)
    if args.nb_classes not in (None, classes):
        raise UserError(f"--nb_classes {args.nb_classes} contradicts the data set, which has {classes} classes")
    if args.check_leak:
        check_leak(images, held_out)
    return images, held_out


def hold_out(images: Segmented, share: float, seed: int) -> tuple[SegmentedPart, SegmentedPart]:
    """Divide the training images into those to learn from and those that choose, at least one each."""
    if len(images) < 2:
        raise UserError("--holdout needs at least 2 training images, one to learn from and one to choose")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    count = min(len(images) - 1, max(1, round(share * len(images))))
    return tuple(SegmentedPart(images, part.sort().values.tolist()) for part in (order[count:], order[:count]))


@dataclass(frozen=True)
class Probe:
    """The frozen encoder of a checkpoint on images with masks."""

    judged: judging.Judged
    images: Segmented  # training

    def encode(self, imgs: torch.Tensor) -> torch.Tensor:
        """Images (N, C, H, W) -> patch tokens (N, L, D) float32 after the final norm."""
        judged = self.judged
        with torch.no_grad(), autocast(judged.device, judged.dtype):
            return judged.model.forward_patches(imgs.to(judged.device, non_blocking=True)).float()

    def loader(self, images: Segmented, transform):
        """Return a loader of `images`. `transform` is a class."""
        options = self.judged.images
        settle_pixel_range(options, self.images)
        ignore = {"ignore_label": images.ignore_label} if transform is SegmentationInput else {}
        made = transform(options.input_size, *options.mean_std, **ignore)
        return build_paired_loader(images, made, options, self.judged.args.batch_size, train=False)

    def fit(self, images: Segmented) -> dict:
        """Return the predictors by name, fitted to patches of `images`."""
        args, model, classes = self.judged.args, self.judged.model, len(images.categories)
        loader = self.loader(images, SegmentationInput)
        bank = collect(self.encode, loader, model.patch_embed.patch_size, classes, args.bank, args.seed)
        judging.check_readable(args.max_bad_fraction, images, bank.images, "the training set")
        if max(args.k) > len(bank):
            raise UserError(f"--k {max(args.k)}: there are only {len(bank)} labelled training patches")
        absent = [name for name, count in zip(images.categories, bank.counts.sum(dim=0).tolist()) if not count]
        if absent:
            print(f"note: {len(absent)} of {classes} classes are in no drawn training patch, among them {absent[0]!r}")
        device = self.judged.device
        return {"knn": Neighbours(bank, args.k, device), "linear": LinearHeads(bank, args.penalty, device)}

    def scores(self, images: Segmented, predictors: dict, split: str) -> dict:
        """Return {predictor: {setting: (its scores, their values)}}."""
        grid = self.judged.model.patch_embed.grid_size
        loader = self.loader(images, SegmentationBatches)
        scores = segment(self.encode, loader, grid, predictors, len(images.categories), f"segmenting {split} images")
        read = {name: {setting: (own, own.read()) for setting, own in each.items()} for name, each in scores.items()}
        skipped = max(stats["skipped"] for each in read.values() for _, stats in each.values())
        limit = self.judged.args.max_bad_fraction
        judging.check_readable(limit, images, len(images) - int(skipped), f"the {split} set")
        return read


def choose(probe: Probe) -> tuple[dict, dict, int]:
    """Fit the predictors and choose the setting of each by the mIoU of held-out training images -> the predictors with
    their chosen setting, {predictor: {setting: mIoU}}, number of images. The first of equal settings is chosen."""
    args = probe.judged.args
    rest, held = hold_out(probe.images, args.holdout, args.seed)
    predictors = probe.fit(rest)
    read = probe.scores(held, predictors, "held-out")
    values = {name: {setting: stats["mIoU"] for setting, (_, stats) in each.items()} for name, each in read.items()}
    chosen = {name: predictor.only(max(values[name], key=values[name].get)) for name, predictor in predictors.items()}
    return chosen, values, len(probe.images)


def judge(judged: judging.Judged, images: Segmented, held_out: Segmented, number: int | None, out: Path | None) -> dict:
    """Evaluate one checkpoint and publish its scores; `number` is that of the checkpoint, None for the only one."""
    record = judged.record("dense_probe", train=images, test=held_out)
    probe = Probe(judged, images)
    predictors, values, seen = choose(probe)
    read = probe.scores(held_out, predictors, "evaluation")
    result, details, chosen = {}, {}, {}
    for name, each in read.items():
        ((setting, (scores, stats)),) = each.items()
        result |= {f"{name}_{metric}": stats[metric] for metric in scores.metrics}
        details[name], chosen[name] = scores.details(held_out.categories), setting
        print(f"{name:7} {scores.summary(stats)}  ({FLAGS[name]} {setting:g})")
    tried = {name: {f"{setting:g}": value for setting, value in own.items()} for name, own in values.items()}
    name = "" if number is None else f"dense_probe-{number}"
    content = dict(chosen=chosen, held_out_mIoU=tried, details=details)
    judged.publish(record, result, seen + len(held_out), name=name, json=out, **content)
    return {**result, **content}


def main(args) -> list[dict]:
    """Return, for each checkpoint, the scores in percent by name, the chosen settings and the scores of each class. A
    random encoder is of the first one's model, unless --model is given."""
    out = check(args)
    opened = judging.open_each(args, judging.open_encoder)
    images, held_out = read_splits(args)
    several, rows = len(opened) > 1, []
    for number, judged in enumerate(opened):
        title = command_line.titles_of([each.path for each in opened])[number]
        print(f"{title}: {' x '.join(map(str, judged.images.input_size))} px, {len(images.categories)} classes")
        row = judge(judged, images, held_out, number if several else None, None if several else out)
        rows.append({"checkpoint": judged.path, "title": title, **row})
    if several and out:
        write_comparison(out, args, rows)
    return rows


if __name__ == "__main__":
    with user_errors("dense_probe.py"):
        main(get_args_parser().parse_args())
