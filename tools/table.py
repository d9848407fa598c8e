"""A table of results: folders named `<what>-seed<n>` are averaged over seeds, mean and deviation.

python tools/table.py OUT/probe-*
"""

import argparse
import json
import re
import statistics
from pathlib import Path

import _common

from util.errors import UserError, user_errors


def results_of(folder: Path) -> dict[str, float]:
    """Every accuracy that a probe (probe.json) or a kNN run (knn.json) left in a folder."""
    found = {}
    for name in ("probe.json", "knn.json"):
        if (folder / name).is_file():
            result = json.loads((folder / name).read_text())["result"]
            found |= {key: value for key, value in result.items() if "acc" in key}
    return found


def collect(folders: list[str]) -> dict[str, list[dict]]:
    groups: dict[str, list[dict]] = {}
    for folder in folders:
        found = results_of(Path(folder))
        if not found:
            raise UserError(f"{folder} holds no result (probe.json or knn.json)")
        groups.setdefault(re.sub(r"-seed\d+$", "", Path(folder).name), []).append(found)
    return groups


def markdown(groups: dict[str, list[dict]]) -> str:
    """Mean ± sample deviation over seeds; columns that a group lacks stay empty."""
    columns = sorted({key for runs in groups.values() for run in runs for key in run})
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name, runs in groups.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.2f}{deviation}" if values else "")
        lines.append(f"| {name} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plain(groups: dict[str, list[dict]], columns: dict[str, str]) -> str:
    """The chosen columns (key -> title) for reading on a terminal."""
    titles = list(columns.values())
    lines = [f"{'encoder':<14}" + "".join(f"{title:>14}" for title in titles)]
    for name, runs in groups.items():
        means = [statistics.mean(run[key] for run in runs) for key in columns]
        lines.append(f"{name:<14}" + "".join(f"{mean:>12.2f} %" for mean in means))
    return "\n".join(lines)


def main(args) -> None:
    print(markdown(collect(args.folders)))


if __name__ == "__main__":
    parser = _common.Parser("A table of results, averaged over seeds.")
    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("folders", nargs="+")
    with user_errors("table.py"):
        main(parser.parse_args())
