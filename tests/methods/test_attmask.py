"""AttMask: attention by hand, exactly the attended patches go, encoders of every origin, resume, two processes."""

import numpy as np
import pytest
import timm
import torch
from helpers.inject import stop_at
from helpers.launch import checkpoint, log_rows, ranks, same_tensors
from helpers.teachers import BASE, made, pretrain, stepped
from helpers.timm_folders import saved_folder
from safetensors.torch import save_file

from evaluation.masks import mask_method, method_scores
from methods import METHODS
from methods.attmask import AttMask, attention_ranks
from methods.dmae_timm import resized
from methods.rcmae import momentum_at
from models_mae import visible_patches
from models_timm import TimmEncoder
from models_vit import build_model
from util.compute.attention_maps import cls_attention
from util.data.sample_rng import redrawn, sample_noise
from util.errors import UserError
from util.weights.load import read_weights

NOISE = sample_noise(0, 3, torch.arange(200), 64)


# Ranks --------------------------------------------------------------------------------------------------------------


def test_known_answers():
    attention, noise = torch.tensor([[0.1, 0.4, 0.3, 0.2]]), torch.tensor([[0.4, 0.1, 0.3, 0.2]])
    assert attention_ranks(attention, noise, "high", 0.5).tolist() == [[0, 3, 2, 1]]
    assert attention_ranks(attention, noise, "low", 0.5).tolist() == [[3, 0, 1, 2]]
    assert attention_ranks(attention, noise, "hint", 0.5).tolist() == [[1, 0, 3, 2]]  # the most attended one stays
    equal = torch.full((1, 4), 0.25)
    assert attention_ranks(equal, noise, "high", 0.5).tolist() == [[3, 0, 2, 1]]  # ties by noise


@pytest.mark.parametrize("rule", ["high", "hint", "low"])
@pytest.mark.parametrize("ratio", [0.3, 0.75, 0.9])
def test_the_removed_patches(rule, ratio):
    """As many as for random masks: the most attended ones, the least attended ones, or the most attended ones after
    three of the top six (half of a tenth of 64), which stay."""
    attention = torch.rand(200, 64, generator=torch.Generator().manual_seed(0))
    ranks, visible = attention_ranks(attention, NOISE, rule, 0.5), visible_patches(64, ratio)
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(64.0).expand(200, -1))
    removed = ranks >= visible
    order = attention.argsort(dim=1, descending=rule != "low")
    if rule == "hint":
        stays = ~removed.gather(1, order)
        assert (stays[:, :6].sum(dim=1) == 3).all()
        assert len({tuple(top.tolist()) for top in stays[:, :6]}) == 20  # all choices of three of six occur
        others = stays[:, 6:].int()
        assert (others.diff(dim=1) >= 0).all()  # below the top six: the most attended ones are removed
    else:
        assert removed.gather(1, order)[:, : 64 - visible].all()


def test_hints_are_keyed_to_the_image():
    attention = torch.rand(200, 64)
    ranks = attention_ranks(attention, NOISE, "hint", 0.5)
    assert torch.equal(attention_ranks(attention[50:60], NOISE[50:60], "hint", 0.5), ranks[50:60])
    assert not torch.equal(attention_ranks(attention, redrawn(NOISE), "hint", 0.5), ranks)
    assert torch.equal(
        attention_ranks(attention, redrawn(NOISE), "high", 0.5), attention_ranks(attention, NOISE, "high", 1)
    )


# Attention ----------------------------------------------------------------------------------------------------------


