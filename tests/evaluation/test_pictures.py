"""Attention maps, Grad-CAM, and images that maximise a channel, on models with known answers."""

import json

import numpy as np
import pytest
import torch
from helpers.launch import scalars
from PIL import Image
from torch import nn

import models_mae
import models_vit
from evaluation.feature_viz import FourierImages, channel_activation, excite, total_variation
from evaluation.saliency import attended_share, grad_cam
from tools import attention, feature_viz
from util.compute.attention_maps import cls_attention
from util.errors import UserError
from util.report import ledger
from util.report.pictures import overlay, shown_range
from util.report.sheet import Sheet

EXACT = dict(rtol=1e-5, atol=1e-6)  # float32, the same sums in another order


def scrambled(**config):
    model = models_vit.vit_micro_patch4(**{"img_size": 16, "num_classes": 3, **config})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def attends_to_brightness(classes=2):
    """Return a classifier with one active block: [cls] attends to the brightness of a patch (coordinate 0) and adds it
    to coordinate 3, which class 1 reads. Coordinates 1 and 2 are constants, so that norms keep the order."""
    model = models_vit.vit_micro_patch4(img_size=16, num_classes=classes)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
    with torch.no_grad():
        model.patch_embed.proj.weight[0] = 1 / 48
        model.patch_embed.proj.bias[1:3] = torch.tensor([5.0, -5.0])
        model.cls_token[0, 0, 1:3] = torch.tensor([5.0, -5.0])
        block = model.blocks[-1].attn
        block.qkv.bias[0] = 20.0  # the query, the same for every token
        block.qkv.weight[128, 0] = 1.0  # keys and values: coordinate 0
        block.qkv.weight[256, 0] = 1.0
        block.proj.weight[3, 0] = 1.0
        model.head.weight[1, 3] = 1.0
    return model.eval()


# --- attention


@pytest.mark.parametrize("block", [0, 2, -1])
def test_attention_is_the_softmax_of_queries_and_keys(block):
    model, imgs, result = scrambled(), torch.randn(2, 3, 16, 16), []
    before = model(imgs)
    hook = model.blocks[block].attn.qkv.register_forward_hook(lambda module, inputs, output: result.append(output))
    rows = cls_attention(model, imgs, block)
    hook.remove()
    q, k, _ = result[0].detach().reshape(2, 17, 3, 4, 32).permute(2, 0, 3, 1, 4)
    expected = (torch.einsum("nhd,nhld->nhl", q[:, :, 0], k) / 32**0.5).softmax(dim=-1)
    torch.testing.assert_close(rows, expected, **EXACT)
    torch.testing.assert_close(rows.sum(dim=-1), torch.ones(2, 4), **EXACT)
    assert model.blocks[block].attn.fused_attn and torch.equal(model(imgs), before)  # hooks are removed


def test_share_of_attended_patches():
    """One patch of four, and all patches equally, regardless of the attention of [cls] to itself."""
    rows = torch.tensor([[[0.6, 0.4, 0.0, 0.0, 0.0], [0.2, 0.2, 0.2, 0.2, 0.2]]])
    torch.testing.assert_close(attended_share(rows), torch.tensor([[0.25, 1.0]]), **EXACT)


# --- Grad-CAM


def test_grad_cam_by_hand():
    """If the last block is only its first norm and the head reads the mean of the patches, d score / d A = w / L."""
    model = scrambled(global_pool=True)
    model.fc_norm, model.blocks[-1].forward = nn.Identity(), model.blocks[-1].norm1.__call__
    model.blocks = model.blocks[-1:]
    nn.init.zeros_(model.blocks[0].norm1.bias)  # patches differ more than they agree: both signs occur before the ReLU
    imgs = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        activations = model.forward_tokens(imgs)[:, 1:]
    expected = (activations @ model.head.weight[1] / 16).relu()
    assert 0 < (expected > 0).float().mean() < 1
    torch.testing.assert_close(grad_cam(model, imgs, lambda: model(imgs)[:, 1]), expected.detach(), **EXACT)


