"""Plain ViTs of torchvision and mmpretrain, checkpoints of Lightning, and I-JEPA's ViT without [cls]."""

from functools import partial

import pytest
import torch
from helpers.small_models import assert_same, refusal, saved, scrambled, vit
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

from models_mae import MaskedAutoencoderViT
from util.weights.load import encoder_state, load_into, read_weights

# mmpretrain's name of each of our tensors, `N` for a number.
MMPRETRAIN = {
    "cls_token": "cls_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj": "patch_embed.projection",
    "blocks.N.norm1": "layers.N.ln1",
    "blocks.N.attn.qkv": "layers.N.attn.qkv",
    "blocks.N.attn.proj": "layers.N.attn.proj",
    "blocks.N.norm2": "layers.N.ln2",
    "blocks.N.mlp.fc1": "layers.N.ffn.layers.0.0",
    "blocks.N.mlp.fc2": "layers.N.ffn.layers.1",
    "norm": "ln1",
    "fc_norm": "ln2",
}


def torchvision_vit():
    sizes = dict(image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=128)
    return scrambled(TorchvisionViT(**sizes, num_classes=7))


def in_mmpretrain(state, head):
    """Return our state under mmpretrain's names, the encoder under `backbone.`, the classifier under `head`."""
    renamed = {}
    for name, value in state.items():
        module, _, kind = name.rpartition(".") if "." in name else (name, "", "")
        parts = module.split(".")
        generic = ".".join(["blocks", "N", *parts[2:]]) if parts[0] == "blocks" else module
        if generic == "head":
            renamed[f"{head}.{kind}"] = value
            continue
        theirs = MMPRETRAIN[generic].replace("N", parts[1] if parts[0] == "blocks" else "")
        renamed[f"backbone.{theirs}" + (f".{kind}" if kind else "")] = value
    return renamed


@pytest.mark.parametrize("prefix", ["", "model.", "module.net."])
def test_torchvision_computes_the_same(tmp_path, prefix):
    """Logits of torchvision's own model, with names of the present and of old versions of its MLP."""
    theirs = torchvision_vit()
    ours = vit(norm_layer=partial(nn.LayerNorm, eps=1e-6))
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    old = {name.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): v for name, v in state.items()}
    assert old.keys() != state.keys()
    imgs = torch.randn(2, 3, 16, 16)
    for names in (state, old):
        weights = read_weights(saved(tmp_path, names))
        assert weights.origin == "ViT classifier, torchvision names"
        report = load_into(ours, weights)
        assert not report.missing and not report.unexpected and not report.skipped
        torch.testing.assert_close(ours(imgs), theirs(imgs), rtol=1e-5, atol=1e-5)
    assert "torchvision names" in report.shown(False)


@pytest.mark.parametrize("head", ["head.layers.head", "head.fc"])
@pytest.mark.parametrize("global_pool", [False, True])
def test_mmpretrain_names(tmp_path, head, global_pool):
    """Every tensor has its place, also the classifier beside the backbone."""
    model = vit(global_pool=global_pool)
    content = {"meta": {"epoch": 3}, "state_dict": in_mmpretrain(model.state_dict(), head)}
    weights = read_weights(saved(tmp_path, content))
    assert_same(weights.state, model.state_dict())
    assert weights.origin == "ViT classifier, mmpretrain names"
    report = load_into(vit(global_pool=global_pool), weights)
    assert not report.missing and not report.unexpected
    assert "the prefix backbone. of its names was removed" in str(report)


def test_mmpretrain_pretraining(tmp_path):
    """Of a file of masked pretraining the encoder is read; the decoder under `neck.` has other names and is not."""
    autoencoder = scrambled(MaskedAutoencoderViT(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4))
    encoder = encoder_state(autoencoder.state_dict())
    content = in_mmpretrain(encoder, "") | {"neck.mask_token": torch.ones(1, 1, 8), "neck.ln1.weight": torch.ones(8)}
    weights = read_weights(saved(tmp_path, {"state_dict": content}))
    assert_same(weights.state, encoder)
    assert weights.origin == "MAE encoder, mmpretrain names"
    assert set(weights.dropped) == {"neck.mask_token", "neck.ln1.weight"}


@pytest.mark.parametrize(
    ("extra", "culprit"),
    [
        ("backbone.pre_norm.weight", "norm_pre.weight"),
        ("backbone.layers.0.attn.gamma1.weight", "blocks.0.attn.gamma1.weight"),
        ("backbone.layers.1.ffn.gamma2.weight", "blocks.1.ffn.gamma2.weight"),
        ("backbone.ln2.weight", "backbone.ln1 and backbone.ln2"),
    ],
)
def test_mmpretrain_models_that_compute_something_else(tmp_path, extra, culprit):
    content = in_mmpretrain(vit().state_dict(), "head.fc") | {extra: torch.ones(32)}
    assert culprit in refusal(read_weights, saved(tmp_path, {"state_dict": content}))


def test_two_libraries_in_one_file(tmp_path):
    content = torchvision_vit().state_dict() | {"cls_token": torch.ones(1, 1, 32)}
    assert "names of ours and of torchvision" in refusal(read_weights, saved(tmp_path, content))


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.backbone."])
@pytest.mark.parametrize("names", ["ours", "torchvision"])
def test_lightning(tmp_path, prefix, names):
    """The weights of a Lightning checkpoint, whose hyper-parameters are not flags of ours."""
    model = vit() if names == "ours" else torchvision_vit()
    content = {
        "state_dict": {prefix + name: value for name, value in model.state_dict().items()},
        "hyper_parameters": {"model": "resnet50", "lr": 0.1},
        "pytorch-lightning_version": "2.5.0",
        "optimizer_states": [{"state": {}, "param_groups": []}],
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {},
    }
    weights = read_weights(saved(tmp_path, content, "last.ckpt"))
    report = load_into(vit(), weights)
    assert not report.missing and not report.unexpected and not weights.args
    assert "entry 'state_dict'" in str(report) and f"the prefix {prefix}" in str(report)


def test_ijepa_is_refused_with_the_architecture_that_fits(tmp_path):
    """A [cls] that I-JEPA lacks would change every feature; timm's architecture without [cls] is named."""
    state = {n: v for n, v in vit(num_classes=0).state_dict().items() if n != "cls_token"}
    state["pos_embed"] = state["pos_embed"][:, 1:]
    content = {name: {f"module.{n}": v for n, v in state.items()} for name in ("encoder", "target_encoder")}
    weights = read_weights(saved(tmp_path, content), "target_encoder")
    message = refusal(load_into, vit(), weights)
    assert "without [cls], as I-JEPA's" in message and "timm:vit_huge_patch14_gap_224=" in message
