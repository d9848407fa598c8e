"""Harmless objects that people store beside their weights: flags, paths, dates, numbers and arrays of numpy.

The allow-list for `torch.load(weights_only=True)`. A pickle may call every class and function in it, with arguments and
state of its choice. So most entries are stand-ins, which only keep checked data. Everything else is refused.
"""

import argparse
import datetime
import pathlib
import pickle
import re
from collections import OrderedDict
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor


def _refuse(what: str, *_):
    # In the words of torch's own refusals, from which `util.weights.file` makes its message.
    raise pickle.UnpicklingError(f"GLOBAL {what}")


# Paths as text: a WindowsPath cannot exist on other systems, and the arguments may be anything.


def _posix_path(*parts):
    return pathlib.PosixPath(*map(_text, parts))


def _windows_path(*parts) -> str:
    return str(pathlib.PureWindowsPath(*map(_text, parts)))


def _text(part):
    return part if type(part) is str else _refuse("pathlib.PurePath")


class _Builtin(str):
    """The name of a builtin type, which only the factory of a defaultdict needs; it cannot be called."""

    def __call__(self, *args):
        return _refuse(self.removeprefix("builtins."))


def _bytes(*args) -> bytes:
    return _refuse("bytes") if args else b""  # protocol 2 writes other bytes as encoded text


# Containers ---------------------------------------------------------------------------------------------------------


def _defaultdict(factory=None, *items) -> dict:
    """A defaultdict without its factory. torch fills only exact dicts and lists."""
    return _refuse("collections.defaultdict") if items else {}


def _deque(items=(), maxlen=None) -> list:
    return list(items) if type(items) in (list, tuple) else _refuse("collections.deque")


class _Dict:
    """A subclass of dict: its entries, without its attributes."""

    def __new__(cls, *args):
        return _refuse("dict") if args else OrderedDict()


class _TorchVersion:
    def __new__(cls, version):
        return version if type(version) is str else _refuse("torch.torch_version.TorchVersion")


# numpy --------------------------------------------------------------------------------------------------------------

_NUMBERS = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split())


class _Dtype:
    """The type of a numpy number or string, from its code (f8) and byte order."""

    order = "="

    def __init__(self, code, *_):
        self.code = code if type(code) is str else "O"

    def __setstate__(self, state):
        self.order = state[1]

    def numpy(self, strings: bool = False) -> np.dtype:
        """Return the type. Raises UnpicklingError unless it is one of numbers or, if wanted, of `strings`: arrays of
        objects may run code."""
        known = self.code in _NUMBERS or (strings and re.fullmatch("U[0-9]{1,6}", self.code))
        if not known or type(self.order) is not str or self.order not in tuple("<>=|"):
            return _refuse(f"numpy.dtype({shorten(ascii(self.code), 40)})")
        return np.dtype(self.order + self.code)


def _scalar(dtype, data):
    """Return a numpy number or string as one of Python."""
    if type(dtype) is not _Dtype or type(data) is not bytes:
        return _refuse("numpy.object_")
    return np.frombuffer(data, dtype.numpy(strings=True), 1)[0].item()


class _Array:
    """A numpy array, whose pickle gives it its data after its creation."""

    tensor: Tensor | None = None

    def __setstate__(self, state):
        _version, shape, dtype, fortran, data = state
        if type(dtype) is not _Dtype or type(data) is not bytes:
            _refuse("numpy.object_")
        array = np.frombuffer(data, dtype.numpy()).reshape(shape, order="F" if fortran is True else "C")
        # Copied: the memory of bytes is read-only.
        self.tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _new_array(*_) -> _Array:
    return _Array()


# The list -----------------------------------------------------------------------------------------------------------

_DICTS = ["yacs.config.CfgNode", "easydict.EasyDict", "addict.addict.Dict"]
_DICTS += [f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")]
_DICTS += [f"{package}.utilities.data.AttributeDict" for package in ("lightning_fabric", "lightning.fabric")]
_FACTORIES = [f"builtins.{name}" for name in "bool dict float int list str tuple".split()]

# Python 3.13 pickles paths under another module than earlier and later versions, numpy 2 under other modules than 1.
SAFE_GLOBALS = [
    argparse.Namespace,
    (argparse.Namespace, "types.SimpleNamespace"),
    *((_posix_path, f"{m}.{name}") for m in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
    *((_windows_path, f"{m}.{n}") for m in ("pathlib", "pathlib._local") for n in ("WindowsPath", "PureWindowsPath")),
    datetime.date,
    datetime.datetime,
    datetime.time,
    datetime.timedelta,
    datetime.timezone,
    (_defaultdict, "collections.defaultdict"),
    (_deque, "collections.deque"),
    *((_Builtin(name), name) for name in _FACTORIES),
    (_bytes, "builtins.bytes"),
    *((_Dict, name) for name in _DICTS),
    (_TorchVersion, "torch.torch_version.TorchVersion"),
    (_Dtype, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_new_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


def without_stand_ins(value, seen: dict | None = None):
    """Return `value` without stand-ins, at any depth: arrays of numpy as tensors. Containers are changed in place; one
    that occurs several times, as in a file made to exhaust readers, is visited once."""
    seen = {} if seen is None else seen
    if id(value) in seen:
        return seen[id(value)][1]
    if isinstance(value, _Builtin):
        return str(value)
    if isinstance(value, _Array):
        return value.tensor if value.tensor is not None else _refuse("numpy.ndarray")
    if isinstance(value, (dict, list)):
        seen[id(value)] = value, value  # the reference keeps the id unique
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
            value[key] = without_stand_ins(item, seen)
    elif type(value) is tuple:
        seen[id(value)] = value, tuple(without_stand_ins(item, seen) for item in value)
        return seen[id(value)][1]
    elif isinstance(value, argparse.Namespace):
        without_stand_ins(vars(value), seen)
    return value
