"""Weights of other libraries: timm and Hugging Face models compute the same here; damaged and hostile files are
refused."""

import argparse
import os
import pickle
import re
from functools import partial

import pytest
import torch
from helpers.small_models import SIZES, mae, refusal, saved, scrambled, vit
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from util.pos_embed import get_2d_sincos_pos_embed
from util.weights.load import encoder_state, load_into, read_weights

# --- refused files


class Payload:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, legacy):
    path, target = tmp_path / "evil.pth", tmp_path / "pwned"
    content = {"model": mae().state_dict(), "args": argparse.Namespace(x=Payload(target))}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(read_weights, path)
    assert "evil.pth is refused" in message and "mkdir" in message and not target.exists()
    torch.load(path, weights_only=False)  # the payload would run
    assert target.exists()


def test_a_plain_malicious_pickle_is_not_run(tmp_path):
    for protocol in (2, 5):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "pwned"), protocol))
        assert "evil.pkl" in refusal(read_weights, tmp_path / "evil.pkl")
    assert not (tmp_path / "pwned").exists()


def test_a_whole_module_is_refused_by_name(tmp_path):
    message = refusal(read_weights, saved(tmp_path, {"model": nn.Linear(2, 2)}))
    assert "torch.nn.modules.linear.Linear" in message
    # The allow-list is open only while reading.
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def broken_files(folder):
    (folder / "zero.pth").write_bytes(b"")
    (folder / "zero.safetensors").write_bytes(b"")
    (folder / "text.pth").write_text("hello world\n" * 10)
    (folder / "page.pth").write_text("<!DOCTYPE html><html></html>")
    (folder / "text.safetensors").write_text("hello world\n" * 10)
    (folder / "brace.pth").write_text("12345678{ no header")
    Image.new("RGB", (8, 8)).save(folder / "image.png")
    (folder / "list2.pth").write_bytes(pickle.dumps([1, 2], 2))
    (folder / "list5.pth").write_bytes(pickle.dumps([1, 2], 5))
    torch.save([1, 2], folder / "saved_list.pth")
    torch.save(torch.zeros(2), folder / "tensor.pth")
    torch.save({"model": {"a": torch.zeros(2000)}}, folder / "whole.pth")
    whole = (folder / "whole.pth").read_bytes()
    (folder / "half.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "almost.pth").write_bytes(whole[:-100])
    torch.save({"model": {"a": torch.zeros(2000)}}, folder / "old.pth", _use_new_zipfile_serialization=False)
    (folder / "half_old.pth").write_bytes((folder / "old.pth").read_bytes()[:4000])
    save_file({"a": torch.zeros(2000)}, folder / "good.safetensors")
    (folder / "half.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:1000])
    (folder / "folder").mkdir()
    (folder / "folder" / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    "name, right",
    [
        ("missing.pth", "does not exist"),
        ("folder", "give a file in it (model.safetensors)"),
        ("zero.pth", "empty"),
        ("zero.safetensors", "empty"),
        ("text.pth", "written by torch.save"),
        ("page.pth", "written by torch.save"),
        ("image.png", "written by torch.save"),
        ("list2.pth", "written by torch.save"),
        ("list5.pth", "written by torch.save"),
        ("half_old.pth", "damaged"),
        ("half.pth", "truncated or damaged"),
        ("almost.pth", "truncated or damaged"),
        ("text.safetensors", "not a safetensors file"),
        ("brace.pth", "not a safetensors file"),
        ("half.safetensors", "damaged"),
        ("saved_list.pth", "contains a list"),
        ("tensor.pth", "contains a Tensor"),
        ("whole.pth", "no ViT weights (its tensors: a)"),
        ("good.safetensors", "no ViT weights (its tensors: a)"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, name, right):
    broken_files(tmp_path)
    message = refusal(read_weights, tmp_path / name)
    assert message.startswith(str(tmp_path / name)) and right in message, message


def test_networks_that_are_no_plain_vit(tmp_path):
    resnet = {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
    assert "conv1.weight, layer1.0.conv1.weight" in refusal(read_weights, saved(tmp_path, resnet))
    assert "its tensors: none" in refusal(read_weights, saved(tmp_path, {"model": {}}))
    video = {**vit().state_dict(), "patch_embed.proj.weight": torch.zeros(32, 3, 2, 4, 4)}
    assert "(32, 3, 2, 4, 4)" in refusal(read_weights, saved(tmp_path, video))
    quantised = {name: value.to(torch.int8) for name, value in vit().state_dict().items()}
    assert "int8" in refusal(read_weights, saved(tmp_path, quantised))


# --- timm


def timm_vit(**overrides):
    return TimmViT(**{**SIZES, "num_classes": 7, **overrides})


def test_timm_weights_give_the_same_logits(tmp_path):
    for pool in ("token", "avg"):
        theirs = scrambled(timm_vit(global_pool=pool))
        ours = vit(global_pool=pool == "avg", norm_layer=partial(nn.LayerNorm, eps=1e-6))
        weights = read_weights(saved(tmp_path, theirs.state_dict()))
        assert weights.origin == "ViT classifier"
        report = load_into(ours, weights)
        assert not report.missing and not report.unexpected and not report.skipped
        imgs = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(ours(imgs), theirs(imgs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "overrides, culprit",
    [
        (dict(init_values=1e-5), "blocks.0.ls1.gamma"),
        (dict(qk_norm=True), "blocks.0.attn.q_norm.weight"),
        (dict(reg_tokens=4), "reg_token"),
        (dict(pre_norm=True), "norm_pre.weight"),
    ],
)
def test_timm_models_that_compute_something_else(tmp_path, overrides, culprit):
    message = refusal(read_weights, saved(tmp_path, timm_vit(**overrides).state_dict()))
    assert culprit in message and "not a plain ViT" in message


def test_timm_models_without_a_cls_position(tmp_path):
    weights = read_weights(saved(tmp_path, timm_vit(no_embed_class=True).state_dict()))
    assert "16 positions, which are not [cls]" in refusal(load_into, vit(), weights)
    weights = read_weights(saved(tmp_path, timm_vit(class_token=False, global_pool="avg").state_dict()))
    assert "[cls]" in refusal(load_into, vit(), weights)
    bias_free = read_weights(saved(tmp_path, timm_vit(qkv_bias=False).state_dict()))
    assert "blocks.0.attn.qkv.bias" in refusal(load_into, vit(), bias_free)


# --- Hugging Face

HF = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16)
HF |= dict(patch_size=4, layer_norm_eps=1e-12)
HF_MAE = dict(
    decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=4, decoder_intermediate_size=64
)
HF_NORM = partial(nn.LayerNorm, eps=1e-12)


def hub_names(state):
    """Return the state with the names of the hub's files, whatever the installed transformers uses in memory."""
    renames = [
        (r"(?<!encoder\.)\b(?:encoder\.layer|layers)\.(\d+)", r"encoder.layer.\1"),
        (r"attention\.(?:attention\.)?(?:query|q_proj)\.", "attention.attention.query."),
        (r"attention\.(?:attention\.)?(?:key|k_proj)\.", "attention.attention.key."),
        (r"attention\.(?:attention\.)?(?:value|v_proj)\.", "attention.attention.value."),
        (r"attention\.(?:output\.dense|o_proj)\.", "attention.output.dense."),
        (r"mlp\.fc1\.", "intermediate.dense."),
        (r"mlp\.fc2\.", "output.dense."),
    ]

    def rename(name):
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        return name

    renamed = {rename(name): value for name, value in state.items()}
    assert any(name.endswith("encoder.layer.0.attention.attention.query.weight") for name in renamed)
    return renamed


def hf_files(model, folder):
    """Return files of a model: its state, that of the hub, the file of `save_pretrained`, and one with prefixes."""
    state = model.state_dict()
    model.save_pretrained(folder / "saved")
    return [
        saved(folder, state, "memory.pth"),
        saved(folder, hub_names(state), "hub.pth"),
        folder / "saved" / "model.safetensors",
        saved(folder, {"state_dict": {f"module.{name}": value for name, value in state.items()}}, "wrapped.pth"),
    ]


def hf_model(class_name, seed=0, **config):
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    configuration = transformers.ViTMAEConfig if "MAE" in class_name else transformers.ViTConfig
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(configuration(**HF, **config)).eval()
    # Positions too: transformers 5 leaves them at zero, which would hide a wrong order.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_hugging_face_mae_has_the_same_loss_and_prediction(tmp_path, norm_pix_loss):
    theirs = hf_model("ViTMAEForPreTraining", **HF_MAE, norm_pix_loss=norm_pix_loss)
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    expected = theirs(imgs, noise=noise)
    for path in hf_files(theirs, tmp_path):
        weights = read_weights(path, "state_dict" if path.name == "wrapped.pth" else "model")
        assert weights.origin == "MAE (encoder and decoder), Hugging Face names"
        ours = mae(norm_layer=HF_NORM, norm_pix_loss=norm_pix_loss)
        report = load_into(ours, weights)
        assert len(report.taken) == len(ours.state_dict()) and not report.unexpected
        loss, pred, mask = ours(imgs, 0.75, noise)
        torch.testing.assert_close(mask, expected.mask)
        torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(pred, expected.logits, rtol=1e-5, atol=1e-5)


def test_hugging_face_classifier_has_the_same_logits(tmp_path):
    theirs = hf_model("ViTForImageClassification", num_labels=7)
    imgs = torch.randn(2, 3, 16, 16)
    for path in hf_files(theirs, tmp_path):
        weights = read_weights(path, "state_dict" if path.name == "wrapped.pth" else "model")
        assert weights.origin == "ViT classifier, Hugging Face names"
        ours = vit(norm_layer=HF_NORM)
        assert not load_into(ours, weights).missing
        torch.testing.assert_close(ours(imgs), theirs(imgs).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "class_name, origin, dropped",
    [
        ("ViTMAEModel", "MAE encoder", set()),
        ("ViTModel", "ViT encoder", {"pooler.dense.weight", "pooler.dense.bias"}),
        ("ViTForMaskedImageModeling", "ViT encoder", {"embeddings.mask_token", "decoder.0.weight", "decoder.0.bias"}),
    ],
)
def test_hugging_face_encoders_have_the_same_features(tmp_path, class_name, origin, dropped):
    theirs = hf_model(class_name, **({"encoder_stride": 4} if "Masked" in class_name else {}))
    imgs, noise = torch.randn(2, 3, 16, 16), torch.arange(16.0).expand(2, -1)
    encoder = getattr(theirs, "vit", theirs)
    if class_name == "ViTMAEModel":
        theirs.config.mask_ratio = 0.0
        table = get_2d_sincos_pos_embed(32, 4, cls_token=True)
        theirs.embeddings.position_embeddings.data.copy_(torch.from_numpy(table)[None])
        encoder = partial(theirs, noise=noise)
    expected = encoder(imgs).last_hidden_state
    for path in hf_files(theirs, tmp_path):
        weights = read_weights(path, "state_dict" if path.name == "wrapped.pth" else "model")
        assert weights.origin == origin + ", Hugging Face names" and set(weights.dropped) == dropped
        ours = mae(norm_layer=HF_NORM)
        report = load_into(ours, weights)
        assert set(report.unexpected) == dropped
        assert set(report.missing) == ours.state_dict().keys() - encoder_state(ours.state_dict()).keys()
        latent, _, _ = ours.forward_encoder(imgs, 0.0, noise)
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)


def test_hugging_face_leftovers_are_refused(tmp_path):
    state = {
        "vit.embeddings.patch_embeddings.projection.weight": torch.zeros(32, 3, 4, 4),
        "vit.encoder.layer.0.layernorm_before.weight": torch.zeros(32),
        "vit.encoder.layer.0.attention.attention.query.weight": torch.zeros(32, 32),
    }
    assert "blocks.0.attn.q.weight" in refusal(read_weights, saved(tmp_path, state))
    state = {**state, "vit.embeddings.distillation_token": torch.zeros(1, 1, 32)}
    assert "embeddings.distillation_token" in refusal(read_weights, saved(tmp_path, state))
