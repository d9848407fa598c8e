"""Weights of the Hugging Face Hub: from its cache without a network, and one sentence where they cannot be had. The
client is the real one."""

import subprocess
import sys

import huggingface_hub
import pytest
import timm
import torch
from helpers.exports import scrambled
from helpers.launch import ROOT

import models_vit
from evaluation.checkpoint import read_checkpoint
from util.errors import UserError
from util.weights import hub
from util.weights.load import read_weights

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A function that puts files into a cache as a download would; no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub._download.cache_clear()

    def put(repository: str):
        folder = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs/main").write_text(COMMIT)
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
        return folder / "snapshots" / COMMIT

    yield put
    hub._download.cache_clear()


@pytest.mark.parametrize("name", ["hf:someone/a-vit", "hf-hub:someone/a-vit", "someone/a-vit"])
def test_a_timm_repository(cache, name, tmp_path, monkeypatch):
    """Weights, sizes, normalisation and names of classes."""
    monkeypatch.chdir(tmp_path)
    sizes = dict(img_size=32, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=2)
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    model.pretrained_cfg.update(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), input_size=(3, 32, 32))
    own = {key: value for key, value in sizes.items() if key != "num_classes"}
    names = {"label_names": ["cat", "dog"]}
    timm.models.save_for_hf(
        model, str(cache("someone/a-vit")), model_config=names, model_args=own, safe_serialization=True
    )
    weights = read_weights(name)
    assert torch.equal(weights.state["blocks.1.attn.qkv.weight"], model.blocks[1].attn.qkv.weight)
    assert weights.classes == ["cat", "dog"] and weights.args["mean"] == [0.1, 0.2, 0.3]
    assert (weights.args["input_size"], weights.args["num_heads"], weights.args["in_chans"]) == (32, 3, 3)
    assert torch.equal(read_checkpoint(name, "model").state["norm.weight"], weights.state["norm.weight"])


def test_one_file_and_a_revision(cache):
    """As `hf:OWNER/NAME/FILE@REVISION`; also in a folder of the repository."""
    folder = cache("someone/files")
    model = scrambled(models_vit.vit_micro_patch4(img_size=16))
    (folder / "runs").mkdir()
    torch.save({"model": model.state_dict(), "args": {"model": "vit_micro_patch4"}}, folder / "runs/last.pth")
    for name in ("hf:someone/files/runs/last.pth", f"hf:someone/files/runs/last.pth@{COMMIT}"):
        assert torch.equal(read_weights(name).state["cls_token"], model.cls_token)


def test_local_paths_come_first(tmp_path, monkeypatch):
    """A path that exists, or that looks like a file or lies in a folder that exists, is none of the Hub."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    for path in ("owner/name", "owner/missing", "runs/checkpoint-9.pth", "./owner/x", "/a/b", "one", "a/b/c"):
        assert hub.from_hub(path) == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf:nobody/nothing", "hf:nobody/nothing is not in the cache .* HF_HUB_OFFLINE forbids to download it"),
        ("nobody/nothing", "nobody/nothing is not in the cache"),
        ("hf:nobody/nothing/a.pth", "is not in the cache"),
        ("hf:nobody", "is no name on the Hugging Face Hub"),
        ("hf:-a-/--", "is no name on the Hugging Face Hub"),
        ("hf:someone/empty", r"has no weights \(.safetensors or .bin\): name a file"),
    ],
)
def test_what_cannot_be_had(cache, name, message):
    (cache("someone/empty") / "config.json").write_text("{}")
    with pytest.raises(UserError, match=message) as caught:
        read_weights(name)
    assert "\n" not in str(caught.value)


def test_a_missing_network(tmp_path):
    """A main ends with one sentence; nothing listens at this address."""
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    words = f"main_finetune.py --dataset digits --input_size 16 --finetune hf:someone/a-vit --output_dir {tmp_path}/out"
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "hf:someone/a-vit is not in the cache of the Hugging Face Hub, and cannot be downloaded" in done.stderr
    assert not (tmp_path / "out").exists()
