"""The ledger: every finished run appends one line to `results.jsonl` of its output folder.

A line holds the command, flags, code revision, hardware, data, starting weights and results of the run;
`tools/collect.py` makes tables from it. Checkpoints hold the same, so that an evaluation of a checkpoint can record it,
too.
"""

import argparse
import datetime
import fcntl
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice, repeat
from pathlib import Path

import torch

from util.checkpoint.files import LEDGER
from util.checkpoint.same_run import earlier_flags, plain
from util.data.compact import IntList, PathList, take
from util.errors import UserError
from util.notes import note_once
from util.parallel.distributed import find_difference, gather_objects, get_world_size, is_main_process
from util.report.names import renamed

NO_METRICS = ("epoch", "step", "seconds", "data/bad_images")  # entries of a line of log.txt that are not metrics


def revision() -> str:
    """Return the git revision of the code, with a plus if it has uncommitted changes. If git cannot tell it, print a
    note, once, that says why, and return ""."""
    folder = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, env={**os.environ, "LC_ALL": "C"})
    except OSError:
        _note_no_revision("git is not installed: install it")
    except subprocess.TimeoutExpired:
        _note_no_revision(f"git took more than 10 s in {folder}: check that disk")
    else:
        if done.returncode == 0:
            return done.stdout.strip()
        _note_no_revision(_why_no_revision(done.stderr, folder))
    return ""


def _why_no_revision(message: str, folder: Path) -> str:
    """Return why git fails with this message, and what to do."""
    if "dubious ownership" in message:
        advice = f"git config --global --add safe.directory {shlex.quote(str(folder))}"
        return f"{folder} belongs to another user, so git refuses it: {advice}"
    if "not a git repository" in message:
        return f"{folder} is not a git checkout: clone the project with git"
    return f"git fails in {folder}: {(message.strip().splitlines() or ['without a message'])[0]}"


def _note_no_revision(reason: str) -> None:
    note_once(f"the records of this run lack the revision of the code, because {reason}")


# The file -------------------------------------------------------------------------------------------------------------


_LIST = re.compile(r"\[\n\s+([-+.\w,\s]*?)\s+\]")  # of numbers: written in one line, for the rows of matrices


def strict(value):
    """Return `value` as strict JSON can hold it: non-finite numbers become null, other objects their text."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (bool, int, str, type(None))) else str(value)


def append(folder: str | Path | None, row: dict) -> None:
    """Append a line to the ledger of `folder`, on the main process; do nothing if `folder` is empty.

    The line is written at once, synced, under a lock: several runs may end at the same time. A line that a crash cut
    off is ended first. Raises UserError if the folder cannot be written.
    """
    if not folder or not is_main_process():
        return
    line = json.dumps(strict(row), allow_nan=False).encode() + b"\n"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(Path(folder) / LEDGER, "ab+", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{Path(folder) / LEDGER} cannot be written: {error.strerror}") from error


def write_json(path: str | Path, args, **content) -> None:
    """Write the flags and the `content` as strict JSON to `path` with the suffix .json, on the main process. Raises
    UserError if it cannot be written."""
    if not is_main_process():
        return
    path = Path(path).with_suffix(".json")
    text = json.dumps(strict({**vars(args), **content}), indent=2, allow_nan=False)
    text = _LIST.sub(lambda match: f"[{' '.join(match[1].split())}]", text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error


def read(path: str | Path) -> list[dict]:
    """Return the lines of a ledger, oldest first, with the present names of metrics; [] if there is no file. Damaged
    lines are reported and left out."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and _is_line(row):
            rows.append({**row, "metrics": renamed(row["metrics"], row["command"].startswith("main_"))})
        elif line.strip():
            print(f"note: line {number} of {path} is damaged and is left out", file=sys.stderr)
    return rows


def _is_line(row: dict) -> bool:
    """Whether `row` has the entries that tables need, as `Record.enter` writes them."""
    data, source = row.get("data") or {}, row.get("source") or {}
    splits = [split or {} for split in data.values()] if isinstance(data, dict) else []
    dicts = [row.get("flags"), row.get("metrics"), row.get("hardware") or {}, data, source, *splits]
    parts = row.get("earlier") or []
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        return False
    changes = [part.get(name) or {} for part in parts for name in ("flags", "data")]
    dicts += changes + [
        split or {} for change in changes[1::2] if isinstance(change, dict) for split in change.values()
    ]
    texts = [row.get("command"), row.get("finished") or "", row.get("revision") or ""]
    if not all(isinstance(each, dict) for each in dicts) or not all(isinstance(text, str) for text in texts):
        return False
    return not source or ("path" in source and _is_line({**source, "command": "", "metrics": {}}))


