"""Paths and labels of images, read from folders and from list files. No image is opened here."""

import os
from collections import Counter
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.images import printable
from util.errors import UserError

# Folders --------------------------------------------------------------------------------------------------------------


# Endings of images that are skipped: we read the same endings as torchvision's ImageFolder.
OTHER_ENDINGS = (".gif", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".heif", ".dng", ".tga", ".psd", ".svg")


def images_below(folder: Path, others: Counter | None = None) -> list[str]:
    """Return the paths of all images below a folder, sorted. Links to folders are followed, but not back to a folder
    above them. `others` counts the files with OTHER_ENDINGS. Raises UserError for a folder that cannot be read."""

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): its images would be missing") from error

    paths, ancestors = [], {str(folder): [os.path.realpath(folder)]}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        chain = ancestors.pop(parent)  # real paths of the folders from the top to this one
        for name in list(folders):
            subfolder = os.path.join(parent, name)
            real = os.path.realpath(subfolder)
            if any(is_below(ancestor, real) for ancestor in chain):
                folders.remove(name)
            else:
                ancestors[subfolder] = [*chain, real]
        paths += [os.path.join(parent, name) for name in files if name.lower().endswith(IMG_EXTENSIONS)]
        if others is not None:
            endings = (os.path.splitext(name)[1].lower() for name in files)
            others.update(ending for ending in endings if ending in OTHER_ENDINGS)
    return sorted(paths)


def note_skipped(folder: Path, others: Counter) -> None:
    """Print a note about the image files that `images_below` skipped."""
    if others:
        print(
            f"note: {others.total()} files below {printable(str(folder))} are skipped because of their endings "
            f"({' '.join(others)}); supported endings are {' '.join(IMG_EXTENSIONS)}"
        )


def class_names(folder: Path) -> list[str]:
    """Return the names of the class folders, sorted. Raises UserError for a broken link: a class would be missing."""
    entries = sorted(folder.iterdir())
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


def read_list(path: str, root: Path, outside: bool = False) -> tuple[list[str], list[str] | None]:
    """Return the paths and labels of a list file, which has path or path<TAB>label on each line. The labels are None
    when no line has one. Raises UserError for a path that is not below `root`, unless `outside`: a list that comes with
    the data must not refer to other files."""
    if not path:
        raise UserError("--dataset filelist needs two text files: --train_list and --val_list")
    if not os.path.isfile(path):
        raise UserError(f"--dataset filelist needs --train_list and --val_list, text files: {path} is not a file")
    rows = [line.split("\t") for line in read_lines(path, "the list file")]
    if not rows:
        raise UserError(f"the list file {path} is empty: every line must be a path, or path<TAB>label")
    widths = {len(row) for row in rows}
    if len(widths) > 1 or max(widths) > 2:
        raise UserError(f"the list file {path} mixes lines with and without a label, or has lines with several tabs")
    _refuse_quotes(path, root, rows)
    if not any(os.path.isfile(root / row[0]) for row in rows[:20]):
        raise UserError(f"the list file {path} names {rows[0][0]}, which is not below --data_path {root}")
    top = os.path.abspath(root)
    suspects = (row[0] for row in rows if may_leave(row[0]))
    stray = next((name for name in suspects if not is_below(os.path.abspath(root / name), top)), None)
    if stray is not None and not outside:
        raise UserError(
            f"the list file {path} names {stray}, which is not below --data_path {root}: give a folder that "
            f"contains all of them, or --allow_outside for a list that you trust"
        )
    return [str(root / row[0]) for row in rows], [row[1].strip() for row in rows] if widths == {2} else None


_QUOTES = "\"'"


def _refuse_quotes(path: str, root: Path, rows: list[list[str]]) -> None:
    """Raise UserError for quoted paths, and for labels that also occur without quotes: one class would become two."""
    for name in (row[0] for row in rows):
        if name.strip() != name.strip().strip(_QUOTES) and not os.path.isfile(root / name):
            raise UserError(f"the list file {path} has quotes in {name}: write paths without quotes")
    labels = {row[1].strip() for row in rows if len(row) > 1}
    quoted = next((label for label in sorted(labels) if label != label.strip(_QUOTES) in labels), None)
    if quoted is not None:
        raise UserError(f"the list file {path} has both labels {quoted} and {quoted.strip(_QUOTES)}: remove the quotes")


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
