"""Detectors and segmenters as the start of others: relative positions are loaded, resampled or refused; what other
commands say about such files."""

from types import SimpleNamespace

import pytest
import torch
from helpers.tolerances import close
from torch import nn

import models_detect
import models_segment
from evaluation import judging
from evaluation.dense import load_start
from models_grid import RELATIVE
from tools import export, predict
from util.errors import UserError
from util.weights.load import read_weights

MODEL = "vit_micro_patch4"


def detector(size=32, **options):
    options = {"window": 3, "head_width": 8, "patch_size": 8, **options}
    return models_detect.build_model(MODEL, 2, img_size=(size, size), **options)


def segmenter(size=32, **options):
    options = {"rel_pos": True, "head_width": 8, "head_norm": "layer", "patch_size": 8, **options}
    return models_segment.build_model(MODEL, 2, img_size=(size, size), **options)


def saved(path, model, **args):
    """Write `model` as its main does, after random numbers took the place of all parameters."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    flags = {"model": MODEL, "patch_size": 8, "input_size": model.patch_embed.img_size[0], **args}
    torch.save({"model": model.state_dict(), "args": flags, "classes": ["a", "b"]}, path)
    return str(path)


def started(path, model):
    args = SimpleNamespace(eval=False, verbose=False, trainable_blocks=None, grad_checkpoint=False, recompute="none")
    load_start(model, args, read_weights(path, allowed=RELATIVE))
    return model.eval()


@pytest.mark.parametrize("make, blocks", [(detector, [3]), (segmenter, [0, 1, 2, 3])])
def test_the_encoder_is_that_of_the_file(make, blocks, tmp_path):
    """Of windows and a grid of the same size: the maps are those of the file's encoder, with new heads."""
    first, imgs = make(), torch.randn(2, 3, 32, 32)
    path = saved(tmp_path / "first.pth", first)
    second = started(path, make())
    with torch.no_grad():
        for ours, theirs in zip(second.forward_maps(imgs, blocks), first.eval().forward_maps(imgs, blocks)):
            close(ours, theirs, 1e-6)


@pytest.mark.parametrize("make, options, tables", [(detector, {"window": 4}, 8), (segmenter, {}, 4)])
def test_other_windows_and_another_grid(make, options, tables, tmp_path, capsys):
    path = saved(tmp_path / "first.pth", make())
    model = started(path, make(64, **options))
    assert f"{tables} tables of relative positions interpolated" in capsys.readouterr().out
    assert all(float(table.abs().max()) > 0 for name, table in model.state_dict().items() if RELATIVE in name)
    with torch.no_grad():
        assert model.forward_maps(torch.randn(1, 3, 64, 64), [3])[0].isfinite().all()


@pytest.mark.parametrize(
    "first, second, message",
    [
        (detector, lambda: detector(rel_pos=False), "a detector of main_detect.py with .* has none: give --rel_pos"),
        (segmenter, lambda: segmenter(rel_pos=False), "a segmenter of main_segment.py with .* give --rel_pos"),
        (detector, segmenter, "with relative positions .*rel_pos_h.* those of this model are of another kind"),
        (segmenter, detector, "with relative positions .*bias_table.* those of this model are of another kind"),
    ],
)
def test_positions_that_would_be_lost_are_refused(first, second, message, tmp_path):
    path = saved(tmp_path / "first.pth", first())
    with pytest.raises(UserError, match=message):
        started(path, second())


def test_a_file_without_relative_positions(tmp_path):
    """They stay zero, so that attention is that of the file."""
    path = saved(tmp_path / "first.pth", detector(rel_pos=False))
    assert not any(
        float(table.abs().max()) for name, table in started(path, detector()).state_dict().items() if RELATIVE in name
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (detector, "is a detector of main_detect.py; its encoder has .*rel_pos_h"),
        (lambda: detector(rel_pos=False), "is a detector of main_detect.py, whose encoder has no norm after"),
        (lambda: segmenter(rel_pos=False), "is a segmenter of main_segment.py, whose encoder has no norm after"),
    ],
)
def test_what_the_tools_for_classifiers_say(make, message, tmp_path):
    path = saved(tmp_path / "dense.pth", make())
    for tool, flags in ((predict, f"--data {tmp_path} --out {tmp_path}/a.csv"), (export, "--to onnx --out a.onnx")):
        with pytest.raises(UserError, match=message + ".*tools/visualize_dense.py"):
            tool.main(tool.get_args_parser().parse_args(f"{path} {flags}".split()))


def test_a_segmenter_with_a_linear_head(tmp_path):
    """Its encoder is a whole ViT with its final norm, which has features; but it classifies no images."""
    path = saved(tmp_path / "linear.pth", segmenter(rel_pos=False, head="linear"))
    with pytest.raises(UserError, match=r"is a segmenter of main_segment\.py, which classifies no images"):
        predict.main(predict.get_args_parser().parse_args([path, "--data", str(tmp_path), "--out", "a.csv"]))
    args = judging.evaluation_parser("", features=False).parse_args([path, "--device", "cpu"])
    assert judging.open_encoder(args, path).model.norm.weight.std() > 0.05  # not that of a new norm
