"""Lists of the images in large folders, kept in an index file for the next start.

To walk through 14 million files takes minutes, on a network disk hours; to check an index takes one system call for
each folder. A folder's times change when an entry is added to it, removed from it or renamed: the time of its content
(mtime), which programs can set back, and that of its status (ctime), which they cannot. A folder with other times than
the index has is listed again, with all of its class; so the result is always that of walking through all folders.

Two things could deceive this check, and are excluded: changes within the resolution of the times, by not trusting the
times of a folder that had changed shortly before it was listed; and file systems in user space (object stores, mostly),
whose folders' times may not change, by keeping no index of them.
"""

import hashlib
import json
import os
import socket
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from util.data.bands import ARRAY_ENDINGS
from util.data.compact import PathList
from util.data.file_lists import images_below, times_of
from util.data.images import printable
from util.data.leftovers import RULES, Skipped
from util.parallel.distributed import is_main_process

FROM = 100_000  # images from which an index is written: fewer are listed in a second or two
SETTLED = 60.0  # seconds for which a folder must not have changed when it is listed; clocks may differ
MOST_LEFTOVERS = 10_000  # of a class; with more of them it is listed at every start
_FORMAT = 1
_THREADS = 16  # that wait for a network disk's times of folders
_ABANDONED = 3600  # seconds after which a temporary file belongs to a process that was killed


@dataclass(frozen=True)
class IndexFiles:
    """Where index files are kept ("": nowhere); with `relist` those that exist are not read, but replaced."""

    folder: str = ""
    relist: bool = False

    def path_for(self, folder: Path) -> Path | None:
        """Return the index file of the images below `folder`, None if none is to be kept."""
        if not self.folder or not _times_change(folder):
            return None
        name = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
        return Path(self.folder).expanduser() / f"images-{name}.index"


@dataclass
class Part:
    """The images in one class folder, sorted: the bytes of their paths, one after the other, and the length of each;
    and for each folder in it its name and its times (F, 2), -1 if they are not to be trusted. Names are relative to the
    folder of all classes."""

    data: np.ndarray
    lengths: np.ndarray
    folders: Sequence[str]
    times: np.ndarray
    endings: dict[str, int] = field(default_factory=dict)  # what was left out, see `Skipped`
    leftovers: list[str] = field(default_factory=list)

    def is_current(self, root: str) -> bool:
        """Whether no folder has changed since it was listed."""
        if (self.times < 0).any():
            return False
        return all(times_of(os.path.join(root, n)) == known for n, known in zip(self.folders, self.times.tolist()))


def list_images(
    folder: Path, names: list[str], skipped: Skipped, index: IndexFiles | None = None
) -> tuple[PathList, np.ndarray]:
    """Return the paths of all images in the class folders `names` of a folder ("": in the folder itself), class by
    class and sorted in each, and the number of images in each, (len(names),). What is left out is added to `skipped`.
    With an `index`, a folder that has not changed since it was listed is not listed again, and the main process keeps
    the list of a large folder. Raises UserError for a folder that cannot be read."""
    began, path = time.time(), None if index is None else index.path_for(folder)
    known = _read(path, folder) if index and path and not index.relist else {}
    kept = _current(known, folder, names)
    parts = []
    for name in tqdm(names, "listing images", disable=None, delay=5, leave=False, unit=" classes"):
        part = kept.get(name)
        parts.append(_listed(folder, name, began) if part is None else part)
    total = sum(len(part.lengths) for part in parts)
    for part in parts:
        skipped.endings.update(part.endings)
        skipped.leftovers += part.leftovers
    if known:
        changed = f"; {len(names) - len(kept)} of {len(names)} classes have changed" if len(kept) < len(names) else ""
        print(f"{total} images below {printable(str(folder))}, from the index {printable(str(path))}{changed}")
    if path and total >= FROM and (len(kept) < len(names) or list(known) != names) and is_main_process():
        _write(path, folder, names, parts)
    lengths = _joined([part.lengths for part in parts], np.uint16)
    paths = PathList.of_bytes(_joined([part.data for part in parts], np.uint8), lengths, _prefix(folder))
    return _without_arrays(paths, np.array([len(part.lengths) for part in parts], np.int64), skipped)


def _without_arrays(paths: PathList, counts: np.ndarray, skipped: Skipped) -> tuple[PathList, np.ndarray]:
    """Leave out the arrays of a data set that also has images: they may be anything, such as features of the images.
    `counts` are those of the classes, whose paths follow each other."""
    is_array = paths.ending_in(ARRAY_ENDINGS)
    if is_array.all() or not is_array.any():
        return paths, counts
    skipped.endings.update(os.path.splitext(path)[1].lower() for path in paths.take(np.flatnonzero(is_array)))
    classes = np.repeat(np.arange(len(counts)), counts)[~is_array]
    return paths.take(np.flatnonzero(~is_array)), np.bincount(classes, minlength=len(counts))


def _prefix(folder: Path) -> str:
    return str(folder / "x")[:-1]  # what pathlib and os.walk put before the names in it


def _joined(arrays: list[np.ndarray], dtype) -> np.ndarray:
    """Concatenate arrays. Slices that make up a whole array in its order are not copied."""
    arrays = [array for array in arrays if len(array)]
    whole = arrays[0].base if arrays else np.zeros(0, dtype)
    if isinstance(whole, np.ndarray) and all(array.base is whole for array in arrays):
        starts = [array.ctypes.data for array in arrays]
        if sum(map(len, arrays)) == len(whole) and starts == sorted(starts):
            return whole
    return np.concatenate(arrays)


