"""Long lists in few bytes.

A list of millions of Python strings or integers takes several times the size of its content, and forked data workers
copy it page by page, because every access changes a reference count. The buffers here are shared by all workers.
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, ClassVar, SupportsIndex, overload

import numpy as np

_CHUNK = 1 << 12  # paths that are encoded at once
_AT_ONCE = 1 << 16  # paths that are copied at once by `take`


class PathList(Sequence):
    """An immutable list of paths: a prefix that all of them begin with, the bytes of the rest in one buffer, and where
    each begins. Names that are not UTF-8 keep their bytes, as Python's file functions represent them (surrogateescape).
    """

    def __init__(self, paths: Iterable[str]):
        data, lengths = bytearray(), []
        self._prefix = ""
        self._unencodable: dict[int, str] = {}  # by index; no file system has such names, but a list may
        paths, count = iter(paths), 0
        while chunk := list(islice(paths, _CHUNK)):
            encoded = [self._encoded(path, index) for index, path in enumerate(chunk, count)]
            data += b"".join(encoded)
            lengths.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            count += len(chunk)
        self._data = np.frombuffer(data, np.uint8)
        self._offsets = _offsets(np.concatenate(lengths) if count else np.zeros(0, np.int64))

    @classmethod
    def of_bytes(cls, data: np.ndarray, lengths: np.ndarray, prefix: str = "") -> "PathList":
        """Return the list of paths with the bytes `data` (uint8), one after the other, each behind the prefix; path i
        has `lengths[i]` of these bytes."""
        made = cls(())
        made._data, made._offsets, made._prefix = data, _offsets(lengths), prefix
        return made

    def _encoded(self, path: str, index: int) -> bytes:
        try:
            return path.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            self._unencodable[index] = path
            return b""

    def __len__(self) -> int:
        return len(self._offsets) - 1

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # also of numpy's integers, and from the end
        if index in self._unencodable:
            return self._unencodable[index]
        start, stop = self._offsets[index : index + 2].tolist()
        return self._prefix + str(self._data[start:stop], "utf-8", "surrogateescape")

    def encoded(self) -> Iterator[bytes]:
        """Yield the bytes of all paths, several times as fast as the paths. Raises UnicodeEncodeError for a path that
        has none."""
        prefix = self._prefix.encode("utf-8", "surrogateescape")
        for path in self._unencodable.values():
            path.encode("utf-8", "surrogateescape")
        for first in range(0, len(self), _AT_ONCE):
            offsets = self._offsets[first : first + _AT_ONCE + 1]
            data, ends = self._data[offsets[0] : offsets[-1]].tobytes(), (offsets - offsets[0]).tolist()
            yield from (prefix + data[start:stop] for start, stop in pairwise(ends))

    def below(self, folder: str) -> "PathList":
        """Return the paths relative to `folder`; those that are not below it by os.path.relpath."""
        start = os.path.join(folder, "")
        if self._prefix.startswith(start) and not self._unencodable:
            return PathList.of_bytes(self._data, np.diff(self._offsets), self._prefix[len(start) :])
        return PathList(os.path.relpath(path, folder) for path in self)

    def ending_in(self, endings: Sequence[str]) -> np.ndarray:
        """Return which paths end in one of `endings`, which are in lower case and ASCII, in any case: (N,) bool."""
        found, lengths = np.zeros(len(self), bool), np.diff(self._offsets)
        for ending in endings:
            rows = np.flatnonzero(lengths >= len(ending))
            for back, letter in enumerate(reversed(ending), 1):
                values = self._data[self._offsets[rows + 1] - back]
                rows = rows[(values == ord(letter)) | (values == ord(letter.upper()))]
            found[rows] = True
        return found

    def take(self, rows: Sequence[int] | np.ndarray) -> "PathList":
        """Return the paths at the indices `rows`, without making strings."""
        indices = np.asarray(rows, np.int64)
        starts, lengths = self._offsets[indices], np.diff(self._offsets)[indices]
        data, at = np.empty(int(lengths.sum()), np.uint8), 0
        for first in range(0, len(indices), _AT_ONCE):
            some = lengths[first : first + _AT_ONCE]
            total, begins = int(some.sum()), np.cumsum(some) - some
            source = np.arange(total) + np.repeat(starts[first : first + _AT_ONCE] - begins, some)
            data[at : at + total] = self._data[source]
            at += total
        taken = PathList.of_bytes(data, lengths, self._prefix)
        if self._unencodable:
            taken._unencodable = {i: self._unencodable[row] for i, row in enumerate(indices.tolist()) if
                                  row in self._unencodable}  # fmt: skip
        return taken


def _offsets(lengths: np.ndarray) -> np.ndarray:
    """Return where each of several parts of these lengths begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


class Repeated(Sequence):
    """An immutable list of texts of which many are the same, such as the patients of images: each text once, and 4
    bytes for each place. Equal to a list of the same texts."""

    def __init__(self, texts: Iterable[str]):
        known: dict[str, int] = {}
        codes = array("i", (known.setdefault(text, len(known)) for text in texts))
        self.codes = np.frombuffer(codes, np.int32) if codes else np.zeros(0, np.int32)
        self.distinct = PathList(known)

    @classmethod
    def of_codes(cls, codes: Sequence[int] | np.ndarray, distinct: Sequence[str]) -> "Repeated":
        """Return the list of the texts `distinct[code]`."""
        made = cls(())
        made.codes, made.distinct = np.asarray(codes, np.int32), PathList(distinct)
        return made

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.distinct[code] for code in self.codes[index].tolist()]
        return self.distinct[self.codes[index]]

    def __iter__(self) -> Iterator[str]:
        texts = list(self.distinct)
        return (texts[code] for code in self.codes.tolist())

    def take(self, rows: Sequence[int] | np.ndarray) -> "Repeated":
        """Return the texts at the indices `rows`."""
        taken = Repeated(())
        taken.codes, taken.distinct = self.codes[np.asarray(rows, np.int64)], self.distinct
        return taken

    def __eq__(self, other):
        return list(self) == list(other) if isinstance(other, (list, Repeated)) else NotImplemented

    __hash__: ClassVar[None] = None


class IntList(array):
    """64-bit integers in one buffer, equal to a list of the same integers."""

    def __eq__(self, other):
        if isinstance(other, list):
            return self.tolist() == other
        return super().__eq__(other)

    __hash__: ClassVar[None] = None

    def take(self, rows: Sequence[int] | np.ndarray) -> Sequence[int]:
        """Return the integers at the indices `rows`."""
        return compact(np.asarray(self)[np.asarray(rows, np.int64)])


def compact(values: Iterable) -> Any:
    """Return integers as an `IntList`, and anything else as a list."""
    if isinstance(values, np.ndarray) and values.dtype.kind in "iu":
        made = IntList("q")
        made.frombytes(np.ascontiguousarray(values, np.int64).data.cast("B") if len(values) else b"")
        return made
    values = values if isinstance(values, (list, range, array)) else list(values)
    try:
        return IntList("q", values)
    except (TypeError, OverflowError):
        return list(values)


def take(values: Any, rows: Sequence[int] | np.ndarray) -> Any:
    """Return the elements of a list at the indices `rows`: of a compact list a compact one, of another one a list."""
    return values.take(rows) if hasattr(values, "take") else [values[row] for row in rows]
