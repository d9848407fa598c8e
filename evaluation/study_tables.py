"""The part of a page that shows a study: tables, claims and figures, from the kept results (`evaluation.study`)."""

import statistics
from pathlib import Path

from evaluation.study import PRETRAINING, TUNING, Study, time_of
from evaluation.study_claims import claims_table
from evaluation.study_figures import draw_all
from evaluation.study_scores import at_equal_time, by_seed, clock_only, hours, pretrainings, scores_of, title_of
from evaluation.tables import DEVIATION
from util.checkpoint.atomic import write_atomically
from util.errors import UserError

BEGIN, END = "<!-- study: begin -->", "<!-- study: end -->"
RECONSTRUCTIONS = "study_reconstructions.png"


def cell(values: list[float]) -> str:
    """Return mean, sample standard deviation and number of seeds of `values` as the text of a cell."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} (n = 1)" if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f} (n = {len(values)})"


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def cells_of(study: Study, method: str, titles: list[str]) -> list[str]:
    scores = scores_of(study)
    return [cell(list(by_seed(study, method, scores[title]).values())) for title in titles]


def first_table(study: Study) -> list[str]:
    """Return the lines of the short table: `headline` of the study, time beside MAE's, and MAE at equal time."""
    titles = study.config.get("headline") or list(scores_of(study))[:1]
    base, judged_by, rows = title_of(study, study.baseline), scores_of(study)[titles[0]], []
    head = ["method", *titles, f"time, {base} = 1"]
    if study.config.get("equal_time"):
        head.append(f"{titles[0]} of {base} at equal time")
    for method in study.methods:
        cells = cells_of(study, method, titles)
        if any(cells):
            costs, equal = hours(study, method, study.baseline), at_equal_time(study, method, judged_by)
            ratio = f"{costs[0] / costs[1]:.2f}" if costs and costs[1] else ""
            row = [title_of(study, method), *cells, ratio, "" if equal is None else f"{equal:.2f}"]
            rows.append(row[: len(head)])
    return table(head, rows)


def scores_table(study: Study) -> list[str]:
    """Return the lines of the table with all scores of each method that has one."""
    titles, rows = list(scores_of(study)), []
    for method in study.methods:
        cells = cells_of(study, method, titles)
        if not any(cells):
            continue
        runs, spent = pretrainings(study, method), hours(study, method)
        images, shown = (f"{runs[0]['images_seen']:,}", f"{spent[0]:.2f}") if spent else ("0", "0")
        rows.append([title_of(study, method), images, shown, *cells])
    return table(["method", "images", "core hours", *titles], rows)


def rates_table(study: Study) -> list[str]:
    """Return the lines of the table of tuning: accuracy on held-out training images by learning rate."""
    rates, rows = study.config["rates"], []
    for method in study.methods:
        scores = [study.kept.metric(f"{TUNING}-{method}-{rate}", "eval/knn20_acc1") for rate in rates]
        if any(score is not None for score in scores):
            cells = ["" if score is None else f"{score:.2f}" for score in scores]
            rows.append([title_of(study, method), *cells, str(study.best_rate(method) or "")])
    return table(["20-NN on held-out training images", *map(str, rates), "chosen"], rows)


def progress(study: Study) -> str:
    """Return the sentence that says how much of the study is finished."""
    pieces = list(study.pieces())
    finished = sum(piece.name in study.kept.results for piece in pieces)
    runs = sum(result["kind"] == PRETRAINING for result in study.kept.results.values())
    spent = sum(time_of(result) for result in study.kept.results.values()) / 3600
    pretrained = "1 of them a whole pretraining" if runs == 1 else f"{runs} of them whole pretrainings"
    return (
        f"{finished} of {len(pieces)} pieces are finished, {pretrained}; about {spent:.1f} core hours so far. What has "
        "not been run is empty or not listed."
    )


def notes(study: Study) -> str:
    """Return the sentences below the first table."""
    text = f"Accuracies in percent, mean ± {DEVIATION}; n: number of seeds."
    if study.config.get("equal_time"):
        first = title_of(study, study.baseline)
        text += (
            f" The last column is {first} trained for as long as the method of the row, between the lengths of {first} "
            "that were run, by the logarithm of the time."
        )
    if clock_only(study):
        text += " Some times are of the clock, on a machine with other work, and are too long."
    return text


def section(study: Study, folder: Path) -> list[str]:
    """Draw the figures into a folder, and return the lines of the whole part of the page."""
    figures = draw_all(study, folder)
    first = figures.pop("study.png", None)
    parts = ([first, ""] if first else []) + [*first_table(study), "", notes(study), "", progress(study), ""]
    claims = claims_table(study)
    if claims:
        parts += [
            "### What the papers claim, and what was found",
            "",
            "Differences are taken per seed. *Seen*: they are in the direction of the claim, and larger than twice the "
            "standard error; with one seed, than twice the standard deviation over seeds, where that is known.",
            "",
            *claims,
            "",
        ]
    parts += ["### All scores", "", *scores_table(study), ""]
    parts += ["### Learning rates", "", *rates_table(study), ""]
    if (folder / RECONSTRUCTIONS).exists():
        figures[RECONSTRUCTIONS] = f"![reconstructions side by side]({RECONSTRUCTIONS})"
    if figures:
        parts += ["### Targets, gradients, pictures", ""]
        parts += [line for figure in figures.values() for line in (figure, "")]
    return parts


def write_results(study: Study, page: Path) -> None:
    """Replace what stands between the markers of a page by the tables, and write the figures beside the page. Raises
    UserError for a page without the markers."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    if BEGIN not in text or END not in text:
        raise UserError(f"--results {page} has no lines {BEGIN} and {END}: add them where the tables belong")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    made = f"{before}{BEGIN}\n" + "\n".join(section(study, page.parent)) + f"{END}{after}"
    write_atomically(page, lambda file: file.write(made.encode()))
    print(f"{page}: {progress(study)}")
