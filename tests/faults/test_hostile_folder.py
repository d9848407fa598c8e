"""A checkpoint folder of --fsdp that runs code, names files outside itself, or claims too much memory is refused in one
sentence, by tools/unshard.py and by --resume.

`util.checkpoint.sharded.save` writes the folders; the tests then forge the list of tensors and renew the checksums.
"""

import io
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import freeze
from helpers.forked import Forked
from helpers.launch import finish
from torch import nn
from torch.distributed.checkpoint import metadata as description
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorProperties

from tools import unshard
from util.checkpoint import sharded, tensor_list
from util.checkpoint.atomic import write_tensors
from util.errors import UserError, user_errors
from util.weights.checksum import crc32
from util.weights.file import read_file

NAME = "module.model.weight"  # of the forged tensor, 4 x 4


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def trained():
    """A module and its optimizer, after one step."""
    module = nn.ModuleDict({"model": nn.Linear(4, 4)})
    optimizer = torch.optim.AdamW(module.parameters())
    module["model"](torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return module, optimizer


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "checkpoint-0.dcp"
    sharded.save(path, *trained(), {"epoch": 0}, {})
    return path


def seal(folder: Path) -> None:
    """Recompute the checksums after a change."""
    rest = read_file(folder / sharded.REST)
    rest["checksums"] = {name: crc32(folder / name) for name in rest["checksums"]}
    write_tensors(folder / sharded.REST, rest)


def forge(folder: Path, change) -> None:
    """Let `change` modify the list of tensors, and recompute the checksums."""
    listed = pickle.loads((folder / ".metadata").read_bytes())
    change(listed)
    (folder / ".metadata").write_bytes(pickle.dumps(listed))
    seal(folder)


def add_payload(folder: Path, name: str, target: Path) -> _StorageInfo:
    """Append a hostile pickle to the first file, and return its offset and length. It is longer than tensor `name`."""
    buffer = io.BytesIO()
    torch.save([Payload(target), b"x" * 10_000], buffer)
    file = next(folder.glob("__0_*.distcp"))
    info = _StorageInfo(file.name, file.stat().st_size, len(buffer.getvalue()))
    with open(file, "ab") as end:
        end.write(buffer.getvalue())
    return info


def bytes_for_a_tensor(folder: Path, target: Path, name: str = NAME) -> None:
    """Replace a tensor by bytes with the attributes of its description: torch loads bytes with weights_only=False."""
    info = add_payload(folder, name, target)

    def change(listed):
        forged, tensor = BytesStorageMetadata(), listed.state_dict_metadata[name]
        forged.size, forged.properties, forged.chunks = tensor.size, tensor.properties, tensor.chunks
        listed.state_dict_metadata[name] = forged
        listed.storage_data[MetadataIndex(name)] = info

    forge(folder, change)


def one_file(folder: Path) -> None:
    sharded.one_file(folder)


def load(folder: Path) -> None:
    sharded.load(folder, *trained())


READERS = pytest.mark.parametrize("read", [one_file, load])


@READERS
def test_bytes_that_look_like_a_tensor(read, folder, tmp_path):
    bytes_for_a_tensor(folder, tmp_path / "owned")
    with pytest.raises(UserError, match="BytesStorageMetadata"):
        read(folder)
    assert not (tmp_path / "owned").exists()


def test_this_payload_is_real(folder, tmp_path):
    """Torch's own reader and planner run the payload."""
    bytes_for_a_tensor(folder, tmp_path / "owned")
    dcp.load({NAME: torch.zeros(4, 4)}, storage_reader=FileSystemReader(folder), no_dist=True)
    assert (tmp_path / "owned").is_dir()


def test_unshard_ends_in_one_sentence(folder, tmp_path, monkeypatch, capsys):
    bytes_for_a_tensor(folder, tmp_path / "owned")
    monkeypatch.setattr("sys.argv", ["unshard.py", str(folder)])
    with pytest.raises(SystemExit) as ended, user_errors("unshard.py"):
        unshard.main()
    written = capsys.readouterr().err
    assert ended.value.code == 2 and written.count("error:") == 1 and written.count("\n") == 1
    assert folder.name in written and not (tmp_path / "owned").exists() and not list(tmp_path.glob("*.pth"))


def test_resume_ends_in_one_sentence(tmp_path, monkeypatch):
    """The command on two ranks: each ends with its own line."""
    frozen = freeze.FROZEN / "e71f53e" / "fsdp.tar.xz"
    bytes_for_a_tensor(freeze.unpack(frozen, tmp_path / "run"), tmp_path / "owned", "module.model.cls_token")
    monkeypatch.chdir(tmp_path)
    flags = freeze.KINDS["fsdp"][1]
    output = finish(
        Forked("helpers.frozen_script", f"{flags} --output_dir out --resume run/checkpoint-1-4.dcp", 2), code=2
    )
    assert "BytesStorageMetadata" in output and "Traceback" not in output
    assert not (tmp_path / "owned").exists()


def test_the_planner_refuses_bytes(folder, tmp_path):
    """The planner refuses bytes even if the check of the list has accepted them."""
    bytes_for_a_tensor(folder, tmp_path / "owned")
    with pytest.raises(CheckpointException, match="is not a tensor"):
        dcp.load(
            {NAME: torch.zeros(4, 4)},
            storage_reader=FileSystemReader(folder),
            planner=tensor_list.TensorPlanner(),
            no_dist=True,
        )
    assert not (tmp_path / "owned").exists()


@READERS
def test_a_pickle_in_a_file_of_tensors(read, folder, tmp_path):
    """The pickle is listed as a tensor, so torch reads it with weights_only=True."""
    info = add_payload(folder, NAME, tmp_path / "owned")
    forge(folder, lambda listed: listed.storage_data.update({MetadataIndex(NAME, (0, 0)): info}))
    with pytest.raises(UserError, match="do not contain the listed tensors"):
        read(folder)
    assert not (tmp_path / "owned").exists()


# Lists of tensors -----------------------------------------------------------------------------------------------------


def relocate(**fields):
    """Return a change that replaces the storage entry of the forged tensor."""

    def change(listed):
        index = MetadataIndex(NAME, (0, 0))
        listed.storage_data[index] = replace(listed.storage_data[index], **fields)

    return change


def describe(**fields):
    """Return a change that replaces the description of the forged tensor."""
    return lambda listed: vars(listed.state_dict_metadata[NAME]).update(fields)


def chunk(offsets, sizes):
    return description.ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


def overlapping(listed):
    first, second, *_ = listed.storage_data
    listed.storage_data[second] = listed.storage_data[first]


def compressed(listed):
    relocate(transform_descriptors=["stream.zstd/1"])(listed)


WHOLE = chunk((0, 0), (4, 4))
FORGERIES = {
    "absolute path": (relocate(relative_path="/etc/passwd"), "a file that --fsdp does not write"),
    "path outside": (relocate(relative_path="../__0_0.distcp"), "a file that --fsdp does not write"),
    "path with a zero byte": (relocate(relative_path="__0_0.distcp\0"), "a file that --fsdp does not write"),
    "path of another type": (relocate(relative_path=Path("__0_0.distcp")), "a file that --fsdp does not write"),
    "negative offset": (relocate(offset=-1), "the position of a tensor in its file"),
    "length of another type": (relocate(length=1e9), "the position of a tensor in its file"),
    "length beyond the file": (relocate(offset=10**9), "is cut off"),
    "compressed": (compressed, "is compressed"),
    "bytes used twice": (overlapping, "overlap in their file"),
    "endless": (describe(size=torch.Size([10**12]), chunks=[chunk((0,), (10**12,))]), "have no room for"),
    "endless, without chunks": (describe(size=torch.Size([10**12]), chunks=[]), "has gaps or overlaps"),
    "product beyond 64 bits": (describe(size=torch.Size([2**62] * 3), chunks=[]), "has gaps or overlaps"),
    "more dimensions than torch has": (describe(size=torch.Size([1] * 100), chunks=[]), "has no size"),
    "negative size": (describe(size=torch.Size([-4, 4])), "is not made of whole numbers"),
    "size of another type": (describe(size=(4, 4)), "has no size"),
    "chunk outside": (describe(chunks=[chunk((1, 0), (4, 4))]), "is outside the tensor"),
    "chunk of other dimensions": (describe(chunks=[chunk((0,), (16,))]), "is outside the tensor"),
    "chunk twice": (describe(chunks=[WHOLE, WHOLE]), "have no room for"),
    "chunks of another type": (describe(chunks=(WHOLE,)), "has no list of chunks"),
    "gap": (describe(chunks=[chunk((0, 0), (3, 4))]), "has gaps or overlaps"),
    "no properties": (describe(properties=None), "has no dtype"),
    "quantized": (describe(properties=TensorProperties(dtype=torch.qint8)), "torch.qint8"),
    "no tensors": (lambda listed: vars(listed).update(state_dict_metadata=None), "does not list tensors"),
    "no files": (lambda listed: vars(listed).update(storage_data=None), "does not list tensors"),
    "name that moves the cursor": (
        lambda listed: listed.state_dict_metadata.update({"\x1b[2J": listed.state_dict_metadata[NAME]}),
        "has no name",
    ),
}


@READERS
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_list(read, forgery, folder):
    change, words = FORGERIES[forgery]
    forge(folder, change)
    with pytest.raises(UserError) as refused:
        read(folder)
    assert words in str(refused.value) and folder.name in str(refused.value) and "\n" not in str(refused.value)


# Opcodes: GLOBAL of a class of torch's descriptions, then the operations on it.
CLASS = b"ctorch.distributed.checkpoint.metadata\n%s\n"
PICKLES = {
    "code": (b"cposix\nmkdir\n(S'owned'\ntR.", "posix.mkdir"),
    "getattr": (b"cbuiltins\ngetattr\n" + CLASS % b"Metadata" + b"(S'__init__'\ntR.", "builtins.getattr"),
    "import through torch": (b"ctorch\nos\n.", "torch.os"),
    "module beside torch's": (b"ctorch.distributed.checkpoint.metadata\nos\n.", "metadata.os"),
    "attribute of a class": (CLASS % b"Metadata" + b"(NI1\nI2\nI3\nt(N}S'forged'\nI1\nstb.", "is damaged"),
    "call without arguments": (CLASS % b"TensorStorageMetadata" + b"(tR.", "is not a Metadata"),
    "layout that is not one": (b"ctorch.serialization\n_get_layout\n(S'cache'\ntR.", "is not a Metadata"),
    "state of a layout": (b"ctorch.serialization\n_get_layout\n}S'cache'\nI1\nsb.", "is damaged"),
    "path with a state": (b"cpathlib\nPosixPath\n(S'.'\ntR}S'_str'\nI1\nsb.", "is not a Metadata"),
    "call of a dtype": (b"ctorch\nfloat32\n(tR.", "is damaged"),
    "number": (b"I1\n.", "is not a Metadata"),
    "cut off": (CLASS % b"Metadata", "is damaged"),
    "more bytes than memory": (b"\x8e" + (2**62).to_bytes(8, "little") + b".", "is damaged"),
    "empty": (b"", "is damaged"),
}


@READERS
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_with_other_opcodes(read, name, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = PICKLES[name]
    (folder / ".metadata").write_bytes(content)
    seal(folder)
    with pytest.raises(UserError, match=words):
        read(folder)
    assert not (tmp_path / "owned").exists()


def test_a_class_of_torch_is_not_changed(folder):
    """The opcode BUILD with a pair as its state sets attributes, also of classes."""
    for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata"):
        (folder / ".metadata").write_bytes(CLASS % name.encode() + b"(N}S'forged'\nI1\nstb.")
        seal(folder)
        assert not sharded.is_whole(folder)
        assert not hasattr(getattr(description, name), "forged")


# The rest -------------------------------------------------------------------------------------------------------------

CHECKSUM = "has a checksum of a file that --fsdp does not write"
BESIDE = "does not belong to these tensors"
RESTS = {
    "checksum outside": ({"checksums": {"/dev/zero": 0}}, CHECKSUM),
    "checksum above": ({"checksums": {"../secret": 0}}, CHECKSUM),
    "checksums of another type": ({"checksums": [1]}, BESIDE),
    "names of no tensor": ({"names": ["model.missing"]}, BESIDE),
    "names that are lists": ({"names": [["model.weight"]]}, BESIDE),
    "groups of another type": ({"param_groups": [1]}, BESIDE),
}


@READERS
@pytest.mark.parametrize("name", RESTS)
def test_a_forged_state(read, name, folder):
    change, words = RESTS[name]
    write_tensors(folder / sharded.REST, read_file(folder / sharded.REST) | change)
    with pytest.raises(UserError, match=words):
        read(folder)


def test_less_memory_than_the_folder_needs(folder, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "zeros", full)
    with pytest.raises(UserError, match=r"checkpoint-0\.dcp needs 0\.0 GB of memory"):
        sharded.one_file(folder)


def test_an_honest_folder(folder):
    """It is read back bit for bit both ways, and its list agrees with torch's own reader."""
    module, optimizer = trained()
    sharded.load(folder, module, optimizer)
    made = sharded.one_file(folder)
    assert all(torch.equal(value, made["model"][name]) for name, value in module["model"].state_dict().items())
    state = optimizer.state[module["model"].weight]
    assert state["step"] == 1 and torch.equal(made["optimizer"]["state"][0]["exp_avg"], state["exp_avg"])
    ours, theirs = tensor_list.Reader(folder).read_metadata(), FileSystemReader(folder).read_metadata()
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert math.prod(ours.state_dict_metadata[NAME].size) == 16
