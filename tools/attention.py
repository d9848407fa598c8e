"""Attention of [cls] to the patches and Grad-CAM, drawn over images, for one checkpoint, or several as rows.

python tools/attention.py mae/checkpoint-799.pth mlo/checkpoint-199.pth --data DIR --out attention.png
python tools/attention.py finetuned/checkpoint-99.pth --data DIR --out cam.png --show gradcam --class_index 3

Grad-CAM is taken at the first norm of the last block, as in MLO-MAE (Guo et al., Section C.2). The unscaled maps are
written beside the picture (.npz), with the flags and shares (.json); the ledger gets a line for each checkpoint.
"""

import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch

from evaluation import command_line, judging
from evaluation.image_options import sample_images
from evaluation.publish import write_comparison
from evaluation.saliency import attended_share, grad_cam
from util.compute.attention_maps import block_at, cls_attention
from util.errors import UserError, user_errors
from util.report.pictures import overlay, rgb, rows_of_images, shown_range
from util.report.sheet import Bar, Sheet, draw_sheet

MAPS = ["attention", "gradcam"]
NO_GRADIENT = "no positive gradient"
ADVICE = ": leave attention out (--show gradcam)"
OBJECTIVES = {
    "class": "the score of a class",
    "feature": "the distance of the image's feature from the mean of the images shown",
}


def get_args_parser():
    parser = command_line.data_parser("Draw the attention of [cls] and Grad-CAM of one or several checkpoints.")
    command_line.add_checkpoint_flags(parser, several=True)
    command_line.add_picture_flags(parser, masked=False)
    parser.add_argument(
        "--show", nargs="+", choices=MAPS, default=MAPS, metavar="MAP", help=f"maps to draw: {' '.join(MAPS)}"
    )
    parser.add_argument("--block", type=int, default=-1, help="block, counted from 0, or from the end if negative")
    parser.add_argument("--heads", action="store_true", help="also draw a map for each attention head")
    parser.add_argument(
        "--objective",
        choices=["auto", *OBJECTIVES],
        default="auto",
        help="scalar that Grad-CAM differentiates: class, a classifier's score; feature, the distance of the image's "
        "feature from the mean of the images shown, for encoders; auto: class if every checkpoint has a classifier",
    )
    parser.add_argument(
        "--class_index", type=int, help="class whose score is differentiated; without it the predicted one"
    )
    command_line.add_feature_flags(parser)
    command_line.add_model_flags(parser)
    command_line.add_device_flag(parser)
    return parser


class Subject:
    """One checkpoint, with the images in its size and normalisation."""

    def __init__(self, judged: judging.Judged):
        self.model, args, self.path = judged.model.requires_grad_(False), judged.args, judged.path
        block_at(self.model, args.block)
        self.pool = command_line.settle_pool(args, self.model, self.path)
        sample = sample_images(args, judged.images, self.model)
        self.judged = replace(judged, resolved={**judged.resolved, **sample.source})
        self.subset = sample.subset
        self.colours = rgb(sample.colours)
        self.imgs = sample.imgs.to(judged.device)
        self.grid = tuple(self.model.patch_embed.grid_size)

    def feature(self, imgs):
        """Encode images (N, C, H, W) into features (N, D), differentiably."""
        return self.model.feature(imgs, self.pool)

    def score(self, objective: str, class_index: int | None) -> torch.Tensor:
        """Return the scores (N,) that Grad-CAM differentiates."""
        if objective == "class":
            logits = self.model(self.imgs)
            classes = logits.argmax(dim=1)
            if class_index is not None:
                classes = torch.full_like(classes, class_index)
            return logits.gather(1, classes[:, None])[:, 0]
        feature = self.feature(self.imgs)
        return (feature * (feature - feature.mean(dim=0)).detach()).sum(dim=1)

    def maps(self, args, objective: str) -> dict[str, torch.Tensor]:
        """Compute the maps of `--show`: attention (N, h, rows, columns), with its share of attended patches (N, h) as
        attended and the weight of [cls] itself (N, h) as to_cls; gradcam (N, rows, columns), with its score (N,); and
        of a classifier the predicted classes (N,)."""
        maps = {}
        if "attention" in args.show:
            attention = cls_attention(self.model, self.imgs, args.block, ADVICE)
            maps["attention"] = attention[..., 1:].unflatten(-1, self.grid)
            maps["to_cls"], maps["attended"] = attention[..., 0], attended_share(attention)
        if "gradcam" in args.show:
            score = lambda: self.score(objective, args.class_index)  # noqa: E731
            maps["gradcam"] = grad_cam(self.model, self.imgs, score, args.block).unflatten(-1, self.grid)
            with torch.no_grad():
                maps["score"] = score()
        if self.model.num_classes:
            with torch.no_grad():
                maps["predicted"] = self.model(self.imgs).argmax(dim=1)
        return {name: values.cpu() for name, values in maps.items()}


def settle_objective(args, subjects: list[Subject]) -> str:
    """Return the objective of Grad-CAM, class or feature. Raises UserError if a checkpoint or the images exclude it."""
    headless = [subject.path for subject in subjects if not subject.model.num_classes]
    objective = args.objective
    if objective == "auto":
        objective = "feature" if headless and args.class_index is None else "class"
    if objective == "class" and headless:
        raise UserError(
            f"{headless[0]} has no classifier for Grad-CAM: give a checkpoint of main_finetune.py or main_linprobe.py, "
            "or --objective feature"
        )
    if objective == "feature" and args.class_index is not None:
        raise UserError("--class_index has no effect with --objective feature")
    for subject in subjects if args.class_index is not None else []:
        if not 0 <= args.class_index < subject.model.num_classes:
            raise UserError(f"--class_index {args.class_index}: {subject.path} has {subject.model.num_classes} classes")
    if objective == "feature" and len(subjects[0].imgs) < 2:
        raise UserError(
            "--objective feature compares an image with the others: give a folder of at least two (--count)"
        )
    return objective


