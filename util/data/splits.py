"""Division of one set of images into training and evaluation, image by image or group by group (all images of a patient
on the same side)."""

import hashlib
import math
import os
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from util.errors import UserError
from util.notes import note_once

_ROUNDS = 20  # passes over the groups: the first one fills the held-out side, two or three more improve it


def choose_side(
    groups: Sequence[str], labels: Sequence[Iterable[str]], fraction: float, train: bool, column: str = ""
) -> list[int]:
    """Return the indices of the images for training or for evaluation, as `hold_out` divides them, and print how many
    they are. `column` is the value of `--group_column`, "" where each image is a group. Raises UserError if there are
    none."""
    held = hold_out(groups, labels, fraction)
    rows, part = np.flatnonzero(held != train).tolist(), "training" if train else "evaluation"
    if not rows:
        what = f"images of two groups ({column}) or more" if column else "two images or more"
        raise UserError(f"--val_fraction {fraction:g} leaves no image for {part}: a class needs {what}")
    of = ""
    if column:
        of = f", those of {len({groups[row] for row in rows})} of {len(set(groups))} groups ({column})"
        _note_missing(held, labels, column)
    print(f"--val_fraction {fraction:g}: {len(rows)} of {len(groups)} images are for {part}{of}")
    return rows


def _note_missing(held: np.ndarray, labels: Sequence[Iterable[str]], column: str) -> None:
    """Print a note for labels that one side lacks."""
    sides = [{label for own, is_held in zip(labels, held) if is_held == side for label in own} for side in (0, 1)]
    for part, here, there in (("training", *sides), ("evaluation", *reversed(sides))):
        if there - here:
            note_once(
                f"no image of {min(there - here)!r} is for {part} ({len(there - here)} such labels): too few groups "
                f"({column}) have it"
            )


def hold_out(
    groups: Sequence[str], labels: Sequence[Iterable[Hashable]], fraction: float, salt: str = ""
) -> np.ndarray:
    """Return which images are held out, (N,) bool: whole groups, so that about `fraction` of every label is held out.

    `groups[i]` is the group of image i, or its own name where each image is a group. `labels[i]` are its labels: one,
    several or none. The result depends on these, on `fraction` and on `salt` alone, not on the order of the images, the
    platform or the version of a library. A label of several groups is on both sides if the sizes of its groups allow
    it; a label of one group stays in training.

    Groups are visited in a random but fixed order. One changes sides if that lowers the sum over the labels of the
    squared differences between the images held out and those wanted, each relative to the images of the label. All
    begin in training. With one image in each group, the first images of each label are held out.
    """
    content = _contents(groups, labels)
    size, wanted = _targets(content, fraction)
    excess, held = {label: -count for label, count in wanted.items()}, set()
    order = sorted(content, key=lambda group: hashlib.sha256(os.fsencode(salt + group)).digest())
    for _ in range(_ROUNDS):
        moves = sum(_move(group, content[group], excess, size, held) for group in order)
        if not moves:
            break
    return np.fromiter((group in held for group in groups), dtype=bool, count=len(groups))


def _move(group: str, own: dict, excess: dict, size: dict, held: set[str]) -> bool:
    """Let a group with `own` images of each label change sides if that is better; return whether it did. `excess` is
    how many images of each label are held out beyond those wanted."""
    sign = -1 if group in held else 1
    # (excess + change)² - excess², summed exactly: the order of the labels must not matter.
    terms = [count * (2 * sign * excess[label] + count) / size[label] ** 2 for label, count in own.items()]
    if math.fsum(terms) >= 0:
        return False
    for label, count in own.items():
        excess[label] += sign * count
    held.symmetric_difference_update((group,))
    return True


def _contents(groups: Sequence[str], labels: Sequence[Iterable[Hashable]]) -> dict[str, dict[Hashable, int]]:
    """Return the number of images of each label in each group. Images without labels count as a label of their own."""
    content: dict[str, dict] = {}
    for group, own in zip(groups, labels):
        counts = content.setdefault(group, {})
        for label in set(own) or (None,):
            counts[label] = counts.get(label, 0) + 1
    return content


def _targets(content: dict[str, dict], fraction: float) -> tuple[Counter, dict[Hashable, int]]:
    """Return the number of images of each label, and how many of them are to be held out: at least one and not all,
    but none of a label that only one group has."""
    size, spread = Counter(), Counter()
    for counts in content.values():
        for label, count in counts.items():
            size[label] += count
            spread[label] += 1
    wanted = {
        label: min(max(1, round(fraction * count)), count - 1) if spread[label] > 1 else 0
        for label, count in size.items()
    }
    return size, wanted
