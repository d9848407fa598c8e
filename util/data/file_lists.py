"""Paths of images below folders, and what readers of folders and of list files share. No image is opened here."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.images import printable
from util.data.leftovers import OTHER_ENDINGS, Skipped, is_leftover
from util.errors import UserError

# Folders --------------------------------------------------------------------------------------------------------------


def images_below(
    folder: Path,
    skipped: Skipped | None = None,
    times: dict[str, list[int]] | None = None,
    endings: tuple[str, ...] = IMG_EXTENSIONS,
) -> list[str]:
    """Return the paths of all images below a folder, sorted. Links to folders are followed, but not back to a folder
    above them. What is left out is added to `skipped`, and to `times` for each folder its `times_of` before it was
    listed. Raises UserError for a folder that cannot be read."""
    skipped = Skipped() if skipped is None else skipped

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): its images would be missing") from error

    def enter(path: str) -> None:
        if times is not None:
            times[path] = times_of(path)

    paths, ancestors = [], {str(folder): [os.path.realpath(folder)]}
    enter(str(folder))
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        chain = ancestors.pop(parent)  # real paths of the folders from the top to this one
        left = dict.fromkeys(filter(is_leftover, [*folders, *files]))  # in order, and quick to search
        skipped.leftovers += left
        folders[:], files = ([name for name in names if name not in left] for names in (folders, files))
        for name in list(folders):
            subfolder = os.path.join(parent, name)
            real = os.path.realpath(subfolder)
            if any(is_below(ancestor, real) for ancestor in chain):
                folders.remove(name)
            else:
                ancestors[subfolder] = [*chain, real]
                enter(subfolder)
        for name in files:
            lower = name.lower()
            if lower.endswith(endings):
                paths.append(os.path.join(parent, name))
            elif lower.endswith(OTHER_ENDINGS):
                skipped.endings[next(ending for ending in OTHER_ENDINGS if lower.endswith(ending))] += 1
    return sorted(paths)


def times_of(folder: str) -> list[int]:
    """Return when a folder's content and its status changed (mtime, ctime), in nanoseconds; [-1, -1] if unknown."""
    try:
        status = os.stat(folder)
    except OSError:
        return [-1, -1]
    return [status.st_mtime_ns, status.st_ctime_ns]


def class_names(folder: Path, skipped: Skipped | None = None) -> list[str]:
    """Return the names of the class folders, sorted. Folders that are left out are added to `skipped`. Raises UserError
    for a broken link: a class would be missing."""
    entries = sorted(folder.iterdir())
    if skipped is not None:
        skipped.leftovers += (entry.name for entry in entries if is_leftover(entry.name))
    entries = [entry for entry in entries if not is_leftover(entry.name)]
    broken = next((entry for entry in entries if entry.is_symlink() and not os.path.exists(entry)), None)
    if broken is not None:
        raise UserError(f"{broken} is a broken link: remove it or restore its target")
    return [entry.name for entry in entries if entry.is_dir()]


def note_odd_classes(folder: Path, classes: list[str], used: set[int]) -> None:
    """Print notes about classes that may be mistakes: those without images, and names that differ only in case."""
    empty = [name for index, name in enumerate(classes) if index not in used]
    if empty:
        print(
            f"note: {printable(str(folder))} has {len(empty)} class folders without images, among them {empty[0]!r}; "
            f"each counts as a class"
        )
    alike = {}
    for name in classes:
        alike.setdefault(name.casefold(), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            print(
                f"note: the class folders {' and '.join(map(repr, names))} differ only in case; they count as "
                f"{len(names)} classes"
            )


# Lists ----------------------------------------------------------------------------------------------------------------


def read_lines(path: str | Path, what: str) -> list[str]:
    """Return the non-empty lines of a text file. Only LF and CRLF end a line: the other line ends of Unicode may be
    part of a file name. Raises UserError when the file is not text in UTF-8; the message begins with `what`."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without the byte order mark of Windows editors
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not a text file in UTF-8") from error
    return [line for line in text.split("\n") if line.strip()]


def sorted_labels(names) -> list[str]:
    """Return the distinct names in order. Numbers are sorted by value: class 10 comes after class 9."""

    def key(label: str) -> tuple:
        is_number = label.isdecimal() and len(label) < 20  # int() refuses thousands of digits
        return (0, int(label), label) if is_number else (1, 0, label)

    return sorted(set(names), key=key)


def class_indices(labels: Iterable[str], classes: Sequence[str], path: str | Path, source: str) -> list[int]:
    """Return the index of each label of the list `path` among `classes`. Raises UserError for a label that is not
    there; the message says that it is not `source`."""
    index = {name: i for i, name in enumerate(classes)}
    labels = list(labels)
    unknown = next((label for label in labels if label not in index), None)
    if unknown is not None:
        raise UserError(f"the list file {path} has the label {unknown!r}, which is not {source}")
    return [index[label] for label in labels]


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or inside it; both must be absolute and normalised (no `..`, no `//`)."""
    return path == folder or path.startswith(folder if folder.endswith(os.sep) else folder + os.sep)


def may_leave(name: str) -> bool:
    """Whether a path relative to a folder may lead out of it, so that it has to be normalised to find out, which takes
    much longer."""
    return ".." in name or name.startswith(os.sep)


def check_below(paths: list[str], root: Path, source) -> None:
    """Raise UserError when one of the paths, which come from the data set's own list `source`, is not below `root`."""
    top, prefix = os.path.abspath(root), f"{root}{os.sep}"

    def is_stray(path: str) -> bool:
        inside = path.startswith(prefix) and not may_leave(path[len(prefix) :])
        return not inside and not is_below(os.path.abspath(path), top)

    stray = next(filter(is_stray, paths), None)
    if stray is not None:
        raise UserError(f"{source} names {stray}, which is not below --data_path {root}")


class RealPaths:
    """`os.path.realpath` of many files, without a system call for each: every folder is resolved and listed once, and
    only links are resolved one by one."""

    def __init__(self):
        self._folders: dict[str, tuple[str, set[str] | None]] = {}  # real path, and names of the links in it

    def __call__(self, path: str) -> str:
        parent, name = os.path.split(path)
        if parent not in self._folders:
            self._folders[parent] = os.path.realpath(parent), self._links(parent)
        real, links = self._folders[parent]
        if links is None or name in links or name in ("", os.curdir, os.pardir):
            return os.path.realpath(path)
        return os.path.join(real, name)

    @staticmethod
    def _links(folder: str) -> set[str] | None:
        try:
            with os.scandir(folder or os.curdir) as entries:
                return {entry.name for entry in entries if entry.is_symlink()}
        except OSError:  # not listed, but its files may be readable
            return None
