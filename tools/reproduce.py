"""Compare a sweep with a paper: published numbers, those of the sweep's ledgers, and the differences of the setting.

    python tools/reproduce.py OUT --paper bootstrap_mae --runs mae k10

scripts/reproduce.sh runs a sweep and calls this. tools/published.json has the published numbers of the runs of a sweep
(or, without a number, the runs that they are above or below), and the paper's setting under the names of flags in
tools/collect.py: `pretrain.epochs` of the pretraining, `epochs` of its evaluation. null is a value that the paper does
not report. `batch` is the effective batch size; `model` is without its patch size.
"""

import csv
import io
import json
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.runs import Run, read_runs, shown_value
from evaluation.tables import DEVIATION, Cell, make_table
from util.architectures import own_config
from util.checkpoint.files import LEDGER
from util.errors import UserError, user_errors
from util.parser import Parser

PUBLISHED = Path(__file__).with_name("published.json")
READERS = {"imagefolder", "folder", "filelist", "wds"}  # formats, which do not identify the images
PREFIXES = ("", "pretrain.", "finetune.")
NAMES = {
    "finetune:eval/acc1": "fine-tuned",
    "finetune_small:eval/acc1": "fine-tuned, small augmentation",
    "probe:eval/acc1": "linear probe",
    "linear:eval/acc1": "linear probe",
    "fewshot:eval/fewshot10_acc1": "10 images a class",
}


@dataclass
class Row:
    """A row of the table. `cell` is None for a missing run, `published` for one that the paper does not report."""

    run: str
    metric: str
    cell: Cell | None
    published: dict | None
    differs: list[str]


def published(paper: str) -> dict:
    """Return the entry of a paper in published.json. Raises UserError for an unknown one."""
    papers = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    if paper not in papers:
        raise UserError(f"--paper {paper} is not known; use one of {', '.join(papers)}")
    return papers[paper]


# The setting ----------------------------------------------------------------------------------------------------------


def ours(run: Run) -> dict:
    """Return the flags of a run, and values derived from them, under the names of published.json."""
    flags = dict(run.flags)
    for prefix in PREFIXES:
        if f"{prefix}batch_size" not in flags:
            continue
        sizes = [flags.get(prefix + name) or 1 for name in ("batch_size", "accum_iter", "world_size")]
        flags[f"{prefix}batch"] = sizes[0] * sizes[1] * sizes[2]
        config = own_config(flags.get(f"{prefix}model"))
        for name in ("patch_size", "decoder_depth", "decoder_embed_dim"):
            if flags.get(prefix + name) is None:
                flags[prefix + name] = config.get(name)
        flags[f"{prefix}model"] = str(flags.get(f"{prefix}model")).removeprefix("mae_").split("_patch")[0]
        size = flags.get(f"{prefix}input_size")
        if isinstance(size, list) and len(set(size)) == 1:
            flags[f"{prefix}input_size"] = size[0]
    return flags


def differences(run: Run, setting: dict) -> list[str]:
    """Return a text such as `epochs 5, not 100` for each value of the paper's setting that differs from the run's."""
    flags, texts = ours(run), []
    for name, wanted in setting.items():
        if wanted is None or (name.startswith("pretrain.") and not run.flags["pretrained"]):
            continue
        value = flags.get(name)
        if name.endswith("dataset") and value in READERS:
            continue  # the number of images is compared instead
        if value is None:
            texts.append(f"{name} not recorded, {shown_value(wanted)} there")
        elif value != wanted:
            texts.append(f"{name} {shown_value(value)}, not {shown_value(wanted)}")
    return texts


# The table ------------------------------------------------------------------------------------------------------------


def entry(paper: dict, run: str) -> tuple[dict, str]:
    """Return the published entry of a run, and the text that the star in its name stands for."""
    for name, published_run in paper["runs"].items():
        if fnmatchcase(run, name):
            return published_run, run[len(name.partition("*")[0]) :] if "*" in name else ""
    return {}, ""


def expanded(paper: dict, names: list[str], runs: list[Run]) -> list[str]:
    """Return the runs of a sweep, each followed by the teacher of its pretraining if that is evaluated too."""
    known = set(paper["runs"]) | {run.flags["run"] for run in runs}
    return [each for name in names for each in (name, f"{name}-ema") if each == name or each in known]


