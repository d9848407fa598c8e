"""Weights of this project: read with their metadata, loaded into every model, reported, or refused in one sentence."""

import argparse
import os
import pathlib
import zipfile

import pytest
import torch
from helpers.small_models import assert_same, mae, refusal, saved, vit, weights_of
from safetensors.torch import load_file
from torch import nn

from util.pos_embed import get_2d_sincos_pos_embed, interpolate_grid
from util.weights.file import read_file
from util.weights.load import Weights, encoder_state, load_into, read_weights, save_encoder
from util.weights.model_config import resolve_config

# --- reading


def test_official_layout_with_a_namespace_and_a_path(tmp_path):
    model = mae()
    args = argparse.Namespace(input_size=16, norm_pix_loss=True, output_dir=pathlib.PosixPath("/data/x"))
    weights = read_weights(saved(tmp_path, {"model": model.state_dict(), "optimizer": {}, "epoch": 3, "args": args}))
    assert_same(weights.state, model.state_dict())
    assert weights.args == {"input_size": 16, "norm_pix_loss": True, "output_dir": pathlib.PosixPath("/data/x")}
    assert weights.origin == "MAE (encoder and decoder)" and weights.has_decoder and not weights.dropped


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])
def test_a_path_pickled_by_another_python(tmp_path, module):
    """Python 3.13 pickles paths with the module name `pathlib._local`."""
    path = saved(tmp_path, {"args": argparse.Namespace(output_dir=pathlib.PosixPath("/data/x"))})
    ours, theirs = (f"c{name}\n".encode() for name in (pathlib.PosixPath.__module__, module))
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "theirs.pth", "w") as target:
        for name in source.namelist():
            assert ours in source.read(name) or not name.endswith("data.pkl")
            target.writestr(name, source.read(name).replace(ours, theirs))
    assert read_file(tmp_path / "theirs.pth")["args"].output_dir == pathlib.PosixPath("/data/x")


def test_types_of_checkpoints_are_recognised(tmp_path):
    model = mae()
    assert read_weights(saved(tmp_path, {"model": encoder_state(model.state_dict())})).origin == "MAE encoder"
    classifier = vit(global_pool=True)
    weights = read_weights(saved(tmp_path, {"model": classifier.state_dict(), "args": {"nb_classes": 7}}))
    assert weights.origin == "ViT classifier" and not weights.has_decoder and weights.args == {"nb_classes": 7}
    assert read_weights(saved(tmp_path, vit(0).state_dict())).origin == "ViT encoder"
    rectangle = {"model": encoder_state(mae(img_size=(8, 32)).state_dict()), "args": {"input_size": [8, 32]}}
    assert read_weights(saved(tmp_path, rectangle)).origin == "MAE encoder"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "mae.", "module._orig_mod.mae.", "mae.mae._orig_mod."])
def test_prefixes_are_removed(tmp_path, prefix):
    model = mae()
    state = {prefix + name: value for name, value in model.state_dict().items()}
    assert_same(read_weights(saved(tmp_path, state)).state, model.state_dict())
    assert_same(read_weights(saved(tmp_path, {"model": state})).state, model.state_dict())


def test_prefixes_inside_and_beside_other_modules(tmp_path):
    """A compiled block, and a pretrainer whose methods have tensors: those are dropped and reported."""
    model = mae()
    state = {
        f"module.mae.{name}".replace("blocks.0.", "blocks.0._orig_mod."): value
        for name, value in model.state_dict().items()
    }
    state |= {"module.methods.0.teacher.blocks.0.attn.qkv.weight": torch.ones(3), "n_averaged": torch.tensor(5)}
    weights = read_weights(saved(tmp_path, state))
    assert_same(weights.state, model.state_dict())
    report = load_into(mae(), weights)
    assert report.unexpected == ["methods.0.teacher.blocks.0.attn.qkv.weight", "n_averaged"]
    assert "not used: methods.0.teacher.blocks.0.attn.qkv.weight, n_averaged (not part of" in str(report)


def test_two_models_in_one_state_are_refused(tmp_path):
    state = mae().state_dict()
    message = refusal(read_weights, saved(tmp_path, {**state, **{f"module.{name}": state[name] for name in state}}))
    assert "has cls_token twice" in message and "file.pth" in message


