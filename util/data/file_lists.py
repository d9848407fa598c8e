"""Which images and labels a folder or a list has: paths alone, nothing is opened but the lists."""

import os
from collections import Counter
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.images import shown
from util.errors import UserError

# Folders --------------------------------------------------------------------------------------------------------------


# Endings of pictures that are not looked for: torchvision's ImageFolder reads the same ones as we do, and no others.
OTHER_ENDINGS = (".gif", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".heif", ".dng", ".tga", ".psd", ".svg")


def images_below(folder: Path, others: Counter | None = None) -> list[str]:
    """Paths of all images in a folder, sorted; links to folders are followed, but not in circles. `others` counts files
    by OTHER_ENDINGS. UserError for a folder that cannot be read."""

    def refuse(error: OSError):
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): its images would be missing") from error

    found, above = [], {str(folder): [os.path.realpath(folder)]}
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        chain = above.pop(parent)  # where the folders that led here really are
        for name in list(folders):
            place = os.path.join(parent, name)
            real = os.path.realpath(place)
            if any(is_below(one, real) for one in chain):
                folders.remove(name)
            else:
                above[place] = [*chain, real]
        found += [os.path.join(parent, name) for name in files if name.lower().endswith(IMG_EXTENSIONS)]
        if others is not None:
            endings = (os.path.splitext(name)[1].lower() for name in files)
            others.update(ending for ending in endings if ending in OTHER_ENDINGS)
    return sorted(found)


def say_others(folder: Path, others: Counter) -> None:
    if others:
        print(
            f"note: {others.total()} files below {shown(str(folder))} are left out by their endings "
            f"({' '.join(others)}); known are {' '.join(IMG_EXTENSIONS)}"
        )


def class_names(folder: Path) -> list[str]:
    """Names of the class folders, sorted. UserError for a link that leads nowhere: a class would be missing."""
    entries = sorted(folder.iterdir())
    lost = next((entry for entry in entries if entry.is_symlink() and not os.path.exists(entry)), None)
    if lost is not None:
        raise UserError(f"{lost} is a link that leads nowhere: remove it, or bring back what it leads to")
    return [entry.name for entry in entries if entry.is_dir()]


def say_odd_classes(folder: Path, classes: list[str], used: set[int]) -> None:
    """What is perhaps not meant: classes without images, and ones that a file system elsewhere would have made one."""
    empty = [name for place, name in enumerate(classes) if place not in used]
    if empty:
        print(
            f"note: {shown(str(folder))} has {len(empty)} class folders without images, {empty[0]!r} is one of them; "
            f"each counts as a class"
        )
    alike = {}
    for name in classes:
        alike.setdefault(name.casefold(), []).append(name)
    for names in alike.values():
        if len(names) > 1:
            print(
                f"note: the class folders {' and '.join(map(repr, names))} differ in case only; they are "
                f"{len(names)} classes"
            )


# Lists ----------------------------------------------------------------------------------------------------------------


def read_list(path: str, root: Path, outside: bool = False) -> tuple[list[str], list[str] | None]:
    """Paths and labels (None when no line has one) of a list file: path, or path<TAB>label, one per line. UserError
    for a path that is not below `root`, unless `outside`: a list that came with the data must not name other files."""
    if not path or not os.path.isfile(path):
        raise UserError(
            f"--dataset filelist needs --train_list and --val_list, text files; {path or 'none'} is no file"
        )
    rows = [line.split("\t") for line in read_lines(path, "the list file")]
    if not rows:
        raise UserError(f"the list file {path} is empty; it wants a path, or path<TAB>label, on every line")
    widths = {len(row) for row in rows}
    if len(widths) > 1 or max(widths) > 2:
        raise UserError(f"the list file {path} mixes lines with and without a label, or has lines with several tabs")
    _refuse_quotes(path, root, rows)
    if not any(os.path.isfile(root / row[0]) for row in rows[:20]):
        raise UserError(f"the list file {path} names {rows[0][0]}, which is not below --data_path {root}")
    top = os.path.abspath(root)
    stray = next((row[0] for row in rows if not is_below(os.path.abspath(root / row[0]), top)), None)
    if stray is not None and not outside:
        raise UserError(
            f"the list file {path} names {stray}, which is not below --data_path {root}: give a folder that "
            f"holds all of them, or --allow_outside for a list that you trust"
        )
    return [str(root / row[0]) for row in rows], [row[1].strip() for row in rows] if widths == {2} else None


_QUOTES = "\"'"


def _refuse_quotes(path: str, root: Path, rows: list[list[str]]) -> None:
    """UserError for paths in quotes, and for labels that are another label but for a quote: two classes for one."""
    for name in (row[0] for row in rows):
        if name.strip() != name.strip().strip(_QUOTES) and not os.path.isfile(root / name):
            raise UserError(f"the list file {path} has quotes in {name}: it wants paths as they are")
    labels = {row[1].strip() for row in rows if len(row) > 1}
    twice = next((label for label in sorted(labels) if label != label.strip(_QUOTES) in labels), None)
    if twice is not None:
        raise UserError(f"the list file {path} has the label {twice} beside {twice.strip(_QUOTES)}: remove the quotes")


def read_lines(path: str | Path, what: str) -> list[str]:
    """The lines of a text file that are not empty. They end with a line feed (before it perhaps a carriage return), and
    with nothing else that unicode calls a line's end, which a file's name may have. UserError when it is no text."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # with or without the mark that Windows' editors put first
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not a text file in UTF-8") from error
    return [line for line in text.split("\n") if line.strip()]


def sorted_labels(names) -> list[str]:
    """Different names in order; numbers as numbers: class 10 comes after class 9."""

    def key(label: str) -> tuple:
        is_number = label.isdecimal() and len(label) < 20  # python refuses thousands of digits
        return (0, int(label), label) if is_number else (1, 0, label)

    return sorted(set(names), key=key)


def is_below(path: str, folder: str) -> bool:
    """Both absolute and without `..`."""
    return os.path.commonpath([path, folder]) == folder


def check_below(paths: list[str], root: Path, source) -> None:
    """UserError for a path of a list that came with the data, and leads out of its folder."""
    top = os.path.abspath(root)
    stray = next((path for path in paths if not is_below(os.path.abspath(path), top)), None)
    if stray is not None:
        raise UserError(f"{source} names {stray}, which is not below --data_path {root}")
