"""Division of one set of images into training and evaluation, image by image or group by group (all images of a patient
on the same side)."""

import hashlib
import math
import os
from array import array
from collections.abc import Hashable, Sequence
from itertools import pairwise

import numpy as np

from util.data.compact import PathList, Repeated
from util.errors import UserError
from util.notes import note_once

_ROUNDS = 20  # passes over the groups: the first one fills the held-out side, two or three more improve it


def choose_side(groups: Sequence[str], labels: Sequence, fraction: float, train: bool, column: str = "") -> np.ndarray:
    """Return the indices of the images for training or for evaluation, as `hold_out` divides them, and print how many
    they are. `column` is the value of `--group_column`, "" where each image is a group. Raises UserError if there are
    none."""
    held = hold_out(groups, labels, fraction)
    rows, part = np.flatnonzero(held != train), "training" if train else "evaluation"
    if not len(rows):
        what = f"images of two groups ({column}) or more" if column else "two images or more"
        raise UserError(f"--val_fraction {fraction:g} leaves no image for {part}: a class needs {what}")
    of = ""
    if column:
        of = f", those of {len({groups[row] for row in rows.tolist()})} of {len(set(groups))} groups ({column})"
        _note_missing(held, labels, column)
    print(f"--val_fraction {fraction:g}: {len(rows)} of {len(groups)} images are for {part}{of}")
    return rows


def _note_missing(held: np.ndarray, labels: Sequence, column: str) -> None:
    """Print a note for labels that one side lacks."""
    sets = ((label,) for label in labels) if isinstance(labels, Repeated) else labels
    sides: tuple[set, set] = set(), set()
    for own, is_held in zip(sets, held.tolist()):
        sides[is_held].update(own)
    for part, here, there in (("training", *sides), ("evaluation", *reversed(sides))):
        if there - here:
            note_once(
                f"no image of {min(there - here)!r} is for {part} ({len(there - here)} such labels): too few groups "
                f"({column}) have it"
            )


def hold_out(groups: Sequence[str], labels: Sequence, fraction: float, salt: str = "") -> np.ndarray:
    """Return which images are held out, (N,) bool: whole groups, so that about `fraction` of every label is held out.

    `groups[i]` is the group of image i, or its own name where each image is a group. `labels[i]` are its labels: one,
    several or none; of a `Repeated` it is the label. The result depends on these, on `fraction` and on `salt` alone,
    not on the order of the images, the platform or the version of a library. A label of several groups is on both sides
    if the sizes of its groups allow it; a label of one group stays in training.

    Groups are visited in a random but fixed order. One changes sides if that lowers the sum over the labels of the
    squared differences between the images held out and those wanted, each relative to the images of the label. All
    begin in training. With one image in each group, the first images of each label are held out.
    """
    if not len(groups):
        return np.zeros(0, bool)
    image, label = _label_codes(labels)
    group = _in_random_order(groups, salt)
    # One row for each group and label that occur together, in the order in which the groups are visited.
    labels_in_all = int(label.max()) + 1
    rows, counts = np.unique(group[image] * labels_in_all + label, return_counts=True)
    own_group, own_label = np.divmod(rows, labels_in_all)
    held = np.zeros(int(group.max()) + 1, bool)
    wanted = _wanted(np.bincount(label), np.bincount(own_label), fraction)
    entangled = np.zeros(labels_in_all, bool)
    entangled[own_label[(counts > 1) | (np.bincount(own_group)[own_group] > 1)]] = True
    alone = ~entangled[own_label]
    held[_first_of_each(own_group[alone], own_label[alone], wanted)] = True
    others = np.flatnonzero(~alone)
    _balance(held, own_group[others], own_label[others], counts[others], np.bincount(label), wanted)
    return held[group]


