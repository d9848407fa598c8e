"""DMAE with teachers from timm: what they compute, where they look, and that they are neither trained nor stored."""

import math

import pytest
import timm
import torch
from helpers.launch import checkpoint, same_tensors
from helpers.teachers import BASE, made, pretrain, stepped
from helpers.timm_folders import saved_folder
from safetensors.torch import save_file

from methods.dmae_timm import resized
from models_encoder import gather_tokens
from util.errors import UserError

PIXELS = "--mean 0.3 0.4 0.5 --std 0.2 0.3 0.4"
IDS = torch.tensor([[5, 0, 15], [1, 2, 3]])


def plain_file(tmp_path):
    """Write a plain ViT for the student's grid of 4x4 patches; return its file."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=12)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors"


def test_a_plain_vit_given_both_ways(tmp_path):
    """As a file of ours and through timm the targets are the same, with timm's normalisation of pixels (0.5, 0.5)."""
    file, alike = plain_file(tmp_path), "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5"
    ours, _ = made(f"--dmae_teacher {file} {alike}")
    theirs, _ = made(f"--dmae_teacher timm:vit_tiny_patch16_224={file} {alike}")
    assert theirs.methods["dmae"]._teacher[0].visible_only
    imgs = torch.randn(2, 3, 16, 16)
    one, other = (p.methods["dmae"].teacher_features(imgs, IDS) for p in (ours, theirs))
    assert list(one) == list(other) == [8] and one[8].shape == (2, 4, 192)
    torch.testing.assert_close(one[8], other[8], rtol=1e-4, atol=1e-4)


def test_pixels_are_converted(tmp_path):
    """The teacher sees its own normalisation of the pixels that the student sees."""
    saved_folder(tmp_path / "m", "convnext_atto")
    pretrainer, _ = made(f"--dmae_teacher timm:{tmp_path}/m {PIXELS}")
    pixels = torch.rand(2, 3, 16, 16)
    mean, std, mean_t, std_t = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in ((0.3, 0.4, 0.5), (0.2, 0.3, 0.4), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    )
    teacher = pretrainer.methods["dmae"]._teacher[0]
    torch.testing.assert_close(
        teacher.images((pixels - mean) / std), resized((pixels - mean_t) / std_t, (64, 64)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("architecture", "level", "size"),
    [("convnext_atto", 2, 64), ("vit_small_patch16_dinov3", 0, 64), ("beitv2_base_patch16_224", 0, 64)],
)
def test_whole_image_at_the_visible_places(architecture, level, size, tmp_path):
    """Features of the whole image, gathered where the student sees patches; [cls] only if the teacher has one."""
    saved_folder(tmp_path / "m", architecture)
    pretrainer, _ = made(f"--dmae_teacher timm:{tmp_path}/m {PIXELS}")
    method = pretrainer.methods["dmae"]
    teacher = method._teacher[0]
    assert not teacher.visible_only and teacher.size == (size, size) and list(teacher.levels) == [level]
    imgs = torch.randn(2, 3, 16, 16)
    features = method.teacher_features(imgs, IDS)[level]
    maps = teacher.network.forward_intermediates(
        teacher.images(imgs), indices=[level], norm=False, output_fmt="NCHW", intermediates_only=True
    )[0]
    expected = gather_tokens(maps.flatten(2).transpose(1, 2), IDS)
    assert features.shape[1] == 3 + teacher.has_cls and teacher.has_cls == (architecture != "convnext_atto")
    torch.testing.assert_close(features[:, -3:], expected, rtol=1e-5, atol=1e-5)


def test_coarser_and_finer_stages_meet_the_grid(tmp_path):
    """Stages of other resolutions are resampled to the student's grid."""
    saved_folder(tmp_path / "m", "convnext_atto")
    pretrainer, _ = made(f"--dmae_teacher timm:{tmp_path}/m --dmae_blocks 2:2,4:4 {PIXELS}")
    teacher = pretrainer.methods["dmae"]._teacher[0]
    assert teacher.size == (128, 128)  # the coarsest stage, of 1/32, has the student's grid
    features = teacher.features(torch.randn(2, 3, 16, 16), IDS)
    assert [tuple(f.shape) for f in features.values()] == [(2, 3, 16), (2, 3, 32)]


@pytest.mark.parametrize("architecture", ["convnext_atto", "vit_small_patch14_reg4_dinov2"])
def test_no_gradient_reaches_the_teacher(architecture, tmp_path):
    """Gradients for the student alone; the checkpoint has neither the teacher's weights nor its state."""
    saved_folder(tmp_path / "m", architecture)
    pretrainer, _ = made(f"--dmae_teacher timm:{tmp_path}/m {PIXELS}")
    method = pretrainer.methods["dmae"]
    before = {name: value.clone() for name, value in method._teacher[0].state_dict().items()}
    gradients = stepped(pretrainer, 2)
    assert all(gradients[name].abs().sum() > 0 for name in gradients if "projections" in name)
    assert not any(p.requires_grad for p in method._teacher[0].parameters())
    after = method._teacher[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name.split(".")[0] for name in method.state_dict()} == {"projections", "_extra_state"}
    assert math.isfinite(sum(pretrainer(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16)).values()).item())


def test_resume(image_folder, tmp_path):
    """A resumed run ends like the uninterrupted one, also with an untrained teacher; another teacher is refused."""
    teacher = "timm:resnet10t=random --dmae_blocks 3:4"
    flags = f"{BASE} --data_path {image_folder} --batch_size 32 --save_freq 1 --keep 0 {PIXELS}"
    pretrain(f"{flags} --epochs 2 --output_dir {tmp_path}/whole --dmae_teacher {teacher}")
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "checkpoint-0.pth").write_bytes((tmp_path / "whole" / "checkpoint-0.pth").read_bytes())
    resumed = f"{flags} --epochs 2 --output_dir {tmp_path}/part --resume auto --dmae_teacher"
    pretrain(f"{resumed} {teacher}")
    whole, part = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("whole", "part"))
    assert same_tensors(whole["model"], part["model"]) and same_tensors(whole["optimizer"], part["optimizer"])
    (tmp_path / "part" / "checkpoint-1.pth").unlink()
    saved_folder(tmp_path / "m", "resnet10t")
    with pytest.raises(UserError, match="is not the file this run began with"):
        pretrain(f"{resumed} timm:{tmp_path}/m --dmae_blocks 3:4")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("timm:resnet10t=random --dmae_teacher_model mae_vit_base_patch16", "--dmae_teacher_model has no effect"),
        ("timm:resnet10t=random --dmae_teacher_pos fresh", "--dmae_teacher_pos fresh has no effect"),
        ("timm:resnet10t=random --dmae_blocks 1:9", "the teacher 1 to 5"),
        ("timm:resnet10t=random --dmae_blocks 3:4 --dmae_proj none", "--dmae_proj none needs a student as wide"),
        ("timm:resnet10t=random --dmae_blocks 3:5 --dmae_teacher_size 32", "cannot meet the student's 4x4 patches"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        made(f"--dmae_teacher {flags} {PIXELS}")
