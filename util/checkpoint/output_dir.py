"""`--output_dir` and `--log_dir`, checked before a run and created after all other checks have passed."""

import os
from pathlib import Path

from util.checkpoint.atomic import write_atomically
from util.checkpoint.files import (
    ABANDONED,
    BEST,
    CONFUSION,
    ENCODERS,
    EVALUATION,
    EVENTS,
    LEDGER,
    LOGGERS,
    SCORES,
    list_checkpoints,
)
from util.checkpoint.save import remove_checkpoint
from util.errors import UserError
from util.parallel.distributed import is_main_process


def _files_of_a_run(folder: Path) -> list[Path]:
    """Return the files and sharded checkpoints of a run in `folder`, without its ledger; [] if there is no folder."""
    if not os.path.isdir(folder):  # Path.is_dir raises OSError for a name that is too long
        return []
    names = ("log.txt", "args.json", BEST, "probe.json", "probe.pth", "spikes.jsonl")
    names += (SCORES, CONFUSION, LOGGERS)
    paths = [folder / name for name in names]
    paths += [*list_checkpoints(folder), *folder.glob(EVENTS), *folder.glob(".checkpoint-*.tmp")]
    paths += [*folder.glob(ENCODERS), *folder.glob(f"*{ABANDONED}")]
    folders = (".dcp", ".dcp.tmp", f".dcp{ABANDONED}")
    return [path for path in paths if path.is_file() or path.name.endswith(folders)]


def _files_of_evaluations(folder: Path) -> list[Path]:
    """Return what `--eval` and tools have written about the checkpoints in `folder`: the ledger, files under fixed
    names, and TensorBoard's events, which a later evaluation would continue."""
    paths = [folder / LEDGER, *(folder / name for name in EVALUATION), *folder.glob(f"tensorboard-*/{EVENTS}")]
    return [path for path in paths if path.is_file()]


def _check_folder(flag: str, folder: Path) -> None:
    """Raise UserError when a file is in the way of `folder`, or when it is not writable."""
    nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(nearest):
        raise UserError(f"--{flag} {folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--{flag} {folder} is not writable")


def check_output_dir(args) -> None:
    """Raise UserError when `--output_dir` or `--log_dir` cannot be written, or when one of them contains another run
    and neither `--resume` nor `--overwrite` is given."""
    for flag in ("output_dir", "log_dir"):
        if getattr(args, flag):
            _check_folder(flag, Path(getattr(args, flag)))
    if getattr(args, "eval", False):
        return
    folder = Path(args.output_dir)
    files = _files_of_a_run(folder) if args.output_dir else []
    if files and not args.resume and not args.overwrite:
        raise UserError(
            f"--output_dir {folder} holds another run ({files[0].name}): choose another folder, "
            f"continue the run with --resume auto, or delete it with --overwrite"
        )
    _check_log_dir(args, folder)


def check_resumed_here(output_dir: str, resume: Path | None) -> None:
    """Raise UserError if a run that continues from the checkpoint `resume` would continue the log of another one in
    `output_dir`."""
    folder = Path(output_dir)
    if resume is None or not output_dir or resume.resolve().parent == folder.resolve():
        return
    files = _files_of_a_run(folder)
    if files:
        raise UserError(
            f"--output_dir {folder} holds another run ({files[0].name}) than --resume {resume}: choose another folder"
        )


def _check_log_dir(args, folder: Path) -> None:
    """Raise UserError when a new run would draw its curves over those of another one in `--log_dir`."""
    if not args.log_dir or args.resume or args.overwrite or (args.output_dir and Path(args.log_dir) == folder):
        return
    if os.path.isdir(args.log_dir) and any(Path(args.log_dir).glob(EVENTS)):
        raise UserError(
            f"--log_dir {args.log_dir} holds the curves of another run, over which those of this one would be drawn: "
            f"choose another folder, or hide them with --overwrite"
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
    for path in [*_files_of_a_run(folder), *_files_of_evaluations(folder)]:
        remove_checkpoint(path)
    others = sorted(path.name for path in folder.glob("*.json"))
    if others:
        print(f"note: {', '.join(others)} in {folder} stay; they are not of this run")
