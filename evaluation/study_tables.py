"""The table and the figure of a study, from the kept results of its finished pieces (`evaluation.study`)."""

import json
import statistics
from pathlib import Path

from matplotlib.figure import Figure

from evaluation.study import PRETRAINING, TUNING, Study
from evaluation.tables import DEVIATION
from util.checkpoint.atomic import write_atomically
from util.errors import UserError
from util.report.curves import style
from util.report.sheet import save_figure

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
WATCHED = ("target_std", "target_rank", "grad_cosine")  # drawn below the accuracy, where a log has them


def cell(values: list[float]) -> str:
    """Return mean, sample standard deviation and number of seeds of `values` as the text of a cell."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} (n = 1)" if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f} (n = {len(values)})"


def scores_table(study: Study) -> list[str]:
    """Return the lines of the table with a row for each method that has a score."""
    kept, scores = study.kept, study.config["scores"]
    lines = ["| method | images | core hours | " + " | ".join(title for *_, title in scores) + " |"]
    lines.append("|---" * (len(scores) + 3) + "|")
    for method in study.methods:
        seeds = [f"{method}-seed{seed}" for seed in study.config["seeds"]]
        rows = [[kept.metric(f"{name}-{kind}", metric) for name in seeds] for kind, metric, _ in scores]
        cells = [cell([value for value in row if value is not None]) for row in rows]
        if not any(cells):
            continue
        source = study.methods[method].get("of", method)
        runs = [kept.results.get(f"{source}-seed{seed}", {}) for seed in study.config["seeds"]]
        runs = [run for run in runs if run]
        images = f"{runs[0]['images_seen']:,}" if runs else "0"
        hours = f"{statistics.fmean(run['seconds'] for run in runs) / 3600:.2f}" if runs else "0"
        lines.append(f"| {method} | {images} | {hours} | {' | '.join(cells)} |")
    return lines


def rates_table(study: Study) -> list[str]:
    """Return the lines of the table of tuning: accuracy on held-out training images by learning rate."""
    rates = study.config["rates"]
    lines = ["| 20-NN on held-out training images | " + " | ".join(map(str, rates)) + " | chosen |"]
    lines.append("|---" * (len(rates) + 2) + "|")
    for method in study.methods:
        scores = [study.kept.metric(f"{TUNING}-{method}-{rate}", "eval/knn20_acc1") for rate in rates]
        if any(score is not None for score in scores):
            cells = ["" if score is None else f"{score:.2f}" for score in scores]
            lines.append(f"| {method} | {' | '.join(cells)} | {study.best_rate(method) or ''} |")
    return lines


def progress(study: Study) -> str:
    """Return the sentence that says how much of the study is finished."""
    pieces = list(study.pieces())
    finished = sum(piece.name in study.kept.results for piece in pieces)
    runs = sum(result["kind"] == PRETRAINING for result in study.kept.results.values())
    hours = sum(result["seconds"] for result in study.kept.results.values()) / 3600
    return (
        f"{finished} of {len(pieces)} pieces are finished, {runs} of them whole pretrainings: {hours:.1f} hours of a "
        "core. An empty cell has not been run."
    )


def curves(study: Study) -> dict[str, list[dict]]:
    """Return the rows of the log of the first seed of each method that has been pretrained."""
    found = {}
    for method in study.methods:
        log = study.kept.folder / f"{method}-seed{study.config['seeds'][0]}.txt"
        if log.exists():
            found[method] = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    return found


def draw(study: Study, path: Path) -> bool:
    """Draw accuracy against images seen, and below it what is watched of targets and gradients -> whether there was
    anything to draw."""
    logs = curves(study)
    panels = {"eval/knn20_acc1": "20-NN, %"}
    for name in WATCHED:
        keys = {key for rows in logs.values() for row in rows for key in row if key.split("/")[-1] == name}
        panels |= {key: name.replace("_", " ") for key in sorted(keys)}
    if not logs:
        return False
    figure = Figure(figsize=(6, 3.2 * len(panels)), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(len(panels), squeeze=False).flat, panels.items()):
        for number, (method, rows) in enumerate(logs.items()):
            points = [((row["epoch"] + 1), row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points), label=method, markersize=3, **style(number))
        axes.set_xlabel("epochs of the training images")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", ncols=2)
    save_figure(figure, path)
    return True


def write_results(study: Study, page: Path) -> None:
    """Replace what stands between the markers of a page by the tables, and write the figure beside the page. Raises
    UserError for a page without the markers."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"--results {page} has no lines {BEGIN} and {END}: add them where the tables belong")
    picture = page.with_name("study.png")
    parts = [progress(study), "", *scores_table(study), "", f"{DEVIATION[0].upper()}{DEVIATION[1:]}; n: seeds.", ""]
    if draw(study, picture):
        parts += [f"![accuracy against epochs]({picture.name})", ""]
    parts += [*rates_table(study), ""]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    made = f"{before}{BEGIN}\n" + "\n".join(parts) + f"{END}{after}"
    write_atomically(page, lambda file: file.write(made.encode()))
    print(f"{page}: {progress(study)}")
