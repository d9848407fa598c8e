"""Encoders inside larger models: the prefix of their names is removed and reported, and of several encoders one is
chosen by a rule."""

import pytest
import torch
from helpers.small_models import assert_same, mae, refusal, saved, vit

from util.weights.load import load_into, read_weights

PREFIXES = [
    "model.",
    "backbone.",
    "encoder.",
    "student.",
    "teacher.",
    "module.base_encoder.",
    "target_encoder.",
    "vit.",
]
PREFIXES += ["module.student.backbone.", "_orig_mod.model.backbone.", "visual.trunk.", "model.mae.", "encoder_k."]


def under(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_removed_and_reported(tmp_path, prefix, wrap):
    state = encoder = vit().state_dict()
    state = {**under(prefix, encoder), "criterion.weight": torch.ones(3), "queue": torch.ones(3, 4)}
    weights = read_weights(saved(tmp_path, wrap(state)))
    assert_same(weights.state, encoder)
    report = load_into(vit(), weights)
    assert not report.missing and report.unexpected == ["criterion.weight", "queue"]
    assert f"the prefix {prefix} of its names was removed" in str(report)
    assert "criterion.weight, queue (outside" in str(report)


def test_an_autoencoder_below_a_prefix(tmp_path):
    autoencoder = mae().state_dict()
    weights = read_weights(saved(tmp_path, {"state_dict": under("model.", autoencoder)}))
    assert_same(weights.state, autoencoder)
    assert weights.has_decoder and "entry 'state_dict'" in str(load_into(mae(), weights))


def test_hugging_face_names_below_a_prefix(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=7)
    state = transformers.ViTForImageClassification(config).state_dict()
    plain = read_weights(saved(tmp_path, state))
    for prefix in ("model.", "module.backbone."):
        weights = read_weights(saved(tmp_path, under(prefix, state)))
        assert_same(weights.state, plain.state)
        assert weights.origin == plain.origin == "ViT classifier, Hugging Face names"


@pytest.mark.parametrize(
    "trained, average",
    [
        ("student.", "teacher."),
        ("student.backbone.", "teacher.backbone."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("encoder.", "target_encoder."),
        ("encoder_q.", "encoder_k."),
        ("online_network.encoder.", "target_network.encoder."),
        ("model.", "ema_model."),
        ("", "ema."),
    ],
)
def test_the_trained_network_is_chosen_not_its_average(tmp_path, trained, average):
    first, second = vit().state_dict(), vit().state_dict()
    path = saved(tmp_path, {**under(average, second), **under(trained, first)})
    weights = read_weights(path)
    assert_same(weights.state, first)
    report = str(load_into(vit(), weights))
    key = average.removeprefix("module.").rstrip(".")
    assert "of several encoders in it" in report and f"not of {key}." in report
    assert f"of another encoder, --checkpoint_key {key}" in report
    for part in (key, key.split(".")[0]):
        assert_same(read_weights(path, part).state, second)


def test_a_choice_that_no_rule_makes_is_refused(tmp_path):
    path = saved(tmp_path, {**under("left.", vit().state_dict()), **under("right.", vit().state_dict())})
    message = refusal(read_weights, path)
    assert "left., right." in message and "--checkpoint_key left" in message
    assert read_weights(path, "right").prefix == "right."
    assert "'middle'" in refusal(read_weights, path, "middle")


def test_only_a_known_encoder_is_looked_for_below_a_prefix(tmp_path):
    """Names that merely end alike, and other networks below a prefix."""
    state = {"my_patch_embed.proj.weight": torch.ones(8, 3, 4, 4), "blocks.0.norm1.weight": torch.ones(8)}
    assert "no ViT weights" in refusal(read_weights, saved(tmp_path, state))
    scaled = {**vit().state_dict(), "blocks.0.ls1.gamma": torch.ones(32)}
    assert "not a plain ViT" in refusal(read_weights, saved(tmp_path, under("backbone.", scaled)))
