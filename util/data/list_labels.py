"""The labels of a list file: one class, a set of labels, or numbers per image, from one column or from several."""

import math
import re
from collections import Counter

from util.data.file_lists import sorted_labels
from util.data.list_files import ImageList
from util.errors import UserError

SEPARATORS = "|;,"  # between the labels of a set, where other tools write several into one cell
# "n01751748 111 108 431 370 n01751748 ..." in ImageNet's LOC_val_solution.csv: one class, and its boxes.
_BOXES = re.compile(r"([a-z]\w*)( \d+){4}( \1( \d+){4})*")
_ON, _OFF = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}
_UNKNOWN = {"", "-1", "-1.0", "nan"}  # not annotated, or uncertain as in CheXpert


# One class ------------------------------------------------------------------------------------------------------------


def class_labels(listed: ImageList, check_sets: bool = True) -> tuple[list[str] | None, list[str]]:
    """Return the class of each image (None without labels), and all classes in order. Several columns are one-hot: the
    classes are their names, in the order in which they were given.

    Raises UserError for images without a label, for numbers that are no classes, and, with `check_sets`, if most
    classes are combinations of others.
    """
    if len(listed.columns) > 1:
        return _one_hot_classes(listed), listed.columns
    labels = ["" if cell.lower() == "nan" else cell for cell in listed.cells[0]] if listed.columns else []
    counts = Counter(labels)
    if not labels or counts.keys() == {""}:
        return None, []
    if counts[""]:
        raise UserError(
            f"the list file {listed.source} has no label for {counts['']} of {len(labels)} images, among them "
            f"{listed.paths[labels.index('')]}: remove these lines; images that have no label, or several, need "
            f"main_finetune.py --targets multilabel"
        )
    if all(map(_BOXES.fullmatch, counts)):
        print(f"note: {listed.source} has boxes behind its labels, such as {labels[0]!r}: they are not read")
        labels = [label.split()[0] for label in labels]
        counts = Counter(labels)
    _refuse_numbers(listed.source, counts)
    if check_sets:
        _check_sets(listed.source, counts)
    if 20 <= len(labels) < 2 * len(counts):
        print(f"note: {listed.source} has {len(counts)} different labels for {len(labels)} images: are they classes?")
    return labels, sorted_labels(counts)


def _one_hot_classes(listed: ImageList) -> list[str]:
    sets = _chosen_columns(listed)
    wrong = [row for row, names in enumerate(sets) if len(names) != 1]
    if wrong:
        raise UserError(
            f"the list file {listed.source} has a 1 in {len(sets[wrong[0]])} of its label columns for "
            f"{listed.paths[wrong[0]]} ({len(wrong)} such rows): one 1 per row is needed; sets of labels need "
            f"main_finetune.py --targets multilabel"
        )
    return [name for names in sets for name in names]


def _refuse_numbers(source: str, counts: Counter) -> None:
    """Raise UserError if the labels are measurements."""
    if _are_measurements(counts):
        raise UserError(
            f"the list file {source} has {len(counts)} different numbers as labels, such as {next(iter(counts))}: "
            f"main_finetune.py --targets regression predicts numbers; these would be {len(counts)} classes"
        )


