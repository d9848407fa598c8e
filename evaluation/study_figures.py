"""The figures of a study, each from the logs that are there: accuracy, targets and gradients against images seen."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.study import Study
from evaluation.study_folders import read_lines
from evaluation.study_scores import title_of
from util.report.curves import style
from util.report.sheet import save_figure

# Files beside the page: text of the picture, and the panels (key of the log, label of the axis).
FIGURES = {
    "study.png": ("accuracy against images seen", [("eval/knn20_acc1", "20-NN accuracy while pretraining, %")]),
    "study_targets.png": (
        "do bootstrapped targets collapse?",
        [
            ("train/target_std", "standard deviation of target features"),
            ("train/target_rank", "effective rank of target features"),
        ],
    ),
    "study_cosine.png": (
        "cosine of the gradients of RC-MAE's two losses",
        [("train/grad_cosine", "cosine of reconstruction and consistency gradients")],
    ),
}


def curves(study: Study, key: str) -> dict[str, list[tuple[float, float]]]:
    """Return the points (million images seen, value) of a number in the log of the first seed of each row."""
    found = {}
    for method in study.methods:
        name = f"{method}-seed{study.config['seeds'][0]}"
        rows, result = read_lines(study.kept.folder / f"{name}.txt"), study.kept.results.get(name)
        if not rows or not result:
            continue
        images = (result.get("images_seen") or 0) / (rows[-1]["epoch"] + 1) / 1e6
        values = [(row["epoch"] + 1, row.get(key)) for row in rows]
        points = [(images * epoch, value) for epoch, value in values if value is not None and math.isfinite(value)]
        if points:
            found[method] = points
    return found


def draw(study: Study, path: Path, panels: list[tuple[str, str]]) -> bool:
    """Draw a panel for each number -> whether there was anything to draw."""
    drawn = [(label, lines) for key, label in panels if (lines := curves(study, key))]
    if not drawn:
        return False
    names = [method for method in study.methods if any(method in lines for _, lines in drawn)]
    legend = -(-len(names) // 3)
    figure = Figure(figsize=(7, 3.6 * len(drawn) + 0.22 * legend), layout="constrained")
    handles = {}
    for axes, (label, lines) in zip(figure.subplots(len(drawn), squeeze=False).flat, drawn):
        for method, points in lines.items():
            look = style(list(study.methods).index(method))
            (handles[method],) = axes.plot(*zip(*points), label=title_of(study, method), markersize=4, **look)
        axes.set_xlabel("images seen, millions")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    lines = [handles[name] for name in names]
    figure.legend(handles=lines, fontsize="small", loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
    return True


def draw_all(study: Study, folder: Path) -> dict[str, str]:
    """Write the figures into a folder -> the lines of Markdown that show them, by file."""
    return {
        name: f"![{title}]({name})" for name, (title, panels) in FIGURES.items() if draw(study, folder / name, panels)
    }
