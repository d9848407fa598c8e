"""Writing a checkpoint of a run, and deleting the ones that it makes superfluous."""

import os
import shutil
from pathlib import Path

from util.checkpoint import retry
from util.checkpoint.atomic import write_tensors
from util.checkpoint.files import _NAME, _position, checkpoint_name, list_checkpoints
from util.parallel.distributed import is_main_process


def save_checkpoint(output_dir: str | Path, epoch: int, batch: int, content: dict, keep: int = 0) -> Path:
    """Write one checkpoint (main process only), then delete what `keep` and progress have made superfluous.

    Files inside an epoch are kept only until a later one is whole; of the epoch files the newest `keep` (0: all).
    SaveFailed on all ranks when the disk does not take it; then nothing is deleted.
    """
    path = Path(output_dir) / checkpoint_name(epoch, batch)
    retry.everywhere(lambda: write_tensors(path, content))
    retry.everywhere(lambda: _tidy(path, keep))
    return path


def save_folder(output_dir: str | Path, epoch: int, batch: int, write, keep: int = 0) -> Path:
    """The same for a folder into which every process writes its share: `write(folder)`."""
    path = Path(output_dir) / checkpoint_name(epoch, batch, "dcp")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        retry.everywhere(lambda: _replace_folder(temporary, path))
    except retry.SaveFailed:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    retry.everywhere(lambda: _tidy(path, keep))
    return path


def _replace_folder(new: Path, path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True)
    os.replace(new, path)


def _tidy(path: Path, keep: int) -> None:
    """Delete the checkpoints beside `path` that it makes superfluous."""
    epoch_files = 0
    for old in list_checkpoints(path.parent):
        inside = _NAME.fullmatch(old.name)[2] is not None
        epoch_files += not inside
        superfluous = inside or (keep and epoch_files > keep)
        if old != path and superfluous and _position(old) < _position(path):
            _remove(old)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def abandon_later(output_dir: str | Path, path: Path) -> None:
    """After a resume from an earlier file of a run, its later ones belong to another future: they get the ending
    `.abandoned`, so that `--resume auto` and `--keep` do not count them."""
    start = _position(path)
    if not is_main_process() or start is None or path.resolve().parent != Path(output_dir).resolve():
        return
    for later in list_checkpoints(output_dir):
        if _position(later) > start:
            print(f"{later.name} is of a later state of this run: renamed to {later.name}.abandoned")
            later.rename(later.with_name(f"{later.name}.abandoned"))
