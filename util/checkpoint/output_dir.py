"""`--output_dir` and `--log_dir`, checked before a run and created after all other checks have passed."""

import os
from pathlib import Path

from util.checkpoint.atomic import write_atomically
from util.checkpoint.files import CONFUSION, LEDGER, SCORES, list_checkpoints
from util.checkpoint.save import remove_checkpoint
from util.errors import UserError
from util.parallel.distributed import is_main_process


def _files_of_a_run(folder: Path) -> list[Path]:
    """Return the files and sharded checkpoints of a run in `folder`, without its ledger; [] if there is no folder."""
    if not os.path.isdir(folder):  # Path.is_dir raises OSError for a name that is too long
        return []
    names = ("log.txt", "args.json", "checkpoint-best.pth", "probe.json", "probe.pth", "spikes.jsonl")
    names += (SCORES, CONFUSION)
    paths = [folder / name for name in names]
    paths += [*list_checkpoints(folder), *folder.glob("events.out.tfevents.*"), *folder.glob(".checkpoint-*.tmp")]
    paths += folder.glob("encoder*.safetensors")
    return [path for path in paths if path.is_file() or path.suffix == ".dcp" or path.name.endswith(".dcp.tmp")]


def _check_folder(flag: str, folder: Path) -> None:
    """Raise UserError when a file is in the way of `folder`, or when it is not writable."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise UserError(f"--{flag} {folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--{flag} {folder} is not writable")


def check_output_dir(args) -> None:
    """Raise UserError when `--output_dir` or `--log_dir` cannot be written, or when `--output_dir` contains another run
    and neither `--resume` nor `--overwrite` is given."""
    for flag in ("output_dir", "log_dir"):
        if getattr(args, flag):
            _check_folder(flag, Path(getattr(args, flag)))
    if not args.output_dir or getattr(args, "eval", False):
        return
    folder = Path(args.output_dir)
    files = _files_of_a_run(folder)
    if files and not args.resume and not args.overwrite:
        raise UserError(
            f"--output_dir {folder} holds another run ({files[0].name}): choose another folder, "
            f"continue the run with --resume auto, or delete it with --overwrite"
        )


def _try_writing(folder: Path) -> None:
    """Raise OSError when nothing can be written to `folder`, for example on a full or read-only disk. (os.access does
    not detect a full disk, and for root it is nearly always true.)"""
    probe = folder / f".writable-{os.getpid()}.tmp"
    try:
        write_atomically(probe, lambda file: file.write(bytes(4096)))
    finally:
        probe.unlink(missing_ok=True)


def make_output_dir(output_dir: str, log_dir: str, overwrite: bool) -> None:
    """Create both folders and, with `overwrite`, delete the run in `output_dir`. Call this after all other checks.
    Raises UserError when a folder cannot be written to."""
    if not is_main_process():
        return
    for flag, folder in (("output_dir", output_dir), ("log_dir", log_dir)):
        try:
            if folder:
                os.makedirs(folder, exist_ok=True)
                if overwrite and flag == "output_dir":
                    _delete_run(Path(folder))
                _try_writing(Path(folder))
        except OSError as error:
            raise UserError(f"--{flag} {folder} cannot be written: {error.strerror}") from error


def _delete_run(folder: Path) -> None:
    for path in _files_of_a_run(folder):
        remove_checkpoint(path)
    (folder / LEDGER).unlink(missing_ok=True)
