"""List files: a text file that names the images of a data set and their labels, written by hand or by another tool.

A list is a table. Its cells are separated by tabs, commas, semicolons or spaces, and its first row may be a header.
Which of these holds is decided by one criterion: the cells of the image column must name files that exist.
"""

import contextlib
import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from util.data.file_lists import is_below, read_lines
from util.data.images import printable
from util.data.list_names import Names, has_ending
from util.errors import MissingSplit, UserError

SAMPLE = 21  # rows from which the layout is inferred: a header and twenty images
# Names of columns, in lower case and without spaces and punctuation: "Image Index" is imageindex.
IMAGE_NAMES = set("image images img imgs path paths file files filename filenames filepath filepaths fname".split())
IMAGE_NAMES |= set(
    "imagename imagepath imagepaths imagefile imageid imageindex imgname imgpath imgid id idcode".split()
)
LABEL_NAMES = set("label labels class classes classname target targets category categories tag tags dx".split())
LABEL_NAMES |= set("diagnosis diagnostic findinglabels species breed".split())
_NOT_BELOW = re.compile(r"(^|/)\.{0,2}(/|$)")  # an empty component, `.` or `..`: the path must be resolved
_QUOTES = "\"'"


@dataclass(frozen=True)
class ImageList:
    """The rows of a list file: `paths`, and the cells of each label column, `cells[column][row]`. `columns` are the
    names of the label columns (numbers from 1 without a header); there are none without labels. `groups` are the cells
    of `--group_column`, None without it."""

    source: str
    paths: list[str]
    columns: list[str]
    cells: list[list[str]]
    groups: list[str] | None = None

    def of(self, rows: Sequence[int]) -> tuple[list[str], list[str] | None]:
        """Return the paths and the groups of some rows."""
        return [self.paths[row] for row in rows], self.groups and [self.groups[row] for row in rows]


# Layouts --------------------------------------------------------------------------------------------------------------


def _split_tabs(lines: Iterable[str]) -> Iterator[list[str]]:
    return (line.split("\t") for line in lines)


def _split_spaces(lines: Iterable[str]) -> Iterator[list[str]]:
    return (line.split() for line in lines)


def _split_last_space(lines: Iterable[str]) -> Iterator[list[str]]:
    return (line.rsplit(None, 1) for line in lines)


def _split_csv(delimiter: str, lines: Iterable[str]) -> Iterator[list[str]]:
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    return ([cell.strip() for cell in row] for row in rows)


Layout = Callable[[Iterable[str]], Iterator[list[str]]]
# The first one is that of our own lists, in which quotes are part of a name.
LAYOUTS: dict[str, Layout] = {
    "tabs": _split_tabs,
    "commas": partial(_split_csv, ","),
    "semicolons": partial(_split_csv, ";"),
    "tabs (with quotes)": partial(_split_csv, "\t"),
    "spaces": _split_spaces,
    "the last space": _split_last_space,
}


def _sample(split: Layout, lines: list[str]) -> list[list[str]]:
    rows = []
    with contextlib.suppress(csv.Error):  # not this layout, or damaged: reading all rows will say so
        rows.extend(islice(split(lines), SAMPLE))
    return rows


