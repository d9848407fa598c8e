"""Which checkpoint `--resume` continues from."""

import os
import zipfile
from pathlib import Path

from util.checkpoint import sharded
from util.checkpoint.files import list_checkpoints
from util.errors import UserError
from util.parallel.distributed import from_main_process
from util.weights.checksum import damage


def is_whole(path: Path) -> bool:
    """Whether the file is a zip archive (what torch.save writes) all of whose checksums hold; of a folder, whether
    everything is there, with its checksums."""
    if path.is_dir():
        pass  # which builds on this file

        return sharded.is_whole(path)
    try:
        return zipfile.is_zipfile(path) and not damage(path)
    except OSError:
        return False


def find_resume(resume: str, output_dir: str, needed: bool = False) -> Path | None:
    """The file that `--resume` means. `auto`: the furthest whole one of `output_dir`, or None (UserError if `needed`);
    says what it skips."""
    if resume != "auto":
        return Path(resume)
    if not output_dir:
        raise UserError("--resume auto looks into --output_dir, which is empty")
    return from_main_process(lambda: _newest_whole(output_dir, needed))


def _newest_whole(output_dir: str, needed: bool) -> Path | None:
    for path in list_checkpoints(output_dir) if os.path.isdir(output_dir) else []:
        if is_whole(path):
            return path
        print(f"skipping {path}: the file is damaged")
    if needed:
        raise UserError(f"--resume auto finds no whole checkpoint in --output_dir {output_dir}: name a file")
    print(f"nothing to resume in {output_dir}: starting afresh")
    return None