@pytest.mark.parametrize("global_pool", [False, True])
def test_grad_cam_of_a_whole_block(global_pool):
    """Compare with the explicit network after the first norm of the last block, one image at a time."""
    model, imgs = scrambled(global_pool=global_pool), torch.randn(2, 3, 16, 16)
    result = grad_cam(model, imgs, lambda: model(imgs)[:, 2])
    block, entering = model.blocks[-1], []
    hook = block.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0].detach()))
    model(imgs)
    hook.remove()
    for i, x in enumerate(entering[0]):
        a = block.norm1(x[None]).detach().requires_grad_(True)
        y = x[None] + block.attn(a)
        y = y + block.mlp(block.norm2(y))
        feature = model.fc_norm(y[:, 1:].mean(1)) if global_pool else model.norm(y)[:, 0]
        gradient = torch.autograd.grad(model.head(feature)[0, 2], a)[0][0, 1:]
        expected = (a[0, 1:] @ gradient.mean(dim=0)).relu().detach()
        torch.testing.assert_close(result[i], expected, rtol=1e-4, atol=1e-6)  # a gradient through four matrix products


# --- the tool


@pytest.fixture
def planted(tmp_path):
    """Grey images with one bright patch each, and a checkpoint that attends to it."""
    (tmp_path / "images").mkdir()
    patches = [0, 5, 10, 15]
    for i, patch in enumerate(patches):
        pixels = np.full((16, 16, 3), 90, np.uint8)
        row, column = divmod(patch, 4)
        pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 250
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    args = {"model": "vit_micro_patch4", "input_size": 16, "mean": [0.35] * 3, "std": [0.2] * 3}
    torch.save({"model": attends_to_brightness().state_dict(), "args": args}, tmp_path / "bright.pth")
    return tmp_path, patches


@pytest.fixture
def drawn_sheets(monkeypatch):
    """The sheets that are drawn, in their order; `saved` those that are written to a file."""
    sheets, init, save = [], Sheet.__init__, Sheet.save

    def keep(self, *args):
        init(self, *args)
        self.saved = False
        self.words = lambda: [words for _, _, words in self.texts]
        sheets.append(self)

    def write(self, path):
        self.saved = True
        save(self, path)

    monkeypatch.setattr(Sheet, "__init__", keep)
    monkeypatch.setattr(Sheet, "save", write)
    return sheets


def drawn(folder, *flags, checkpoints=("bright.pth",)):
    options = [name if name == "random" else str(folder / name) for name in checkpoints] + [
        "--data",
        str(folder / "images"),
    ]
    options += ["--out", str(folder / "a.png"), *flags]
    return attention.main(attention.get_args_parser().parse_args(options))


def test_a_planted_patch_has_the_most_attention(planted, capsys):
    folder, patches = planted
    (result,) = drawn(folder, "--class_index", "1")
    assert result["gradcam"].flatten(1).argmax(dim=1).tolist() == patches
    assert result["attention"].mean(dim=1).flatten(1).argmax(dim=1).tolist() == patches
    numbers = np.load(folder / "a.npz")
    assert np.array_equal(numbers["gradcam_0"], result["gradcam"].numpy()) and numbers["attention_0"].shape == (
        4,
        4,
        4,
        4,
    )
    total = numbers["attention_0"].sum(axis=(2, 3)) + numbers["to_cls_0"]
    assert np.allclose(total, 1, atol=1e-6)  # float32
    assert json.loads((folder / "a.json").read_text())["objective"] == "class"
    # The map is brightest at the patch.
    dark = torch.zeros(4, 3, 16, 16)
    over = overlay(dark, result["gradcam"]).mean(dim=1).unfold(1, 4, 4).unfold(2, 4, 4).mean(dim=(-1, -2))
    assert over.flatten(1).argmax(dim=1).tolist() == patches


