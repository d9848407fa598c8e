"""The blocks of text at the start and at the end of a run: titles in one column, and beside them lines that fit 80
columns."""

from collections.abc import Iterable

from util.report.log import COLUMNS

TITLES = 15  # width of the column of titles
Row = tuple[str, list[str]]  # title, lines


def row(title: str, *values: str | None) -> Row:
    """Return a row with `values` separated by commas, in as many lines as needed. No value is broken, and values that
    are None or empty are left out."""
    lines: list[str] = []
    for value in filter(None, values):
        longer = f"{lines[-1]}, {value}" if lines else value
        if lines and len(longer) < COLUMNS - TITLES:
            lines[-1] = longer
            continue
        if lines:
            lines[-1] += ","
        lines.append(value)
    return title, lines


def block(rows: Iterable[Row]) -> str:
    """Return `rows` as text. Rows without lines are left out; a title longer than its column is followed by a space."""
    texts = []
    for title, lines in rows:
        for number, line in enumerate(lines):
            texts.append(f"{'' if number else title:<{TITLES - 1}} {line}")
    return "\n".join(texts)


def counted(number: float, noun: str) -> str:
    """Return "1 image", "1,437 images", "0.348 epochs"."""
    number = int(number) if number == int(number) else round(number, 3)
    return f"{number:,} {noun}" + "s" * (number != 1)
