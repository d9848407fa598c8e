"""A table of results: folders named `<what>-seed<n>` are averaged over seeds, mean and deviation.

python tools/table.py OUT/probe-*
python tools/table.py OUT/probe-* OUT/finetune-* --strip probe- finetune-     one row for both
"""

import argparse
import json
import re
import statistics
import sys
from pathlib import Path

import _common

from util.errors import UserError, user_errors


def results_of(folder: Path) -> dict[str, float]:
    """Every accuracy that a probe (probe.json), a kNN run (knn.json) or a training with labels (log.txt) left in a
    folder; of a training that after the last epoch, not the best on the test set."""
    found = {}
    if (folder / "log.txt").is_file() and not (folder / "probe.json").is_file():
        found |= _training(folder)
    for name in ("probe.json", "knn.json"):
        if (folder / name).is_file():
            result = json.loads((folder / name).read_text())["result"]
            found |= {key: value for key, value in result.items() if "acc" in key}
    return found


def _training(folder: Path) -> dict[str, float]:
    """Accuracy after the last epoch of what was trained here: finetune_acc1, or with the folder's own word for it
    (finetune_small-mask75-seed0: finetune_small_acc1); of a linear probe, test_acc1. Nothing where that epoch is still
    to come, and for a run without labels."""
    try:
        args = json.loads((folder / "args.json").read_text())
        last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return {}
    if "test_acc1" not in last or last.get("epoch") != args.get("epochs", 0) - 1:
        return {}
    kind = folder.name.split("-")[0]
    kind = kind if kind.startswith("finetune") else "finetune"
    return {f"{kind}_acc1" if "layer_decay" in args else "test_acc1": last["test_acc1"]}


def collect(folders: list[str], strip: list[str] | tuple = ()) -> dict[str, list[dict]]:
    """{name: results of each seed}. Names lose the prefixes `strip`; folders that then have one name are one."""
    groups: dict[str, dict[str, dict]] = {}
    for folder in folders:
        found = results_of(Path(folder))
        if not found:
            print(f"note: {folder} holds no result yet, it is left out", file=sys.stderr)
            continue
        name = Path(folder).name
        for prefix in strip:
            name = name.removeprefix(prefix)
        groups.setdefault(re.sub(r"-seed\d+$", "", name), {}).setdefault(name, {}).update(found)
    if not groups:
        some = " ".join(folders[:3])
        raise UserError(f"{some}: no result (probe.json, knn.json, or the log of a finished fine-tuning)")
    return {name: list(seeds.values()) for name, seeds in groups.items()}


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
    print(markdown(collect(args.folders, args.strip)))


if __name__ == "__main__":
    parser = _common.Parser("A table of results, averaged over seeds.")
    parser.formatter_class = argparse.HelpFormatter
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--strip", nargs="*", default=[], help="beginnings of names that do not tell runs apart")
    with user_errors("table.py"):
        main(parser.parse_args())
