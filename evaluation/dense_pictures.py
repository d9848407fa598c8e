"""Pictures of dense predictions beside the ground truth."""

from collections.abc import Sequence

import numpy as np
import torch

from util.data.dense.rle import decode
from util.data.dense.transforms import DetectionEvaluation, SegmentationEvaluation
from util.report.curves import COLOURS
from util.report.pictures import rgb

UNLABELLED = (1.0, 1.0, 1.0)
SURE = 0.5  # score from which detections are drawn


def palette(count: int) -> torch.Tensor:
    """Return colours (count, 3) in [0, 1] for classes: those of `util.report.curves` first, which colour-blind readers
    can tell apart, then the same ones, darker and lighter in turn."""
    base = torch.tensor([[int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)] for code in COLOURS])
    rounds = [base]
    while sum(map(len, rounds)) < count:
        share = 0.75 ** ((len(rounds) + 1) // 2)
        rounds.append(base * share if len(rounds) % 2 else 1 - (1 - base) * share)
    return torch.cat(rounds)[:count]


def painted(labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Return the colours (3, H, W) of labels (H, W); values that are no class are white."""
    colours = torch.cat([palette(classes), torch.tensor([UNLABELLED])])
    known = (labels >= 0) & (labels < classes)
    return colours[torch.where(known, labels, classes)].permute(2, 0, 1)


def segmentation_figure(
    shown: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    resize: SegmentationEvaluation,
    categories: Sequence[str],
    ignore: int,
):
    """Draw images beside predictions and labels, with the classes that occur in them as a legend. `shown` are
    (network's input (C, h, w), prediction (H, W), labels (H, W)). Returns a figure of matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    classes = len(categories)
    figure = Figure(figsize=(2.4 * 3, 2.3 * len(shown) + 0.3), layout="constrained")
    grid = figure.subplots(len(shown), 3, squeeze=False)
    for axes, (img, predicted, labels) in zip(grid, shown):
        used = resize.shape(*labels.shape)
        picture = rgb((img * resize.std + resize.mean).clamp(0, 1)[None, :, : used[0], : used[1]])[0]
        for axis, tile in zip(axes, (picture, painted(predicted, classes), painted(labels, classes))):
            axis.imshow(tile.permute(1, 2, 0).numpy(), interpolation="nearest", aspect="equal")
            axis.set(xticks=[], yticks=[])
        right = (predicted == labels)[labels != ignore]
        axes[1].set_xlabel(f"{100 * right.float().mean():.0f} % of pixels right" if len(right) else "nothing labelled")
    for axis, title in zip(grid[0], ("image", "prediction", "labels (white: not evaluated)")):
        axis.set_title(title, fontsize=10)
    present = torch.cat([part.flatten().unique() for _, *parts in shown for part in parts]).unique().tolist()
    colours = palette(classes).tolist()
    handles = [Patch(color=colours[label], label=categories[label]) for label in present if 0 <= label < classes]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, max(1, len(handles))), fontsize=8)
    return figure


def detection_figure(
    shown: Sequence[tuple[torch.Tensor, dict, dict]], resize: DetectionEvaluation, categories: Sequence[str]
):
    """Draw detections beside the truth, boxes and masks in the colours of the classes, which are a legend. `shown` are
    (network's input (C, h, w), detections, truth), as `evaluation.detect_scores` takes them, in pixels of the original
    images, with `size` (H, W) in the truth. Detections with a score below `SURE` are left out. Returns a figure of
    matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(3.4 * 2, 3.6 * len(shown) + 0.4), layout="constrained")
    grid = figure.subplots(len(shown), 2, squeeze=False)
    colours, present = palette(len(categories)).tolist(), set()
    for axes, (img, found, truth) in zip(grid, shown):
        height, width = truth["size"]
        used = resize.shape(height, width)
        picture = rgb((img * resize.std + resize.mean).clamp(0, 1)[None, :, : used[0], : used[1]])[0]
        sure = _sure(found)
        for axis, objects in zip(axes, (sure, truth)):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest", extent=(0, width, height, 0))
            _draw_objects(axis, objects, (height, width), colours)
            axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
            present |= set(np.asarray(objects["labels"]).tolist())
        highest = f" (highest {found['scores'].max():.2f})" if len(found["scores"]) else ""
        axes[0].set_xlabel(f"{len(sure['labels'])} with a score from {SURE}{'' if len(sure['labels']) else highest}")
        axes[1].set_xlabel(f"{len(truth['labels'])} annotated")
    for axis, title in zip(grid[0], ("detections", "annotations")):
        axis.set_title(title, fontsize=10)
    handles = [Patch(color=colours[label - 1], label=categories[label - 1]) for label in sorted(present)]
    if handles:
        figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=8)
    return figure


def _sure(found: dict) -> dict:
    kept = found["scores"] >= SURE
    return {name: value[kept] for name, value in found.items()}


def _draw_objects(axis, objects: dict, size: tuple[int, int], colours: list) -> None:
    """Draw the boxes (M, 4) of objects, their masks (M, H, W) or `rles`, and their `scores`."""
    from matplotlib.patches import Rectangle

    masks = [decode(code, size[::-1]) for code in objects["rles"]] if "rles" in objects else objects.get("masks", [])
    for label, mask in zip(np.asarray(objects["labels"]).tolist(), masks):
        layer = np.zeros((*size, 4))
        layer[np.asarray(mask, bool)] = (*colours[label - 1], 0.55)
        axis.imshow(layer, interpolation="nearest", extent=(0, size[1], size[0], 0))
    scores = objects.get("scores", [None] * len(objects["labels"]))
    for label, box, score in zip(np.asarray(objects["labels"]).tolist(), np.asarray(objects["boxes"]), scores):
        left, top, right, bottom = box.tolist()
        colour = colours[label - 1]
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white", lw=2.6))
        axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, lw=1.6))
        if score is not None:
            style = dict(facecolor=colour, edgecolor="none", pad=0.8)
            ink = "white" if np.dot(colour, (0.3, 0.59, 0.11)) < 0.6 else "black"
            above = "bottom" if top > 0.06 * size[0] else "top"  # at the upper edge the number stands inside the box
            axis.text(left, top, f"{score:.2f}", fontsize=6.5, color=ink, va=above, bbox=style, clip_on=True)


def figure_tensor(figure) -> torch.Tensor:
    """Return a figure of matplotlib as a picture (3, H, W) in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.from_numpy(np.asarray(canvas.buffer_rgba()).copy())
    return pixels[..., :3].permute(2, 0, 1).float() / 255