def test_keys(tmp_path):
    first, second = mae(), mae()
    path = saved(tmp_path, {"model": first.state_dict(), "model_ema": second.state_dict(), "args": {}, "epoch": 1})
    assert_same(read_weights(path, "model_ema").state, second.state_dict())
    message = refusal(read_weights, path, "ema")
    assert "'ema'" in message and "--checkpoint_key" in message and "(model, model_ema)" in message
    assert "a int under 'epoch'" in refusal(read_weights, path, "epoch")
    two = {"student": first.state_dict(), "teacher": second.state_dict()}
    assert "(student, teacher)" in refusal(read_weights, saved(tmp_path, two))
    assert "bare state dict" in refusal(read_weights, saved(tmp_path, first.state_dict()), "model_ema")
    assert "only the keys epoch" in refusal(read_weights, saved(tmp_path, {"epoch": 1}))


def test_safetensors_by_content_and_metadata(tmp_path):
    model = mae(img_size=(8, 32))
    path = tmp_path / "w.safetensors"
    save_encoder(model.state_dict(), path, {"input_size": "[8, 32]", "patch_size": "4", "method": "mae"})
    weights = read_weights(path)
    assert weights.args == {"input_size": [8, 32], "patch_size": 4, "method": "mae"}
    assert_same(weights.state, encoder_state(model.state_dict()))
    os.rename(path, tmp_path / "renamed.bin")
    assert_same(read_weights(tmp_path / "renamed.bin").state, weights.state)


# --- loading


def test_one_line_unless_verbose():
    """The line counts what was loaded and what was not, and names what must not be silent: missing tensors,
    interpolated positions, a skipped head, notes."""
    full = load_into(mae(), weights_of(mae()))
    assert full.shown(True) == str(full)
    assert full.shown(False) == f"file.pth: test, {len(mae().state_dict())} tensors loaded"
    weights = weights_of(mae())
    weights.dropped.append("stray")
    model = vit(img_size=(8, 24), num_classes=7, global_pool=True)
    line = load_into(model, weights).shown(False)
    assert "\n" not in line and "pos_embed interpolated 4x4 -> 2x6" in line
    assert "missing in the file, kept at their initial value: fc_norm (2 tensors), head (2 tensors)" in line
    assert "not used (decoder, not needed)" in line and "1 not used (not part of a ViT" in line
    assert "stray" not in line and line.endswith("(--verbose names them)")


def test_mae_into_mae(tmp_path):
    source, model = mae(), mae()
    report = load_into(model, weights_of(source))
    assert_same(model.state_dict(), source.state_dict())
    assert set(report.taken) == set(model.state_dict())
    assert not (report.interpolated or report.missing or report.unexpected or report.skipped)
    assert "blocks.0-1 (24 tensors)" in str(report) and len(str(report).splitlines()) == 2


def test_encoder_into_mae_keeps_the_decoder():
    source, model = mae(), mae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_into(model, Weights("e.pth", "MAE encoder", encoder_state(source.state_dict()), {}))
    expected = {**before, **encoder_state(source.state_dict())}
    assert_same(model.state_dict(), expected)
    assert set(report.missing) == before.keys() - encoder_state(before).keys()
    assert "kept at their initial value" in str(report) and "decoder_blocks.0 (12 tensors)" in str(report)


@pytest.mark.parametrize("global_pool", [False, True])
def test_mae_into_vit(global_pool):
    source, model = mae(), vit(global_pool=global_pool)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = load_into(model, weights_of(source))
    taken = {name: value for name, value in encoder_state(source.state_dict()).items() if name in before}
    assert_same(model.state_dict(), {**before, **taken})
    assert ("norm.weight" in report.unexpected) == global_pool
    assert report.missing == (["fc_norm.weight", "fc_norm.bias"] if global_pool else []) + ["head.weight", "head.bias"]
    assert {"mask_token", "decoder_pred.weight", "decoder_blocks.0.norm1.bias"} <= set(report.unexpected)
    assert "(decoder, not needed)" in str(report)
    assert ("norm (2 tensors) (this model reads pooled patches (fc_norm))" in str(report)) == global_pool


def test_half_precision_weights_fill_a_float_model(tmp_path):
    source, model = mae().bfloat16(), mae(img_size=32)
    weights = read_weights(saved(tmp_path, source.state_dict()))
    report = load_into(model, weights)
    assert report.interpolated == ["pos_embed", "decoder_pos_embed"]
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    assert torch.equal(model.cls_token, source.cls_token.float())


def test_head_of_the_same_size_is_taken():
    source, model = vit(global_pool=True), vit(global_pool=True)
    report = load_into(model, weights_of(source))
    assert_same(model.state_dict(), source.state_dict())
    assert not report.skipped and not report.missing


