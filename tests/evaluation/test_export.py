"""Exported models compute the same in the other library, and are read back unchanged."""

import importlib
import json
import sys
from functools import partial

import pytest
import timm
import torch
from helpers.exports import FLAGS, exported, refused, saved, saved_classifier, scrambled
from helpers.launch import scalars
from PIL import Image
from torch import nn

import models_mae
import models_vit
from evaluation.checkpoint import load_autoencoder
from evaluation.encoder import load_encoder, token_feature
from evaluation.export import timm_arguments
from main_linprobe import probe_head
from tools import export
from util.data.transforms import eval_transform
from util.errors import UserError, user_errors
from util.report import ledger
from util.weights.file import read_file
from util.weights.load import load_into, read_weights

# Float32 sums in another order through four blocks and a norm, on outputs of about 1: usually 1e-6.
CLOSE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture
def mae(tmp_path):
    model = scrambled(models_mae.mae_vit_micro_patch4(img_size=16))
    return model, saved(tmp_path / "mae.pth", model, model="mae_vit_micro_patch4", mask_ratio=0.5)


@pytest.fixture
def classifier(tmp_path):
    return partial(saved_classifier, tmp_path / "classifier.pth")


def printed_model(printed):
    """Return the model that the printed line of code makes."""
    code = next(line for line in printed.splitlines() if "model = " in line).split("model = ")[1]
    modules = {name: importlib.import_module(name) for name in ("functools", "timm", "torch")}
    if "transformers" in code:
        modules["transformers"] = pytest.importorskip("transformers")
    if "onnxruntime" in code:
        modules["onnxruntime"] = pytest.importorskip("onnxruntime")
    model = eval(code, modules)
    return model.eval() if isinstance(model, nn.Module) and "export" not in code else model


def features_again(path, imgs, pool="cls", **flags):
    """Return the features of the exported file, read as the mains read it, without a flag about the model."""
    model, _ = load_encoder(read_weights(path), flags, head=False)
    return token_feature(model, imgs, pool)


# --- timm


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_encoder_to_timm_and_back(mae, tmp_path, capsys, pool):
    model, path = mae
    flags = ["--global_pool"] if pool == "avg" else []
    out = exported(path, "timm", tmp_path / "encoder.safetensors", *flags)
    theirs, imgs = printed_model(capsys.readouterr().out), torch.randn(3, 3, 16, 16)
    latent = model.encode(model.embed(imgs))[0]
    expected = latent[:, 0] if pool == "cls" else latent[:, 1:].mean(dim=1)
    torch.testing.assert_close(theirs(imgs), expected, **CLOSE)
    torch.testing.assert_close(theirs.forward_features(imgs), latent, **CLOSE)
    torch.testing.assert_close(features_again(out, imgs, pool), expected, **CLOSE)
    again = read_weights(out).args
    assert again["mean"] == FLAGS["mean"] and again["input_size"] == 16 and again["model"] == "vit_micro_patch4"


@pytest.mark.parametrize("global_pool", [False, True])
@pytest.mark.parametrize("size", [16, (8, 32)])
def test_classifier_to_timm_and_back(classifier, tmp_path, capsys, global_pool, size):
    model, path = classifier(global_pool, img_size=size)
    out = exported(path, "timm", tmp_path / "c.safetensors")
    height, width = (size, size) if isinstance(size, int) else size
    theirs, imgs = printed_model(capsys.readouterr().out), torch.randn(3, 3, height, width)
    torch.testing.assert_close(theirs(imgs), model(imgs), **CLOSE)
    again, _ = load_encoder(read_weights(out), {})
    torch.testing.assert_close(again(imgs), model(imgs), **CLOSE)


