"""Writing the checkpoints of a run, and deleting those that are no longer needed."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from util.checkpoint import retry
from util.checkpoint.atomic import write_tensors
from util.checkpoint.files import (
    ABANDONED,
    BEST,
    CONFUSION,
    ENCODERS,
    NAME,
    SCORES,
    checkpoint_name,
    list_checkpoints,
    resume_position,
)
from util.errors import UserError
from util.parallel.distributed import is_main_process
from util.weights.file import read_file


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay when a new one is written.

    Of those at the end of an epoch the newest `keep` stay (0: all). A `temporary` one stays only until the next one is
    complete, like those inside an epoch, and does not count for `keep`. `outdated` is a temporary one that was written
    before.
    """

    keep: int = 0
    temporary: bool = False
    outdated: Path | None = None


def save_checkpoint(
    output_dir: str | Path, epoch: int, batch: int, content: dict, retention: Retention = Retention()
) -> Path:
    """Write one checkpoint on the main process, then delete those that are no longer needed; all ranks must call it.

    Raises SaveFailed on all ranks when it cannot be written; then nothing is deleted.
    """
    path = Path(output_dir) / checkpoint_name(epoch, batch)
    retry.on_main_process(lambda: write_tensors(path, content))
    retry.on_main_process(lambda: _tidy(path, retention))
    return path


def save_folder(output_dir: str | Path, epoch: int, batch: int, write, retention: Retention = Retention()) -> Path:
    """Like `save_checkpoint`, for a folder into which every process writes its share by `write(folder)`."""
    path = Path(output_dir) / checkpoint_name(epoch, batch, "dcp")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        retry.on_main_process(lambda: _replace_folder(temporary, path))
    except retry.SaveFailed:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    retry.on_main_process(lambda: _tidy(path, retention))
    return path


def _replace_folder(new: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)


def _tidy(path: Path, retention: Retention) -> None:
    """Delete the checkpoints beside `path` that are no longer needed."""
    epoch_files, keep = 0, retention.keep
    for old in list_checkpoints(path.parent):
        match = NAME.fullmatch(old.name)
        inside_epoch = match is not None and match[2] is not None
        temporary = inside_epoch or old == retention.outdated or (old == path and retention.temporary)
        epoch_files += not temporary
        superfluous = temporary or (keep and epoch_files > keep)
        if old != path and superfluous and resume_position(old) < resume_position(path):
            remove_checkpoint(old)


def remove_checkpoint(path: Path) -> None:
    """Delete a file, or the folder of a sharded checkpoint."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def abandon_later(output_dir: str | Path, path: Path) -> bool:
    """After a resume from an earlier checkpoint of a run, rename its later ones to `.abandoned`, so that `--resume
    auto` and `--keep` do not count them; also the best weights, if they are later, and the results of its end. Nothing
    in the folder then claims to be of the run that continues. Return whether the best weights were renamed. Only the
    main process does anything."""
    start, folder = resume_position(path), Path(output_dir)
    if not is_main_process() or start is None or path.resolve().parent != folder.resolve():
        return False
    later = [old for old in list_checkpoints(folder) if resume_position(old) > start]
    results = [*folder.glob(ENCODERS), folder / SCORES, folder / CONFUSION] if later else []
    best = [folder / BEST] if _epoch_of(folder / BEST) >= start[0] else []
    for old in [*later, *best, *(result for result in results if result.is_file())]:
        print(f"{old.name} is later than the resumed checkpoint: renamed to {old.name}{ABANDONED}")
        abandoned = old.with_name(f"{old.name}{ABANDONED}")
        if abandoned.exists():  # from an earlier resume; a folder cannot be renamed onto another one
            remove_checkpoint(abandoned)
        old.rename(abandoned)
    return bool(best)


def _epoch_of(path: Path) -> int:
    """Return the epoch after which a file of weights was written; -1 if there is no such file, or it is damaged."""
    try:
        epoch = read_file(path).get("epoch") if path.is_file() else None
    except UserError:
        return -1
    return epoch if isinstance(epoch, int) else -1