def test_head_left_out_when_asked():
    source, model = vit(), vit()
    head = model.head.weight.clone()
    report = load_into(model, weights_of(source), ignore_head=True)
    assert torch.equal(model.head.weight, head) and torch.equal(model.norm.weight, source.norm.weight)
    assert report.skipped == report.missing == ["head.weight", "head.bias"]
    assert "skipped: head: left out, as requested" in str(report)


def test_head_of_another_size_or_feature_is_skipped():
    model = vit()
    head = model.head.weight.clone()
    report = load_into(model, weights_of(vit(num_classes=10)))
    assert report.skipped == ["head.weight", "head.bias"]
    assert "skipped: head: 10 classes in the file, 7 in the model: new" in str(report)
    report = load_into(model, weights_of(vit(global_pool=True)))
    assert "reads pooled patches (fc_norm) in the file, the [cls] token (norm) in the model: new" in str(report)
    assert "norm.weight" in report.missing and "fc_norm.weight" in report.unexpected
    assert torch.equal(model.head.weight, head)


def test_linear_probe_head():
    """The probe's batch norm has buffers and no affine parameters: both parts are loaded, or the head is left out."""

    def probe():
        model = vit()
        model.head = nn.Sequential(nn.BatchNorm1d(32, affine=False), model.head)
        model.head[0].running_mean.normal_()
        return model

    source, model = probe(), probe()
    load_into(model, weights_of(source))
    assert_same(model.state_dict(), source.state_dict())
    report = load_into(vit(), weights_of(source))
    assert "head.0.running_mean" in report.skipped and "head.0.running_mean" in str(report)


def test_a_head_is_not_used_by_an_autoencoder():
    report = load_into(mae(), weights_of(vit()))
    assert report.unexpected == ["head.weight", "head.bias"] and "this model has no head" in str(report)


def test_a_mask_token_without_decoder_is_left_out():
    model, weights = mae(), weights_of(vit(num_classes=0))
    before = model.mask_token.clone()
    weights.state["mask_token"] = torch.ones(1, 1, 16)
    report = load_into(model, weights)
    assert report.unexpected == ["mask_token"] and "mask_token" in report.missing
    assert torch.equal(model.mask_token, before)


# --- positions


def test_positions_are_interpolated_from_a_square():
    source, model = mae(), mae(img_size=(8, 24))
    report = load_into(model, weights_of(source))
    assert report.interpolated == ["pos_embed", "decoder_pos_embed"] and "4x4 -> 2x6" in str(report)
    assert "pos_embed" not in report.taken
    for name in report.interpolated:
        expected = interpolate_grid(source.state_dict()[name], (4, 4), (2, 6))
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=0, atol=0)


@pytest.mark.parametrize("input_size", [[8, 32], (8, 32)])
def test_the_stored_size_gives_the_grid(input_size):
    """2x8 patches are as many as 4x4: without the stored size, trained positions would be read as a square."""
    source, model = vit(img_size=(8, 32)), vit()
    load_into(model, weights_of(source, input_size=input_size, patch_size=None))
    assert torch.equal(model.pos_embed, interpolate_grid(source.pos_embed, (2, 8), (4, 4)))
    load_into(model, weights_of(source))
    assert torch.equal(model.pos_embed, source.pos_embed)


def test_a_stored_size_that_does_not_fit_is_ignored():
    # The official pretraining stores --input_size although it never reaches the model.
    source, model = vit(), vit(img_size=8)
    for input_size in (224, [224], "16", None, [1, 2, 3], []):
        load_into(model, weights_of(source, input_size=input_size))
        assert torch.equal(model.pos_embed, interpolate_grid(source.pos_embed, (4, 4), (2, 2)))


def test_sine_cosine_positions_give_their_grid():
    model, source = mae(img_size=(8, 32)), mae(img_size=(8, 32))
    report = load_into(model, weights_of(source))
    assert not report.interpolated
    table = get_2d_sincos_pos_embed(32, (2, 8), cls_token=True)
    torch.testing.assert_close(model.pos_embed[0], torch.from_numpy(table).float())


def test_rectangles_without_a_stored_size():
    source = vit(img_size=(8, 24))
    model = vit(img_size=(8, 24))
    load_into(model, weights_of(source))
    assert torch.equal(model.pos_embed, source.pos_embed)
    message = refusal(load_into, vit(), weights_of(source))
    assert "13 positions" in message and "input_size" in message and "file.pth" in message


# --- refused pairs


