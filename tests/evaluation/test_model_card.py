"""timm's own folders with their model cards: what timm and we read from them, and their upload."""

import json
from functools import partial

import pytest
import timm
import torch
from helpers.exports import refused, saved, saved_classifier, scrambled
from huggingface_hub import HfApi
from torch import nn

import models_vit
from evaluation.model_card import CURVE
from tools import export
from util.report import ledger
from util.weights.load import read_weights


@pytest.fixture
def classifier(tmp_path):
    return partial(saved_classifier, tmp_path / "classifier.pth")


def test_timm_folder(classifier, tmp_path, capsys):
    """timm loads it by the folder alone, with normalisation and names of the classes, and so do we; the model card has
    flags, scores, the hash of the images and the curve, and nothing of the machine's paths."""
    _, path = classifier(num_classes=3, global_pool=True)
    content = torch.load(path, weights_only=False)
    data = {"train": {"images": 96, "sha256": "abc123"}}
    content |= {"classes": ["cat", "dog", "cow"], "origin": {"images_seen": 960, "data": data}, "epoch": 9}
    content["args"] |= {"data_path": "/home/me/secret", "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    torch.save(content, path)
    rows = [{"epoch": epoch, "train_loss": 2.0 - epoch / 10} for epoch in range(3)]
    (tmp_path / "log.txt").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    ledger.append(tmp_path, {"command": "main_finetune", "flags": {}, "metrics": {"eval/acc1": 81.25}})
    out = tmp_path / "repository"
    export.main(export.get_args_parser().parse_args([str(path), "--to", "timm", "--out", str(out), "--license", "mit"]))
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors", CURVE]
    loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert timm.data.resolve_model_data_config(loaded)["mean"] == [0.1, 0.2, 0.3]
    config = loaded.pretrained_cfg
    assert config["label_names"] == ["cat", "dog", "cow"] and config["crop_pct"] == 1.0
    assert not config.get("license") and not config.get("tag")
    ours = read_weights(out)
    assert ours.classes == ["cat", "dog", "cow"] and ours.args["global_pool"] and ours.args["num_heads"] == 4
    torch.testing.assert_close(
        ours.state["norm.weight" if "norm.weight" in ours.state else "fc_norm.weight"], loaded.fc_norm.weight
    )
    card = (out / "README.md").read_text()
    for words in (
        "license: mit",
        "local-dir:",
        "main_finetune | eval/acc1 | 81.25",
        "abc123",
        "960 images seen",
        CURVE,
    ):
        assert words in card
    assert "secret" not in card and str(tmp_path) not in card and "epoch 10" in card


def test_push(classifier, tmp_path, monkeypatch, capsys):
    """The folder is uploaded to the repository, which is made; a Hub that does not answer is one sentence."""
    calls = []

    class Hub:
        def create_repo(self, repository, exist_ok):
            calls.append((repository, exist_ok))
            return f"https://huggingface.co/{repository}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    _, path = classifier(global_pool=False)
    flags = [path, "--to", "timm", "--out", tmp_path / "out", "--overwrite", "--push", "me/model"]
    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.HfApi", Hub)
        export.main(export.get_args_parser().parse_args([str(flag) for flag in flags]))
    assert "timm.create_model('hf-hub:me/model', pretrained=True)" in (tmp_path / "out/README.md").read_text()
    assert calls == [("me/model", True), ("me/model", ["README.md", "config.json", "model.safetensors"])]
    assert "uploaded to https://huggingface.co/me/model" in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token="none"))
    assert refused(*flags).startswith("--push me/model: ")
    assert "--push needs timm's own format" in refused(path, "--to", "timm", "--out", "a.safetensors", "--push", "a/b")


def test_timm_folder_without_a_place_for_epsilon(tmp_path):
    model = scrambled(models_vit.vit_micro_patch4(img_size=16))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    path = saved(tmp_path / "eps.pth", model, model="vit_micro_patch4", layer_norm_eps=1e-5)
    assert "cannot hold this model's epsilon of the norms, 1e-05" in refused(
        path, "--to", "timm", "--out", tmp_path / "out"
    )
