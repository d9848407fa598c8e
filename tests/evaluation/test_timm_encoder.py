"""Any encoder of timm's in the judging commands: features, grid and attention are timm's own."""

import json

import pytest
import timm
import torch
from helpers.timm_folders import SMALL, saved_folder, small_model

import main_linprobe
from evaluation import judging
from evaluation.features import knn_accuracy
from evaluation.saliency import grad_cam
from models_timm import TimmEncoder
from tools import attention, dense_probe, fewshot, knn, robustness, tsne
from util.compute.attention_maps import cls_attention
from util.data.readers import read_images
from util.data.sources import Subset
from util.errors import UserError
from util.report import ledger
from util.weights.timm_models import timm_model

DATA = ["--dataset", "digits", "--num_workers", "0", "--device", "cpu", "--amp_dtype", "fp32"]
SIZE = {name: sizes.get("img_size", 32) for name, sizes in SMALL.items()}


def parsed(tool, *flags):
    return tool.get_args_parser().parse_args([*map(str, flags), *DATA])


def timm_images(images):
    """Return images (N, 3, H, W) as timm's own transform of the folder's configuration prepares them."""
    return lambda size: torch.stack(
        [
            timm.data.create_transform(
                (3, size, size), interpolation="bilinear", mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), crop_pct=0.8
            )(images.load(i).convert("RGB"))
            for i in range(len(images))
        ]
    )


@pytest.mark.parametrize("architecture", SMALL)
def test_features_are_those_of_timm(architecture, tmp_path):
    """Own feature, mean of the patches and [cls], from images that timm's transform prepares."""
    model = saved_folder(tmp_path / "m", architecture)
    args = parsed(knn, f"timm:{tmp_path}/m", "--batch_size", 16)
    images = Subset(read_images(args, train=False), range(24))
    imgs = timm_images(images)(SIZE[architecture])
    with torch.no_grad():
        tokens = model.forward_features(imgs)
        own = model.forward_head(tokens, pre_logits=True)
    prefix = getattr(model, "num_prefix_tokens", 0)
    last = getattr(model, "output_fmt", "") == "NHWC"
    patches = tokens[:, prefix:].mean(1) if tokens.ndim == 3 else tokens.mean((1, 2) if last else (2, 3))
    expected = {None: own, "avg": patches} | ({"cls": tokens[:, 0]} if prefix else {})
    judged = judging.open_encoder(args, args.checkpoint)
    assert judged.flags["model"] == architecture and judged.flags["pool"] == "own"
    for pool, features in expected.items():
        args.pool = pool
        ours, _ = judging.replace(judged, resolved={**judged.resolved, "pool": pool or "own"}).features(images)
        torch.testing.assert_close(ours, features, rtol=1e-4, atol=1e-4)
    if not prefix:
        with pytest.raises(UserError, match=r"--pool cls: .* has no \[cls\] token"):
            judged.model.feature(imgs[:1], "cls")


