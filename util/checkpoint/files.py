"""The names of a run's checkpoints.

`checkpoint-E.pth` is the state after epoch E (from 0), `checkpoint-E-B.pth` inside epoch E after batch B. Runs with
`--fsdp` write folders of the same names that end with `.dcp` (`util.checkpoint.sharded`).
"""

import re
from pathlib import Path

LEDGER = "results.jsonl"  # results of the runs of a folder; see util/report/ledger.py
SCORES = "scores.json"  # of a finished supervised run: its last evaluation, by class
EVALUATION = ("eval.json", "eval_confusion.png")  # of --eval
BEST = "checkpoint-best.pth"
ENCODERS = "encoder*.safetensors"  # of a finished pretraining
ABANDONED = ".abandoned"  # ending of files that are later than the checkpoint from which their run was resumed
EVENTS = "events.out.tfevents.*"  # of TensorBoard
LOGGERS = "loggers.json"  # the runs of wandb and trackio that a resumed run continues
CONFUSION = "confusion.png"  # the confusion matrix of that evaluation
NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.(?:pth|dcp)")


def checkpoint_name(epoch: int, batch: int = 0, ending: str = "pth") -> str:
    return f"checkpoint-{epoch}-{batch}.{ending}" if batch else f"checkpoint-{epoch}.{ending}"


def resume_position(path: Path) -> tuple[int, int] | None:
    """Return (epoch, batch) at which a run continues from this file, None when it is not named like a checkpoint."""
    match = NAME.fullmatch(path.name)
    if not match:
        return None
    epoch, batch = int(match[1]), int(match[2] or 0)
    return (epoch, batch) if batch else (epoch + 1, 0)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the checkpoints of a run, the furthest first."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if resume_position(path)]
    return sorted(paths, key=lambda path: (resume_position(path), path), reverse=True)
