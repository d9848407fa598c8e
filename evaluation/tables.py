"""Tables of finished runs: mean and sample standard deviation over seeds, in Markdown, LaTeX and CSV."""

import csv
import io
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evaluation.runs import Run, canonical, check_alike, check_names, once_each, shown_value
from util.errors import UserError
from util.report.names import present_name

DEVIATION = "sample standard deviation over seeds"
USUAL = re.compile(r"acc\d|top1|ratio|mAP")  # metrics of a table by default


@dataclass
class Cell:
    """A metric over the seeds of a row."""

    mean: float
    deviation: float | None  # sample standard deviation; None for one run
    n: int


@dataclass
class Table:
    """`rows` holds (values of `by`, {column: cell}); a column is (kind of run, metric). `notes` are sentences below."""

    by: list[str]
    columns: list[tuple[str, str]]
    rows: list[tuple[tuple, dict[tuple[str, str], Cell]]]
    notes: list[str] = field(default_factory=list)

    def titles(self) -> list[str]:
        names = [metric for _, metric in self.columns]
        alone = len(names) == len(set(names))
        return [metric if alone else f"{kind} {metric}" for kind, metric in self.columns]

    def has_deviations(self) -> bool:
        return any(cell.deviation is not None for _, cells in self.rows for cell in cells.values())

    def count(self, cells) -> int:
        return max(cell.n for cell in cells.values())


def make_table(runs: list[Run], by: list[str], metrics: Sequence[str] = (), free=(), allow_revisions=False) -> Table:
    """Group `runs` by flags and average each metric over seeds. Raises UserError for an unknown flag or metric, and for
    a group whose runs differ in more than the seed."""
    check_names(runs, by)
    columns = _columns(runs, metrics)
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(tuple(canonical(run.get(name)) for name in by), []).append(run)
    keys = {run.key_of(name) for run in runs for name in by} | set(by) | set(free)
    rows = []
    for members in groups.values():
        values = tuple(members[0].get(name) for name in by)
        title = ", ".join(f"{name}={shown_value(value)}" for name, value in zip(by, values)) or "of all runs"
        cells = {}
        for kind, metric in columns:
            chosen = [run for run in members if run.kind == kind and metric in run.row["metrics"]]
            if chosen:
                chosen = once_each(chosen)
                check_alike(chosen, title, keys, allow_revisions)
                cells[kind, metric] = _cell(chosen, metric)
        if cells:
            rows.append((values, cells))
    index = {value: i for i, value in enumerate(dict.fromkeys(shown_value(v) for values, _ in rows for v in values))}
    rows.sort(key=lambda row: [_rank(value, index[shown_value(value)]) for value in row[0]])
    return Table(list(by), columns, rows, _notes(runs, columns))


