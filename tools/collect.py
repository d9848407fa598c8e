"""Tables and curves from the ledgers (`results.jsonl`) of finished runs: mean ± sample standard deviation over seeds.

    python tools/collect.py OUT --by method,mask_ratio --metric eval/acc1
    python tools/collect.py OUT --by mask_ratio --plot curve.png

Flags of the pretraining of an evaluated checkpoint are `pretrain.NAME`, of the run that it started from
`pretrain2.NAME` (of a fine-tuned one `finetune.NAME`); NAME alone stands for `pretrain.NAME` if the run has no such
flag. Besides flags there are `command`, `run` (the folder's name without -seed<n>), `method`, `revision`, `pretrained`,
`images_seen`, `seconds`, `data.train`, `data.test` (hashes), `images.train`, `images.test` (numbers). Runs of one row
may differ in the seed alone.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from matplotlib.figure import Figure

from evaluation import command_line
from evaluation.runs import check_names, choose, read_runs, shown_value
from evaluation.tables import DEVIATION, Table, comma_separated, latex, make_table, markdown
from util.checkpoint.files import LEDGER
from util.errors import UserError, user_errors
from util.parser import Parser
from util.report.curves import style
from util.report.sheet import save_figure


def plot(table: Table, x: str, path: Path) -> None:
    """Draw a curve over `x` for each value of the other flags and each metric, with standard deviations as bars. Raises
    UserError if `x` is never a number."""
    index = table.by.index(x)
    curves: dict[str, list] = {}
    for values, cells in table.rows:
        if isinstance(values[index], bool) or not isinstance(values[index], (int, float)):
            continue  # a row without the flag, such as a random encoder
        rest = ", ".join(f"{n} {shown_value(v)}" for n, v in zip(table.by, values) if n != x)
        for column, title in zip(table.columns, table.titles()):
            if column in cells:
                curves.setdefault(", ".join(filter(None, [title, rest])), []).append((values[index], cells[column]))
    if not curves:
        raise UserError(f"--x {x} is a number in none of these rows: there is nothing to draw")
    below = -(-len(curves) // 2) if len(curves) > 1 else 0  # lines of the legend
    figure = Figure(figsize=(6, 4 + 0.2 * below), layout="constrained")
    axes = figure.subplots()
    for number, (title, points) in enumerate(curves.items()):
        bars = [cell.deviation or 0 for _, cell in points]
        means = [(at, cell.mean) for at, cell in points]
        axes.errorbar(*zip(*means), yerr=bars, capsize=3, label=title, **style(number))
    axes.set_xlabel(x)
    axes.set_ylabel(", ".join(dict.fromkeys(metric for _, metric in table.columns)))
    axes.grid(alpha=0.3)
    if any(cell.deviation is not None for points in curves.values() for _, cell in points):
        axes.set_title(f"bars: {DEVIATION}", fontsize="small", loc="left")
    if below:
        figure.legend(fontsize="small", loc="outside lower center", ncols=2, frameon=False)
    save_figure(figure, path)


FORMATS = {"md": markdown, "latex": latex}


def get_args_parser():
    parser = Parser(__doc__)
    parser.add_argument("folders", nargs="+", help=f"folders to search, with subfolders, for {LEDGER}")
    parser.add_argument("--by", default="run", metavar="FLAGS", help="flags to group rows by, separated by commas")
    parser.add_argument(
        "--metric",
        nargs="+",
        default=[],
        metavar="METRIC",
        help="METRIC or KIND:METRIC, such as eval/acc1; without it all accuracies",
    )
    parser.add_argument("--where", nargs="+", default=[], metavar="FLAG=VALUE", help="only the runs with these flags")
    parser.add_argument(
        "--strip",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="prefixes of folder names to use as the kind of run, in place of the command",
    )
    parser.add_argument(
        "--allow_differing", nargs="+", default=[], metavar="FLAG", help="flags that may differ within a row"
    )
    parser.add_argument("--allow_revisions", action="store_true", help="average runs of different revisions")
    parser.add_argument("--format", choices=["md", "csv", "latex"], default="md", help="format of the table")
    parser.add_argument("--digits", type=int, default=2, help="decimals; csv has full precision")
    parser.add_argument("--out", default="", metavar="FILE", help="write the table to this file instead of printing it")
    parser.add_argument(
        "--plot", default="", metavar="FILE", help="draw the metrics over --x into this .png, .pdf or .svg file"
    )
    parser.add_argument(
        "--x", default="", metavar="FLAG", help="flag of --by on the horizontal axis; without it the last one"
    )
    return parser


def main(args) -> Table:
    """Print or write the table and return it. Raises UserError for bad flags and for runs that differ within a row."""
    by = [name for name in args.by.split(",") if name]
    x = args.x or (by[-1] if by else "")
    if (args.plot and x not in by) or (args.x and not args.plot):
        raise UserError(f"--x {x or 'none'} must be one of --by {args.by or 'none'}, and needs --plot")
    for flag in ("out", "plot"):
        if getattr(args, flag) and not Path(getattr(args, flag)).resolve().parent.is_dir():
            raise UserError(f"--{flag} {getattr(args, flag)} must be in a folder that exists")
    command_line.check_picture(args, "plot")
    if args.digits < 0:
        raise UserError(f"--digits {args.digits} must not be negative")
    runs = choose(read_runs(args.folders, args.strip), args.where)
    check_names(runs, args.allow_differing)
    table = make_table(runs, by, args.metric, args.allow_differing, args.allow_revisions)
    text = comma_separated(table) if args.format == "csv" else FORMATS[args.format](table, args.digits)
    if args.format == "csv":
        for note in table.notes:
            print(f"note: {note}", file=sys.stderr)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if args.plot:
        plot(table, x, Path(args.plot))
    return table


if __name__ == "__main__":
    with user_errors("collect.py"):
        main(get_args_parser().parse_args())
