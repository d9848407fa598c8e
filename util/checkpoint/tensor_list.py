"""Safe reading of `--fsdp` checkpoint folders: the list of tensors (`.metadata`, a pickle), and the tensors.

A pickle can call any function it names and set any attribute of the objects it creates. Checks on torch's own objects
would come too late: bytes can pass for a tensor until torch's planner unpickles them, and a class can be changed for
the rest of the process. So here the pickle only fills plain records (`_Record`), and torch's descriptions are made
anew from checked values.

Torch can also write such folders as safetensors (`HuggingFaceStorageWriter`), without a pickle. But folders in today's
format must stay readable, so a hostile folder would remain as dangerous.
"""

import math
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from util.errors import UserError

FILE = re.compile(r"__[0-9]+_[0-9]+\.distcp")  # torch's names for the files of tensors: __RANK_NUMBER.distcp
_MAX_DIMENSIONS = 64  # the limit of torch's own kernels


class Reader(FileSystemReader):
    """Torch's reader of a folder, with a checked list of tensors."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        """Return the list of tensors. Raises UserError when it cannot be read, or lists anything but complete tensors
        in files of this folder."""
        path = Path(self.path) / ".metadata"
        try:
            with open(path, "rb") as file:
                return _metadata(_Unpickler(file).load())
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        except _RefusedError as error:
            raise UserError(f"{path} is refused: {error}") from error
        except Exception as error:  # a damaged pickle can raise any error
            raise UserError(f"{path} is damaged ({type(error).__name__}): use an older checkpoint") from error


class TensorPlanner(DefaultLoadPlanner):
    """Torch's planner without `torch.load(..., weights_only=False)`, by which it reads everything but tensors."""

    def load_bytes(self, read_item, value) -> None:
        raise _RefusedError(f"{read_item.dest_index.fqn} is not a tensor")


def read_tensors(tensors: dict[str, torch.Tensor], reader: Reader, no_dist: bool = False) -> None:
    """Fill `tensors` in place; all processes must call it, unless `no_dist`. Raises UserError when reading fails."""
    try:
        dcp.load(tensors, storage_reader=reader, planner=TensorPlanner(), no_dist=no_dist)
    except CheckpointException as error:  # raised on all ranks
        causes = [cause for cause, _ in error.failures.values()]  # by rank
        if not all(isinstance(cause, Exception) for cause in causes):  # an interrupt
            raise
        raise UserError(f"{reader.path} cannot be read: {_reason(causes[0])}") from error


def _reason(cause: BaseException) -> str:
    if isinstance(cause, (OSError, RuntimeError, MemoryError, _RefusedError)):
        return shorten(str(cause), 200) or type(cause).__name__
    return f"its files do not contain the listed tensors ({type(cause).__name__})"


# The pickle ---------------------------------------------------------------------------------------------------------


class _RefusedError(pickle.UnpicklingError):
    """The list describes something other than complete tensors in files of the folder."""


class _Record:
    """The arguments and state of an object or a call in the pickle; nothing is called or set."""

    args: tuple
    state: Any = None

    def __new__(cls, *args):
        record = super().__new__(cls)
        record.args = args
        return record

    def __setstate__(self, state):
        self.state = state


