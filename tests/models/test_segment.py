"""Segmentation models: UPerNet against recorded numbers of transformers' BEiT, the linear head, losses, loading."""

import json
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.dense_script import rank_texts, segment_problem
from helpers.launch import ranks
from helpers.tolerances import TOL32, close
from torch import nn

import models_mae
import models_segment
import models_vit
from models_segment import Segmenter, build_model, default_blocks
from util.errors import UserError
from util.lr_decay import param_groups_lrd
from util.weights.load import load_into, read_weights

NAMES = [  # of transformers' BEiT and ours
    (r"beit\.embeddings\.cls_token", "cls_token"),
    (r"beit\.embeddings\.position_embeddings", "pos_embed"),
    (r"beit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"beit\.layers", "blocks"),
    (r"attention\.o_proj", "attn.proj"),
    ("layernorm_before", "norm1"),
    ("layernorm_after", "norm2"),
    (r"fpn\.fpn1\.conv_transpose1", "neck.0.0"),
    (r"fpn\.fpn1\.normalization", "neck.0.1"),
    (r"fpn\.fpn1\.conv_transpose2", "neck.0.3"),
    (r"fpn\.fpn2", "neck.1"),
    (r"psp_modules\.blocks\.(\d)\.conv", r"pools.\1.1"),
    ("psp_bottleneck", "bottleneck"),
    ("lateral_convs", "laterals"),
    ("fpn_convs", "smooth"),
    ("fpn_bottleneck", "fuse"),
    (r"auxiliary_head\.convs\.0", "auxiliary_head.0"),
    (r"auxiliary_head\.classifier", "auxiliary_head.2"),
    (r"\.convolution\.", ".0."),
    (r"\.normalization\.", ".1."),
]


def from_beit(state):
    """The state dict of BEiT in our names. Its layer scales are 1; its keys have no bias, which a softmax ignores."""
    state = {name: tensor.double() for name, tensor in state.items() if "lambda" not in name}
    for name in [name for name in state if name.endswith("q_proj.weight")]:
        q, k, v = (
            {
                part: state.pop(name.replace("q_proj.weight", f"{letter}_proj.{part}"), None)
                for part in ("weight", "bias")
            }
            for letter in "qkv"
        )
        k["bias"] = torch.zeros_like(q["bias"])
        for part in ("weight", "bias"):
            state[name.replace("attention.q_proj.weight", f"attn.qkv.{part}")] = torch.cat([q[part], k[part], v[part]])
    for theirs, ours in NAMES:
        state = {re.sub(theirs, ours, name): tensor for name, tensor in state.items()}
    return state


def beit_sized(**options):
    return Segmenter(
        classes=7,
        img_size=32,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=4,
        aux_width=16,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **options,
    )


@pytest.fixture
def upernet(golden):
    ref = golden("upernet_beit")
    model = beit_sized(dropout=0.0).double()
    model.load_state_dict(from_beit(ref.group("sd/")))
    return ref, model


def test_upernet_is_that_of_beit(upernet):
    ref, model = upernet
    imgs, labels = ref["imgs"].double(), ref["labels"]
    close(model.eval()(imgs), ref["logits_eval"])
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    close(model(imgs), ref["logits_train"])
    model.load_state_dict(state)
    losses = model(imgs, labels)
    assert set(losses) == {"pixel_loss", "auxiliary_loss"}
    labelled = (labels != 255).double().mean()  # theirs is a mean over labelled pixels, ours over all
    close(sum(losses.values()) / labelled, ref["loss"])
    (sum(losses.values()) / labelled).backward()
    close(model.patch_embed.proj.weight.grad, ref["grad_patch"])
    close(model.decode_head.classifier.weight.grad, ref["grad_classifier"])
    assert all(p.grad is not None for p in model.parameters())  # else DDP waits for a gradient


def test_upernet_in_float32(upernet):
    ref, model = upernet
    close(model.float().eval()(ref["imgs"]), ref["logits_eval"].float(), TOL32)


def test_loss_counts_pixels_not_labelled_ones():
    """The mean over two images is the mean of the losses of each, however many pixels are labelled."""
    model = beit_sized(head_norm="layer").double().eval()
    imgs, labels = torch.randn(2, 3, 32, 32).double(), torch.randint(0, 7, (2, 32, 32))
    labels[0, 4:] = 255
    both = model(imgs, labels)
    single = [model(imgs[i : i + 1], labels[i : i + 1]) for i in (0, 1)]
    for name, loss in both.items():
        close(loss, (single[0][name] + single[1][name]) / 2)
    model.ignore_label = 3
    assert model(imgs, torch.full_like(labels, 3))["pixel_loss"] == 0


def test_linear_head_reads_normalised_patch_tokens():
    model = build_model("vit_micro_patch4", 5, head="linear", img_size=(16, 24)).eval()
    nn.init.normal_(model.norm.weight)
    imgs = torch.randn(2, 3, 16, 24)
    tokens = model.forward_patches(imgs)  # of the classifier
    norm, layer = model.decode_head
    logits = F.linear(tokens / (1 + norm.eps) ** 0.5, layer.weight[..., 0, 0], layer.bias)
    logits = logits.transpose(1, 2).unflatten(2, (4, 6))
    expected = F.interpolate(logits, size=(16, 24), mode="bilinear", align_corners=False)
    close(model(imgs), expected, TOL32)
    assert set(model(imgs, torch.zeros(2, 16, 24, dtype=torch.int64))) == {"pixel_loss"}


def test_linear_probe_trains_the_head_alone():
    model = build_model("vit_micro_patch4", 5, head="linear", img_size=16)
    model.train_last_blocks(0)
    model(torch.randn(1, 3, 16, 16), torch.zeros(1, 16, 16, dtype=torch.int64))["pixel_loss"].backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"decode_head.{name}" for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    }
    model.train_last_blocks(1)
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "norm", "decode_head"}


