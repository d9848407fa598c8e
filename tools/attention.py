"""Where checkpoints look: attention of [cls] to the patches and Grad-CAM over images, checkpoints side by side.

python tools/attention.py mae/checkpoint-799.pth mlo/checkpoint-199.pth --data DIR --out attention.png
python tools/attention.py finetuned/checkpoint-99.pth --data DIR --out cam.png --show gradcam --class_index 3

Grad-CAM is taken at the first norm of the last block, as in MLO-MAE (Guo et al., Section C.2). A .npz of the name of
the picture holds the maps unscaled, a .json what was drawn; the ledger gets a line for each checkpoint.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image, to_tensor

from evaluation import command_line, judging
from evaluation.saliency import attended_share, block_at, cls_attention, grad_cam
from util.errors import UserError, user_errors
from util.report.ledger import Record, write_json
from util.report.pictures import captioned, denormalized, grid, labelled, overlay, rgb

MAPS = ["attention", "gradcam"]
OBJECTIVES = {
    "class": "the score of a class",
    "feature": "what sets the image's feature apart from the mean of the images shown",
}


def get_args_parser():
    parser = command_line.parser("Draw the attention of [cls] and Grad-CAM of one or several checkpoints.")
    command_line.add_checkpoint_flags(parser, several=True)
    command_line.add_picture_flags(parser, masked=False)
    parser.add_argument(
        "--show", nargs="+", choices=MAPS, default=MAPS, metavar="MAP", help=f"some of {' '.join(MAPS)}"
    )
    parser.add_argument("--block", type=int, default=-1, help="block from 0; negative from the end")
    parser.add_argument("--heads", action="store_true", help="a map for each attention head, too")
    parser.add_argument(
        "--objective",
        choices=["auto", *OBJECTIVES],
        default="auto",
        help="what Grad-CAM explains: class, a classifier's score; feature, the distance of the image's feature from "
        "the mean of the images shown, for encoders; auto: class where every checkpoint has a classifier",
    )
    parser.add_argument("--class_index", type=int, help="the class to explain; without it the predicted one")
    command_line.add_feature_flags(parser)
    command_line.add_model_flags(parser)
    command_line.add_device_flag(parser)
    return parser


class Subject:
    """One checkpoint, with the images in its own size and normalisation."""

    def __init__(self, judged: judging.Judged):
        self.judged, self.model, args = judged, judged.model.requires_grad_(False), judged.args
        self.path = args.checkpoint
        self.title = str(Path(*Path(self.path).with_suffix("").parts[-2:]))
        block_at(self.model, args.block)
        self.pool = command_line.settle_pool(args, self.model, self.path)
        imgs, mean, std, self.part = command_line.chosen_images(args, self.model)
        self.shown = rgb(denormalized(imgs, mean, std))
        self.imgs = imgs.to(judged.device)
        self.grid = tuple(self.model.patch_embed.grid_size)

    def feature(self, imgs):
        """(N, D), differentiable."""
        if self.model.global_pool:
            return self.model.forward_features(imgs)
        tokens = self.model.norm(self.model.forward_tokens(imgs))
        return tokens[:, 0] if self.pool == "cls" else tokens[:, 1:].mean(dim=1)

    def score(self, objective: str, class_index: int | None) -> torch.Tensor:
        """(N,): what Grad-CAM explains."""
        if objective == "class":
            logits = self.model(self.imgs)
            chosen = logits.argmax(dim=1)
            if class_index is not None:
                chosen = torch.full_like(chosen, class_index)
            return logits.gather(1, chosen[:, None])[:, 0]
        feature = self.feature(self.imgs)
        return (feature * (feature - feature.mean(dim=0)).detach()).sum(dim=1)

    def maps(self, args, objective: str) -> dict[str, torch.Tensor]:
        """attention (N, h, rows, columns); attended (N, h), the share of the patches it goes to; to_cls (N, h), what
        [cls] gives itself; gradcam (N, rows, columns); score (N,); predicted (N,)."""
        found = {}
        if "attention" in args.show:
            attention = cls_attention(self.model, self.imgs, args.block)
            found["attention"] = attention[..., 1:].unflatten(-1, self.grid)
            found["to_cls"], found["attended"] = attention[..., 0], attended_share(attention)
        if "gradcam" in args.show:
            score = lambda: self.score(objective, args.class_index)  # noqa: E731
            found["gradcam"] = grad_cam(self.model, self.imgs, score, args.block).unflatten(-1, self.grid)
            with torch.no_grad():
                found["score"] = score()
        if self.model.num_classes:
            with torch.no_grad():
                found["predicted"] = self.model(self.imgs).argmax(dim=1)
        return {name: values.cpu() for name, values in found.items()}


def settle_objective(args, subjects: list[Subject]) -> str:
    """class or feature; UserError where a checkpoint or the images do not allow what is asked for."""
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


def columns_of(found: dict, heads: bool, of: str = "") -> list[tuple[str, torch.Tensor]]:
    """The maps (N, rows, columns) to draw, each with its title: what it is and, where that is said, `of` what."""
    drawn = []
    if "attention" in found:
        drawn.append(("attention", found["attention"].mean(dim=1)))
        drawn += [(f"head {i}", one) for i, one in enumerate(found["attention"].unbind(dim=1)) if heads]
    drawn += [("Grad-CAM", found["gradcam"])] if "gradcam" in found else []
    return [(f"{of}: {title}" if of else title, values) for title, values in drawn]


def caption(args, objective: str) -> str:
    parts = []
    if "attention" in args.show:
        parts.append(f"Attention of [cls] in block {args.block}: mean of its heads{', and each head' * args.heads}")
    if "gradcam" in args.show:
        of = f"class {args.class_index}" if args.class_index is not None else "the predicted class"
        parts.append(f"Grad-CAM: of {of if objective == 'class' else OBJECTIVES[objective]}")
    return f"{'. '.join(parts)}. Each map from its lowest value (dark) to its highest (bright)."


def metrics_of(maps: dict[str, torch.Tensor]) -> dict[str, float]:
    """What the ledger keeps of the maps of one checkpoint, means over the images shown."""
    found = {}
    if "attended" in maps:
        found = {"attended_share": maps["attended"].mean().item(), "attention_to_cls": maps["to_cls"].mean().item()}
        found |= {f"attended_share_head{i}": share for i, share in enumerate(maps["attended"].mean(dim=0).tolist())}
    return found | ({"score": maps["score"].mean().item()} if "score" in maps else {})


def row_of(subject: Subject, maps: dict[str, torch.Tensor]) -> dict:
    """What the JSON says of one checkpoint."""
    row = {"checkpoint": subject.path} | {k: v.tolist() for k, v in maps.items() if k in ("predicted", "score")}
    return row | ({"attended_share": maps["attended"].mean(dim=0).tolist()} if "attended" in maps else {})


def drawing(shown: torch.Tensor, columns: list[tuple[str, torch.Tensor]]) -> Image.Image:
    """Images (N, 3, H, W) and the maps of `columns_of` over them, side by side."""
    drawn = torch.stack([shown, *(overlay(shown, values) for _, values in columns)], dim=1)
    per_row = 2 if drawn.shape[1] <= 4 and len(shown) > 1 else 1
    return labelled(to_pil_image(grid(drawn, per_row)), ["image", *(title for title, _ in columns)] * per_row)


@torch.no_grad()
def main(args) -> list[dict[str, torch.Tensor]]:
    """The maps of each checkpoint, as `Subject.maps` has them."""
    out = command_line.check_out(args, ".png")
    subjects = [Subject(judged) for judged in judging.open_each(args, judging.open_trained)]
    objective = settle_objective(args, subjects) if "gradcam" in args.show else ""
    records = [Record("attention", s.judged.args, s.judged.weights, shown=s.part) for s in subjects]
    found = [subject.maps(args, objective) for subject in subjects]
    titles = [subject.title if len(subjects) > 1 else "" for subject in subjects]
    columns = [columns_of(maps, args.heads, title) for maps, title in zip(found, titles)]
    text = caption(args, objective)
    captioned(drawing(subjects[0].shown, [column for own in columns for column in own]), text).save(out)
    arrays = {f"{name}_{i}": values.numpy() for i, maps in enumerate(found) for name, values in maps.items()}
    np.savez(out.with_suffix(".npz"), **arrays)
    rows = [row_of(subject, maps) for subject, maps in zip(subjects, found)]
    write_json(out, args, objective=objective, caption=text, result=rows)
    print(f"{out}: {text}")
    for i, (subject, record, maps) in enumerate(zip(subjects, records, found)):
        picture = {"maps": to_tensor(drawing(subject.shown, columns[i]))}
        judging.publish(subject.judged, record, metrics_of(maps), len(subject.part), f"attention-{i}", picture)
        if "attended" in maps:
            heads = ", ".join(f"{share:.0%}" for share in maps["attended"].mean(dim=0))
            print(f"  {subject.path}: share of the patches that [cls] attends to, by head: {heads}")
    return found


if __name__ == "__main__":
    with user_errors("attention.py"):
        main(get_args_parser().parse_args())
