"""Checkpoints: written whole or not at all, found again after a crash, read without running what is in them.

`checkpoint-E.pth` is the state after epoch E (from 0), `checkpoint-E-B.pth` inside epoch E after batch B. Runs with
`--fsdp` write folders of the same names that end with `.dcp` (`util.sharding`).
"""

import argparse
import os
import re
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from util import disk
from util.architectures import own_config
from util.checksum import damage
from util.distributed import from_main_process, is_main_process
from util.errors import UserError
from util.weights_file import read_file

LEDGER = "results.jsonl"  # of the runs that ended in a folder; see util/ledger.py
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


def write_atomically(path: Path, write) -> None:
    """`write(file)` into a temporary file beside `path`, synced, then renamed: `path` is old or new, never half.
    OSError when that is not possible; then nothing is left of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        # torch.save answers a full disk with a RuntimeError about the position in the file.
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save_checkpoint(output_dir: str | Path, epoch: int, batch: int, content: dict, keep: int = 0) -> Path:
    """Write one checkpoint (main process only), then delete what `keep` and progress have made superfluous.

    Files inside an epoch are kept only until a later one is whole; of the epoch files the newest `keep` (0: all).
    SaveFailed on all ranks when the disk does not take it; then nothing is deleted.
    """
    path = Path(output_dir) / checkpoint_name(epoch, batch)
    disk.everywhere(lambda: write_tensors(path, content))
    disk.everywhere(lambda: _tidy(path, keep))
    return path


def write_tensors(path: Path, content: dict) -> None:
    """torch.save, whole or not at all."""
    write_atomically(path, lambda file: torch.save(content, file))


def save_folder(output_dir: str | Path, epoch: int, batch: int, write, keep: int = 0) -> Path:
    """The same for a folder into which every process writes its share: `write(folder)`."""
    path = Path(output_dir) / checkpoint_name(epoch, batch, "dcp")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        disk.everywhere(lambda: _replace_folder(temporary, path))
    except disk.SaveFailed:
        if is_main_process():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    disk.everywhere(lambda: _tidy(path, keep))
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


def is_whole(path: Path) -> bool:
    """Whether the file is a zip archive (what torch.save writes) all of whose checksums hold; of a folder, whether
    everything is there, with its checksums."""
    if path.is_dir():
        from util import sharding  # which builds on this file

        return sharding.is_whole(path)
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


def flags_of(state: dict) -> dict:
    """Flags of the run that wrote this checkpoint, {} when it does not say."""
    args = state.get("args")
    return vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}


def stored_args(path: Path) -> dict:
    """`flags_of` the checkpoint at `path`. UserError when it is no checkpoint."""
    return flags_of(read_file(path))


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


# Flags that decide which tensors there are or what they mean; a run cannot go on with others.
_MODEL_FLAGS = ("model", "patch_size", "input_size", "in_chans", "norm_pix_loss", "decoder", "decoder_embed_dim")
_MODEL_FLAGS += (
    "decoder_depth",
    "decoder_num_heads",
    "nb_classes",
    "global_pool",
    "targets",
    "trainable_blocks",
    "head",
)
# Flags that may differ between the two parts of a run without a word.
FREE_FLAGS = {"resume", "overwrite", "output_dir", "log_dir", "num_workers", "pin_mem", "device", "data_path", "rank"}
FREE_FLAGS |= {"gpu", "local_rank", "world_size", "distributed", "dist_url", "dist_backend", "timeout_s"}
FREE_FLAGS |= {"print_freq", "save_freq", "save_steps", "keep", "vis_freq", "knn_freq", "eval_freq", "start_epoch"}
FREE_FLAGS |= {"finetune", "allow_outside", "save_patience", "spike_factor", "check_leak"}


def plain(value):
    """A flag in types that `torch.load(weights_only=True)` reads and that compare equal after a round trip."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, dict, type(None))) else str(value)


def _settled(flags: dict) -> dict:
    """These flags with the model's own values in place of None."""
    own = own_config(flags.get("model"))
    return {name: own.get(name) if value is None else value for name, value in flags.items()}


def check_same_run(path: Path, stored: dict, args: dict) -> None:
    """UserError when a model flag differs from the checkpoint's, a printed note for other differences."""
    stored, args = _settled(stored), _settled(args)
    changed = {
        name: (plain(stored[name]), plain(args[name]))
        for name in stored.keys() & args.keys() - FREE_FLAGS
        if plain(stored[name]) != plain(args[name])
    }
    for name in _MODEL_FLAGS:
        if name in changed:
            before, now = changed[name]
            raise UserError(
                f"--resume {path} was written with --{name} {before}, this run has {now}: give the same, "
                f"or start a new run from its weights with --init_from or --finetune"
            )
    for name, (before, now) in sorted(changed.items()):
        print(f"note: --{name} was {before} when {path.name} was written, now it is {now}")


def _files_of_a_run(folder: Path) -> list[Path]:
    if not os.path.isdir(folder):  # unlike pathlib's, it says False to a name that is too long
        return []
    names = ("log.txt", "args.json", "checkpoint-best.pth", "probe.json", "probe.pth", "spikes.jsonl")
    old = [folder / name for name in names]
    old += [*list_checkpoints(folder), *folder.glob("events.out.tfevents.*"), *folder.glob(".checkpoint-*.tmp")]
    old += folder.glob("encoder*.safetensors")
    return [path for path in old if path.is_file() or path.suffix == ".dcp" or path.name.endswith(".dcp.tmp")]


def _check_place(flag: str, folder: Path) -> None:
    """UserError when `folder` cannot be a folder, or not one to write to."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not os.path.isdir(nearest):
        raise UserError(f"--{flag} {folder} cannot be a folder: {nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise UserError(f"--{flag} {folder} is not writable")


def check_output_dir(args) -> None:
    """UserError when `--output_dir` or `--log_dir` cannot be written, or when `--output_dir` holds another run and
    neither `--resume` nor `--overwrite` was given."""
    for flag in ("output_dir", "log_dir"):
        if getattr(args, flag):
            _check_place(flag, Path(getattr(args, flag)))
    if not args.output_dir or getattr(args, "eval", False):
        return
    folder = Path(args.output_dir)
    old = _files_of_a_run(folder)
    if old and not args.resume and not args.overwrite:
        raise UserError(
            f"--output_dir {folder} holds another run ({old[0].name}): choose another folder, "
            f"continue it with --resume auto, or delete it with --overwrite"
        )


def _try_writing(folder: Path) -> None:
    """OSError on a full or read-only disk (os.access tells root that everything is allowed)."""
    probe = folder / f".writable-{os.getpid()}.tmp"
    try:
        write_atomically(probe, lambda file: file.write(bytes(4096)))
    finally:
        probe.unlink(missing_ok=True)


def make_output_dir(args) -> None:
    """Make the folders and, with `--overwrite`, delete the run in them: called when nothing is left that could fail."""
    if not is_main_process():
        return
    for flag in ("output_dir", "log_dir"):
        folder = getattr(args, flag)
        try:
            if folder:
                os.makedirs(folder, exist_ok=True)
                if args.overwrite and flag == "output_dir":
                    _delete_run(Path(folder))
                _try_writing(Path(folder))
        except OSError as error:
            raise UserError(f"--{flag} {folder} cannot be written: {error.strerror}") from error


def _delete_run(folder: Path) -> None:
    for path in _files_of_a_run(folder):
        _remove(path)
    (folder / LEDGER).unlink(missing_ok=True)