@pytest.mark.parametrize(
    "depth, blocks", [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 2, 3]), (2, [0, 0, 1, 1])]
)
def test_default_blocks(depth, blocks):
    assert default_blocks("upernet", depth) == blocks and default_blocks("linear", depth) == [depth - 1]


def test_layer_decay_groups_as_beit():
    """Relative positions are in their block, neck and heads after all blocks, as in BEiT's code."""
    model = build_model("vit_micro_patch4", 5, img_size=16, rel_pos=True)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_lrd(model, 0.05, model.no_weight_decay(), 0.65)
    scales = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert scales["blocks.1.attn.rel_pos_bias.relative_position_bias_table"] == (pytest.approx(0.65**3), 0.05)
    assert scales["blocks.1.attn.qkv.weight"] == (pytest.approx(0.65**3), 0.05)
    assert scales["neck.1.weight"] == scales["decode_head.classifier.weight"] == (1, 0.05)
    assert scales["auxiliary_head.0.1.weight"] == (1, 0) and scales["pos_embed"] == (pytest.approx(0.65**5), 0)


def mae_file(path, img_size=16):
    mae = models_mae.build_model("mae_vit_micro_patch4", img_size=img_size)
    torch.save({"model": mae.state_dict()}, path)
    return mae


@pytest.mark.parametrize("rel_pos", [False, True])
def test_loading_an_autoencoder(tmp_path, rel_pos):
    """Everything of the encoder is taken, positions are interpolated from the file's table to a grid that is not
    square, neck and head are new; the new relative positions change nothing."""
    mae = mae_file(tmp_path / "mae.pth")
    weights = read_weights(tmp_path / "mae.pth")
    model = build_model("vit_micro_patch4", 5, img_size=(16, 32), rel_pos=rel_pos)
    report = load_into(model, weights)
    new = {name.split(".")[0] for name in report.missing if "rel_pos" not in name}
    assert new == {"neck", "decode_head", "auxiliary_head"} and report.interpolated == ["pos_embed"]
    assert report.grids == "4x4 -> 4x8" and {n.split(".")[0] for n in report.unexpected} >= {"norm", "decoder_embed"}
    assert any("rel_pos" in name for name in report.missing) == rel_pos
    torch.testing.assert_close(model.blocks[2].mlp.fc1.weight, mae.blocks[2].mlp.fc1.weight)
    plain = models_vit.build_model("vit_micro_patch4", img_size=(16, 32), num_classes=0)
    load_into(plain, weights)
    imgs = torch.randn(2, 3, 16, 32)
    tokens = plain.eval().forward_tokens(imgs)[:, 1:]
    maps = model.eval().forward_maps(imgs, [1, 3])
    close(maps[1].flatten(2).transpose(1, 2), tokens, TOL32)