def test_checkpoints_as_rows(planted, drawn_sheets):
    """A row for each checkpoint, which has its own image size; heads add columns; without a classifier the feature is
    explained."""
    folder, _ = planted
    mae = {"model": "vit_micro_patch4", "input_size": 32}
    encoder = models_vit.vit_micro_patch4(img_size=32, num_classes=0)
    torch.save({"model": encoder.state_dict(), "args": mae}, folder / "encoder.pth")
    both = ("bright.pth", "encoder.pth")
    result = drawn(folder, "--heads", checkpoints=both)
    assert result[0]["gradcam"].shape == (4, 4, 4) and result[1]["gradcam"].shape == (4, 8, 8)
    assert json.loads((folder / "a.json").read_text())["objective"] == "feature"
    texts = drawn_sheets[0].words()
    assert texts[:7] == ["image", "attention", "head 0", "head 1", "head 2", "head 3", "Grad-CAM"]
    labels = [f"{folder.name}/{name}" for name in ("bright", "encoder")]
    assert [("".join(texts)).count(label) for label in labels] == [4, 4]  # a row of each for each image
    assert shown_range(result[1]["gradcam"][3]) in texts
    for i, (maps, name) in enumerate(zip(result, both)):
        row = ledger.read(folder / "results.jsonl")[i]
        assert row["command"] == "attention" and row["flags"]["checkpoint"] == str(folder / name)
        assert row["data"]["shown"]["images"] == row["images_seen"] == 4 and row["source"]["sha256"]
        assert row["metrics"]["eval/attended_share"] == pytest.approx(maps["attended"].mean().item())
        heads = [row["metrics"][f"eval/attended_share_head{j}"] for j in range(4)]
        assert np.mean(heads) == pytest.approx(row["metrics"]["eval/attended_share"])
        ((x, value),) = scalars(folder / f"tensorboard-attention-{i}", "eval/attended_share")
        assert x == 1000 and value == pytest.approx(row["metrics"]["eval/attended_share"])
    random = drawn(folder, "--show", "attention", checkpoints=("random", "encoder.pth"))[0]
    assert random["attention"].shape == (4, 4, 8, 8)  # of the other model
    drawn(folder, "--show", "attention", "--global_pool", checkpoints=("encoder.pth",))
    assert drawn_sheets[-1].words()[:4] == ["image", "attention"] * 2  # two images in a row
    for flags, right in (
        ("--objective class", "encoder.pth has no classifier for Grad-CAM"),
        ("--class_index 1", "encoder.pth has no classifier"),
        ("--objective feature --class_index 1", "no effect"),
        ("--block 4", "4 blocks, from 0 to 3"),
        ("--count 0", "--count 0"),
        ("--count 1 --objective feature", "at least two"),
        ("--out x.jpg", "--out x.jpg must be a .png, .pdf or .svg file"),
        ("--tile_size 8", "--tile_size 8 must lie between 32 and 2048 pixels"),
    ):
        with pytest.raises(UserError, match=right):
            drawn(folder, *flags.split(), checkpoints=both)
    with pytest.raises(UserError, match="has 2 classes"):
        drawn(folder, "--class_index", "2")


def test_an_empty_map_is_pale_and_says_why(planted, drawn_sheets):
    """Where no patch raises the score, Grad-CAM is 0 everywhere: class 0 does not read what class 1 reads."""
    folder, _ = planted
    (result,) = drawn(folder, "--class_index", "0", "--show", "gradcam")
    assert not result["gradcam"].any()
    assert "".join(drawn_sheets[0].words()).count("no positivegradient") == 4  # wrapped, below each tile
    colours = torch.rand(2, 3, 8, 8)
    pale, coloured = overlay(colours, torch.stack([torch.full((4, 4), 0.3), torch.rand(4, 4)]))
    assert pale.min() >= 0.7 and torch.equal(pale[0], pale[1]) and coloured.min() < 0.6