# Content of a line ----------------------------------------------------------------------------------------------------


def hardware(device: torch.device, dtype: torch.dtype | None) -> dict:
    """Return the device, the number of processes, and what else affects numbers and speed."""
    return {
        "device": device_name(device),
        "processes": get_world_size(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),  # a class of torch's otherwise, which checkpoints must not contain
        "amp_dtype": str(dtype).split(".")[-1] if dtype else None,
    }


def device_name(device: torch.device) -> str:
    """Return the name of the GPU or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def describe_images(images, data_path: str = "") -> dict:
    """Return the number of images and a hash of their labels or annotations and, if available, their names below
    `data_path` (files) or pixels (arrays). Runs with equal hashes had the same images. A stream has neither."""
    if not hasattr(images, "load"):
        return {"images": None, "sha256": None}
    digest = hashlib.sha256()
    encode = _EncodedOnce().__getitem__ if isinstance(images.targets, IntList) else _encoded
    lines = map(b"%b\t%b\n".__mod__, zip(_names(images, data_path), map(encode, images.targets)))
    while some := list(islice(lines, 1 << 12)):
        digest.update(b"".join(some))
    if hasattr(images, "arrays"):
        digest.update(images.arrays.tobytes())
    for part in images.described() if hasattr(images, "described") else ():
        digest.update(part.encode(errors="surrogateescape"))
    return {"images": len(images), "sha256": digest.hexdigest()}


def _names(images, data_path: str) -> Iterator[bytes]:
    """Yield the names of images in the hash: paths below `data_path`, else indices; "" for images without names."""
    indices = None
    while hasattr(images, "indices"):
        indices = images.indices if indices is None else take(images.indices, indices)
        images = images.images
    if hasattr(images, "paths"):
        root = (str(Path(data_path).expanduser()) + os.sep).encode(errors="surrogateescape") if data_path else b""
        paths = images.paths if isinstance(images.paths, PathList) else PathList(images.paths)
        paths = paths if indices is None else paths.take(indices)
        return (path.removeprefix(root) for path in paths.encoded())
    return repeat(b"") if indices is None else map(_encoded, indices)


class _EncodedOnce(dict):
    """The texts of integers, of which many are the same, as bytes."""

    def __missing__(self, value: int) -> bytes:
        self[value] = _encoded(value)
        return self[value]


def _encoded(value) -> bytes:
    return str(value).encode(errors="surrogateescape")


def metrics_of(log: str, epoch: float = math.inf) -> dict | None:
    """Return the metrics of the last line of a log.txt (given as text) up to `epoch`, under their present names; None
    if there is none."""
    for line in reversed(log.splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut off by a crash
        if row.get("epoch", 0) <= epoch:
            return {name: value for name, value in renamed(row).items() if name not in NO_METRICS}
    return None


def source_of(weights) -> dict | None:
    """Return the file that a run starts from (`weights`: `util.weights.load.Weights` or None), its hash, and the
    history of the run that wrote it, recursively."""
    if weights is None:
        return None
    sha256 = None
    if os.path.isfile(weights.path):
        with open(weights.path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    flags = {name: plain(value) for name, value in weights.args.items()}
    return {"path": weights.path, "sha256": sha256, "flags": flags, **weights.history}


class Record:
    """The record of a run: command, flags, revisions, time, data (`images`: splits by name) and the `weights` it starts
    from. `state` goes into checkpoints, so that a resumed run has one record. Raises UserError if ranks have different
    images or code.

    `earlier` lists the parts of a resumed run that were made in another way than the part that follows, the first one
    first: {"until_epoch", "until_step"} and those of "flags", "revision", "data" and "hardware" that differ, with the
    values that made the part; of the flags only those that differ.
    """

    def __init__(self, command: str, args, weights=None, **images):
        self.command, self.args, self.began, self.seconds_before = command, args, time.monotonic(), 0.0
        self.revisions, self.source, self.data = [revision()], None, {}
        self.stored, self.stored_flags, self._restored = {}, {}, False  # from the checkpoint of a resumed run
        self.hardware: dict | None = None  # of this process; set before the record is written
        self.earlier: list[dict] = []
        if is_main_process():
            self.source = source_of(weights)
        given = {name: split for name, split in images.items() if split is not None}
        self.data = {name: describe_images(split, args.data_path) for name, split in given.items()}
        self._check_ranks()

    def _check_ranks(self) -> None:
        difference = find_difference(self.data)
        if difference:
            split, first, rank, theirs = difference
            raise UserError(
                f"rank {rank} has other images for {split} below --data_path than rank 0 ({theirs['images']} and "
                f"{first['images']}, or other names or labels): give every node the same data"
            )
        revisions = gather_objects(self.revisions[0])
        for rank, theirs in enumerate(revisions):
            if theirs and revisions[0] and theirs != revisions[0]:  # empty outside a checkout
                raise UserError(
                    f"rank {rank} runs revision {theirs} of the code and rank 0 {revisions[0]}: install one of them"
                )

    def state(self, images_seen: int) -> dict:
        if self._restored:
            return dict(self.stored)
        return {
            "revision": ", ".join(self.revisions),
            "images_seen": images_seen,
            "seconds": self.seconds_before + time.monotonic() - self.began,
            "data": self.data,
            "source": self.source,
            "hardware": self.hardware,
            "earlier": self.earlier,
        }

    def load_state(
        self, state: dict | None, flags: dict | None = None, kept: dict | None = None, position: dict | None = None
    ) -> None:
        """Continue the record of the run that wrote `state` and `flags` into its checkpoint (None: a checkpoint without
        them). `kept` are flags whose values here become those of the checkpoint; `position` is where the part that
        wrote it ends."""
        self.stored, self.stored_flags = state or {}, flags or {}
        if kept:
            self.args = argparse.Namespace(**{**vars(self.args), **kept})
        self._add_earlier(position or {})
        before = [name for name in self._stored_revisions() if name != self.revisions[-1]]
        self.revisions = before + self.revisions[-1:]  # that of this process is always the last one
        self.seconds_before = self.stored.get("seconds", 0.0)
        self.source = self.stored.get("source", self.source)

    def _stored_revisions(self) -> list[str]:
        return list(filter(None, self.stored.get("revision", "").split(", ")))

    def _add_earlier(self, position: dict) -> None:
        """Add the part that wrote the checkpoint to `earlier`, if it differs from this one in anything it records."""
        self.earlier = list(self.stored.get("earlier", []))
        flags = earlier_flags(self.stored_flags, vars(self.args))
        revision, hardware = self._stored_revisions()[-1:], self.stored.get("hardware")
        images = {
            split: value
            for split, value in (self.stored.get("data") or {}).items()
            if split in self.data and value != self.data[split]
        }
        differs = {"flags": flags} if flags else {}
        differs |= {"revision": revision[0]} if revision and revision[0] != self.revisions[-1] else {}
        differs |= {"data": images} if images else {}
        differs |= {"hardware": hardware} if hardware and hardware != self.hardware else {}
        if images:
            print(f"note: the {' and '.join(images)} images are not those of the checkpoint (names, labels or number)")
        if differs:
            self.earlier.append({**position, **differs})

    def flags_json(self) -> dict:
        """Return the content of args.json: flags, revision of the code, version of torch, and the earlier parts of a
        resumed run, if they differ."""
        earlier = {"earlier": self.earlier} if self.earlier else {}
        return {**vars(self.args), "revision": revision(), "torch": torch.__version__, **earlier}

    def restore(self) -> None:
        """Report from now on exactly the record of the checkpoint, its flags included: this process adds nothing to the
        run."""
        self._restored = True
        if self.stored_flags:
            self.args = argparse.Namespace()
            vars(self.args).update(self.stored_flags)

    def is_entered(self, folder) -> bool:
        """Return whether the ledger of `folder` has a line of this command with the checkpoint's flags, for a run at
        least as long as the checkpoint's. (A run that is extended has one line for each of its ends; one that is
        resumed from an earlier checkpoint with other flags, too.)"""
        flags = strict({name: plain(value) for name, value in self.stored_flags.items()})
        rows = [row for row in read(Path(folder) / LEDGER) if row["command"] == self.command]
        lengths = [row.get("images_seen") for row in rows if not flags or row["flags"] == flags]
        return any(isinstance(seen, int) and seen >= self.stored.get("images_seen", 0) for seen in lengths)

    def finish(self, folder, images_seen: int) -> None:
        """Append the line of a training run that reached its end, with the metrics of the last line of its log."""
        if folder and is_main_process():
            metrics = metrics_of((Path(folder) / "log.txt").read_text(encoding="utf-8"))
            self.enter(folder, metrics, images_seen)

    def enter(self, folder, metrics: dict, images_seen: int) -> None:
        """Append the line of this run to the ledger of `folder`. `images_seen` counts images with repetitions."""
        if not is_main_process():
            return
        row = {
            "command": self.command,
            "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seed": getattr(self.args, "seed", None),
            **self.state(images_seen),
            "flags": {name: plain(value) for name, value in vars(self.args).items()},
            "metrics": metrics,
        }
        append(folder, row)