def test_the_encoder_comes_back_out_of_a_segmenter(tmp_path):
    model = build_model("vit_micro_patch4", 5, img_size=16)
    torch.save({"model": model.state_dict()}, tmp_path / "segmenter.pth")
    weights = read_weights(tmp_path / "segmenter.pth")
    vit = models_vit.build_model("vit_micro_patch4", img_size=16, num_classes=3)
    report = load_into(vit, weights)
    assert {name.split(".")[0] for name in report.unexpected} == {"neck", "decode_head", "auxiliary_head"}
    assert set(report.missing) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    torch.testing.assert_close(vit.blocks[3].attn.qkv.weight, model.blocks[3].attn.qkv.weight)


def test_a_file_with_relative_positions_is_another_encoder(tmp_path):
    torch.save(
        {"model": build_model("vit_micro_patch4", 5, img_size=16, rel_pos=True).state_dict()}, tmp_path / "b.pth"
    )
    with pytest.raises(UserError, match=r"a segmenter of main_segment\.py; its encoder has .*rel_pos_bias"):
        read_weights(tmp_path / "b.pth")


def test_gradient_checkpointing_and_unfused_attention_change_nothing():
    model = build_model("vit_micro_patch4", 5, img_size=16, rel_pos=True, head_norm="layer", dropout=0.0).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1) if parameter.ndim > 1 else None
    imgs, labels = torch.randn(2, 3, 16, 16).double(), torch.randint(0, 5, (2, 16, 16))

    def gradients():
        model.zero_grad()
        sum(model(imgs, labels).values()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain = gradients()
    model.set_grad_checkpointing()
    close(gradients(), plain)
    for block in model.blocks:
        block.attn.fused_attn = False
    close(gradients(), plain)


REFUSED = {
    "batch": (dict(), "--head_norm layer"),
    "blocks": (dict(feature_blocks=[0, 1, 2, 9]), "--feature_blocks 9: the encoder has the blocks 0 to 3"),
    "count": (dict(feature_blocks=[0, 1]), "--head upernet needs 4, not 2"),
    "norm": (dict(head_norm="group"), "--head_norm 'group' is not known"),
    "head": (dict(head="mask2former"), "use upernet or linear"),
    "size": (dict(img_size=20, head_norm="layer"), "images are 16x16, but the model has positions for 20x20"),
    "patch": (dict(img_size=18), "must be a multiple of the patch size"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refusals(mistake):
    options, message = REFUSED[mistake]
    with pytest.raises(UserError, match=re.escape(message)):
        build_model("vit_micro_patch4", 5, **{"img_size": 16, **options}).train()(torch.zeros(1, 3, 16, 16))


def test_one_image_with_layer_norm_trains():
    model = build_model("vit_micro_patch4", 5, img_size=16, head_norm="layer").train()
    assert torch.isfinite(model(torch.randn(1, 3, 16, 16))).all()
    assert models_segment.HEADS == ["upernet", "linear"]


def test_two_ranks_train_as_one():
    """Gradients of two ranks with two images each are those of four images, although one has ignored pixels."""
    model, imgs, labels = segment_problem()
    sum(model(imgs, labels).values()).backward()
    norms = [p.grad.norm().item() for p in model.parameters() if p.requires_grad]
    for text in rank_texts(ranks("helpers.dense_script", "segment", 2)):
        assert json.loads(text) == pytest.approx(norms, rel=1e-9)
