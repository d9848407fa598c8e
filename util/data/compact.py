"""Long lists in few bytes.

A list of millions of Python strings or integers takes several times the size of its content, and forked data workers
copy it page by page, because every access changes a reference count.
"""

from array import array
from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np

_CHUNK = 1 << 12  # paths that are encoded at once


class PathList(Sequence):
    """An immutable list of paths: their bytes in one buffer, and where each begins. Names that are not UTF-8 keep their
    bytes, as Python's file functions represent them (surrogateescape)."""

    def __init__(self, paths: Iterable[str]):
        self._data, lengths = bytearray(), []
        self._unencodable: dict[int, str] = {}  # by index; no file system has such names, but a list may
        paths, count = iter(paths), 0
        while chunk := list(islice(paths, _CHUNK)):
            encoded = [self._encoded(path, index) for index, path in enumerate(chunk, count)]
            self._data += b"".join(encoded)
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            count += len(chunk)
        self._offsets = np.zeros(count + 1, np.int64)
        if count:
            np.cumsum(np.concatenate(lengths), out=self._offsets[1:])

    def _encoded(self, path: str, index: int) -> bytes:
        try:
            return path.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            self._unencodable[index] = path
            return b""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # also of numpy's integers, and from the end
        if index in self._unencodable:
            return self._unencodable[index]
        start, stop = self._offsets[index : index + 2].tolist()
        return self._data[start:stop].decode("utf-8", "surrogateescape")


class IntList(array):
    """64-bit integers in one buffer, equal to a list of the same integers."""

    def __eq__(self, other):
        if isinstance(other, list):
            return self.tolist() == other
        return super().__eq__(other)

    __hash__ = None


def compact(values: Iterable) -> Sequence:
    """Return integers as an `IntList`, and anything else as a list."""
    values = values if isinstance(values, (list, range, array)) else list(values)
    try:
        return IntList("q", values)
    except (TypeError, OverflowError):
        return list(values)