def test_names_of_timm():
    """Sizes of a timm model give its name alone; other sizes give ViT-B/16 and the arguments that differ."""
    for name, build in models_vit.MODELS.items():
        with torch.device("meta"):  # shapes without memory
            model = build(num_classes=0, depth=1)
        model.blocks = nn.ModuleList([model.blocks[0]] * build.config["depth"])
        arguments = timm_arguments(model, "cls")
        if name.endswith(("patch16", "huge_patch14", "patch8")):
            assert arguments["model_name"] == f"{name}_224"
            assert set(arguments) <= {"model_name", "img_size", "num_classes"}
        if build.config["embed_dim"] <= 192:  # small and fast
            theirs, ours = timm.create_model(**arguments), build(num_classes=0)
            assert {key: value.shape for key, value in theirs.state_dict().items()} == {
                key: value.shape for key, value in ours.state_dict().items()
            }
            assert theirs.blocks[0].attn.num_heads == ours.blocks[0].attn.num_heads


def test_a_probe_becomes_one_linear_layer(tmp_path, capsys):
    """BatchNorm's statistics, which main_linprobe.py keeps before its classifier, are folded in."""
    model = scrambled(models_vit.vit_micro_patch4(img_size=16, num_classes=7))
    model.head = probe_head(model.head).eval()
    model.head[0].running_mean.normal_()
    model.head[0].running_var.uniform_(0.5, 2.0)
    path = saved(tmp_path / "probe.pth", model)
    exported(path, "timm", tmp_path / "probe.safetensors")
    imgs = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(printed_model(capsys.readouterr().out)(imgs), model(imgs), **CLOSE)
    model.head = nn.Sequential(nn.Linear(128, 8), nn.Linear(8, 7))
    path = saved(tmp_path / "two.pth", model)
    assert "not one linear layer" in refused(path, "--to", "timm", "--out", tmp_path / "two.safetensors")
    exported(path, "timm", tmp_path / "two.safetensors", "--encoder_only")


# --- Hugging Face


def test_encoder_to_hugging_face_vit_and_back(mae, tmp_path, capsys):
    model, path = mae
    pytest.importorskip("transformers")
    out = exported(path, "hf-vit", tmp_path / "vit")
    theirs, imgs = printed_model(capsys.readouterr().out), torch.randn(3, 3, 16, 16)
    latent = model.encode(model.embed(imgs))[0]
    torch.testing.assert_close(theirs(imgs).last_hidden_state, latent, **CLOSE)
    for place in (out, out / "model.safetensors"):
        torch.testing.assert_close(features_again(place, imgs), latent[:, 0], **CLOSE)


