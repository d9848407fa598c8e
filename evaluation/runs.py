"""Finished runs, read from their ledgers: which flags each has, and whether two differ in anything but the seed."""

import argparse
import difflib
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from methods import METHODS
from util.checkpoint.files import BEST, LEDGER
from util.checkpoint.same_run import FREE_FLAGS, plain
from util.errors import UserError
from util.report import ledger

# Flags that change results by rounding at most. The number of processes is not among them: it changes the batch.
IRRELEVANT = FREE_FLAGS - {"world_size"} | {"out", "compile", "attention", "grad_checkpoint", "log_mfu", "no_pin_mem"}
IRRELEVANT |= {"recompute", "cuda_graph"}
IRRELEVANT |= {"download", "train_list", "val_list", "max_bad_fraction", "dist_eval", "dist_on_itp", "resplit"}
IRRELEVANT |= {"init_from", "data", "seed", "checkpoint", "tile_size"}
IRRELEVANT |= {"image_column", "label_column", "group_column", "label_sep"}
NOT_COMPARED = {"run", "images_seen", "seconds", "images.train", "images.test"}  # to group by, not to compare
# One such run in a folder.
TRAINING = {"main_pretrain", "main_finetune", "main_linprobe", "main_segment", "main_detect", "main_lit"}
# Flags that users change, as columns of TensorBoard's HPARAMS tab; those of methods are added.
USUAL_FLAGS = {"method": str, "lr": float, "mask_ratio": float, "model": str, "seed": str, "dataset": str}
USUAL_FLAGS |= {"data_path": str, "command": str, "epochs": float, "batch_size": float, "accum_iter": float}
USUAL_FLAGS |= {"world_size": float, "weight_decay": float, "warmup_epochs": float, "aug": str, "mask_ratio_end": float}
USUAL_FLAGS |= {"norm_pix_loss": str, "decoder": str, "layer_decay": float, "drop_path": float, "mixup": float}
USUAL_FLAGS |= {"smoothing": float, "global_pool": str, "targets": str, "checkpoint_key": str}


@dataclass(eq=False)
class Run:
    """One line of a ledger. `flags` are all values to group by, under the names that the commands take."""

    folder: Path
    row: dict
    kind: str
    flags: dict

    @property
    def seeds(self) -> tuple:
        return tuple(sorted((key, value) for key, value in self.flags.items() if _bare(key) == "seed"))

    def key_of(self, name: str) -> str:
        """Return `name`, or the name of the flag of its pretraining if the run itself has no such flag."""
        return name if name in self.flags else f"pretrain.{name}"

    def get(self, name: str):
        return self.flags.get(self.key_of(name))


def _bare(key: str) -> str:
    return re.sub(r"^(pretrain|finetune)\d*\.", "", key)


# Reading --------------------------------------------------------------------------------------------------------------


def read_runs(folders: list[str], strip=()) -> list[Run]:
    """Read every run in the ledgers below `folders` once: the last line of a folder's training, and of evaluating the
    same checkpoint in the same way. Raises UserError if there is none."""
    runs: dict[tuple, Run] = {}
    for folder in folders:
        ledgers = sorted(Path(folder).rglob(LEDGER))
        if not ledgers:
            print(f"note: {folder} holds no {LEDGER} and is left out", file=sys.stderr)
        for path in ledgers:
            for row in ledger.read(path):
                run = _run(path.resolve().parent, row, strip)
                sha256 = (row.get("source") or {}).get("sha256")
                key = run.folder, row["command"], None if row["command"] in TRAINING else (_sameness(run), sha256)
                runs.pop(key, None)
                runs[key] = run
    if not runs:
        some = " ".join(folders[:3])
        raise UserError(f"{some}: no finished run (no {LEDGER} with a line in it)")
    return list(runs.values())