# The table ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """How a list is read: its layout (a key of LAYOUTS), its header ([] if there is none), the index of the image
    column, and how names are repaired."""

    layout: str
    header: list[str]
    width: int
    image: int
    names: Names

    def title(self, index: int) -> str:
        return self.header[index] if self.header else str(index + 1)


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def is_label_name(name: str) -> bool:
    """Whether a column of this name has the labels, unless another one is chosen."""
    return _plain(name) in LABEL_NAMES


def _column(wanted: str, first: list[str]) -> int | None:
    """Return the index of the column that `--image_column`, `--label_column` or `--group_column` names: by the header's
    name, else by number from 1; None if there is no such column."""
    names = [name.strip() for name in first]
    for candidates, name in ((names, wanted), ([_plain(each) for each in names], _plain(wanted))):
        if name and candidates.count(name) == 1:
            return candidates.index(name)
    return int(wanted) - 1 if wanted.isdecimal() and 0 < int(wanted) <= len(first) else None


def _candidates(repair: str, first: list[str], wanted: str) -> list[int]:
    """Return the indices of the columns that may hold the images."""
    if wanted:
        index = _column(wanted, first)
        return [] if index is None else [index]
    if repair in ("ending", "subfolder"):  # other cells, such as numbers, may be names by accident
        return [i for i, name in enumerate(first) if i == 0 or _plain(name) in IMAGE_NAMES]
    return list(range(len(first)))


def _infer(path: str, lines: list[str], root: Path, wanted: str) -> Table:
    """Return the layout in which most of the first rows name an image. Raises UserError if none does."""
    samples = {layout: _sample(split, lines) for layout, split in LAYOUTS.items()}
    best: tuple[int, Table | None] = 0, None
    for repair in Names.REPAIRS:
        if repair == "subfolder" and best[0]:
            break  # the names are relative to the root, and searching a large folder takes minutes
        hits, table = _infer_with(path, samples, Names(root, repair), wanted)
        if hits > best[0]:
            best = hits, table
        own = table is not None and table.layout == "tabs" and repair == "exact" and not _backslashes(table, samples)
        if best[0] >= len(samples["tabs"]) - 1 or own:
            break  # all but a header; or our own layout, in which images may be missing
    if best[1] is not None:
        return best[1]
    rows = samples["tabs"]
    if wanted and all(_column(wanted, sample[0]) is None for sample in samples.values() if sample):
        raise UserError(f"--image_column {wanted} is no column of {path}, whose first line is {rows[0]}")
    _refuse_quotes(path, root, [row[0] for row in rows])
    raise UserError(
        f"the list file {path} names {printable(rows[0][0][:200])}, which is not a file below {root}: no cell of its "
        f"first rows is an image there; give the folder to which the names are relative"
    )


def _backslashes(table: Table, samples: dict) -> bool:
    """Whether an image of the first rows may have the path separators of Windows."""
    return any("\\" in cell for row in samples[table.layout] for cell in row[table.image : table.image + 1])


def _infer_with(path: str, samples: dict, names: Names, wanted: str) -> tuple[int, Table | None]:
    """Return how many of the first rows name an image in the best layout, and that layout; (0, None) if none does."""
    options = {}
    for layout, rows in samples.items():
        for column in _candidates(names.repair, rows[0], wanted) if rows else ():
            options[layout, column] = sum(names.exists(row[column]) for row in rows if column < len(row))
        if names.repair == "exact" and options.get(("tabs", 0)) and not wanted:
            options = {("tabs", 0): options["tabs", 0]}  # a name may contain commas and spaces
            break
    hits = max(options.values(), default=0)
    if not hits:
        return 0, None
    layout, column = _best(path, samples, options)
    rows = samples[layout]
    return hits, Table(layout, _header(rows, column, names), len(rows[0]), column, names)


def _best(path: str, samples: dict, options: dict[tuple[str, int], int]) -> tuple[str, int]:
    """Return the layout and the column with the most images. Raises UserError if several columns name images."""
    most = max(options.values())
    best = [option for option, hits in options.items() if hits == most]
    layout = best[0][0]
    columns = [column for other, column in best if other == layout]
    first = samples[layout][0]
    known = [column for column in columns if _plain(first[column]) in IMAGE_NAMES]
    if len(columns) > 1 and len(known) != 1 and len(first) > 2:
        raise UserError(
            f"several columns of the list file {path} name images ({_some(first[c] for c in columns)}): choose one "
            f"with --image_column"
        )
    return layout, (known or columns)[0]


def _header(rows: list[list[str]], image: int, names: Names) -> list[str]:
    """Return the first row if it is a header: its image cell names no file and looks like no file name."""
    cell = rows[0][image].strip()
    like_a_name = _plain(cell) in IMAGE_NAMES or (any(map(str.isalpha, cell)) and not re.search(r"[\d/\\]", cell))
    if len(rows) > 1 and like_a_name and not has_ending(cell) and not names.exists(rows[0][image]):
        return [name.strip() for name in rows[0]]
    return []


# Reading --------------------------------------------------------------------------------------------------------------


def read_list(
    path: str,
    root: Path,
    outside: bool = False,
    image_column: str = "",
    label_columns: Sequence[str] | None = (),
    announce: bool = True,
    needs_labels: bool = True,
    group_column: str = "",
) -> ImageList:
    """Read a list file. Its columns are chosen by `image_column`, `label_columns` and `group_column` (names of a
    header, or numbers from 1) or, without them, by what they contain and by their usual names; without `group_column`
    there are no groups, and with `label_columns` None no labels. With `announce`, print what was chosen, except for
    plain lists of path, or path<TAB>label. Unless it `needs_labels`, a list whose label column is not known has no
    labels.

    Raises UserError for a list that cannot be understood, and for a path that is not below `root`, unless `outside`: a
    list that comes with the data must not refer to other files.
    """
    if not path:
        raise MissingSplit(
            "--dataset filelist needs two text files: --train_list and --val_list; or --train_list and --val_fraction"
        )
    if not os.path.isfile(path):
        raise UserError(f"--dataset filelist needs --train_list and --val_list, text files: {path} is not a file")
    lines = read_lines(path, "the list file")
    if lines and re.fullmatch(r'"?sep=.?"?\s*', lines[0], re.IGNORECASE):
        lines = lines[1:]  # Excel's
    if not lines:
        raise UserError(f"the list file {path} is empty: every line must be a path, or path<TAB>label")
    table = _infer(path, lines, root, image_column)
    group = _group_column(path, table, lines, group_column)
    labels = [] if label_columns is None else _label_columns(path, table, lines, label_columns, needs_labels, group)
    names, *cells = _read_cells(path, table, lines, [table.image, *labels, *group])
    if table.layout in ("tabs", "spaces", "the last space"):  # csv understands quotes
        _refuse_quotes(path, root, names, *cells[: len(labels)][:1])
    paths, titles = _paths(path, table, names, outside), [table.title(index) for index in labels]
    groups = _groups(path, group_column, paths, cells.pop()) if group else None
    listed = ImageList(path, paths, titles, cells, groups)
    if announce and (table.header or table.layout != "tabs" or table.width > 2 or table.names.repair != "exact"):
        print(_description(table, listed, group))
    return listed


def _group_column(path: str, table: Table, lines: list[str], wanted: str) -> list[int]:
    """Return the index of the group column in a list, which is empty if none is wanted."""
    if not wanted:
        return []
    first = table.header or _sample(LAYOUTS[table.layout], lines)[0]
    index = _column(wanted, first)
    if index is None:
        raise UserError(f"--group_column {wanted} is no column of {path}, whose first line is {first}")
    if index == table.image:
        raise UserError(f"--group_column {wanted} is the image column of {path}: give the column of the groups")
    return [index]


def _groups(path: str, column: str, paths: list[str], cells: list[str]) -> list[str]:
    """Return the group of every image. Raises UserError for images without one, and for an image in two groups."""
    missing = [row for row, cell in enumerate(cells) if cell.lower() in ("", "nan")]
    if missing:
        raise UserError(
            f"--group_column {column}: the list file {path} has no group for {len(missing)} of {len(paths)} images, "
            f"among them {paths[missing[0]]}: fill in this column, or remove these lines"
        )
    known: dict[str, str] = {}
    for name, group in zip(paths, cells):
        if known.setdefault(name, group) != group:
            raise UserError(
                f"--group_column {column}: the list file {path} has {name} in the groups {known[name]} and {group}: an "
                f"image can be in one group only"
            )
    return cells


def _label_columns(path: str, table: Table, lines: list[str], wanted, needed: bool, group: list[int]) -> list[int]:
    """Return the indices of the label columns, which are not the `group` column unless that is wanted. Raises UserError
    if they are not known; where labels are not `needed`, prints a note instead."""
    rows = _sample(LAYOUTS[table.layout], lines)
    if wanted:
        indices = [_column(name, table.header or rows[0]) for name in wanted]
        missing = [name for name, index in zip(wanted, indices) if index is None]
        if missing:
            raise UserError(f"--label_column {missing[0]} is no column of {path}, whose first line is {rows[0]}")
        if table.image in indices or len(set(indices)) < len(indices):
            raise UserError(f"--label_column {' '.join(wanted)} names the image column or a column twice")
        return [index for index in indices if index is not None]
    others = [index for index in range(table.width) if index not in (table.image, *group)]
    if len(others) <= 1:
        return others
    if not table.header:
        sort = "lines with several tabs" if table.layout == "tabs" else f"{table.width} columns"
        raise UserError(
            f"the list file {path} has {sort} and no header: choose columns by number, for example "
            f"--image_column {table.image + 1} --label_column {others[0] + 1}"
        )
    known = [index for index in others if is_label_name(table.header[index])]
    if len(known) == 1:
        return known
    ask = f"the list file {path} has the columns {_some(table.header, 30)}: choose the labels with --label_column"
    binary = [index for index in others if {row[index] for row in rows[1:] if index < len(row)} <= _BINARY]
    if len(binary) > 1:
        ask += f"; {_some((table.header[index] for index in binary), 30)} contain 0 and 1, and may be given together"
    if needed:
        raise UserError(ask)
    print(f"note: {ask}; here the images are read without labels")
    return []


_BINARY = {"0", "1", "0.0", "1.0"}


def _some(names: Iterable[str], count: int = 5) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _read_cells(path: str, table: Table, lines: list[str], indices: list[int]) -> list[list[str]]:
    """Return the cells of the columns `indices`, without the header. Raises UserError if rows differ in length."""
    columns: list[list[str]] = [[] for _ in indices]
    known: dict[str, str] = {}  # a label is stored once, not once for each image
    rows = LAYOUTS[table.layout](lines)
    try:
        if table.header:
            next(rows)
        for number, row in enumerate(rows, 1 + bool(table.header)):
            if len(row) != table.width:
                raise UserError(_uneven(path, table, number, len(row)))
            columns[0].append(row[indices[0]])
            for column, index in zip(columns[1:], indices[1:]):
                label = row[index].strip()
                column.append(known.setdefault(label, label))
    except csv.Error as error:
        raise UserError(f"the list file {path} cannot be read as cells separated by {table.layout}: {error}") from error
    return columns


def _uneven(path: str, table: Table, number: int, width: int) -> str:
    if table.layout == "tabs" and max(width, table.width) < 3:
        return f"the list file {path} mixes lines with and without a label"
    advice = "lines with several tabs" if table.layout == "tabs" else "put cells that contain a separator in quotes"
    return (
        f"the list file {path} has {table.width} cells in its first line and {width} in line {number}, separated by "
        f"{table.layout}: {advice}"
    )


def _refuse_quotes(path: str, root: Path, names: list[str], labels=()) -> None:
    """Raise UserError for quoted paths, and for labels that also occur without quotes: one class would become two."""
    for name in names:
        if name.strip() != name.strip().strip(_QUOTES) and not os.path.isfile(root / name):
            raise UserError(f"the list file {path} has quotes in {name}: write paths without quotes")
    labels = set(labels)
    quoted = next((label for label in sorted(labels) if label != label.strip(_QUOTES) in labels), None)
    if quoted is not None:
        raise UserError(f"the list file {path} has both labels {quoted} and {quoted.strip(_QUOTES)}: remove the quotes")


def _paths(path: str, table: Table, cells: list[str], outside: bool) -> list[str]:
    """Return the paths of the images. Raises UserError for one that is not below the root, unless `outside`."""
    root = table.names.root
    prefix, top = str(root / "x")[:-1], os.path.abspath(root)
    paths = []
    for cell in cells:
        name = table.names.name(cell)
        if not _NOT_BELOW.search(name):
            paths.append(prefix + name)  # as below, but ten times faster
            continue
        if not outside and not is_below(os.path.abspath(root / name), top):
            raise UserError(
                f"the list file {path} names {name}, which is not below --data_path {root}: give a folder that "
                f"contains all of them, or --allow_outside for a list that you trust"
            )
        paths.append(str(root / name))
    return paths


def _description(table: Table, listed: ImageList, group: list[int]) -> str:
    header = f"the header {_some(table.header, 10)}" if table.header else "no header"
    labels = f"labels from {_some(listed.columns, 30)}" if listed.columns else "no labels"
    labels += f", groups from {table.title(group[0])}" if group else ""
    repairs = {"exact": "", "slashes": "; backslashes are read as /", "subfolder": "; names are those in subfolders"}
    repair = repairs.get(table.names.repair, f"; endings such as {table.names.endings[0]} are appended to the names")
    return printable(
        f"{listed.source}: {len(listed.paths)} images, cells separated by {table.layout}, {header}; images from "
        f"{table.title(table.image)}, {labels}{repair}"
    )