# --- images that maximise a channel


def ascend(activation, count=1, size=16, steps=256, lr=0.1, tv=0.0, jitter=0, seed=0):
    random = torch.Generator().manual_seed(seed)
    images = FourierImages((count, 3, size, size), random)
    return excite(activation, images, lambda imgs: imgs, steps, lr, tv, jitter, random)


def test_the_optimum_of_a_linear_channel():
    """<w, x> over colours x in [0, 1] is largest where x is 1 for positive w and 0 for negative w. All pixels but those
    of small weight end on the right side, and 95 % of the optimum is reached: the penalty towards grey, in balance at w
    sigmoid'(z) = 0.01 z, keeps the colours from the bounds."""
    stripes = torch.sin(torch.arange(16) * torch.pi / 4 + 0.3).expand(3, 16, 16)
    for w in (stripes, -stripes, torch.randn(3, 16, 16)):
        imgs, values = ascend(lambda imgs, w=w: (imgs * w).sum(dim=(1, 2, 3)))
        best, worst = w.clamp(min=0).sum(), w.clamp(max=0).sum()
        start, end = (values - worst) / (best - worst)
        assert abs(start - 0.5) < 0.05 and end > 0.95  # from grey, the midpoint
        clear = w.abs() > 0.1
        assert ((imgs[0] > 0.5) == (w > 0))[clear].float().mean() > 0.99
    logits = imgs[0].logit()
    balance = w / w.square().mean().sqrt() * imgs[0] * (1 - imgs[0]) - 0.01 * logits
    assert balance.abs().mean() < 0.002  # at most a tenth of the gradient of a clear pixel


def test_smoothness_and_jitter():
    """Total variation equals the formula and smooths; shifts keep a constant image."""
    steps = torch.tensor([[0.0, 0.0], [1.0, 3.0]]).expand(1, 1, 2, 2)
    assert total_variation(steps).item() == pytest.approx((1 + 3) / 2 + (0 + 2) / 2)
    w = torch.randn(3, 16, 16)
    rough, smooth = (ascend(lambda imgs: (imgs * w).sum(dim=(1, 2, 3)), tv=tv)[0] for tv in (0.0, 1.0))
    assert total_variation(smooth) < 0.5 * total_variation(rough)
    red = torch.tensor([1.0, -1.0, 0.0])[:, None, None]
    (image,), _ = ascend(lambda imgs: (imgs * red).sum(dim=(1, 2, 3)), jitter=5)
    assert image[0].min() > 0.95 and image[1].max() < 0.05


@pytest.mark.parametrize("layer", ["mlp", "block"])
def test_a_channel_at_its_depth(layer):
    """The activation is that of a forward pass; the later blocks are neither used nor removed."""
    model, imgs, result = scrambled(), torch.randn(3, 3, 16, 16), []
    place = model.blocks[1].mlp.fc2 if layer == "mlp" else model.blocks[2]
    hook = place.register_forward_pre_hook(lambda module, inputs: result.append(inputs[0]))
    before = model(imgs)
    hook.remove()
    channels = torch.tensor([5, 0, 127])
    expected = torch.stack([result[0][i, 1:, channel].mean() for i, channel in enumerate(channels)])
    torch.testing.assert_close(channel_activation(model, 1, layer)(imgs, channels), expected, **EXACT)
    assert len(model.blocks) == 4 and torch.equal(model(imgs), before)


def visualised(folder, checkpoint, *flags):
    options = [str(checkpoint), "--out", str(folder / "f.png"), "--device", "cpu", "--steps", "40", *flags]
    return feature_viz.main(feature_viz.get_args_parser().parse_args(options))