def _listed(folder: Path, name: str, began: float) -> Part:
    """List the images in a class folder. `began` is the time when listing began."""
    skipped, times, prefix = Skipped(), {}, _prefix(folder)
    paths = images_below(folder / name, skipped, times, (*IMG_EXTENSIONS, *ARRAY_ENDINGS))
    names = [path.removeprefix(prefix).encode("utf-8", "surrogateescape") for path in paths]
    settled = 1e9 * (began - SETTLED)
    if len(skipped.leftovers) > MOST_LEFTOVERS:
        settled = 0
    rows = [pair if pair[1] < settled else [-1, -1] for pair in times.values()]
    return Part(
        np.frombuffer(b"".join(names), np.uint8),
        np.fromiter(map(len, names), np.uint16, len(names)),
        [parent[len(prefix) :] if parent.startswith(prefix) else "" for parent in times],
        np.array(rows, np.int64).reshape(-1, 2),
        dict(skipped.endings),
        skipped.leftovers,
    )


def _current(known: dict[str, Part], folder: Path, names: list[str]) -> dict[str, Part]:
    """Return the parts of an index that are up to date."""
    wanted = [name for name in names if name in known]
    if not wanted:
        return {}
    root = str(folder)
    with ThreadPoolExecutor(_THREADS) as pool:
        current = pool.map(lambda name: known[name].is_current(root), wanted, chunksize=64)
        return {name: known[name] for name, is_current in zip(wanted, current) if is_current}


def _times_change(folder: Path) -> bool:
    """Whether a folder is not on a file system in user space, such as a mounted object store."""
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return True  # another system than Linux
    kinds = [line.partition(" - ")[2].split(" ")[0] for line in lines if line.split(" ")[2] == number]
    return not any(kind.startswith("fuse.") or kind == "fuse" for kind in kinds)


# The file -------------------------------------------------------------------------------------------------------------
# An archive of arrays (numpy's .npz, without pickle). Its checksums detect what was damaged or cut off.


def _header(folder: Path) -> str:
    """Return what an index must begin with to be valid here."""
    return json.dumps({"format": _FORMAT, "folder": str(folder.absolute()), "rules": RULES})


def _write(path: Path, folder: Path, names: list[str], parts: list[Part]) -> None:
    """Write an index completely or not at all. A note is printed if it cannot be written."""
    left_out = {i: [part.endings, part.leftovers] for i, part in enumerate(parts) if part.endings or part.leftovers}
    folders = [name for part in parts for name in part.folders]
    content = {
        "header": _as_bytes(_header(folder)),
        "names": _as_bytes(json.dumps(names)),
        "left_out": _as_bytes(json.dumps(left_out)),
        "folders": _as_bytes(json.dumps(folders)),
        "counts": np.array([(len(p.lengths), len(p.folders)) for p in parts], np.int64).reshape(-1, 2),
        "times": _joined([part.times for part in parts], np.int64).reshape(-1, 2),
        "lengths": _joined([part.lengths for part in parts], np.uint16),
        "data": _joined([part.data for part in parts], np.uint8),
    }
    where, temporary = printable(str(path)), ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        descriptor, temporary = tempfile.mkstemp(f"-{socket.gethostname()}.tmp", f".{path.name}-", path.parent)
        with os.fdopen(descriptor, "wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            os.unlink(temporary)
        print(f"note: the list of images cannot be kept in {where} ({error.strerror}): the next start lists them again")
        return
    print(f"the list of {len(content['lengths'])} images is kept in {where}: the next start reads it")


def _as_bytes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove_abandoned(path: Path) -> None:
    """Remove what processes that were killed while they wrote this index have left."""
    for old in path.parent.glob(f".{path.name}-*.tmp"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _ABANDONED:
                old.unlink()


def _read(path: Path, folder: Path) -> dict[str, Part]:
    """Return the parts of an index by the names of their class folders; {} if there is none that is valid."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            if stored["header"].tobytes() != _header(folder).encode("utf-8", "surrogateescape"):
                return {}
            content = {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        print(f"note: the index {printable(str(path))} cannot be read ({error}): the images are listed again")
        return {}
    return dict(_parts(content))


def _parts(content: dict[str, np.ndarray]) -> Iterator[tuple[str, Part]]:
    """Yield the names and the parts of the arrays of an index."""
    names, folders, left_out = (
        json.loads(content[name].tobytes().decode("utf-8", "surrogateescape"))
        for name in ("names", "folders", "left_out")
    )
    lengths, data, times = content["lengths"], content["data"], content["times"]
    bytes_before = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    image = folder = 0
    for i, (name, (images, inner)) in enumerate(zip(names, content["counts"].tolist())):
        start, stop = bytes_before[[image, image + images]].tolist()
        own, inside = slice(image, image + images), slice(folder, folder + inner)
        endings, leftovers = left_out.get(str(i), ({}, []))
        yield (
            name,
            Part(data[start:stop], lengths[own], folders[inside], times[inside], Counter(endings), leftovers),
        )
        image, folder = image + images, folder + inner