@pytest.mark.parametrize("architecture", SMALL)
def test_the_grid_is_in_rows(architecture):
    """A patch token depends most on the pixels of its own place, so that rows and columns are not swapped."""
    model = small_model(architecture)
    size = SIZE[architecture] if SIZE[architecture] > 32 or "img_size" in SMALL[architecture] else 64
    encoder = TimmEncoder(model, architecture, (size, size))
    if hasattr(model, "patch_embed") and not hasattr(model, "stages") and not hasattr(model, "layers"):
        assert encoder.forward_patches(torch.zeros(1, 3, size, size)).shape[1] == encoder.patch_embed.num_patches
    theirs = model.forward_intermediates(
        torch.randn(2, 3, size, size), indices=1, output_fmt="NCHW", intermediates_only=True
    )
    rows, columns = theirs[0].shape[2:]
    assert encoder.patch_embed.grid_size == (rows, columns)
    assert encoder.patch_embed.patch_size == (size // rows, size // columns)
    imgs = torch.randn(2, 3, size, size)
    with torch.no_grad():
        ours = encoder.forward_patches(imgs).unflatten(1, (rows, columns))
        maps = model.forward_intermediates(imgs, indices=1, norm=False, output_fmt="NCHW", intermediates_only=True)[0]
    maps = maps.permute(0, 2, 3, 1)
    # Cosine similarity of each place with the same place of timm's map, above that with the transposed map.
    if rows > 1:
        centred, other = ours - ours.mean((1, 2), keepdim=True), maps - maps.mean((1, 2), keepdim=True)
        same = torch.cosine_similarity(centred, other, dim=-1).mean()
        assert same > torch.cosine_similarity(centred, other.transpose(1, 2), dim=-1).mean()


def test_knn_of_a_folder_and_a_file(tmp_path, capsys):
    """The command's accuracy is that of timm's features; folder and file are the same; the ledger names the file."""
    model = saved_folder(tmp_path / "m", "convnext_atto")
    args = parsed(knn, tmp_path / "m", "--k", 1, "--batch_size", 256, "--out", tmp_path / "out" / "knn.json")
    result = knn.main(args)
    train, test = (read_images(args, train=flag) for flag in (True, False))
    with torch.no_grad():
        features = [model.forward_head(model.forward_features(timm_images(s)(32)), True) for s in (train, test)]
    labels = [torch.tensor(list(split.targets)) for split in (train, test)]
    assert result["knn1_acc1"] == pytest.approx(
        knn_accuracy(features[0], labels[0], features[1], labels[1], 1), abs=0.6
    )
    (row,) = ledger.read(tmp_path / "out" / "results.jsonl")
    assert row["source"]["path"].endswith("model.safetensors") and len(row["source"]["sha256"]) == 64
    assert row["flags"]["model"] == "convnext_atto" and row["flags"]["crop_pct"] == 0.8
    assert "timm's convnext_atto" in capsys.readouterr().out


def test_a_random_encoder_beside_it(tmp_path):
    """`random` is the same architecture, untrained."""
    saved_folder(tmp_path / "m", "resnet10t")
    flags = ["--images", 60, "--perplexity", 5, "--out", tmp_path / "t.png", "--input_size", 32]
    results = tsne.main(parsed(tsne, tmp_path / "m", "random", *flags))
    assert [row["checkpoint"] for row in results] == [str(tmp_path / "m"), "random"]
    assert results[0]["intra"] != results[1]["intra"]


def test_fewshot_of_an_untrained_architecture():
    flags = ["timm:resnet10t=random", "--input_size", 32, "--shots", 1, "--draws", 2, "--normalize", "l2"]
    assert fewshot.main(parsed(fewshot, *flags))["fewshot1_acc1"] > 15  # chance is 10 %


def test_cached_linear_probe(tmp_path):
    saved_folder(tmp_path / "m", "convnext_atto")
    flags = ["--finetune", tmp_path / "m", "--cache_features", "--epochs", 3, "--warmup_epochs", 0, "--batch_size", 64]
    result = main_linprobe.main(parsed(main_linprobe, *flags, "--output_dir", tmp_path / "out"))
    assert result["eval/acc1"] > 20
    assert json.loads((tmp_path / "out" / "probe.json").read_text())["result"]["eval/acc1"] == result["eval/acc1"]
    assert not (tmp_path / "out" / "probe.pth").exists()
    with pytest.raises(UserError, match="--cache_features only: add it"):
        main_linprobe.main(parsed(main_linprobe, "--finetune", tmp_path / "m", "--output_dir", tmp_path / "other"))


def test_attention_and_grad_cam(tmp_path):
    """Of a ViT with registers: the weights are those of timm's attention without the registers."""
    saved_folder(tmp_path / "m", "vit_small_patch14_reg4_dinov2", img_size=64)
    flags = ["--out", tmp_path / "a.png", "--count", 2]
    args = attention.get_args_parser().parse_args([f"{tmp_path}/m", *map(str, flags), *DATA[:-2]])
    (maps,) = attention.main(args)
    assert maps["attention"].shape == (2, 3, 4, 4) and maps["gradcam"].shape == (2, 4, 4)
    model = small_model("vit_small_patch14_reg4_dinov2", img_size=64)
    encoder, imgs = TimmEncoder(model, "m", (64, 64)), torch.randn(2, 3, 64, 64)
    found = cls_attention(encoder, imgs)
    seen = []
    block = model.blocks[-1]
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.forward_features(imgs)
        q, k, _ = block.attn.qkv(seen[0]).unflatten(-1, (3, 3, -1)).permute(2, 0, 3, 1, 4)
        weights = ((q * block.attn.scale) @ k.transpose(-1, -2)).softmax(-1)[:, :, 0]
    torch.testing.assert_close(found, torch.cat([weights[..., :1], weights[..., 5:]], -1), rtol=1e-4, atol=1e-5)
    assert grad_cam(encoder, imgs, lambda: encoder(imgs)[:, 0]).shape == (2, 16)


def test_dense_probe_of_stages(tmp_path):
    """A convolutional network has a grid, too."""
    saved_folder(tmp_path / "m", "convnext_atto")
    flags = [str(tmp_path / "m"), "--dataset", "scenes", "--scene_digits", "0", "1", "--scene_count", "12", "4"]
    flags += ["--input_size", "64", "--k", "1", "--penalty", "0.1", *DATA[2:]]
    (row,) = dense_probe.main(dense_probe.get_args_parser().parse_args(flags))
    assert 0 < row["linear_mIoU"] <= 100


def test_robustness_of_a_classifier(tmp_path):
    saved_folder(tmp_path / "m", "convnext_atto")
    flags = [tmp_path / "m", "--corrupt", "--corruptions", "contrast", "--images", 20, "--out", tmp_path / "r.json"]
    result = robustness.main(parsed(robustness, *flags))
    assert 0 <= result["clean_error"] <= 100 and "contrast_error" in result


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        (attention, "timm:resnet10t=random --out {tmp}/a.png", "has no attention over all patches"),
        (attention, "{tmp}/hiera --out {tmp}/a.png", "has no attention over all patches"),
        (attention, "{tmp}/siglip --out {tmp}/a.png --show attention", r"has no \[cls\] token"),
        (robustness, "{tmp}/headless --corrupt", "has no classifier"),
        (knn, "timm:no_such_model", "timm .* has no architecture no_such_model"),
        (knn, "timm:resnet10t=", "must be timm:NAME"),
        (knn, "timm:resnet10t={tmp}/none.pth", "none.pth does not exist"),
        (knn, "timm:vit_tiny_patch16_224={tmp}/headless/model.safetensors", "do not fit timm's vit_tiny_patch16_224"),
        (knn, "timm:resnet10t=random --model vit_micro_patch4", "--model has no effect"),
        (
            knn,
            "timm:hiera_tiny_224=random --input_size 40",
            "does not take images of 40x40 pixels .*: give another --input_size",
        ),
    ],
)
def test_refusals(tool, flags, message, tmp_path):
    saved_folder(tmp_path / "headless", "convnext_atto", num_classes=0)
    saved_folder(tmp_path / "hiera", "hiera_tiny_224")
    saved_folder(tmp_path / "siglip", "vit_base_patch16_siglip_224")
    data = DATA if tool is not attention else DATA[:-2]
    with pytest.raises(UserError, match=message):
        tool.main(tool.get_args_parser().parse_args([*flags.format(tmp=tmp_path).split(), *data]))


