"""What a training run prints at its start and at its end."""

import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from util.checkpoint.files import BEST, CONFUSION, ENCODERS, LEDGER, SCORES, list_checkpoints
from util.checkpoint.same_run import plain
from util.config import as_given
from util.parallel.distributed import get_world_size, is_main_process, shut_down
from util.report.blocks import Row, block, counted, row
from util.report.ledger import Record
from util.report.log import duration
from util.report.names import renamed
from util.report.start_rows import device_row, output_row
from util.training.best_metric import LOWER

EVENTS_SHOWN = "events.out.*"  # their names are long
# Files of a run, in the order of the block at its end, and what they are for.
FILES = {
    BEST: "best weights, for --eval and tools/",
    ENCODERS: "encoder alone, also for other libraries",
    "probe.pth": "encoder and head, for --eval and tools/",
    "log.txt": "metrics, a line for each epoch",
    LEDGER: "flags, data, results: tools/collect.py",
    SCORES: "last evaluation, by class",
    "probe.json": "flags and results",
    "eval.json": "flags and results, by class",
    CONFUSION: "confusion matrix, last evaluation",
    "eval_confusion.png": "confusion matrix",
    "spikes.jsonl": "images of loss spikes",
    EVENTS_SHOWN: "TensorBoard",
    "tensorboard-eval": "TensorBoard",
}


@dataclass(frozen=True)
class Summary:
    """What only the main script knows about its run: `rows` for the block at the start, and the commands that usually
    follow, given the path of the weights."""

    rows: tuple[Row, ...] = ()
    next_commands: Callable[[str], list[str]] = lambda weights: []


NO_SUMMARY = Summary()


def start_block(run, summary: Summary) -> str:
    """Return the block at the start of `run` (`util.training.run.Run`)."""
    return opening(run.args, run.record, summary, run.device, run.amp_dtype, _schedule_rows(run))


def opening(args, record: Record, summary: Summary, device, dtype, schedule: Iterable[Row] = ()) -> str:
    """Return the block at the start of a command, after an empty line. One that trains in steps has a `schedule`."""
    rows = [*summary.rows, _weights_row(args, record), *schedule, device_row(device, dtype), output_row(args)]
    return "\n" + block(rows)


def announce(text: str, args) -> None:
    """Print the block at the start. With `--print_config` also print all flags, in the form of a `--config` file, and
    exit with code 0, on all processes."""
    print(text, flush=True)
    if not getattr(args, "print_config", False):  # forks' flags lack it
        return
    flags = {name: plain(value) for name, value in as_given(vars(args)).items() if name != "print_config"}
    print("\nflags\n" + yaml.safe_dump(flags, sort_keys=False, default_flow_style=None, width=120).rstrip(), flush=True)
    shut_down()
    sys.exit(0)


def _weights_row(args, record: Record) -> Row:
    """Return the row of the weights that the run started from, or that are evaluated: the record has them also where a
    run is resumed. It is empty if they are not known, and for pretraining from random weights."""
    if record.source:
        other = getattr(args, "checkpoint_key", "model") != "model"
        return row("weights", record.source["path"], f"key {args.checkpoint_key}" if other else None)
    known = hasattr(args, "finetune") and (record.stored or not args.resume)
    scratch = ": training from scratch" if hasattr(args, "layer_decay") else ""
    return row("weights", f"random (no --finetune{scratch})" if known else None)


def _schedule_rows(run) -> list[Row]:
    args = run.args
    effective = args.batch_size * args.accum_iter * get_world_size()
    factors = {"per process": args.batch_size, "accumulated": args.accum_iter, "processes": get_world_size()}
    shown = [f"{number} {name}" for name, number in factors.items() if number > 1 or name == "per process"]
    done = f"{counted(run.step, 'step')} done" if run.step else None
    total = f"{counted(run.total_steps, 'step')} in {counted(args.epochs, 'epoch')}"
    return [
        row("batch", f"{counted(effective, 'image')}" + (f" = {' x '.join(shown)}" if len(shown) > 1 else "")),
        row("steps", f"{run.steps_per_epoch:,} per epoch", total, done),
        row(
            "learning rate",
            f"{args.lr:.3g} (base {args.lr * 256 / effective:.3g})",
            f"{counted(args.warmup_epochs, 'epoch')} of warm-up" if args.warmup_epochs else None,
            _decay(args),
            f"weight decay {args.weight_decay:g}",
        ),
    ]