def test_the_epsilon_of_a_folder(tmp_path, capsys):
    """The epsilon of Hugging Face's configuration (1e-12 by default; here a large one) is used and exported, and
    reported where it cannot be used. A file without a configuration does not contain it."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, image_size=16)
    config = transformers.ViTConfig(**sizes, patch_size=4, layer_norm_eps=1e-3)
    theirs, imgs = transformers.ViTModel(config, add_pooling_layer=False).eval(), torch.randn(3, 3, 16, 16)
    theirs.save_pretrained(tmp_path / "vit")
    expected = theirs(imgs).last_hidden_state[:, 0]
    torch.testing.assert_close(features_again(tmp_path / "vit", imgs), expected, **CLOSE)
    (tmp_path / "alone.safetensors").write_bytes((tmp_path / "vit" / "model.safetensors").read_bytes())
    alone = features_again(tmp_path / "alone.safetensors", imgs, model="vit_micro_patch4", input_size=[16])
    assert (alone - expected).abs().max() > 1e-3  # a hundred times the rounding error
    for to, out in (("timm", "a.safetensors"), ("hf-vit", "b")):
        capsys.readouterr()
        out = exported(tmp_path / "vit", to, tmp_path / out)
        torch.testing.assert_close(features_again(out, imgs), expected, **CLOSE)
        again, printed = printed_model(capsys.readouterr().out), {"timm": lambda x: x, "hf-vit": lambda x: x[0][:, 0]}
        torch.testing.assert_close(printed[to](again(imgs)), expected, **CLOSE)
    report = load_into(models_mae.mae_vit_micro_patch4(img_size=16), read_weights(tmp_path / "vit"))
    assert "note: its layer norms have an epsilon of 0.001, the model's have 1e-06" in str(report)
    content = json.loads((tmp_path / "vit" / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps({**content, "layer_norm_eps": "small"}))
    assert "layer_norm_eps of 'small'" in refused(tmp_path / "vit", "--to", "timm", "--out", tmp_path / "c.safetensors")


def test_images_are_prepared_as_ours(mae, tmp_path):
    transformers = pytest.importorskip("transformers")
    out = exported(mae[1], "hf-vit", tmp_path / "vit")
    image = Image.frombytes("RGB", (16, 16), bytes(torch.randint(256, (768,)).tolist()))
    theirs = transformers.AutoImageProcessor.from_pretrained(out)(image, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(theirs, eval_transform((16, 16), FLAGS["mean"], FLAGS["std"])(image), **CLOSE)


def test_classifier_to_hugging_face(classifier, tmp_path, capsys):
    pytest.importorskip("transformers")
    model, path = classifier(False, img_size=(8, 32))
    out = exported(path, "hf-vit", tmp_path / "vit")
    theirs, imgs = printed_model(capsys.readouterr().out), torch.randn(3, 3, 8, 32)
    torch.testing.assert_close(theirs(imgs).logits, model(imgs), **CLOSE)
    torch.testing.assert_close(load_encoder(read_weights(out), {})[0](imgs), model(imgs), **CLOSE)
    _, path = classifier(True)
    assert "fc_norm" in refused(path, "--to", "hf-vit", "--out", tmp_path / "pooled")
    assert not (tmp_path / "pooled").exists()


def test_autoencoder_to_hugging_face_and_back(mae, tmp_path, capsys):
    """The same loss and prediction at the same noise, and every tensor comes back bit for bit."""
    pytest.importorskip("transformers")
    model, path = mae
    out = exported(path, "hf-vitmae", tmp_path / "vitmae")
    theirs = printed_model(capsys.readouterr().out)
    imgs, noise = torch.randn(3, 3, 16, 16), torch.rand(3, 16)
    loss, pred, _ = model(imgs, 0.5, noise)
    result = theirs(imgs, noise=noise)
    torch.testing.assert_close(result.logits, pred, **CLOSE)
    torch.testing.assert_close(result.loss, loss, **CLOSE)
    again, weights = models_mae.mae_vit_micro_patch4(img_size=16), read_weights(out)
    assert load_into(again, weights).missing == [] and weights.args["decoder_embed_dim"] == 96
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    assert load_autoencoder(weights, {})[0].blocks[0].attn.num_heads == 4  # read from config.json
    encoder = exported(path, "hf-vitmae", tmp_path / "encoder", "--encoder_only")
    theirs = printed_model(capsys.readouterr().out)
    order = torch.arange(16.0).expand(3, -1)
    latent = model.encode(model.embed(imgs))[0]
    torch.testing.assert_close(theirs(imgs, noise=order).last_hidden_state, latent, **CLOSE)
    torch.testing.assert_close(features_again(encoder, imgs), latent[:, 0], **CLOSE)


def test_heads_of_a_folder_are_checked(mae, tmp_path):
    """Shapes do not give the number of attention heads; the configuration does."""
    pytest.importorskip("transformers")
    out = exported(mae[1], "hf-vit", tmp_path / "vit")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "num_attention_heads": 8}))
    with pytest.raises(UserError, match="8 attention heads"):
        features_again(out, torch.randn(1, 3, 16, 16))
    (out / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        read_weights(out)
    (out / "config.json").write_text("{}")
    (out / "model.safetensors").rename(out / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="in one file"):
        read_weights(out)


# --- programs


@pytest.mark.parametrize("model_type", ["encoder", "avg"])
def test_onnx_and_torch_export(mae, classifier, tmp_path, capsys, model_type):
    """The programs accept any number of images, also one, although the examples have two."""
    pytest.importorskip("onnxscript")
    model, path = mae if model_type == "encoder" else classifier(True)
    exported(path, "onnx", tmp_path / "model.onnx")
    session = printed_model(capsys.readouterr().out)
    exported(path, "torch-export", tmp_path / "model.pt2")
    program = printed_model(capsys.readouterr().out)
    for count in (1, 5):
        imgs = torch.randn(count, 3, 16, 16)
        if model_type == "encoder":
            latent = model.encode(model.embed(imgs))[0]
            expected = [latent[:, 0], latent]
        else:
            expected = [model(imgs)]
        result = session.run(None, {"imgs": imgs.numpy()})
        assert len(result) == len(expected)
        outputs = program(imgs)  # a classifier's logits are one tensor, as announced
        assert isinstance(outputs, tuple if model_type == "encoder" else torch.Tensor)
        outputs = outputs if model_type == "encoder" else [outputs]
        for ours, onnx, torch_export in zip(expected, result, outputs, strict=True):
            torch.testing.assert_close(torch.from_numpy(onnx), ours, **CLOSE)
            torch.testing.assert_close(torch_export, ours, **CLOSE)
    flags = session.get_modelmeta().custom_metadata_map
    assert json.loads(flags["mean"]) == FLAGS["mean"] and json.loads(flags["input_size"]) == 16
    for name in ("model.onnx", "model.pt2"):
        with pytest.raises(UserError, match="program for inference, not weights"):
            read_file(tmp_path / name)


# --- safetensors


def test_safetensors_holds_everything(mae, tmp_path):
    model, path = mae
    out = exported(path, "safetensors", tmp_path / "whole.safetensors")
    weights = read_weights(out)
    assert weights.state.keys() == model.state_dict().keys() and weights.args["mask_ratio"] == 0.5
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.state.items())
    out = exported(path, "safetensors", tmp_path / "encoder.safetensors", "--encoder_only")
    assert not read_weights(out).has_decoder


def test_a_file_of_timm_without_metadata(tmp_path, capsys):
    """Name, patch and image size follow from the shapes; positions are resampled only on request."""
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=48, num_classes=3).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    out = exported(tmp_path / "timm.pth", "timm", tmp_path / "again.safetensors")
    printed, imgs = capsys.readouterr().out, torch.randn(2, 3, 48, 48)
    assert "vit_tiny_patch16_224" in printed and "interpolated" not in printed
    torch.testing.assert_close(printed_model(printed)(imgs), theirs(imgs), **CLOSE)
    exported(tmp_path / "timm.pth", "timm", out, "--overwrite", "--input_size", "64")
    assert "pos_embed interpolated 3x3 -> 4x4" in capsys.readouterr().out


def test_an_autoencoder_without_metadata(mae, tmp_path):
    """Tensors alone, as in the official files for visualisation."""
    pytest.importorskip("transformers")
    torch.save({"model": mae[0].state_dict()}, tmp_path / "bare.pth")
    out = exported(tmp_path / "bare.pth", "hf-vitmae", tmp_path / "vitmae")
    assert json.loads((out / "config.json").read_text())["decoder_num_hidden_layers"] == 2
    out = exported(tmp_path / "bare.pth", "safetensors", tmp_path / "bare.safetensors")
    assert read_weights(out).args["model"] == "mae_vit_micro_patch4"


def test_a_cross_attention_decoder(tmp_path):
    """It is read back from our own format; Hugging Face has no such decoder."""
    pytest.importorskip("transformers")
    model = scrambled(models_mae.mae_vit_micro_patch4(img_size=16, decoder="cross"))
    path = saved(tmp_path / "cross.pth", model, model="mae_vit_micro_patch4", decoder="cross")
    out = exported(path, "safetensors", tmp_path / "cross.safetensors")
    exported(out, "safetensors", tmp_path / "again.safetensors")  # built from the metadata of the first
    assert read_weights(tmp_path / "again.safetensors").state.keys() == model.state_dict().keys()
    assert "self-attention" in refused(path, "--to", "hf-vitmae", "--out", tmp_path / "vitmae")


def test_refusals(mae, classifier, tmp_path, monkeypatch):
    _, path = mae
    _, pooled = classifier(True)
    to = partial(refused, path, "--to")
    assert "must end in .onnx" in to("onnx", "--out", tmp_path / "a.pth")
    assert "cannot be written" in to("onnx", "--out", path / "a.onnx")
    assert "is a file" in to("hf-vit", "--out", path)
    (tmp_path / "a.safetensors").write_text("precious")
    assert "--overwrite" in to("timm", "--out", tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_text() == "precious"
    assert "exists" in to("hf-vit", "--out", tmp_path)
    assert "has no decoder" in refused(pooled, "--to", "hf-vitmae", "--out", tmp_path / "x")
    assert "--pool cls: " in refused(pooled, "--to", "timm", "--out", tmp_path / "x.safetensors", "--cls_token")
    torch.save({"model": {"conv1.weight": torch.zeros(2, 2)}}, tmp_path / "resnet.pth")
    assert "no ViT weights" in refused(tmp_path / "resnet.pth", "--to", "timm", "--out", tmp_path / "x.safetensors")
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    assert "needs the package transformers" in to("hf-vit", "--out", tmp_path / "x")
    assert "requirements-dev.txt" in to("hf-vitmae", "--out", tmp_path / "x")
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "needs the package onnx," in to("onnx", "--out", tmp_path / "x.onnx")
    assert not (tmp_path / "x").exists()


def test_the_result_of_the_check_is_recorded(mae, tmp_path):
    """Ledger, JSON and TensorBoard hold the same difference, beside an exported file and beside a folder."""
    pytest.importorskip("transformers")
    for to, name, beside in (("timm", "a.safetensors", "a.safetensors.json"), ("hf-vit", "v-1.0", "v-1.0.json")):
        exported(mae[1], to, tmp_path / "new" / name)
        row = ledger.read(tmp_path / "new" / "results.jsonl")[-1]
        assert row["command"] == "export" and row["flags"]["to"] == to and row["flags"]["model"] == "vit_micro_patch4"
        assert 0 <= row["metrics"]["eval/largest_difference"] < 1e-5 and row["images_seen"] == 2
        content = json.loads((tmp_path / "new" / beside).read_text())
        assert content["result"] == row["metrics"] and content["told"]["mean"] == FLAGS["mean"]
        assert scalars(tmp_path / "new" / "tensorboard-export", "eval/largest_difference")
        source = content["source"]
        assert source == {name: row["source"][name] for name in ("path", "sha256", "epoch")} and source["sha256"]
    assert not (tmp_path / "new" / "v-1.0" / "results.jsonl").exists()


def test_a_wrong_export_fails(mae, tmp_path, monkeypatch, capsys):
    """The final check reads the written file: values swapped with queries give exit code 1."""
    import evaluation.export

    right = evaluation.export.to_hugging_face
    other = lambda name: name.replace("q_proj", "v_proj").replace("query", "value")  # noqa: E731  of transformers 5, 4
    swapped = lambda state, names: {name: right(state, [other(name)])[other(name)] for name in names}  # noqa: E731
    pytest.importorskip("transformers")
    monkeypatch.setattr(evaluation.export, "to_hugging_face", swapped)
    options = [str(mae[1]), "--to", "hf-vit", "--out", str(tmp_path / "vit")]
    with pytest.raises(SystemExit) as ended, user_errors("export.py"):
        export.main(export.get_args_parser().parse_args(options))
    assert ended.value.code == 1 and "do not use it" in capsys.readouterr().err
