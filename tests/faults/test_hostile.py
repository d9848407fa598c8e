"""A checkpoint whose pickle runs code is refused by every command, and its code does not run.

The payloads are real: each makes a folder when it is unpickled, which the last test shows.
"""

import argparse
import builtins
import collections
import contextlib
import datetime
import functools
import importlib
import os
import pathlib
import pickle
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from helpers.launch import ROOT, SMALL, command_module
from torch.distributed.checkpoint.metadata import Metadata

from util.errors import UserError, user_errors
from util.weights.file import read_file

DATA = "--num_workers 0 --device cpu"
MAE = f"{SMALL} {DATA} --vis_freq 0 --epochs 1 --batch_size 8 --data_path {{data}}"
VIT = f"--model vit_micro_patch4 --input_size 16 {DATA} --epochs 1 --batch_size 8 --data_path {{data}}"
RUN = "--output_dir {out}/run"
# Every flag by which a command reads a checkpoint.
COMMANDS = {
    "--init_from": f"main_pretrain {MAE} {RUN} --init_from {{evil}}",
    "--resume": f"main_pretrain {MAE} {RUN} --resume {{evil}}",
    "--dmae_teacher": f"main_pretrain {MAE} {RUN} --dmae_teacher {{evil}}",
    "--mlo_mask_net": f"main_pretrain {MAE} {RUN} --mlo_mae --mlo_frozen --mlo_mask_net {{evil}}",
    "--finetune": f"main_finetune {VIT} {RUN} --finetune {{evil}}",
    "finetune --resume": f"main_finetune {VIT} {RUN} --resume {{evil}}",
    "finetune --eval": f"main_finetune {VIT} {RUN} --eval --resume {{evil}}",
    "probe --finetune": f"main_linprobe {VIT} {RUN} --finetune {{evil}}",
    "segment": "main_segment --dataset scenes --scene_count 8 4 --output_dir {out} --finetune {evil}",
    "segment --eval": "main_segment --dataset scenes --scene_count 8 4 --output_dir {out} --eval --resume {evil}",
    "cached probe": f"main_linprobe {VIT} {RUN} --finetune {{evil}} --cache_features",
    "probe --resume": f"main_linprobe {VIT} {RUN} --resume {{evil}}",
    "probe --eval": f"main_linprobe {VIT} {RUN} --eval --resume {{evil}}",
    "attention": "attention {evil} --data {data}/val --out {out}/a.png --device cpu",
    "export": "export {evil} --to timm --out {out}/a.safetensors",
    "feature_viz": "feature_viz {evil} --steps 1 --count 1 --out {out}/a.png --device cpu",
    "fewshot": f"fewshot {{evil}} --data_path {{data}} {DATA} --shots 1 --out {{out}}/a.json",
    "knn": f"knn {{evil}} --data_path {{data}} {DATA} --out {{out}}/a.json",
    "mask_maps": "mask_maps {evil} --data {data}/val --out {out}/a.png",
    "predict": "predict {evil} --data {data}/val --out {out}/a.csv --device cpu",
    "features": "predict {evil} --data {data}/val --features --out {out}/a.npz --device cpu",
    "robustness": f"robustness {{evil}} --data_path {{data}} {DATA} --corrupt --out {{out}}/a.json",
    "tsne": f"tsne {{evil}} --data_path {{data}} {DATA} --out {{out}}/a.png",
    "dense_probe": "dense_probe {evil} --dataset scenes --scene_count 8 4 --out {out}/a.json --device cpu",
    "visualize_dense": "visualize_dense {evil} --dataset scenes --scene_count 8 4 --out {out}/a.png --device cpu",
    "visualize": "visualize {evil} --data {data}/val --out {out}/a.png",
    "unshard": "unshard {evil} {out}.pth",
}
NO_CHECKPOINT = {
    "collect",
    "first_run",
    "make_lesions",
    "make_scenes",
    "make_shards",
    "mean_std",
    "study",
    "plan",
    "quadrant_digits",
    "quickstart",
    "rc_linear",
    "reproduce",
}


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def write_zip(path, target):
    torch.save({"model": {"w": torch.zeros(2)}, "args": argparse.Namespace(x=Payload(target))}, path)


def write_old(path, target):
    torch.save({"model": {"w": torch.zeros(2)}, "x": Payload(target)}, path, _use_new_zipfile_serialization=False)


def write_pickle(path, target):
    path.write_bytes(pickle.dumps({"model": Payload(target)}))


KINDS = {"zip.pth": write_zip, "old.pth": write_old, "pickle.pth": write_pickle, "pickle.safetensors": write_pickle}


@pytest.fixture
def evil(request, tmp_path):
    path = tmp_path / request.param
    KINDS[request.param](path, tmp_path / "pwned")
    return path


def run(line: str, capsys, monkeypatch, **names) -> str:
    """Return the output of a command, which must exit with code 2 and one sentence."""
    name, *flags = [word.format(**names) for word in line.split()]
    module = command_module(name)
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as ended, user_errors(name):
        module.main(*([module.get_args_parser().parse_args(flags)] if hasattr(module, "get_args_parser") else []))
    output = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in output
    return output