def _rank(value, index: int) -> tuple:
    """Sort key: numbers by size, other values by their `index`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return (0, value) if number else (1, index)


def _columns(runs: list[Run], metrics) -> list[tuple[str, str]]:
    """Return (kind, metric) for each of `metrics`, which are METRIC or KIND:METRIC, also with a name of an earlier
    revision or without `eval/`; by default the accuracies."""
    known = list(dict.fromkeys((run.kind, name) for run in runs for name in run.row["metrics"]))
    if not metrics:  # without best_*: it was selected on the test set
        metrics = [name for name in dict.fromkeys(name for _, name in known) if USUAL.search(name)]
        metrics = [name for name in metrics if not name.startswith("eval/best_")]
    chosen = []
    for metric in metrics:
        kind, _, name = metric.rpartition(":")
        matches = [column for column in known if column[1] == present_name(name) and kind in ("", column[0])]
        if not matches:
            names = ", ".join(sorted({f"{kind}:{name}" for kind, name in known}))
            raise UserError(f"--metric {metric} is in none of these {len(runs)} runs; they have {names or 'none'}")
        chosen += matches
    if not chosen:
        names = ", ".join(sorted({name for _, name in known}))
        raise UserError(f"none of these {len(runs)} runs has an accuracy: choose a --metric of {names or 'none'}")
    return list(dict.fromkeys(chosen))


def _notes(runs: list[Run], columns: list[tuple[str, str]]) -> list[str]:
    """Return the sentences below a table: what its numbers do not say themselves."""
    shown = [run for run in runs if any(run.kind == kind and name in run.row["metrics"] for kind, name in columns)]
    return [*_note_of_losses(shown, columns), *_note_of_epochs(shown)]


def _note_of_losses(shown: list[Run], columns: list[tuple[str, str]]) -> list[str]:
    """Return a sentence if the losses in a column are sums of different terms."""
    losses = [run for run in shown if any(run.kind == kind and name == "train/loss" for kind, name in columns)]
    if len({run.get("method") for run in losses}) < 2:
        return []
    return ["train/loss of different methods are different losses: they cannot be compared"]


def _note_of_epochs(shown: list[Run]) -> list[str]:
    """Return a sentence on the epoch of the numbers if trainings stand beside evaluations of their checkpoints."""
    judged = [run for run in shown if run.row["command"].endswith(" --eval") and run.row.get("source")]
    commands = {run.row["command"].removesuffix(" --eval") for run in judged}
    trained = dict.fromkeys(run.kind for run in shown if run.row["command"] in commands)
    if not trained:
        return []
    sources = [run.row["source"] for run in judged]
    files = ", ".join(sorted({Path(source["path"]).name for source in sources}))
    epochs = sorted({source["epoch"] + 1 for source in sources if isinstance(source.get("epoch"), int)})
    after = f" after {' to '.join(map(str, dict.fromkeys((epochs[0], epochs[-1]))))} epochs" if epochs else ""
    return [
        f"{', '.join(trained)}: after the last epoch. {', '.join(dict.fromkeys(run.kind for run in judged))}: of the "
        f"evaluated checkpoint ({files}{after}). checkpoint-best.pth is of the best epoch on the evaluation images."
    ]


def _cell(runs: list[Run], metric: str) -> Cell:
    values = []
    for run in runs:
        value = run.row["metrics"][metric]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UserError(f"{metric} of {run.folder} is {value}, not a finite number: choose other runs with --where")
        values.append(value)
    return Cell(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


# Formats --------------------------------------------------------------------------------------------------------------


def _text(table: Table, digits: int, sign: str) -> list[list[str]]:
    """Return the rows of cells as text; a cell with fewer runs than its row states its number."""
    lines = []
    for values, cells in table.rows:
        n = table.count(cells)
        line = [*map(shown_value, values), str(n)]
        for column in table.columns:
            cell = cells.get(column)
            text = "" if cell is None else f"{cell.mean:.{digits}f}"
            if cell is not None and cell.deviation is not None:
                text += f" {sign} {cell.deviation:.{digits}f}"
            line.append(text + (f" (n = {cell.n})" if cell is not None and cell.n != n else ""))
        lines.append(line)
    return lines


def markdown(table: Table, digits: int = 2) -> str:
    """Return the table and its notes in Markdown."""
    head = [*table.by, "n", *table.titles()]
    lines = [head, ["---"] * len(head), *_text(table, digits, "±")]
    lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    deviation = [f"±: {DEVIATION}; n: number of seeds" if table.has_deviations() else "n: number of runs"]
    return "\n".join(lines + [f"\n{note}" for note in deviation + table.notes])


def latex(table: Table, digits: int = 2) -> str:
    """Return the table as a LaTeX `tabular` with the rules of booktabs; its notes are comments."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {char: f"\\{char}" for char in "_%&#{}$"}

    def escaped(cells):
        return " & ".join("".join(special.get(char, char) for char in cell) for cell in cells) + r" \\"

    head = [*table.by, "n", *table.titles()]
    body = [escaped(line).replace("±", r"$\pm$") for line in _text(table, digits, "±")]
    columns = "l" * len(table.by) + "r" * (len(head) - len(table.by))
    begin = [
        *(f"% {note}" for note in table.notes),
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        escaped(head),
        r"\midrule",
    ]
    note = rf"\multicolumn{{{len(head)}}}{{l}}{{\footnotesize $\pm$: {DEVIATION}; n: number of seeds}} \\"
    notes = [note] if table.has_deviations() else []
    return "\n".join([*begin, *body, r"\bottomrule", *notes, r"\end{tabular}"])


def comma_separated(table: Table) -> str:
    """Return the table in CSV, in full precision, with a column each for mean, deviation and n of every metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = [f"{title} {part}" for title in table.titles() for part in ("mean", "deviation", "n")]
    writer.writerow([*table.by, *parts])
    for values, cells in table.rows:
        chosen = [cells.get(column) for column in table.columns]
        numbers = [(cell.mean, cell.deviation, cell.n) if cell else ("", "", 0) for cell in chosen]
        writer.writerow([*map(shown_value, values), *(number for triple in numbers for number in triple)])
    return text.getvalue().rstrip("\n")