def by_hand(model, imgs):
    """softmax(Q K^T / sqrt(d)) of [cls] in the last block, head by head, then the mean over heads: (N, L)."""
    tokens = model.patch_embed(imgs) + model.pos_embed[:, 1:]
    tokens = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(len(imgs), -1, -1), tokens], dim=1)
    for block in model.blocks[:-1]:
        tokens = block(tokens)
    last = model.blocks[-1]
    width, count = tokens.shape[-1], last.attn.num_heads
    products = last.norm1(tokens) @ last.attn.qkv.weight.T + last.attn.qkv.bias
    heads = []
    for head in range(count):
        d = width // count
        queries = products[..., head * d : (head + 1) * d]
        keys = products[..., width + head * d : width + (head + 1) * d]
        heads.append(torch.softmax(queries @ keys.transpose(1, 2) / d**0.5, dim=-1)[:, 0, 1:])
    return torch.stack(heads).mean(dim=0)


def test_attention_is_that_of_the_last_block():
    pretrainer, _ = made("--attmask high")
    imgs = torch.randn(4, 3, 16, 16)
    expected = by_hand(pretrainer.model, imgs)
    method = pretrainer.methods["attmask"]
    torch.testing.assert_close(method.attention(imgs), expected)
    assert expected.std(dim=1).min() > 1e-4
    _, out = pretrainer.forward_with_output(imgs, 0.5, torch.rand(4, 16))
    assert torch.equal(out.mask.bool().nonzero(), expected.topk(8, dim=1).values[:, -1:].le(expected).nonzero())