def test_no_network(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"timm:resnet10t: its weights could not be downloaded: no network$"):
        timm_model("timm:resnet10t").create()


def test_a_plain_folder_stays_ours(tmp_path):
    """A folder of a plain ViT of ours is read as before; the prefix reads it through timm."""
    saved_folder(tmp_path / "m", "vit_tiny_patch16_224", embed_dim=192, depth=12)
    assert timm_model(str(tmp_path / "m")) is None
    assert timm_model(f"timm:{tmp_path}/m").architecture == "vit_tiny_patch16_224"
    assert timm_model("vit_tiny_patch16_224") is None and timm_model("random") is None


def test_ijepa_through_timm(tmp_path):
    """A ViT without [cls] under I-JEPA's names: the mean of the patches, as timm computes it."""
    torch.manual_seed(0)
    sizes = dict(img_size=32, embed_dim=48, depth=2, num_heads=3, patch_size=16)
    model = timm.create_model("vit_huge_patch14_gap_224", num_classes=0, **sizes).eval()
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"encoder": state, "target_encoder": state, "epoch": 3}, tmp_path / "jepa.pth.tar")
    (tmp_path / "m").mkdir()
    source = timm_model(f"timm:vit_huge_patch14_gap_224={tmp_path}/jepa.pth.tar")
    source = judging.replace(source, arguments=sizes)
    imgs = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        encoder = TimmEncoder(source.create(), "jepa", (32, 32))
        torch.testing.assert_close(encoder.feature(imgs, "own"), model.forward_features(imgs).mean(1))
