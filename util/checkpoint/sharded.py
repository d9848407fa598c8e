"""Checkpoints of `--fsdp`: folders `checkpoint-E.dcp` into which every process writes its share of the tensors.

The tensors are written by torch.distributed.checkpoint; `rest.pth` holds everything else. A folder can be loaded on any
number of processes, or made into one file. The sharding itself is in `util.parallel.fsdp`.
"""

import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from util.checkpoint import retry
from util.checkpoint.atomic import write_tensors
from util.checkpoint.tensor_list import FILE, Reader, read_tensors
from util.errors import UserError
from util.parallel.distributed import from_main_process, gather_objects, get_rank, is_main_process
from util.weights.checksum import crc32
from util.weights.file import read_file

REST = "rest.pth"  # written last: a folder without it is incomplete


def _tensors(module: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """Return all tensors, sharded or not, by name: `module.NAME` and `optimizer.NAME/KEY`."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    state = module.state_dict()
    tensors = {f"module.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
    for parameter, parameter_state in optimizer.state.items():
        tensors |= {f"optimizer.{names[parameter]}/{key}": value for key, value in parameter_state.items()}
    return tensors


def save(folder: Path, module: nn.Module, optimizer, rest: dict, exported: dict[str, nn.Module]) -> None:
    """Write a checkpoint into a new `folder`; all processes must call it. `rest` is the main process's content besides
    tensors. `exported` are further complete models inside `module`, by their key in a checkpoint. Raises SaveFailed on
    all ranks when one of them cannot write."""
    retry.on_main_process(lambda: _make_anew(folder))
    try:
        dcp.save(_tensors(module, optimizer), storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:  # raised on all ranks
        causes = [cause for cause, _ in error.failures.values()]  # by rank
        if not all(isinstance(cause, (OSError, RuntimeError)) for cause in causes):
            raise
        raise retry.SaveFailed(retry.reason(causes[0])) from error
    checksums = {name: crc for share in gather_objects(_checksums(folder)) for name, crc in share.items()}
    names = {parameter: name for name, parameter in module.named_parameters()}
    state = module.state_dict()
    content = rest | {
        "names": list(state),
        "extra": {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)},
        "exported": {key: _prefix(module, part) for key, part in exported.items()},
        "optimizer_names": [names[p] for group in optimizer.param_groups for p in group["params"]],
        "param_groups": optimizer.state_dict()["param_groups"],
        "checksums": checksums,
    }
    retry.on_main_process(lambda: write_tensors(folder / REST, content))


def _make_anew(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _checksums(folder: Path) -> dict[str, int]:
    """Return the CRC-32 of the files that this process has just written."""
    mine = [*folder.glob(f"__{get_rank()}_*.distcp"), *([folder / ".metadata"] if is_main_process() else [])]
    return {path.name: crc32(path) for path in mine}


def _prefix(module: nn.Module, part: nn.Module) -> str:
    return next(f"{name}." for name, submodule in module.named_modules() if submodule is part)


def load(folder: Path, module: nn.Module, optimizer) -> None:
    """Load a checkpoint on any number of processes, all of which must call it. Raises UserError when the folder is
    damaged or hostile, or its tensors are not those of `module` and `optimizer`."""
    problem = from_main_process(lambda: damage(folder))
    if problem:
        raise UserError(
            f"--resume {folder} is incomplete or damaged ({problem}): --resume auto takes the newest undamaged one"
        )
    rest, reader = read_file(folder / REST), Reader(folder)
    stored: Any = reader.read_metadata().state_dict_metadata  # of tensors only (`tensor_list`)
    for name, parameter in module.named_parameters():
        keys = [key for key in stored if key.startswith(f"optimizer.{name}/")]
        for key in keys:
            whole = torch.zeros_like(parameter, requires_grad=False)
            tensor = whole if stored[key].size == parameter.shape else torch.zeros((), device=parameter.device)
            optimizer.state[parameter][key.split("/")[-1]] = tensor
    wanted = _tensors(module, optimizer)
    for name in wanted.keys() | stored.keys():
        sizes = [tuple(stored[name].size) if name in stored else None, _shape(wanted.get(name))]
        if sizes[0] != sizes[1]:
            raise UserError(
                f"--resume {folder} does not fit these flags: {name} has shape {sizes[0]} in the folder and {sizes[1]} "
                f"in this run"
            )
    read_tensors(wanted, reader)
    module.load_state_dict(rest["extra"], strict=False)
    for group, theirs in zip(optimizer.param_groups, rest["param_groups"]):
        group |= {name: value for name, value in theirs.items() if name not in ("params", "fused", "foreach")}


def _shape(tensor: torch.Tensor | None) -> tuple | None:
    return None if tensor is None else tuple(tensor.shape)


def _fits(rest: dict, stored: dict) -> bool:
    """Whether `rest` has the entries that `load` and `one_file` use, and its names are those of tensors in `stored`."""
    types = {"names": list, "extra": dict, "exported": dict, "optimizer_names": list, "param_groups": list}
    if not all(isinstance(rest.get(key), expected) for key, expected in types.items()):
        return False
    strings = [*rest["names"], *rest["extra"], *rest["optimizer_names"], *rest["exported"], *rest["exported"].values()]
    groups, checksums = rest["param_groups"], rest.get("checksums", {})
    if not all(isinstance(value, str) for value in strings) or not all(isinstance(group, dict) for group in groups):
        return False
    return isinstance(checksums, dict) and all(
        name in rest["extra"] or f"module.{name}" in stored for name in rest["names"]
    )


def is_whole(folder: Path) -> bool:
    return not damage(folder)


def damage(folder: Path) -> str:
    """Return what is wrong with a folder, "" when every file exists, is long enough for its tensors and matches its
    checksum (folders of older versions have no checksums)."""
    try:
        rest, metadata = read_file(folder / REST), Reader(folder).read_metadata()
        if not _fits(rest, metadata.state_dict_metadata):
            return f"{folder / REST} does not belong to these tensors"
        for entry in metadata.storage_data.values():
            if (folder / entry.relative_path).stat().st_size < entry.offset + entry.length:
                return f"{folder / entry.relative_path} is cut off"
        for name, crc in rest.get("checksums", {}).items():
            if name != ".metadata" and not (isinstance(name, str) and FILE.fullmatch(name)):
                return f"{folder / REST} has a checksum of a file that --fsdp does not write"
            if crc32(folder / name) != crc:
                return f"the checksum of {folder / name} does not match"
    except OSError as error:
        return f"{error.filename or folder} cannot be read: {error.strerror}"
    except UserError as error:
        return str(error)
    return ""


def one_file(folder: Path) -> dict:
    """Return the checkpoint that the same run would have written without `--fsdp`. Raises UserError when the folder is
    incomplete, damaged or hostile, or needs more memory than is free."""
    problem = damage(folder)
    if problem:
        raise UserError(f"{folder} is not a complete checkpoint of --fsdp (checkpoint-*.dcp): {problem}")
    rest, reader = read_file(folder / REST), Reader(folder)
    tensors = _empty_tensors(folder, reader.read_metadata().state_dict_metadata)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        read_tensors(tensors, reader, no_dist=True)
    module = {
        name: rest["extra"][name] if name in rest["extra"] else tensors[f"module.{name}"] for name in rest["names"]
    }
    states = {}
    for index, name in enumerate(rest["optimizer_names"]):
        keys = [key for key in tensors if key.startswith(f"optimizer.{name}/")]
        states[index] = {key.split("/")[-1]: tensors[key] for key in keys}
    content = {key: value for key, value in rest.items() if key not in _ONLY_HERE}
    content |= {"model": _below(module, "model."), "methods": _below(module, "methods.")}
    content["optimizer"] = {"state": states, "param_groups": rest["param_groups"]}
    return content | {key: _below(module, prefix) for key, prefix in rest["exported"].items()}


def _empty_tensors(folder: Path, stored: dict) -> dict[str, torch.Tensor]:
    """Return zeros of the stored shapes. They are not `torch.empty`: gaps in a hostile list must not show the memory of
    this process."""
    try:
        return {name: torch.zeros(meta.size, dtype=meta.properties.dtype) for name, meta in stored.items()}
    except (RuntimeError, MemoryError) as error:
        needed = sum(math.prod(meta.size) * meta.properties.dtype.itemsize for meta in stored.values())
        raise UserError(f"{folder} needs {needed / 1e9:.1f} GB of memory, more than is free") from error


_ONLY_HERE = {"names", "extra", "exported", "optimizer_names", "param_groups", "checksums"}


def _below(state: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