def _are_measurements(counts: Counter) -> bool:
    """Whether labels are many different numbers, most of them with a fraction."""
    numbers = [value for value in map(_number, counts) if value is not None]
    fractions = sum(value != int(value) for value in numbers)
    many = len(counts) > min(20, max(4, counts.total() // 2))
    return many and len(numbers) >= 0.95 * len(counts) and fractions > 0.5 * len(numbers)


def _number(text: str) -> float | None:
    """Return the finite number in `text`, None for anything else."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _check_sets(source: str, counts: Counter) -> None:
    """Refuse labels of which most are combinations of other labels, as in "a|b"; note that some are."""
    for separator in SEPARATORS:
        parts = {label: [part.strip() for part in label.split(separator)] for label in counts}
        seen_in = Counter(part for names in parts.values() for part in set(names))
        sets = [label for label, names in parts.items() if len(names) > 1 and min(seen_in[name] for name in names) > 1]
        if not sets:
            continue
        images = sum(counts[label] for label in sets)
        advice = (
            f"the list file {source} has combinations of other labels as labels, such as {sets[0]!r} ({len(sets)} of "
            f"{len(counts)} labels, {images} images): --targets multilabel --label_sep '{separator}' reads sets of "
            f"labels"
        )
        if 2 * len(sets) > len(counts):
            raise UserError(f"{advice}; --label_sep '' makes each combination a class of its own")
        print(f"note: {advice}; here each is a class of its own")
        return


# Strata ---------------------------------------------------------------------------------------------------------------


def strata(listed: ImageList) -> list[list[str]]:
    """Return the labels of each image whose shares a division of the list keeps: the parts of its cell, or the columns
    with a 1; none for measurements. They depend on the cells alone, not on the command or on how it reads labels, so
    that pretraining and fine-tuning divide a list in the same way."""
    if len(listed.columns) != 1:
        rows = zip(*listed.cells) if listed.columns else ((),) * len(listed.paths)
        return [[name for name, cell in zip(listed.columns, cells) if cell.lower() in _ON] for cells in rows]
    if _are_measurements(Counter(listed.cells[0])):
        return [[]] * len(listed.paths)
    separator = re.compile(f"[{re.escape(SEPARATORS)}]")
    parts = {cell: [part.strip() for part in separator.split(cell) if part.strip()] for cell in set(listed.cells[0])}
    return [parts[cell] for cell in listed.cells[0]]


# Sets of labels -------------------------------------------------------------------------------------------------------


def label_sets(listed: ImageList, separator: str = ",", no_finding: str = "") -> list[set[str]]:
    """Return the labels of each image, which may be none: the cell divided at `separator` (not if that is empty), or
    the names of the columns with a 1. The label `no_finding` stands for no label."""
    if len(listed.columns) > 1:
        sets = [set(names) for names in _chosen_columns(listed)]
    else:
        divided = {cell: cell.split(separator) if separator else [cell] for cell in set(listed.cells[0])}
        sets = [{label.strip() for label in divided[cell]} - {""} for cell in listed.cells[0]]
    return [names - {no_finding} for names in sets]


def _chosen_columns(listed: ImageList) -> list[list[str]]:
    """Return, for each image, the names of the label columns with a 1. Cells that are empty or -1 (uncertain) count as
    0, and are counted. Raises UserError for other cells."""
    unknown, sets = 0, [[] for _ in listed.paths]
    for name, cells in zip(listed.columns, listed.cells):
        for row, cell in enumerate(cells):
            value = cell.lower()
            if value in _ON:
                sets[row].append(name)
            elif value in _UNKNOWN:
                unknown += 1
            elif value not in _OFF:
                raise UserError(
                    f"the list file {listed.source} has {cell!r} in the column {name} for {listed.paths[row]}: several "
                    f"--label_column must contain 0 and 1"
                )
    if unknown:
        print(f"note: {unknown} cells of the label columns of {listed.source} are empty or -1: they count as 0")
    return sets


# Numbers --------------------------------------------------------------------------------------------------------------


def numbers(listed: ImageList) -> tuple[list[int], list[tuple[float, ...]]]:
    """Return the rows that have a number in every label column, and their numbers; the others are counted in a note.
    Raises UserError for text, and if there are no numbers."""
    if not listed.columns:
        raise UserError(f"the list file {listed.source} has no labels; --targets regression needs path<TAB>number")
    rows, values, missing = [], [], 0
    for row, cells in enumerate(zip(*listed.cells)):
        parsed = [_number(cell) for cell in cells]
        if None not in parsed:
            rows.append(row)
            values.append(tuple(parsed))
            continue
        text = next(cell for cell, value in zip(cells, parsed) if value is None)
        if text.lower().strip("+-") not in {"", "nan", "na", "n/a", "none", "null", "inf", "infinity"}:
            raise UserError(f"the list file {listed.source} has {text!r} for {listed.paths[row]}, which is no number")
        missing += 1
    if not rows:
        raise UserError(f"the list file {listed.source} has no numbers as labels")
    if missing:
        print(f"note: {missing} of {len(listed.paths)} images of {listed.source} have no number and are left out")
    return rows, values