def _decay(args) -> str:
    schedule = getattr(args, "lr_schedule", "cosine")
    if schedule == "constant":
        return "constant"
    if schedule == "step":
        return "divided by 10 after " + " and ".join(f"{100 * share:g} %" for share in args.lr_steps)
    return f"{schedule} to {args.min_lr:g}"


def end_block(run, summary: Summary) -> str:
    """Return the block at the end of `run`: its length, last and best numbers, files, and the next commands."""
    folder, seconds = run.args.output_dir, run.record.state(run.images_seen()).get("seconds", 0.0)
    length = counted(run.step, "step"), f"{counted(run.images_seen(), 'image')} seen", f"in {duration(seconds)}"
    rows = [row("finished", counted(run.fractional_epoch(), "epoch"), *length)]
    if folder:
        rows += result_rows(_log_rows(Path(folder) / "log.txt"))
    weights = _weights_for_transfer(Path(folder)) if folder else None
    return closing(folder, summary, str(weights) if weights else "", rows)


def closing(folder: str, summary: Summary, weights: str, results: Iterable[Row] = ()) -> str:
    """Return the block at the end of a command, after an empty line: `results`, the files in the output `folder`, and
    the commands that usually follow, with `weights`. Without a folder only the results are shown; other processes than
    the main one, which print nothing, read no files."""
    rows = list(results)
    if folder and is_main_process():
        rows.append(("files", [f"in {folder}", *_file_lines(Path(folder))]))
        rows.append(("next", summary.next_commands(weights) if weights else []))
    return f"\n{block(rows)}" if rows else ""


def _log_rows(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(renamed(json.loads(line)))
        except ValueError:
            continue  # cut off by a crash
    return rows


def result_rows(log: list[dict]) -> list[Row]:
    """Return the rows of the last numbers and, after several evaluations, of the best ones. `log` are the rows of
    log.txt. Of training only the loss is shown."""
    if not log:
        return []
    shown = [name for name in log[-1] if _is_shown(name)]
    last = [f"{name} {log[-1][name]:.4g}" for name in shown if _is_number(log[-1][name])]
    best = [_best(name, log) for name in shown if not name.startswith("train/")]
    return [row("last epoch", *last), row("best", *best)]


def _is_shown(name: str) -> bool:
    evaluated = name.startswith("eval/") and not name.startswith("eval/best") and name != "eval/skipped"
    return evaluated or name == "train/loss"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _best(name: str, log: list[dict]) -> str | None:
    """Return the best value of a metric with its epoch, counted from 1; None if it has fewer than two values."""
    values = [(row[name], row.get("epoch", 0)) for row in log if _is_number(row.get(name))]
    if len(values) < 2:
        return None
    lower = any(name.endswith(ending) for ending in LOWER)
    value, epoch = (min if lower else max)(values, key=lambda pair: pair[0])
    return f"{name} {value:.4g} (epoch {epoch + 1})"


# Files ----------------------------------------------------------------------------------------------------------------


def _file_lines(folder: Path) -> list[str]:
    checkpoints = list_checkpoints(folder)
    lines = []
    if checkpoints:
        earlier = f"; {len(checkpoints) - 1} earlier" if len(checkpoints) > 1 else ""
        lines.append((checkpoints[0].name, f"for --resume and --finetune{earlier}"))
    for pattern, use in FILES.items():
        shown = pattern if pattern == EVENTS_SHOWN else None
        names = sorted({shown or path.name for path in folder.glob(pattern)})
        lines += [(name, use) for name in names]
    return [f"{name:<22} {use}" for name, use in lines]


def _weights_for_transfer(folder: Path) -> Path | None:
    """Return the file that the next command starts from: the best weights, the whole checkpoint or, where that is a
    folder (`--fsdp`), the encoder."""
    candidates = [folder / "probe.pth", folder / BEST, *list_checkpoints(folder)[:1]]
    candidates += sorted(folder.glob(ENCODERS))
    return next((path for path in candidates if path.is_file()), None)