_DESCRIPTIONS = "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata MetadataIndex StorageMeta"
_NAMES = [("torch.distributed.checkpoint.metadata", name) for name in _DESCRIPTIONS.split()]
_NAMES += [("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"), ("torch.serialization", "_get_layout")]
_NAMES += [("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch", "Size")]
# The path of the folder. Python 3.13 pickles paths under another module than earlier and later versions.
_NAMES += [(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")]
_RECORDS = {(module, name): type(name, (_Record,), {}) for module, name in _NAMES}
_DTYPES = {"float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if (module, name) in _RECORDS:
            return _RECORDS[module, name]
        raise _RefusedError(f"its pickle refers to {shorten(ascii(f'{module}.{name}'), 100)}, which may run code")


# Torch's descriptions -----------------------------------------------------------------------------------------------


def _metadata(record) -> Metadata:
    listed, stored = _fields(record, "Metadata", "state_dict_metadata", "storage_data")
    _check(type(listed) is dict and type(stored) is dict, "it does not list tensors")
    storage = dict(_storage_entry(index, info) for index, info in stored.items())
    _check_disjoint(storage.values())
    unused = dict(storage)
    tensors = {name: _tensor(name, entry, unused) for name, entry in listed.items()}
    return Metadata(tensors, storage_data=storage)


def _storage_entry(index, info) -> tuple[MetadataIndex, _StorageInfo]:
    """Return the index of a chunk (tensor and offset), and the position of its bytes in a file."""
    name, offsets = _fields(index, "MetadataIndex", "fqn", "offset")
    file, start, length, transforms = _fields(
        info, "_StorageInfo", "relative_path", "offset", "length", "transform_descriptors"
    )
    _check(_is_name(name), "a tensor in it has no name")
    _check(type(file) is str and FILE.fullmatch(file), "it names a file that --fsdp does not write")
    _check(_is_count(start) and _is_count(length), "the position of a tensor in its file is wrong")
    _check(transforms is None, "a tensor in it is compressed, which --fsdp does not do")
    return MetadataIndex(name, _size(offsets)), _StorageInfo(file, start, length)


def _check_disjoint(entries: Iterable[_StorageInfo]) -> None:
    """Check that no bytes serve two tensors: together these then need no more memory than the files have bytes."""
    ends: dict[str, int] = {}
    for entry in sorted(entries, key=lambda entry: (entry.relative_path, entry.offset)):
        _check(entry.offset >= ends.get(entry.relative_path, 0), "two tensors in it overlap in their file")
        ends[entry.relative_path] = entry.offset + entry.length


def _tensor(name, record, unused: dict[MetadataIndex, _StorageInfo]) -> TensorStorageMetadata:
    """Return the description of one tensor, and remove the entries of its chunks from `unused`."""
    _check(_is_name(name), "a tensor in it has no name")
    properties, size, records = _fields(record, "TensorStorageMetadata", "properties", "size", "chunks")
    dtype, size = _dtype(properties), _size(size)
    _check(type(records) is list, f"{name} has no list of chunks")
    chunks = []
    for chunk in records:
        offsets, sizes = (_size(part) for part in _fields(chunk, "ChunkStorageMetadata", "offsets", "sizes"))
        inside = len(offsets) == len(sizes) == len(size) and all(
            offset + length <= whole for offset, length, whole in zip(offsets, sizes, size)
        )
        _check(inside, f"a chunk of {name} is outside the tensor")
        entry = unused.pop(MetadataIndex(name, offsets), None)
        stored = entry is not None and entry.length >= math.prod(sizes) * dtype.itemsize
        _check(stored, f"its files have no room for {name} of size {tuple(size)}")
        chunks.append(ChunkStorageMetadata(offsets, sizes))
    _check(sum(math.prod(chunk.sizes) for chunk in chunks) == math.prod(size), f"{name} has gaps or overlaps")
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _dtype(record) -> torch.dtype:
    """Return the first entry of TensorProperties, the only one that torch uses when it loads."""
    has_entries = _is_record(record, "TensorProperties") and type(record.state) is tuple and record.state
    _check(has_entries and isinstance(record.state[0], torch.dtype), "a tensor in it has no dtype")
    return record.state[0]


def _size(record) -> torch.Size:
    numbers: Any = record.args[0] if _is_record(record, "Size") and len(record.args) == 1 else None
    _check(type(numbers) is tuple and len(numbers) <= _MAX_DIMENSIONS, "a tensor in it has no size")
    _check(all(_is_count(number) for number in numbers), "a size in it is not made of whole numbers from 0")
    return torch.Size(numbers)


def _fields(record, name: str, *fields: str) -> list:
    _check(_is_record(record, name) and type(record.state) is dict, f"something in it is not a {name}")
    return [record.state.get(field) for field in fields]


def _is_record(value, name: str) -> bool:
    return isinstance(value, _Record) and type(value).__name__ == name


def _is_count(value) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_name(value) -> bool:
    """Whether a value is a name that is safe to print."""
    return type(value) is str and value.isprintable() and len(value) <= 1000


def _check(valid, problem: str) -> None:
    if not valid:
        raise _RefusedError(problem)
