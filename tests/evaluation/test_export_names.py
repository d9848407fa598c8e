"""Exports keep the names of the classes, and each has a JSON file of its own."""

import json
from pathlib import Path

import pytest
import torch
from helpers.exports import exported, saved_classifier
from safetensors import safe_open

from tools import export
from util.weights.load import read_weights

NAMES = ["cat", "dog, or wolf", "höhe", "1", "e", "f", "g"]


def with_names(path, names):
    state = torch.load(path, weights_only=True)
    torch.save({**state, "classes": names}, path)
    return path


def stored_names(to, out):
    """Return the names in an exported file, read with the other library."""
    if to == "hf-vit":
        config = pytest.importorskip("transformers").AutoConfig.from_pretrained(out)
        assert config.label2id == {name: i for i, name in config.id2label.items()}
        return [config.id2label[i] for i in range(len(config.id2label))]
    if to == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(out), providers=["CPUExecutionProvider"])
        return json.loads(session.get_modelmeta().custom_metadata_map["label_names"])
    if to == "torch-export":
        extra = {"flags.json": ""}
        torch.export.load(out, extra_files=extra)
        return json.loads(extra["flags.json"])["label_names"]
    with safe_open(out, framework="pt") as file:
        return json.loads(file.metadata()["label_names"])


@pytest.mark.parametrize("to", ["timm", "safetensors", "hf-vit", "onnx", "torch-export"])
def test_names_of_classes_are_exported(tmp_path, to):
    for package in {"hf-vit": ["transformers"], "onnx": ["onnx", "onnxscript", "onnxruntime"]}.get(to, []):
        pytest.importorskip(package)
    _, path = saved_classifier(tmp_path / "classifier.pth", False)
    suffix = export.SUFFIXES.get(to, "")
    out = exported(with_names(path, NAMES), to, tmp_path / f"cls{suffix}")
    assert stored_names(to, out) == NAMES
    assert json.loads(Path(f"{out}.json").read_text())["told"]["label_names"] == NAMES
    if to not in ("onnx", "torch-export"):
        again = read_weights(out)
        assert again.classes == NAMES and "label_names" not in again.args


def test_unknown_names_of_classes(tmp_path, capsys):
    """A checkpoint without names, or with another number of them: a note. An encoder has no classes."""
    _, path = saved_classifier(tmp_path / "classifier.pth", False)
    for i, names in enumerate(([], ["a", "b"])):
        out = exported(with_names(path, names), "timm", tmp_path / f"{i}.safetensors")
        with safe_open(out, framework="pt") as file:
            assert "label_names" not in file.metadata()
        assert f"note: {path} has {'2 names for' if names else 'no names of'} its 7 classes" in capsys.readouterr().out
    exported(path, "timm", tmp_path / "encoder.safetensors", "--encoder_only")
    assert "note:" not in capsys.readouterr().out


def test_placeholders_of_hugging_face_are_no_names(tmp_path):
    pytest.importorskip("transformers")
    _, path = saved_classifier(tmp_path / "classifier.pth", False)
    out = exported(path, "hf-vit", tmp_path / "folder")
    assert stored_names("hf-vit", out)[2] == "LABEL_2" and read_weights(out).classes == []


def test_exports_of_one_name_have_a_json_each(tmp_path):
    _, path = saved_classifier(tmp_path / "classifier.pth", True)
    for to in ("timm", "torch-export"):
        exported(path, to, tmp_path / f"cls{export.SUFFIXES[to]}")
    announced = [
        json.loads((tmp_path / f"cls{export.SUFFIXES[to]}.json").read_text()) for to in ("timm", "torch-export")
    ]
    assert [content["to"] for content in announced] == ["timm", "torch-export"]
    assert announced[1]["outputs"] == "model(imgs) gives logits" and not (tmp_path / "cls.json").exists()
