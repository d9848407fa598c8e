"""DMAE: geometry, file and sanity check of the teacher."""

import re

import pytest
import torch
from helpers.launch import checkpoint, log_rows
from helpers.teachers import BASE, made, pretrain, switches

from methods.dmae import DMAE, aligned_blocks
from models_encoder import gather_tokens
from models_mae import build_model
from util.errors import UserError


def test_default_blocks():
    assert aligned_blocks(None, 12, 24) == [(8, 17)]
    assert aligned_blocks("9:18,12:24", 12, 24) == [(8, 17), (11, 23)]
    assert aligned_blocks(None, 1, 2) == [(0, 0)]


def test_teacher_is_checked_and_not_stored(image_folder, tmp_path, teacher, capsys):
    """The teacher's loss on the first batch is printed once; the checkpoint has its hash; --resume refuses another
    file."""
    flags = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 32 --save_freq 1 --output_dir {tmp_path} "
    flags += f"{switches(['dmae'])}".replace("--dmae_teacher", f"--dmae_teacher {teacher}")
    pretrain(f"{flags} --dmae_blocks 2:3,4:4 --dmae_proj mlp")
    output = capsys.readouterr().out
    result = re.findall(r"teacher: reconstruction loss (\S+) on the first batch, (\S+) if it predicted zeros", output)
    assert len(result) == 1
    loss, nothing = (float(number) for number in result[0])
    rows = log_rows(teacher.parent)
    # Colour and noise: the teacher is better than predicting the mean, and close to the loss in its log.
    assert loss < 0.9 * nothing and loss == pytest.approx(rows[-1]["train/pixels"], rel=0.25)
    assert {"train/distillation_2", "train/distillation_4"} <= log_rows(tmp_path)[0].keys()
    state = checkpoint(tmp_path, "checkpoint-1.pth")["methods"]
    assert {name.split(".")[1] for name in state} == {"projections", "_extra_state"}
    assert len(state["dmae._extra_state"]["sha256"]) == 64

    other = tmp_path / "other.pth"
    content = torch.load(teacher, weights_only=True)
    content["model"]["norm.bias"] += 1
    torch.save(content, other)
    with pytest.raises(UserError, match="is not the file this run began with"):
        pretrain(f"{flags} --dmae_blocks 2:3,4:4 --dmae_proj mlp --resume auto --dmae_teacher {other}")
    del content["model"]["blocks.1.norm1.bias"]
    torch.save(content, other)
    with pytest.raises(UserError, match=r"blocks\.1\.norm1\.bias"):
        pretrain(f"{flags} --dmae_blocks 2:3,4:4 --overwrite --dmae_teacher {other}")


def test_untrained_teacher_is_reported(tmp_path, capsys):
    args = "--norm_pix_loss"
    model = made(args)[0].model
    torch.save(
        {
            "model": model.state_dict(),
            "args": {
                "model": "mae_vit_micro_patch4",
                "norm_pix_loss": True,
                "input_size": 16,
                "decoder_embed_dim": 32,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
            },
        },
        tmp_path / "raw.pth",
    )
    pretrainer, _ = made(f"{args} --dmae_teacher {tmp_path}/raw.pth")
    pretrainer(torch.randn(8, 3, 16, 16), 0.75, torch.rand(8, 16))
    assert "WARNING: hardly better" in capsys.readouterr().out


def test_other_pixels_are_warned_about(teacher, capsys):
    made(f"--dmae_teacher {teacher}")
    assert "warning: the teacher was trained on pixels with mean 0.500/0.500/0.500" in capsys.readouterr().out
    made(switches(["dmae"], teacher))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("positions", ["inner", "fresh"])
def test_larger_teacher_grid(tmp_path, positions):
    """A teacher of another patch and image size, given as weights alone: the positions of its inner tokens."""
    whole = build_model("mae_vit_micro_patch4", img_size=64, patch_size=8)
    with torch.no_grad():
        whole.pos_embed.normal_()
    torch.save(
        {"model": whole.state_dict(), "args": {"model": "mae_vit_micro_patch4", "patch_size": 8, "input_size": 64}},
        tmp_path / "t.pth",
    )
    pretrainer, _ = made(f"--dmae_teacher {tmp_path}/t.pth --dmae_teacher_pos {positions}")
    method = pretrainer.methods["dmae"]
    imgs = torch.randn(2, 3, 16, 16)
    ids = torch.tensor([[5, 0, 15], [1, 2, 3]])
    features = method.teacher_features(imgs, ids)[2]
    # With explicit padding: 16 px resized to 4 patches of 8, padded by 16 px of zeros, rows and columns 2 to 5 kept.
    padded = torch.nn.functional.pad(torch.nn.functional.interpolate(imgs, (32, 32), mode="bilinear"), (16,) * 4)
    kept = [8 * row + column for row in range(2, 6) for column in range(2, 6)]
    tokens = whole.patch_embed(padded)[:, kept]
    fresh = build_model("mae_vit_micro_patch4", img_size=16).pos_embed
    table = whole.pos_embed[:, 1:][:, kept] if positions == "inner" else fresh[:, 1:]
    cls = (whole.pos_embed if positions == "inner" else fresh)[:, :1]
    x = torch.cat([(whole.cls_token + cls).expand(2, -1, -1), gather_tokens(tokens + table, ids)], 1)
    for block in whole.blocks[:3]:
        x = block(x)
    assert torch.allclose(features, x, atol=1e-5)


def test_teacher_files_without_metadata(tmp_path, capsys):
    """Weights alone: the grid is that of their positions; a decoder whose number of heads is unknown is left out with
    a message."""
    whole = build_model("mae_vit_micro_patch4", img_size=16, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    with torch.no_grad():
        whole.pos_embed.normal_()
    torch.save(whole.state_dict(), tmp_path / "bare.pth")
    pretrainer, _ = made(f"--dmae_teacher {tmp_path}/bare.pth")
    assert torch.equal(pretrainer.methods["dmae"]._teacher[0].network.pos_embed, whole.pos_embed)
    output = capsys.readouterr().out
    assert "(width 32, depth 1) is not its model's: left out" in output and "interpolated" not in output
    with pytest.raises(UserError, match="takes 3 channels, the student 1"):
        made(f"--dmae_teacher {tmp_path}/bare.pth --in_chans 1 --mean 0.5 --std 0.5")


def test_teacher_follows_the_model(teacher):
    """The teacher follows to another type, and so to another device; no parameters include it."""
    pretrainer, _ = made(switches(["dmae"], teacher))
    pretrainer.double()
    method = pretrainer.methods["dmae"]
    assert method._teacher[0].network.cls_token.dtype == torch.float64
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"projections"}
    assert isinstance(method, DMAE)