def _label_codes(labels: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Return one row (image, number of the label) for each label of each image. Images without labels count as a label
    of their own."""
    if isinstance(labels, Repeated):
        return np.arange(len(labels)), labels.codes.astype(np.int64)
    known: dict[Hashable, int] = {}
    images, codes = array("q"), array("q")
    for image, own in enumerate(labels):
        for label in set(own) or (None,):
            images.append(image)
            codes.append(known.setdefault(label, len(known)))
    return np.asarray(images), np.asarray(codes)


def _in_random_order(groups: Sequence[str], salt: str) -> np.ndarray:
    """Return the place of each image's group (N,) in the order in which the groups are visited: that of the hashes of
    their names."""
    if isinstance(groups, Repeated):
        return _in_random_order(groups.distinct, salt)[groups.codes]
    start = os.fsencode(salt)
    names = groups.encoded() if isinstance(groups, PathList) else map(os.fsencode, groups)
    digests = bytearray()
    for name in names:
        digests += hashlib.sha256(start + name).digest()
    keys = np.frombuffer(digests, ">u8").astype(np.uint64).reshape(-1, 4).T
    order = np.argsort(keys[0], kind="stable")
    if (keys[0][order[1:]] == keys[0][order[:-1]]).any():  # the same name, or once in 2**64 pairs another one
        order = np.lexsort(keys[::-1])
    is_new = (keys[:, order[1:]] != keys[:, order[:-1]]).any(axis=0)
    place = np.empty(len(order), np.int64)
    place[order] = np.concatenate([[0], np.cumsum(is_new)])
    return place


def _wanted(size: np.ndarray, spread: np.ndarray, fraction: float) -> np.ndarray:
    """Return how many images of each label are to be held out: at least one and not all, but none of a label that only
    one group has. `size` is the number of images of each label, `spread` that of its groups."""
    return np.array(
        [
            min(max(1, round(fraction * count)), count - 1) if groups > 1 else 0
            for count, groups in zip(size.tolist(), spread.tolist())
        ]
    )


def _first_of_each(group: np.ndarray, label: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the groups that are held out where each has one image: for each label as many as are wanted, in the order
    of the rows. It is what `_balance` arrives at."""
    by_label = np.argsort(label, kind="stable")
    number, first = label[by_label], np.searchsorted(label[by_label], np.arange(len(wanted)))
    return group[by_label[np.arange(len(by_label)) - first[number] < wanted[number]]]


def _balance(held: np.ndarray, group, label, counts, size: np.ndarray, wanted: np.ndarray) -> None:
    """Let groups change sides until none does any more, and mark those that are `held`. Row i says that `group[i]` has
    `counts[i]` images of `label[i]`; rows of a group follow each other."""
    if not len(group):
        return
    edges = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]])).tolist() + [len(group)]
    rows, names = list(zip(label.tolist(), counts.tolist())), group[edges[:-1]].tolist()
    own = [rows[start:stop] for start, stop in pairwise(edges)]
    sizes, excess, inside = size.tolist(), (-wanted).tolist(), [False] * len(own)
    for _ in range(_ROUNDS):
        moves = 0
        for i, content in enumerate(own):
            sign = -1 if inside[i] else 1
            if _lowers(content, sign, excess, sizes):
                inside[i], moves = not inside[i], moves + 1
                for code, count in content:
                    excess[code] += sign * count
        if not moves:
            break
    held[[name for name, is_inside in zip(names, inside) if is_inside]] = True


def _lowers(content: list[tuple[int, int]], sign: int, excess: list[int], sizes: list[int]) -> bool:
    """Whether it is better that a group with this `content` (label, images) is held out (`sign` 1), or is not (-1).
    `excess` is how many images of each label are held out beyond those wanted."""
    if len(content) == 1:
        ((label, count),) = content
        return 2 * sign * excess[label] + count < 0
    # (excess + change)² - excess², summed exactly: the order of the labels must not matter.
    terms = [count * (2 * sign * excess[label] + count) / sizes[label] ** 2 for label, count in content]
    return math.fsum(terms) < 0