def test_an_encoder_that_attends_to_bright_patches(tmp_path):
    """Weights by hand: the query of [cls] is constant, the key of a patch its brightness. The brightest patches go."""
    encoder = build_model("vit_micro_patch4", img_size=16, num_classes=0)
    state = {name: torch.zeros_like(value) for name, value in encoder.state_dict().items()}
    for name in state:  # the residual stream is what the patch embedding writes
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    state["patch_embed.proj.weight"][0] = 1 / 48  # channel 0: brightness; channel 1 keeps the norm from removing it
    state["patch_embed.proj.bias"][1] = 50
    state["cls_token"][..., 2] = 1
    last = f"blocks.{len(encoder.blocks) - 1}.attn.qkv"
    width = len(state["norm.weight"])
    state[f"{last}.bias"][:width] = 1  # every query
    state[f"{last}.weight"][width, 0] = 100  # the key of head 0
    torch.save({"model": state, "args": {"model": "vit_micro_patch4"}}, tmp_path / "bright.pth")
    pretrainer, _ = made(f"--attmask high --attmask_encoder {tmp_path}/bright.pth")
    order = torch.stack([torch.randperm(16) for _ in range(5)])
    imgs = order.float().view(5, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(-1, 3, -1, -1) / 16
    for ratio, count in ((0.25, 4), (0.75, 12)):
        _, out = pretrainer.forward_with_output(imgs, ratio, torch.rand(5, 16))
        assert torch.equal(out.mask.bool(), order >= 16 - count)


def test_a_file_and_timm_give_the_same(tmp_path):
    """A plain ViT at the student's grid, read by us and by timm, which reads the attention with a hook."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=12)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    alike = "--mean 0.5 0.5 0.5 --std 0.5 0.5 0.5 --attmask high --attmask_encoder"
    ours, _ = made(f"{alike} {tmp_path}/vit.safetensors")
    theirs, _ = made(f"{alike} timm:vit_tiny_patch16_224={tmp_path}/vit.safetensors")
    imgs = torch.randn(2, 3, 16, 16)
    one, other = (pretrainer.methods["attmask"].attention(imgs) for pretrainer in (ours, theirs))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one, by_hand(model, resized(imgs, (64, 64))), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_other_vits_of_timm(architecture, tmp_path):
    """With registers or rotary positions, and with its own normalisation of pixels."""
    saved_folder(tmp_path / "m", architecture)
    pretrainer, _ = made(f"--attmask high --attmask_encoder timm:{tmp_path}/m --mean 0.3 0.4 0.5 --std 0.2 0.3 0.4")
    pixels = torch.rand(2, 3, 16, 16)
    mean, std, mean_t, std_t = (
        torch.tensor(values).view(1, 3, 1, 1)
        for values in ((0.3, 0.4, 0.5), (0.2, 0.3, 0.4), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    )
    method = pretrainer.methods["attmask"]
    encoder = method._frozen[0].network
    assert isinstance(encoder, TimmEncoder) and encoder.img_size == (64, 64)
    weights = cls_attention(encoder, resized((pixels - mean_t) / std_t, (64, 64)))
    torch.testing.assert_close(
        method.attention((pixels - mean) / std), weights[..., 1:].mean(dim=1), rtol=1e-4, atol=1e-6
    )
    assert weights.shape[2] == 17 and not list(method.parameters())


# The method ---------------------------------------------------------------------------------------------------------


def test_the_average_follows_the_encoder():
    """By RC-MAE's momentum; a skipped step leaves it unchanged; it is not trained, and previews do not change it."""
    pretrainer, _ = made("--attmask hint --attmask_momentum 0.9", steps=10)
    network = pretrainer.methods["attmask"].average.network
    name = f"blocks.{len(network.blocks) - 1}.attn.qkv.weight"
    before, student = network.get_parameter(name).clone(), pretrainer.model.get_parameter(name)
    gradients = stepped(pretrainer, 1)
    rate = 1 - momentum_at(0, 10, 0.9)
    torch.testing.assert_close(network.get_parameter(name), before + rate * (student - before))
    assert not any("average" in key and gradients[key] is not None for key in gradients)
    kept = network.get_parameter(name).clone()
    stepped(pretrainer, 1, applied=0.0, first=1)
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    _, out = pretrainer.forward_with_output(imgs, 0.5, noise)
    assert torch.equal(pretrainer.preview_scores(imgs, noise), out.scores)
    assert torch.equal(network.get_parameter(name), kept)
    picture = pretrainer.methods["attmask"].pictures(pretrainer.model, imgs, imgs.sigmoid())["attention"]
    assert picture.shape[0] == 3 and picture.min() >= 0 and picture.max() <= 1


@pytest.mark.parametrize("other", ["--mae_k 1", "--rc_mae --rc_mask different", "--u_mae", "--decoder cross"])
def test_with_other_methods(other, image_folder, tmp_path):
    flags = f"{BASE} --data_path {image_folder} --batch_size 16 --epochs 2 --attmask hint {other}"
    pretrain(f"{flags} --output_dir {tmp_path}")
    assert all(np.isfinite(row["train/loss"]) for row in log_rows(tmp_path))


@pytest.mark.parametrize("encoder", ["ema", "{teacher}", "timm:vit_tiny_patch16_224=random"])
def test_resume_and_tools(encoder, teacher, image_folder, tmp_path, monkeypatch):
    """Bit for bit; the masks of a checkpoint are those of the run; another encoder is refused."""
    encoder = encoder.format(teacher=teacher)
    flags = f"{BASE} --data_path {image_folder} --batch_size 16 --epochs 2 --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25"
    flags += " --attmask hint --attmask_encoder"
    pretrain(f"{flags} {encoder} --output_dir {tmp_path}/whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        pretrain(f"{flags} {encoder} --output_dir {tmp_path}/cut")
    pretrain(f"{flags} {encoder} --output_dir {tmp_path}/cut --resume auto")
    ours, theirs = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("cut", "whole"))
    for key in ("model", "optimizer"):
        assert same_tensors(ours[key], theirs[key])
    stored = {name: value for name, value in theirs["methods"].items() if isinstance(value, torch.Tensor)}
    assert bool(stored) == (encoder == "ema")
    assert all(torch.equal(value, ours["methods"][name]) for name, value in stored.items())

    weights, noise, imgs = (
        read_weights(tmp_path / "whole/checkpoint-1.pth"),
        torch.rand(5, 16),
        torch.randn(5, 3, 16, 16),
    )
    assert mask_method(weights, METHODS) is AttMask
    pretrainer, _ = made(f"--attmask hint --attmask_encoder {encoder} --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25")
    method = pretrainer.methods["attmask"]
    method.load_state_dict({name.removeprefix("attmask."): value for name, value in theirs["methods"].items()})
    expected = method.scores(pretrainer.model, imgs, noise)
    assert torch.equal(method_scores(weights, AttMask, pretrainer.model, imgs, noise), expected)
    if encoder != "ema":
        (tmp_path / "cut/checkpoint-1.pth").unlink()
        with pytest.raises(UserError, match="is not the encoder this run began with"):
            pretrain(f"{flags} timm:vit_small_patch16_224=random --output_dir {tmp_path}/cut --resume auto")


@pytest.mark.parametrize("flags", ["", "--fsdp"])
def test_two_processes_equal_one(flags, image_folder, tmp_path):
    common = f"{BASE} --data_path {image_folder} --epochs 1 --attmask hint --u_mae --lr 1e-3"
    pretrain(f"{common} --batch_size 16 --output_dir {tmp_path}/one")
    ranks("main_pretrain", f"{common} {flags} --batch_size 8 --output_dir {tmp_path}/two", 2)
    ours, theirs = (log_rows(tmp_path / name)[0] for name in ("one", "two"))
    assert ours["train/pixels"] == pytest.approx(theirs["train/pixels"], rel=1e-5)  # sums in another order


def test_grey_images_and_other_patches(tmp_path):
    """A checkpoint of another grid: its positions are resampled, and the attention has the student's grid."""
    encoder = build_model("vit_micro_patch4", img_size=32, num_classes=0, in_chans=1)
    torch.save({"model": encoder.state_dict(), "args": {"model": "vit_micro_patch4"}}, tmp_path / "grey.pth")
    flags = f"--in_chans 1 --attmask high --attmask_encoder {tmp_path}/grey.pth --patch_size 8 --input_size 32"
    pretrainer, _ = made(flags)
    method = pretrainer.methods["attmask"]
    assert method._frozen[0].size == (16, 16)  # 4 x 4 patches of 4 pixels
    assert method.attention(torch.randn(2, 1, 32, 32)).shape == (2, 16)
    with pytest.raises(UserError, match="takes 1 channels, the student 3"):
        made(flags.replace("--in_chans 1", ""))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--attmask all", None),
        ("--attmask_hint 0.5", "--attmask_hint has no effect without --attmask"),
        ("--attmask high --attmask_hint 0.3", "--attmask_hint has no effect with --attmask high"),
        ("--attmask hint --attmask_hint 0", "--attmask_hint 0.0 must lie in"),
        ("--attmask high --attmask_momentum 2", "--attmask_momentum 2.0 must lie between 0 and 1"),
        (
            "--attmask high --attmask_model vit_micro_patch4",
            "--attmask_model has no effect with this --attmask_encoder",
        ),
        (
            "--attmask high --attmask_encoder timm:vit_tiny_patch16_224=random --attmask_momentum 0.9",
            "no effect with this",
        ),
        ("--attmask high --attmask_encoder nothing.pth", "nothing.pth"),
        ("--attmask high --attmask_encoder timm:resnet10t=random", "resnet10t is no ViT"),
        ("--attmask high --attmask_encoder timm:convnext_atto=random", "convnext_atto is no ViT"),
        ("--attmask high --attmask_encoder timm:vit_base_patch16_siglip_224=random", r"has no \[cls\] token"),
        ("--attmask high --attmask_encoder timm:swin_tiny_patch4_window7_224=random", "swin"),
        ("--attmask high --mask block", "--mask and --attmask both decide the mask"),
        ("--attmask low --rc_mae --rc_mask different", "--rc_mask different has no effect with --attmask low"),
        ("--attmask high --decoder cross --decoder_fraction 0.5", "that --attmask, which decides the mask, scores"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(SystemExit if message is None else UserError, match=message):
        made(flags)
