"""Pictures of dense predictions beside the ground truth."""

from collections.abc import Sequence

import numpy as np
import torch

from util.data.dense.transforms import SegmentationEvaluation
from util.report.curves import COLOURS
from util.report.pictures import rgb

UNLABELLED = (1.0, 1.0, 1.0)


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


def figure_tensor(figure) -> torch.Tensor:
    """Return a figure of matplotlib as a picture (3, H, W) in [0, 1]."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.from_numpy(np.asarray(canvas.buffer_rgba()).copy())
    return pixels[..., :3].permute(2, 0, 1).float() / 255
