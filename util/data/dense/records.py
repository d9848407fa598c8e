"""What annotation files say about the objects of images: one record per image, checked while it is read."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from util.data.compact import PathList
from util.data.images import printable
from util.errors import UserError


class Records(Sequence):
    """An immutable list of values that JSON can hold, as text in one buffer: millions of Python objects would take
    gigabytes, and forked data workers would copy them page by page."""

    def __init__(self, values: Iterable):
        self._texts = PathList(json.dumps(value, separators=(",", ":")) for value in values)

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index):
        return json.loads(self._texts[index])

    def texts(self) -> Sequence[str]:
        """Return the values as JSON."""
        return self._texts


@dataclass
class Split:
    """One split of a data set of objects: the path and the record (`util.data.dense.annotated.Detected.record`) of each
    image, and the categories with their numbers in the annotation file."""

    paths: list[str]
    records: list[dict]
    categories: list[str]
    category_ids: list[int]
    source: str  # the annotation file or folder, for messages


@dataclass
class Dropped:
    """Objects that training leaves out because nothing can be learned from them: how many, and the first of each
    kind."""

    counts: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        self.first.setdefault(reason, name)

    def report(self, total: int, limit: float, source: str) -> None:
        """Print what was left out of `total` objects. Raises UserError if it is a larger share than `limit`."""
        for reason, count in self.counts.items():
            print(f"note: {count} of {total} objects of {source} are left out: {reason} ({self.first[reason]})")
        dropped = self.counts.total()
        if dropped > limit * total:
            reason = self.counts.most_common(1)[0][0]
            raise UserError(
                f"{source}: {dropped} of {total} objects cannot be used, a larger share than --max_bad_fraction "
                f"{limit:g}; most have {reason}, the first in {self.first[reason]}"
            )


def fault_of(box: Sequence[float], width: float, height: float) -> str:
    """Return what is wrong with a box (left, top, right, bottom) in an image of this size, "" if it can be used. An
    image whose size is not known has the size 0."""
    left, top, right, bottom = box
    if right <= left or bottom <= top:
        return "boxes without an area, or whose corners are exchanged"
    if width and height:
        left, top, right, bottom = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            return "boxes outside the image"
    return "boxes below 1 pixel" if right - left < 1 or bottom - top < 1 else ""


def usable(split: Split, masks: bool, limit: float) -> Split:
    """Return the part of a split that training uses: without groups (`crowd`), without objects of which nothing can be
    learned, and without images that have no other. Raises UserError if that leaves nothing, or if more than the share
    `limit` of the objects cannot be used."""
    dropped, total, paths, records, crowds, empty = Dropped(), 0, [], [], 0, 0
    for path, record in zip(split.paths, split.records):
        kept = []
        for each in record["objects"]:
            crowds += each["crowd"]
            if each["crowd"]:
                continue
            total += 1
            fault = fault_of(each["box"], record["width"], record["height"])
            if not fault and masks and not _has_area(each["segmentation"]):
                fault = "masks of fewer than three points"
            if fault:
                dropped.add(fault, f"object {each['name']} of {printable(path)}")
            else:
                kept.append(each)
        if kept:
            paths.append(path)
            records.append({**record, "objects": kept})
        else:
            empty += 1
    dropped.report(total, limit, split.source)
    if not records:
        raise UserError(f"{split.source} has no object that can be used for training")
    notes = [f"{crowds} groups (crowd)"] * bool(crowds) + [f"{empty} images without objects"] * bool(empty)
    if notes:
        print(f"note: training leaves out {' and '.join(notes)} of {split.source}")
    present = {each["label"] for record in records for each in record["objects"]}
    absent = [name for label, name in enumerate(split.categories, 1) if label not in present]
    if absent:
        print(f"note: {len(absent)} classes have no object in {split.source}, among them {printable(absent[0])!r}")
    return Split(paths, records, split.categories, split.category_ids, split.source)


def _has_area(segmentation) -> bool:
    """Whether a segmentation is a run-length code, or has a polygon of three points."""
    return isinstance(segmentation, dict) or any(len(polygon) >= 6 for polygon in segmentation or [])


def finite(values: Iterable) -> bool:
    """Whether all values are finite numbers."""
    return all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in values)