def _run(folder: Path, row: dict, strip) -> Run:
    begin = next((prefix for prefix in strip if folder.name.startswith(prefix)), "")
    kind = begin.strip("-_ ") or row["command"]
    if begin and row["command"].endswith(" --eval"):  # of the run beside it, whose last epoch is another number
        kind += " --eval"
    name = re.sub(r"-seed\d+$", "", folder.name.removeprefix(begin))
    data = row.get("data") or {}
    flags = {"run": name, "command": row["command"], "pretrained": bool(row.get("source")), **_own(row)}
    flags |= {f"data.{split}": (value or {}).get("sha256") for split, value in data.items()}
    dtype = (row.get("hardware") or {}).get("amp_dtype")
    if flags.get("amp_dtype") == "auto" and dtype:
        flags["amp_dtype"] = dtype
    count = {"pretrain": 0, "finetune": 0}
    source = row.get("source")
    while source:
        role = "pretrain" if "mask_ratio" in source["flags"] or not source["flags"] else "finetune"
        count[role] += 1
        prefix = f"{role}{count[role] if count[role] > 1 else ''}."
        # The best checkpoints of several seeds may be of different epochs and still belong into one row.
        epoch = "best" if Path(source["path"]).name == BEST else source.get("epoch")
        own = _own(source) | {"epoch": epoch}
        if not source["flags"]:  # a foreign file: only its content identifies it
            own["file"] = source.get("sha256") or source["path"]
        flags |= {prefix + name: value for name, value in own.items()}
        source = source.get("source")
    return Run(folder, row, kind, flags)


def _own(row: dict) -> dict:
    """Return the flags of a run, or of the run that wrote a checkpoint, with its revision, images and time."""
    flags = dict(row["flags"])
    if "mask_ratio" in flags:
        on = [method.name for method in METHODS if _enabled(method, flags)]
        flags["method"] = "+".join(on) or "mae"
    changed = _changed_on_the_way(row.get("earlier") or [])
    flags |= {"earlier": changed} if changed else {}
    known = ("revision", "images_seen", "seconds")
    counts = {f"images.{split}": (value or {}).get("images") for split, value in (row.get("data") or {}).items()}
    return flags | counts | {name: row[name] for name in known if row.get(name) is not None}


def _changed_on_the_way(parts: list[dict]) -> list[dict]:
    """Return what of the earlier `parts` of a resumed run (`util.report.ledger.Record`) may have changed its
    results."""
    changed = []
    for part in parts:
        relevant = {name: value for name, value in part.get("flags", {}).items() if name not in IRRELEVANT}
        relevant |= {f"data.{split}": (value or {}).get("sha256") for split, value in part.get("data", {}).items()}
        changed += [{"until_epoch": part.get("until_epoch"), **relevant}] if relevant else []
    return changed


def _enabled(method, flags: dict) -> bool:
    try:
        return bool(method.enabled(argparse.Namespace(**flags)))
    except AttributeError:  # a checkpoint that is older than this method
        return False


# TensorBoard's HPARAMS tab --------------------------------------------------------------------------------------------


def columns() -> dict[str, type]:
    """Return the columns of the HPARAMS tab, {flag: float or str}: those of `USUAL_FLAGS` and of all methods. They are
    the same for all commands, because TensorBoard takes the columns of all runs from the first one that it reads."""
    options = {option.name: option for method in METHODS for option in (method.switch, *method.options)}
    return USUAL_FLAGS | {name: _kind(option) for name, option in options.items()}


def _kind(option) -> type:
    own = option.type if option.default is None else type(option.default)
    return float if own in (int, float) else str


def hparams_of(record: ledger.Record) -> dict:
    """Return what the HPARAMS tab shows of a run, by the names of `columns`, without flags that it does not have. What
    a run has not itself is that of its pretraining. An evaluation has the flags of the training whose weights it
    evaluates, but its own data, so that the two can be compared line by line."""
    runs = [{"flags": {name: plain(value) for name, value in vars(record.args).items()}}]
    source = record.source
    while source:
        runs.append(source)
        source = source.get("source")
    flags = [_own(run) for run in runs]
    trained = flags if record.command in TRAINING or not any(flags[1:]) else flags[1:]
    values = {name: next((each[name] for each in trained if name in each), None) for name in columns()}
    values |= {name: flags[0].get(name) for name in ("dataset", "data_path")} | {"command": record.command}
    kinds = {name: (int, float) if kind is float else object for name, kind in columns().items()}  # checkpoints may err
    return {name: value for name, value in values.items() if value not in (None, "") and isinstance(value, kinds[name])}