def test_another_encoder_is_refused_and_the_fitting_name_given():
    base = {"embed_dim": 192, "depth": 12, "num_heads": 3}
    message = refusal(load_into, mae(), weights_of(vit(**base)))
    assert "a ViT of width 192, depth 12, patch 4, 3 channels" in message
    assert "width 32, depth 2, patch 4, 3 channels" in message and "--model mae_deit_tiny_patch4 fits" in message
    assert "--model deit_tiny_patch4 fits" in refusal(load_into, vit(), weights_of(vit(**base)))
    message = refusal(load_into, vit(), weights_of(vit(**base, in_chans=4)))
    assert message.endswith("--model deit_tiny_patch4 fits the file with --in_chans 4")


def test_each_kind_of_misfit_leaves_the_model_as_it_was():
    model = mae()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for other, difference in [
        (mae(depth=3), "depth 3"),
        (mae(depth=1), "depth 1"),
        (mae(embed_dim=48), "width 48"),
        (mae(patch_size=8), "patch 8"),
        (mae(in_chans=1), "--in_chans 1 is needed"),
        (vit(mlp_ratio=2), "blocks.0.mlp.fc1.weight is (64, 32) in the file and (128, 32) in the model"),
        (mae(decoder_depth=2), "a decoder of width 16, depth 2"),
        (mae(decoder_embed_dim=32), "(--decoder, --decoder_embed_dim, --decoder_depth)"),
    ]:
        message = refusal(load_into, model, weights_of(other))
        assert difference in message and "file.pth" in message
        assert_same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["cls_token", "pos_embed", "patch_embed.proj.bias", "blocks.1.attn.proj.weight"])
def test_nothing_of_the_encoder_may_be_missing(name):
    weights = weights_of(mae())
    del weights.state[name]
    for model in (mae(), vit()):
        assert f"lacks {name} of the encoder" in refusal(load_into, model, weights)


@pytest.mark.parametrize("name", ["mask_token", "decoder_blocks.0.norm1.bias", "decoder_pos_embed"])
def test_a_decoder_is_complete_or_left_out(name):
    weights = weights_of(mae())
    del weights.state[name]
    assert name in refusal(load_into, mae(), weights)
    load_into(vit(), weights)  # without a decoder it has no effect
    weights = weights_of(mae())
    weights.state["decoder_blocks.extra.gamma"] = torch.ones(1)
    assert "decoder_blocks.extra.gamma" in refusal(load_into, mae(), weights)


def test_another_known_number_of_attention_heads_is_refused():
    source = vit(embed_dim=128, depth=4)
    load_into(vit(embed_dim=128, depth=4, num_heads=4), weights_of(source, model="mae_vit_micro_patch4"))
    message = refusal(
        load_into, vit(embed_dim=128, depth=4, num_heads=8), weights_of(source, model="mae_vit_micro_patch4")
    )
    assert "4 attention heads, but the model has 8" in message
    message = refusal(load_into, mae(), weights_of(mae(), decoder_num_heads=2))
    assert "--decoder_num_heads" in message
    load_into(vit(), weights_of(mae(), decoder_num_heads=None, model="unknown"))


# --- writing


def test_encoder_state_and_save_encoder(tmp_path):
    model = mae()
    state = encoder_state(model.state_dict())
    names = {name.split(".")[0] for name in state}
    assert names == {"cls_token", "pos_embed", "patch_embed", "blocks", "norm"} and len(state) == 2 + 2 + 24 + 2
    assert names == {name.split(".")[0] for name in encoder_state(vit().state_dict())}  # without head

    state["norm.bias"] = state["norm.weight"]  # shared memory, which safetensors alone refuses
    save_encoder(state, tmp_path / "e.safetensors", {"source": "x"})
    (tmp_path / "plain").touch()
    assert (tmp_path / "e.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode  # readable for others
    (tmp_path / "plain").unlink()
    assert_same(load_file(tmp_path / "e.safetensors"), state)
    assert os.listdir(tmp_path) == ["e.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "e.safetensors"
    state = mae().state_dict()
    save_encoder(state, path, {})
    before = path.read_bytes()

    def fail(tensors, filename, metadata=None):
        pathlib.Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("util.weights.file.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_encoder({name: value + 1 for name, value in state.items()}, path, {})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["e.safetensors"]


def test_odd_decoder_flags_do_not_matter_for_an_encoder():
    """Other people's training code stores flags of these names, too, in other types."""
    weights = weights_of(vit(), decoder=True, decoder_depth="8", decoder_embed_dim=512.0, model="vit_micro_patch4")
    config = resolve_config(weights, {"input_size": 16})
    assert config.model == "vit_micro_patch4" and config.decoder == "self"
