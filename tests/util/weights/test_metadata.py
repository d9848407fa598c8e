"""Harmless objects beside the weights are read by an allow-list; what they hold is kept as plain values."""

import argparse
import collections
import datetime
import pathlib
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from helpers.small_models import assert_same, mae, saved

from util.weights.file import read_file
from util.weights.load import load_into, read_weights

NOW = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
HARMLESS = {
    "numpy float": (np.float64(0.25), 0.25),
    "numpy float32": (np.float32(0.5), 0.5),
    "numpy int": (np.int64(-7), -7),
    "numpy bool": (np.bool_(True), True),
    "numpy text": (np.str_("höhe"), "höhe"),
    "numpy array": (np.arange(6.0).reshape(2, 3), torch.arange(6.0, dtype=torch.float64).reshape(2, 3)),
    "numpy array by columns": (np.asfortranarray(np.arange(6).reshape(2, 3)), torch.arange(6).reshape(2, 3)),
    "numpy array of another byte order": (np.arange(3, dtype=">i4"), torch.arange(3, dtype=torch.int32)),
    "empty numpy array": (np.zeros((0, 3)), torch.zeros((0, 3), dtype=torch.float64)),
    "defaultdict": (collections.defaultdict(list, {"x": [1]}), {"x": [1]}),
    "defaultdict of floats": (collections.defaultdict(float), {}),
    "OrderedDict": (collections.OrderedDict(a=1), {"a": 1}),
    "Counter": (collections.Counter("aab"), {"a": 2, "b": 1}),
    "deque": (collections.deque([1, 2.5], maxlen=3), [1, 2.5]),
    "date": (NOW.date(), NOW.date()),
    "datetime": (NOW, NOW),
    "timedelta": (datetime.timedelta(3, 4, 5), datetime.timedelta(3, 4, 5)),
    "Path": (pathlib.Path("/a/b"), pathlib.Path("/a/b")),
    "Windows path": (pathlib.PureWindowsPath("C:/a/b"), "C:\\a\\b"),
    "torch's version": (torch.__version__, str(torch.__version__)),
    "empty bytes": (b"", b""),
    "bytes": (b"\xff\x00", b"\xff\x00"),
    "class of a flag": (int, "builtins.int"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_objects_are_read(tmp_path, name, legacy):
    value, expected = HARMLESS[name]
    model = mae()
    content = {"model": model.state_dict(), "x": [(value,)], "args": argparse.Namespace(input_size=16, y=value)}
    torch.save(content, tmp_path / "file.pth", _use_new_zipfile_serialization=not legacy)
    result = read_file(tmp_path / "file.pth")["x"][0][0]
    if isinstance(expected, torch.Tensor):
        assert result.dtype == expected.dtype and torch.equal(result, expected)
    else:
        assert result == expected
    assert type(result) is type(expected) or isinstance(result, dict)
    weights = read_weights(tmp_path / "file.pth")
    assert_same(weights.state, model.state_dict())
    assert not load_into(mae(), weights).missing and weights.args["input_size"] == 16


def test_flags_of_numpy_are_plain_numbers(tmp_path):
    args = types.SimpleNamespace(mean=np.array([0.5, 0.25]), mask_ratio=np.float64(0.6), output_dir=pathlib.Path("/x"))
    weights = read_weights(saved(tmp_path, {"model": mae().state_dict(), "args": args}))
    assert weights.args == {"mean": [0.5, 0.25], "mask_ratio": 0.6, "output_dir": pathlib.Path("/x")}


def test_weights_of_numpy(tmp_path):
    """A state dict of arrays, as converters from other frameworks write it."""
    model = mae()
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    assert_same(read_weights(saved(tmp_path, {"model": state})).state, model.state_dict())


def renamed(path, before: bytes, after: bytes):
    """Return a copy of a checkpoint with other bytes in its pickle."""
    copy = path.with_name("renamed.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(copy, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            assert before in content or not name.endswith("data.pkl")
            target.writestr(name, content.replace(before, after))
    return copy


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_of_windows(tmp_path, module):
    path = saved(tmp_path, {"x": pathlib.PosixPath("C:\\") / "data"})
    ours = f"c{pathlib.PosixPath.__module__}\nPosixPath\n".encode()
    content = read_file(renamed(path, ours, f"c{module}\nWindowsPath\n".encode()))
    assert content["x"] == "C:\\data"


@pytest.mark.parametrize("core", ["core", "_core"])
def test_numbers_of_numpy_1_and_2(tmp_path, core):
    path = saved(tmp_path, {"x": np.float64(3), "y": np.ones(2)})
    ours = f"c{np.float64(3).__reduce__()[0].__module__}".encode()
    content = read_file(renamed(path, ours, f"cnumpy.{core}.multiarray".encode()))
    assert content["x"] == 3 and content["y"].tolist() == [1, 1]


def test_configurations_that_are_dicts(tmp_path, monkeypatch):
    """yacs, as in SimMIM and Swin: a subclass of dict with attributes. It need not be installed."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = module.CfgNode(MODEL=module.CfgNode(NAME="vit"))
    config.frozen = True
    path = saved(tmp_path, {"model": mae().state_dict(), "config": config})
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert read_file(path)["config"] == {"MODEL": {"NAME": "vit"}}
    assert read_weights(path).has_decoder
