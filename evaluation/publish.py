"""Writing the result of an evaluation to a JSON file, to TensorBoard and to the ledger."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.confusion import save_picture
from evaluation.runs import columns, hparams_of
from util.checkpoint.files import CONFUSION, LEDGER, SCORES
from util.parallel.distributed import is_main_process
from util.report.ledger import Record, write_json
from util.report.loggers import open_loggers


@dataclass(frozen=True)
class Destination:
    """The JSON file, the folder of TensorBoard events and the folder of the ledger. An empty path: not written."""

    json: str | Path | None = None
    board: str | Path | None = None
    ledger: str | Path | None = None
    job: str = "eval"  # ending of the run's name in wandb and trackio


def _write_once(name: str, write: Callable[[], object]) -> None:
    write()


def _identified(source: Mapping | None) -> Mapping | None:
    """Return what identifies a checkpoint: its path may belong to another run later."""
    return source and {name: source.get(name) for name in ("path", "sha256", "epoch")}


def publish(
    record: Record,
    metrics: Mapping[str, float],
    images_seen: int,
    to: Destination,
    *,
    pictures: Mapping[str, torch.Tensor] = {},
    attempt: Callable[[str, Callable[[], object]], None] = _write_once,
    **content,
) -> None:
    """Write the `metrics` of one checkpoint. `record` describes the evaluation, which passed `images_seen` images
    through the network; its `hardware` is set.

    JSON: the flags, `metrics` as `result`, the checkpoint as `source`, the revision of the code, and `content`.
    TensorBoard: the `metrics` of the group eval and `pictures` (3, H, W) in [0, 1] by tag, at the checkpoint's epoch,
    so that the checkpoints of one run form a curve; flags as hparams. Files are written by `attempt(name, write)`,
    which may call `write` again after a failure. Only the main process writes. Raises UserError if a file cannot be
    written.
    """
    if to.json:
        content |= {"source": _identified(record.source), "revision": record.revisions[-1]}
        attempt(Path(to.json).name, lambda: write_json(to.json, record.args, result=metrics, **content))
    epoch = (record.source or {}).get("epoch") or 0
    flags = record.flags_json() if hasattr(record.args, "logger") else {}
    board = open_loggers(record.args, str(to.board) if to.board else None, flags, job=to.job)
    board.scalars({name: value for name, value in metrics.items() if name.startswith("eval/")}, epoch + 1)
    for tag, picture in pictures.items():
        board.image(tag, picture, epoch + 1)
    board.hparams(hparams_of(record), columns())
    board.close()
    if to.ledger:
        attempt(LEDGER, lambda: record.enter(to.ledger, metrics, images_seen))


def write_scores(
    scores,
    args,
    metrics: Mapping[str, float],
    names: list[str] | None,
    folder: str | Path,
    attempt: Callable[[str, Callable[[], object]], None] = _write_once,
    **content,
) -> None:
    """Write scores.json into `folder`, if one is given: the flags, the `metrics` of the `scores` as `result`, the
    `details` of the `scores` by class name, and `content`. Files are written as by `publish`."""
    if folder:
        result, details = {f"eval/{name}": value for name, value in metrics.items()}, scores.details(names)
        attempt(SCORES, lambda: write_json(Path(folder) / SCORES, args, result=result, details=details, **content))


def write_confusion(
    scores,
    names: list[str] | None,
    folder: str | Path,
    file: str = CONFUSION,
    attempt: Callable[[str, Callable[[], object]], None] = _write_once,
) -> dict[str, torch.Tensor]:
    """Draw the confusion matrix, where `scores` have one, and write it to `file` in `folder`, if one is given.
    Return the picture (3, H, W) in [0, 1] as {"confusion_matrix": picture}, else {}; only on the main process."""
    picture = scores.picture(names) if is_main_process() else None
    if picture is None:
        return {}
    if folder:
        attempt(file, lambda: save_picture(picture, Path(folder) / file))
    return {"confusion_matrix": torch.from_numpy(picture).permute(2, 0, 1) / 255}


def write_comparison(out: str | Path, args, rows: list[dict], **content) -> None:
    """Write the JSON file of several checkpoints side by side: flags, `content`, and `rows` as `result`."""
    write_json(out, args, **content, result=rows)
