"""Segmentation and detection start from every file that fine-tuning starts from, and from each other's runs; positions
are interpolated once, to images of any shape."""

import argparse
import shlex

import pytest
import torch
from helpers.exports import exported, saved, scrambled
from helpers.launch import checkpoint
from timm.models.vision_transformer import VisionTransformer as TimmViT

import main_detect
import main_segment
import models_detect
import models_mae
import models_segment
import models_vit
from main_linprobe import Probe
from util.errors import UserError
from util.pos_embed import interpolate_grid

MODEL = "vit_micro_patch4"
BASE = "--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 2 1 --batch_size 2 --max_steps 1"
BASE += " --head_width 8 --num_workers 0 --device cpu --amp_dtype fp32"
MAINS = {
    "segment": (main_segment, f"{BASE} --head_norm layer"),
    "detect": (main_detect, f"{BASE} --detector faster --window 3"),
}
FROZEN = "--trainable_blocks 0 --layer_decay 1"  # the encoder that is saved is the one that was loaded


def start(name: str, flags: str, folder) -> dict:
    """Train for one step; return the tensors of the checkpoint."""
    main, base = MAINS[name]
    main.main(main.get_args_parser().parse_args(shlex.split(f"{base} {flags} --output_dir '{folder}'")))
    return checkpoint(folder, "checkpoint-0.pth")["model"] if str(folder) else {}


# Files of 16 x 16 pixels, 4 x 4 patches. Each function writes one, and returns its encoder and the flags that read it.


def official(folder):
    """The layout of the official MAE: flags are a Namespace, beside an optimizer."""
    model = scrambled(models_mae.build_model(f"mae_{MODEL}", img_size=16))
    flags = argparse.Namespace(model=f"mae_{MODEL}", input_size=16, norm_pix_loss=True)
    torch.save({"model": model.state_dict(), "optimizer": {}, "epoch": 9, "args": flags}, folder / "file.pth")
    return model, folder / "file.pth", ""


def export(folder):
    model, path, _ = official(folder)
    return model, exported(path, "safetensors", folder / "x.safetensors"), ""


def timm(folder):
    """A bare state dict of another library, whose model has to be named."""
    model = scrambled(TimmViT(img_size=16, patch_size=4, embed_dim=128, depth=4, num_heads=4, num_classes=7))
    torch.save(model.state_dict(), folder / "timm.pth")
    return model, folder / "timm.pth", f"--model {MODEL}"


def teacher(folder):
    """A run of RC-MAE: its teacher, not its student."""
    student, model = (scrambled(models_mae.build_model(f"mae_{MODEL}", img_size=16)) for _ in range(2))
    states = {"model": student.state_dict(), "model_ema": model.state_dict()}
    torch.save({**states, "args": {"model": f"mae_{MODEL}", "input_size": 16}}, folder / "rc.pth")
    return model, folder / "rc.pth", "--checkpoint_key model_ema"


def classifier(folder):
    """A fine-tuned one, whose norm is that of the mean of the patches."""
    model = scrambled(models_vit.build_model(MODEL, img_size=16, num_classes=7, global_pool=True))
    return model, saved(folder / "finetuned.pth", model), ""


def attentive_probe(folder):
    model = scrambled(Probe(models_vit.build_model(MODEL, img_size=16, num_classes=7), attentive=True).vit)
    return model, saved(folder / "probe.pth", model), ""


def segmenter(folder):
    model = scrambled(models_segment.build_model(MODEL, 5, img_size=16))
    return model, saved(folder / "segmenter.pth", model, head="upernet"), ""


def detector(folder):
    model = scrambled(models_detect.build_model(MODEL, 5, img_size=16, rel_pos=False, head_width=8))
    return model, saved(folder / "detector.pth", model, pyramid="simple"), ""


FILES = [official, export, timm, teacher, classifier, attentive_probe, segmenter, detector]


@pytest.mark.parametrize("name", MAINS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_every_file_that_fine_tuning_takes(name, file, tmp_path):
    """All of the encoder is taken. Positions are interpolated once, from the file's table, to a grid that is not
    square."""
    model, path, flags = file(tmp_path)
    state, encoder = start(name, f"--finetune {path} {flags} --input_size 32 64 {FROZEN}", tmp_path / "run"), {}
    for key, value in model.state_dict().items():
        if key.startswith(("blocks.", "patch_embed.")) or key == "cls_token":
            encoder[key] = value
    assert len(encoder) == 48 + 3 and all(torch.equal(state[key], value) for key, value in encoder.items())
    positions = interpolate_grid(model.state_dict()["pos_embed"], (4, 4), (8, 16))
    assert torch.equal(state["pos_embed"], positions)


def test_a_run_is_the_source_of_the_next_one(tmp_path):
    """A segmenter for 16 x 32 pixels starts a detector for 32 x 32: its own table is the source, with the grid that it
    has. Neither `--eval` nor `--resume` interpolates, which would be a second time."""
    _, path, _ = official(tmp_path)
    first = start("segment", f"--finetune {path} --input_size 16 32 --lr 1e-3", tmp_path / "first")
    before = f"{tmp_path}/first/checkpoint-0.pth"
    second = start("detect", f"--finetune {before} --input_size 32 {FROZEN}", tmp_path / "second")
    assert torch.equal(second["pos_embed"], interpolate_grid(first["pos_embed"], (4, 8), (8, 8)))
    assert torch.equal(second["blocks.1.attn.qkv.weight"], first["blocks.1.attn.qkv.weight"])
    with pytest.raises(UserError, match=r"does not fit these flags: .*pos_embed"):
        start("segment", f"--eval --finetune {before} --input_size 32", "")
    with pytest.raises(UserError, match=r"was written with --input_size \[16, 32\], this run has 32"):
        start("segment", f"--resume {before} --input_size 32 --epochs 2", tmp_path / "other")


def test_relative_positions(tmp_path):
    """They start a run of the same main, and are refused where they would be lost."""
    model = scrambled(models_detect.build_model(MODEL, 5, img_size=32, head_width=8, window=3))
    path = saved(tmp_path / "relative.pth", model, input_size=32)
    state = start("detect", f"--finetune {path} --input_size 32 {FROZEN}", tmp_path / "run")
    tables = {name: table for name, table in model.state_dict().items() if "rel_pos" in name}
    assert len(tables) == 8 and all(torch.equal(state[name], table) for name, table in tables.items())
    with pytest.raises(UserError, match="with relative positions"):
        start("segment", f"--finetune {path}", "")