def test_feature_viz(tmp_path, capsys, drawn_sheets):
    """Every channel at every depth is larger than for grey, reproducibly; pixels of channels that read one colour take
    that colour."""
    args = {"model": "vit_micro_patch4", "input_size": 16, "mean": [0.5] * 3, "std": [0.2] * 3}
    untrained = models_mae.mae_vit_micro_patch4(img_size=16)
    torch.save({"model": untrained.state_dict(), "args": args}, tmp_path / "a.pth")
    flags = "--count 3 --layer block --jitter 0".split()  # to an untrained encoder a shifted patch is another patch
    ((images, values),) = visualised(tmp_path, tmp_path / "a.pth", *flags)
    assert images.shape == (4, 3, 3, 16, 16) and (values[:, 1] > values[:, 0]).all()
    (texts,) = (sheet.words() for sheet in drawn_sheets if sheet.saved)
    assert texts[:3] == ["channel 0", "channel 64", "channel 127"] and "block 3" in texts
    before, after = values[0, :, 0].tolist()
    assert f"{before:.2g} to {after:.2g}" in texts
    ((again, _),) = visualised(tmp_path, tmp_path / "a.pth", *flags)
    assert torch.equal(images, again)
    assert np.array_equal(np.load(tmp_path / "f.npz")["images"], images.numpy())
    row = ledger.read(tmp_path / "results.jsonl")[0]
    assert row["command"] == "feature_viz" and row["metrics"]["eval/excited_share"] == 1
    assert row["metrics"]["eval/block3_excited"] == pytest.approx(values[3, 1].mean().item())
    assert json.loads((tmp_path / "f.json").read_text())["result"] == row["metrics"]
    (_, value), *_ = scalars(tmp_path / "tensorboard-feature_viz", "eval/block0_grey")
    assert value == pytest.approx(values[0, 0].mean().item())
    model = attends_to_brightness()
    with torch.no_grad():  # coordinate 0: red less blue; two channels of the last MLP that read it, or its negative
        model.patch_embed.proj.weight[0, 2] *= -1
        model.patch_embed.proj.weight[0, 1] = 0
        model.blocks[-1].mlp.fc1.weight[7, 0], model.blocks[-1].mlp.fc1.weight[9, 0] = 1.0, -1.0
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "red.pth")
    flags = "--blocks 3 --channels 7 9 --steps 128 --lr 0.1".split()
    ((((red, blue),), _),) = visualised(tmp_path, tmp_path / "red.pth", *flags)
    assert red[0].min() > 0.9 and red[2].max() < 0.1 and blue[0].max() < 0.1 and blue[2].min() > 0.9
    visualised(tmp_path, tmp_path / "red.pth", "--blocks", "3", "--channels", "7", "8")  # channel 8 is constant
    assert "; 1 of 2 no more than by grey" in capsys.readouterr().out
    drawn_sheets.clear()
    flags = f"{tmp_path}/red.pth {tmp_path}/a.pth --count 1 --blocks 3 --steps 2 --device cpu --out {tmp_path}/b.svg"
    two = feature_viz.main(feature_viz.get_args_parser().parse_args(flags.split()))
    labels = [f"{tmp_path.name}/{name} block 3" for name in ("red", "a")]
    assert all(label.replace(" ", "") in "".join(drawn_sheets[0].words()).replace(" ", "") for label in labels)
    assert np.array_equal(np.load(tmp_path / "b.npz")["images_1"], two[1][0].numpy())
    assert {"b_0.json", "b_1.json"} <= {path.name for path in tmp_path.iterdir()}
    for flags, right in (
        ("--blocks 4", "--blocks 4: the encoder has 4"),
        ("--channels 512", "--channels 512: the encoder has 512 .mlp."),
        ("--layer block --channels 128", "has 128 .block."),
        ("--steps 0", "--steps 0"),
        ("--lr nan", "--lr nan"),
        ("--tv -1", "--tv"),
        ("--out a.jpg", "--out a.jpg must be a .png, .pdf or .svg file"),
    ):
        with pytest.raises(UserError, match=right):
            visualised(tmp_path, tmp_path / "a.pth", *flags.split())