def make_rows(paper: dict, names: list[str], runs: list[Run]) -> list[Row]:
    """Return a row for each run and metric that the sweep or the paper has. Raises UserError if the runs of a row
    differ in more than the seed."""
    rows = []
    for name in expanded(paper, names, runs):
        published_run, star = entry(paper, name)
        for metric, of_metric in paper["metrics"].items():
            kind, _, key = metric.partition(":")
            own = [r for r in runs if r.flags["run"] == name and r.kind == kind and key in r.row["metrics"]]
            number = published_run.get(metric)
            if not own and number is None:
                continue
            row = Row(name, metric, None, _named(number, star), [])
            if own:
                table = make_table(own, ["run"], [metric], allow_revisions=True)
                row.cell = table.rows[0][1][kind, key]
                row.differs = _of_code_and_seeds(own, row.cell)
            if own and number:
                setting = paper["setting"] | of_metric | published_run.get("setting", {}) | number.get("setting", {})
                row.differs = differences(own[-1], setting) + row.differs
            rows.append(row)
    return rows


def _named(number: dict | None, star: str) -> dict | None:
    """Return the published number with its stars replaced."""
    if number is None:
        return None
    return {
        name: [run.replace("*", star) for run in value] if isinstance(value, list) else value
        for name, value in number.items()
    }


def _of_code_and_seeds(runs: list[Run], cell: Cell) -> list[str]:
    revisions = {run.row.get("revision") for run in runs}
    more = [f"{len(revisions)} revisions of the code"] if len(revisions) > 1 else []
    return more + (["one seed"] if cell.n == 1 else [])


def _shown_cell(cell: Cell | None) -> str:
    if cell is None:
        return "missing"
    deviation = "" if cell.deviation is None else f" ± {cell.deviation:.2f}"
    return f"{cell.mean:.2f}{deviation} (n = {cell.n})"


def _shown_number(number: dict | None) -> str:
    if number is None:
        return "no number"
    parts = [str(number["value"])] if "value" in number else []
    parts += [f"{word} {', '.join(number[word])}" for word in ("above", "below") if word in number]
    return "; ".join(parts)


def markdown(paper: dict, rows: list[Row]) -> str:
    """Return the title, the note and the table in Markdown."""
    lines = [["run", "metric", "ours", "published", "from", "what differs in our setting"], ["---"] * 6]
    for row in rows:
        where, differs = (row.published or {}).get("from", ""), "; ".join(row.differs)
        name = NAMES.get(row.metric, row.metric)
        lines.append([row.run, name, _shown_cell(row.cell), _shown_number(row.published), where, differs])
    table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
    deviations = any(row.cell and row.cell.deviation is not None for row in rows)
    sign = f" ±: {DEVIATION}, n: number of seeds." * deviations
    return f"# {paper['title']}\n\n{paper['note']} Accuracies in percent.{sign}\n\n{table}"


def comma_separated(rows: list[Row]) -> str:
    """Return the table in CSV, in full precision, with a column each for mean, deviation and n."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "metric", "mean", "deviation", "n", "published", "from", "differs"])
    for row in rows:
        numbers = (row.cell.mean, row.cell.deviation, row.cell.n) if row.cell else ("", "", 0)
        number = row.published or {}
        text_of_number = _shown_number(number) if number else ""
        writer.writerow([row.run, row.metric, *numbers, text_of_number, number.get("from", ""), "; ".join(row.differs)])
    return text.getvalue().rstrip("\n")


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument(
        "out", metavar="OUT", help="folder of a sweep, into which reproduced.md and reproduced.csv are written"
    )
    parser.add_argument("--paper", required=True, help="paper in tools/published.json; mlo_mae/SET for that paper")
    parser.add_argument(
        "--runs", nargs="+", required=True, metavar="RUN", help="runs of the sweep, in the order of the table"
    )
    return parser


def main(args) -> list[Row]:
    """Print and write the table, and return its rows. Raises UserError for bad flags."""
    paper, out = published(args.paper), Path(args.out)
    if not out.is_dir():
        raise UserError(f"OUT {out} must be the folder of a sweep; scripts/reproduce.sh makes it")
    kinds = dict.fromkeys(metric.partition(":")[0] for metric in paper["metrics"])
    runs = read_runs([str(out)], [f"{kind}-" for kind in kinds]) if any(out.rglob(LEDGER)) else []
    rows = make_rows(paper, args.runs, runs)
    text = markdown(paper, rows)
    for name, content in (("reproduced.md", text), ("reproduced.csv", comma_separated(rows))):
        (out / name).write_text(content + "\n", encoding="utf-8")
    print(text)
    return rows


if __name__ == "__main__":
    with user_errors("reproduce.py"):
        main(get_args_parser().parse_args())
