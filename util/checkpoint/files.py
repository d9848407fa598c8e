"""The names of a run's checkpoints.

`checkpoint-E.pth` is the state after epoch E (from 0), `checkpoint-E-B.pth` inside epoch E after batch B. Runs with
`--fsdp` write folders of the same names that end with `.dcp` (`util.checkpoint.sharded`).
"""

import re
from pathlib import Path

LEDGER = "results.jsonl"  # of the runs that ended in a folder; see util/report/ledger.py
_NAME = re.compile(r"checkpoint-(\d+)(?:-(\d+))?\.(?:pth|dcp)")


def checkpoint_name(epoch: int, batch: int = 0, ending: str = "pth") -> str:
    return f"checkpoint-{epoch}-{batch}.{ending}" if batch else f"checkpoint-{epoch}.{ending}"


def _position(path: Path) -> tuple[int, int] | None:
    """(epoch, batch) at which a run continues from this file."""
    match = _NAME.fullmatch(path.name)
    if not match:
        return None
    epoch, batch = int(match[1]), int(match[2] or 0)
    return (epoch, batch) if batch else (epoch + 1, 0)


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoints of a run, the furthest first."""
    found = [(position, path) for path in Path(output_dir).glob("checkpoint-*") if (position := _position(path))]
    return [path for _, path in sorted(found, reverse=True)]