@pytest.mark.parametrize("evil", KINDS, indirect=True)
@pytest.mark.parametrize("command", COMMANDS)
def test_its_code_is_not_run(command, evil, image_folder, tmp_path, capsys, monkeypatch):
    output = run(COMMANDS[command], capsys, monkeypatch, evil=evil, data=image_folder, out=tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert evil.name in output and output.count("error:") == 1
    assert not list(tmp_path.glob("out/**/*.*"))  # and nothing is written


def test_every_tool_is_in_the_list():
    tools = {path.stem for path in (ROOT / "tools").glob("[a-z]*.py")}
    tried = {line.split()[0] for line in COMMANDS.values()}
    assert tools - NO_CHECKPOINT <= tried


@pytest.mark.parametrize("name", ["rest.pth", ".metadata"])
def test_a_folder_of_fsdp(name, image_folder, tmp_path, capsys, monkeypatch):
    """One file of the folder is hostile: the state without tensors, or the list of tensors."""
    folder = tmp_path / "checkpoint-0.dcp"
    folder.mkdir()
    torch.save({"names": [], "checksums": {}, "epoch": 0, "args": {}}, folder / "rest.pth")
    (folder / ".metadata").write_bytes(pickle.dumps(Metadata({})))
    (write_zip if name == "rest.pth" else write_pickle)(folder / name, tmp_path / "pwned")
    for line in (f"unshard {folder}", f"main_pretrain {MAE} {RUN} --fsdp --resume {{evil}}"):
        run(line, capsys, monkeypatch, evil=folder, data=image_folder, out=tmp_path / "out")
        assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("evil", ["zip.pth", "pickle.pth"], indirect=True)
def test_resume_auto(evil, image_folder, tmp_path, capsys, monkeypatch):
    """The hostile file is the newest checkpoint of the output folder. A file that is not a zip archive is damaged: it
    is named and skipped. An intact one is refused, and nothing is trained."""
    import main_pretrain

    line = MAE.replace("--epochs 1", "--epochs 2") + " --output_dir {out} --save_freq 1"
    flags = line.format(data=image_folder, out=tmp_path / "run").split()
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags))
    shutil.copy(evil, tmp_path / "run" / "checkpoint-7.pth")
    if evil.name == "zip.pth":
        shown = run(f"main_pretrain {line} --resume auto", capsys, monkeypatch, data=image_folder, out=tmp_path / "run")
        assert "checkpoint-7.pth is refused because its pickle refers to posix.mkdir" in shown
    else:
        main_pretrain.main(main_pretrain.get_args_parser().parse_args([*flags, "--resume", "auto"]))
        shown = capsys.readouterr()
        assert "checkpoint-7.pth" in shown.out + shown.err and f"resumed {tmp_path}/run/checkpoint-1.pth" in shown.out
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("evil", ["zip.pth", "old.pth", "pickle.pth"], indirect=True)
def test_the_payloads_are_real(evil, tmp_path):
    if evil.name == "pickle.pth":
        pickle.loads(evil.read_bytes())
    else:
        torch.load(evil, weights_only=False)
    assert (tmp_path / "pwned").is_dir()


# Types of the allow-list (util/weights/metadata.py), abused -----------------------------------------------------------


class Calls:
    """The pickle of a call, perhaps with a state for its result."""

    def __init__(self, function, *args, state=None):
        self.call = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.call


scalar, reconstruct = np.float64(1).__reduce__()[0], np.ones(1).__reduce__()[0]
HOSTILE = {
    "state of a namespace": lambda evil: types.SimpleNamespace(x=evil),
    "item of a defaultdict": lambda evil: collections.defaultdict(list, x=evil),
    "factory that makes code": lambda evil: (collections.defaultdict(eval), evil),
    "item of a deque": lambda evil: collections.deque([evil]),
    "part of a path": lambda evil: Calls(pathlib.PurePosixPath, evil),
    "array of objects": lambda evil: np.array([evil], dtype=object),
    "number of objects": lambda evil: Calls(scalar, np.dtype("O"), evil),
    "time zone": lambda evil: Calls(datetime.datetime, 2024, 1, 1, 0, 0, 0, 0, evil),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_payload_inside_an_allowed_type(name, legacy, tmp_path):
    content = {"model": {}, "x": HOSTILE[name](Payload(tmp_path / "pwned"))}
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"evil\.pth is refused because .* may run code"):
        read_file(tmp_path / "evil.pth")
    assert not (tmp_path / "pwned").exists()
    with contextlib.suppress(TypeError):  # of the path or the date: the payload has run before
        torch.load(tmp_path / "evil.pth", weights_only=False)
    assert (tmp_path / "pwned").is_dir()  # the payload is real


# Without a forbidden name: the allowed ones in uses that no harmless file has.
MISUSED = {
    "dtype of objects": Calls(scalar, np.dtype("O"), b"12345678"),
    "dtype of records": Calls(scalar, np.dtype([("a", "f8")]), b"12345678"),
    "text for a number": Calls(scalar, np.dtype("f8"), "12345678"),
    "too few bytes": Calls(scalar, np.dtype("f8"), b"1234"),
    "giant text": Calls(scalar, Calls(np.dtype, "U9999999"), b"1234"),
    "array of objects": np.array([[1], "two"], dtype=object),
    "array larger than its data": Calls(
        reconstruct, np.ndarray, (0,), b"b", state=(1, (2**40,), np.dtype("f8"), False, b"")
    ),
    "array without data": Calls(reconstruct, np.ndarray, (0,), b"b"),
    "called builtin": Calls(list, "abc"),
    "called type": Calls(builtins.int, "7"),
    "defaultdict of a list": Calls(collections.defaultdict, list, [("a", 1)]),
    "deque of text": Calls(collections.deque, "abc"),
    "path of numbers": Calls(pathlib.PurePosixPath, 7),
    "getattr": getattr,
    "import": importlib.import_module,
    "partial": functools.partial(int, base=2),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", MISUSED)
def test_an_allowed_type_with_arguments_that_no_file_has(name, legacy, tmp_path):
    torch.save({"model": {}, "x": MISUSED[name]}, tmp_path / "odd.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"odd\.pth is (refused|truncated|not a checkpoint)"):
        read_file(tmp_path / "odd.pth")
