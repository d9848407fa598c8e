"""The checkpoint from which `--resume` continues."""

import os
import zipfile
from pathlib import Path

from util.checkpoint import sharded
from util.checkpoint.files import list_checkpoints
from util.checkpoint.same_run import flags_of
from util.errors import UserError
from util.parallel.distributed import from_main_process
from util.weights.checksum import damage
from util.weights.file import read_file


def is_whole(path: Path) -> bool:
    """Whether a checkpoint is complete and undamaged: a file must be a zip archive (of torch.save) with correct
    checksums; a folder of `--fsdp` must have all its files with correct checksums."""
    if path.is_dir():
        return sharded.is_whole(path)
    try:
        return zipfile.is_zipfile(path) and not damage(path)
    except OSError:
        return False


def find_resume(resume: str, output_dir: str, needed: bool = False) -> Path | None:
    """Return the checkpoint of `--resume`. `auto` is the furthest undamaged one of `output_dir`; damaged ones are
    skipped with a message. If there is none, returns None, or raises UserError if `needed`."""
    if resume != "auto":
        return Path(resume)
    if not output_dir:
        raise UserError("--resume auto needs --output_dir, the folder of the run")
    return from_main_process(lambda: _newest_whole(output_dir, needed))


def stored_flags(resume: Path | None, others: dict) -> dict:
    """Return the flags that are stored in the checkpoint to resume; without one the `others`, of starting weights. Its
    tensors are not read."""
    if resume is None:
        return others
    return flags_of(read_file(resume / sharded.REST if resume.is_dir() else resume, tensors=False))


def _newest_whole(output_dir: str, needed: bool) -> Path | None:
    for path in list_checkpoints(output_dir) if os.path.isdir(output_dir) else []:
        if is_whole(path):
            return path
        print(f"skipping {path}: the file is damaged")
    if needed:
        raise UserError(f"--resume auto: there is no undamaged checkpoint in --output_dir {output_dir}: give a file")
    print(f"nothing to resume in {output_dir}: starting a new run")
    return None