def columns_of(maps: dict, heads: bool) -> dict[str, torch.Tensor]:
    """Return the maps (N, rows, columns) to draw, by title."""
    columns = {}
    if "attention" in maps:
        columns["attention"] = maps["attention"].mean(dim=1)
        columns |= {f"head {i}": head for i, head in enumerate(maps["attention"].unbind(dim=1)) if heads}
    return columns | ({"Grad-CAM": maps["gradcam"]} if "gradcam" in maps else {})


def note_of(title: str, values: torch.Tensor) -> str:
    """Return the note below a map (rows, columns): its range, or why it is empty."""
    return NO_GRADIENT if title == "Grad-CAM" and not values.any() else shown_range(values)


def caption(args, objective: str) -> str:
    """Return the caption of the picture."""
    parts = []
    if "attention" in args.show:
        block = f"block {args.block}" + " (counted from the end)" * (args.block < 0)
        block = "the last block" if args.block == -1 else block
        parts.append(f"Attention of [cls] to the patches in {block}: mean of its heads{', and each head' * args.heads}")
    if "gradcam" in args.show:
        target = "the predicted class" if args.class_index is None else f"class {args.class_index}"
        target = f"the score of {target}" if objective == "class" else OBJECTIVES[objective]
        parts.append(f"Grad-CAM: patches that raise {target}; a pale tile ({NO_GRADIENT}): no patch does")
    return f"{'. '.join(parts)}."


def metrics_of(maps: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the metrics of one checkpoint for the ledger, means over the images shown."""
    metrics = {}
    if "attended" in maps:
        metrics = {"attended_share": maps["attended"].mean().item(), "attention_to_cls": maps["to_cls"].mean().item()}
        metrics |= {f"attended_share_head{i}": share for i, share in enumerate(maps["attended"].mean(dim=0).tolist())}
    return metrics | ({"score": maps["score"].mean().item()} if "score" in maps else {})


def row_of(subject: Subject, maps: dict[str, torch.Tensor]) -> dict:
    """Return the entry of one checkpoint in the JSON file."""
    row = {"checkpoint": subject.path} | {k: v.tolist() for k, v in maps.items() if k in ("predicted", "score")}
    return row | ({"attended_share": maps["attended"].mean(dim=0).tolist()} if "attended" in maps else {})


def drawing(subjects: list[Subject], columns: list[dict[str, torch.Tensor]], text: str = "", side=None) -> Sheet:
    """Draw the images of each checkpoint and its maps of `columns_of` over them, one checkpoint below the other. A map
    that a checkpoint lacks, as it has fewer heads, stays white."""
    titles = list(max(columns, key=len))
    pictures, notes = [], []
    for subject, own in zip(subjects, columns):
        white = torch.ones_like(subject.colours)
        over = [overlay(subject.colours, own[title]) if title in own else white for title in titles]
        pictures.append(torch.stack([subject.colours, *over], dim=1))
        ranges = [[note_of(title, v) for v in own[title]] if title in own else [""] * len(white) for title in titles]
        notes.append([["", *image] for image in zip(*ranges)])
    per_row = 2 if len(titles) < 4 and len(pictures[0]) > 1 else 1
    labels = command_line.titles_of([subject.path for subject in subjects]) if len(subjects) > 1 else [""]
    rows = rows_of_images(pictures, labels, notes, per_row)
    bar = Bar("lowest", "highest value of the map", "each map is scaled to its own range, which is below it")
    return draw_sheet(rows, ["image", *titles], text, bar, side, per_row)


@torch.no_grad()
def main(args) -> list[dict[str, torch.Tensor]]:
    """Draw and return the maps of each checkpoint, as `Subject.maps` does."""
    out = command_line.needed_picture(args)
    command_line.check_tile(args)
    opened = judging.open_each(args, judging.open_trained)
    judging.check_same_images(opened, lambda judged: (Fraction(*judged.images.input_size),))
    subjects = [Subject(judged) for judged in opened]
    objective = settle_objective(args, subjects) if "gradcam" in args.show else ""
    records = [subject.judged.record("attention", shown=subject.subset) for subject in subjects]
    maps = [subject.maps(args, objective) for subject in subjects]
    columns = [columns_of(own, args.heads) for own in maps]
    text = caption(args, objective)
    drawing(subjects, columns, text, args.tile_size).save(out)
    arrays = {f"{name}_{i}": values.numpy() for i, own in enumerate(maps) for name, values in own.items()}
    np.savez(out.with_suffix(".npz"), **arrays)
    rows = [row_of(subject, own) for subject, own in zip(subjects, maps)]
    write_comparison(out, args, rows, objective=objective, caption=text)
    print(f"{out}: {text}")
    for i, (subject, record, own) in enumerate(zip(subjects, records, maps)):
        pictures = {"maps": drawing([subject], [columns[i]], text).tensor()}
        images_seen = len(subject.subset)
        subject.judged.publish(record, metrics_of(own), images_seen, name=f"attention-{i}", pictures=pictures)
        if "attended" in own:
            heads = ", ".join(f"{share:.0%}" for share in own["attended"].mean(dim=0))
            print(f"  {subject.path}: share of the patches that [cls] attends to, by head: {heads}")
    return maps


if __name__ == "__main__":
    with user_errors("attention.py"):
        main(get_args_parser().parse_args())