# Comparing ------------------------------------------------------------------------------------------------------------


def canonical(value) -> str:
    """Return `value` as JSON; in a path, the number of the seed is left out."""
    text = json.dumps(value, sort_keys=True)
    return re.sub(r"seed\d+", "seed", text) if "/" in text else text


def _compared(run: Run) -> dict[str, str]:
    skip = IRRELEVANT | NOT_COMPARED
    return {key: canonical(value) for key, value in run.flags.items() if _bare(key) not in skip}


def _sameness(run: Run) -> tuple:
    return tuple(sorted(_compared(run).items())), run.seeds


def check_alike(runs: list[Run], title: str, free: set[str], allow_revisions: bool) -> None:
    """Raise UserError, with the flag and both values, if these runs differ in a flag that is not `free`."""
    flags = [_compared(run) for run in runs]
    keys = sorted({key for each in flags for key in each}, key=lambda key: (_bare(key) != key, key))
    first = ("command", "pretrained", "method", "pretrain.method")  # they explain differences in other flags
    for key in sorted(keys, key=lambda key: key not in first):
        if key in free or _bare(key) in free or (allow_revisions and _bare(key) == "revision"):
            continue
        values = [each.get(key) for each in flags]
        if _bare(key).startswith("data.") and None in values:
            continue  # not recorded by one of them
        for other, value in zip(runs[1:], values[1:]):
            if value != values[0]:
                texts = [shown_value(run.flags[key]) if key in run.flags else "absent" for run in (runs[0], other)]
                allow = "--allow_revisions" if _bare(key) == "revision" else f"--allow_differing {key}"
                raise UserError(
                    f"the row {title} would average runs that differ in {key}: {texts[0]} in {runs[0].folder}, "
                    f"{texts[1]} in {other.folder}; add {key} to --by, choose with --where, or allow it with {allow}"
                )


def once_each(runs: list[Run]) -> list[Run]:
    """Return the last run of each combination of flags and seeds; the earlier ones are printed and left out."""
    last: dict[tuple, Run] = {}
    for run in sorted(runs, key=lambda run: run.row.get("finished", "")):
        before = last.get(_sameness(run))
        if before is not None:
            print(
                f"note: {before.folder} and {run.folder} have the same flags and seeds: the later run counts",
                file=sys.stderr,
            )
        last[_sameness(run)] = run
    return [run for run in runs if run in last.values()]


# Selecting ------------------------------------------------------------------------------------------------------------


def check_names(runs: list[Run], names) -> None:
    """Raise UserError for a name that is a flag of none of these runs."""
    known = {key for run in runs for key in run.flags}
    known |= {key.removeprefix("pretrain.") for key in known}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3)
            advice = f"; similar flags: {', '.join(near)}" if near else ""
            raise UserError(f"{name} is no flag of any of these {len(runs)} runs{advice}")


def choose(runs: list[Run], conditions: list[str]) -> list[Run]:
    """Return the runs for which every `flag=value` holds; numbers compare as numbers. Raises UserError if none is
    left."""
    pairs = [condition.partition("=") for condition in conditions]
    for name, sign, _ in pairs:
        if not sign:
            raise UserError(f"--where {name} must be flag=value")
    check_names(runs, [name for name, _, _ in pairs])
    for name, _, wanted in pairs:
        left = [run for run in runs if _is(run.get(name), wanted)]
        if not left:
            present = ", ".join(dict.fromkeys(shown_value(run.get(name)) for run in runs))
            raise UserError(f"--where {name}={wanted} holds for no run; {name} is {present}")
        runs = left
    return runs


def _is(value, wanted: str) -> bool:
    try:
        return not isinstance(value, bool) and float(value) == float(wanted)
    except (TypeError, ValueError):
        return shown_value(value).lower() == wanted.lower()


def _shown_item(item) -> str:
    if isinstance(item, dict):
        return f"({', '.join(f'{name} {shown_value(value)}' for name, value in item.items())})"
    return str(item)


def shown_value(value) -> str:
    """Return a value as text for tables and messages."""
    if isinstance(value, list):
        return " ".join(map(_shown_item, value))
    return "none" if value in (None, "") else f"{value:g}" if isinstance(value, float) else str(value)
