"""Few-shot accuracy, similarity ratio and t-SNE: known answers, a chain of real commands, and refusals."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.stats
import timm
import torch
from helpers.launch import DIGITS, scalars
from PIL import Image

import main_pretrain
from evaluation import judging
from tools import collect, fewshot, knn, tsne
from util.data.readers import read_images
from util.errors import UserError
from util.report import ledger

DATA = "--dataset digits --num_workers 0 --device cpu"


def run(tool, *flags) -> dict:
    return tool.main(tool.get_args_parser().parse_args([str(flag) for flag in flags]))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    flags = f"{DIGITS} --num_workers 0 --epochs 1 --warmup_epochs 0 --mask_ratio 0.5 --output_dir {folder}"
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))
    return folder


# Few shots ------------------------------------------------------------------------------------------------------------


def clusters(distance: float, seed: int = 0, images: int = 400):
    """Return noisy features (M, 8) around the eight corners of a simplex, and their labels (M,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % 8
    return distance * np.eye(8)[labels] + rng.normal(size=(images, 8)), labels


@pytest.mark.parametrize("how", fewshot.NORMALIZE)
def test_separate_clusters_are_classified_perfectly(how):
    (train, labels), (test, test_labels) = clusters(40.0), clusters(40.0, seed=1)
    train, test = fewshot.normalized(train, test, how)
    draws = [fewshot.draw(labels, 5, 0, number) for number in range(3)]
    result = fewshot.fewshot_accuracies(train, labels, test, test_labels, [1, 5], draws, C=1.0)
    assert result == {1: [100.0] * 3, 5: [100.0] * 3}


def test_noise_is_chance():
    """Chance, one in eight, lies in the interval over draws of noise, widened by the sampling error of 2000 images."""
    (train, labels), (test, test_labels) = clusters(0.0), clusters(0.0, seed=1, images=2000)
    draws = [fewshot.draw(labels, 10, 0, number) for number in range(10)]
    result = fewshot.fewshot_accuracies(train, labels, test, test_labels, [1, 10], draws, C=0.1)
    for values in result.values():
        mean, half = fewshot.interval(values)
        # All draws share the test split: three standard deviations of the mean of 2000 guesses, 0.7 points each.
        assert abs(mean - 12.5) < half + 3 * 100 * math.sqrt(0.125 * 0.875 / 2000) and half < 3


def test_interval_against_scipy():
    values = [50.0, 52.0, 49.0, 57.0, 51.5]
    low, high = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    mean, half = fewshot.interval(values)
    assert (mean - half, mean + half) == pytest.approx((low, high), rel=1e-12)
    ten = list(range(10))  # the table's value for 9 degrees of freedom, 2.262, has four digits
    assert fewshot.interval(ten)[1] == pytest.approx(2.262 * np.std(ten, ddof=1) / math.sqrt(10), rel=2e-4)


def test_draws():
    """A draw has equally many different images of each class; smaller draws are part of larger ones. Draws depend on
    the seed alone and differ from one another."""
    labels = np.random.default_rng(0).integers(0, 4, 100)
    chosen = fewshot.draw(labels, 10, seed=3, number=1)
    assert chosen.shape == (4, 10) and len(set(chosen.ravel())) == 40
    assert (labels[chosen] == np.arange(4)[:, None]).all()
    assert (fewshot.draw(labels, 4, 3, 1) == chosen[:, :4]).all()
    assert (fewshot.draw(labels, 10, 3, 1) == chosen).all()
    others = [fewshot.draw(labels, 10, seed, number) for seed, number in ((3, 2), (4, 1))]
    assert not any((other == chosen).all() for other in others)
    with pytest.raises(UserError, match=f"class 2 has only {(labels == 2).sum()} training images|class . has only"):
        fewshot.draw(labels, 90, 3, 1)


def test_only_needed_images_are_encoded(monkeypatch):
    """Only the drawn images, and those that the statistics need, are encoded."""
    monkeypatch.setattr(fewshot, "STATISTICS", 50)
    args = fewshot.get_args_parser().parse_args([*DATA.split(), "--shots", "2", "--draws", "3"])
    images = read_images(args, train=True)
    part, draws, of = fewshot.needed_images(images, args)
    assert of.sum() == 50 and 50 <= len(part) <= 50 + 3 * 2 * 10 and len(set(part.indices)) == len(part)
    for number, chosen in enumerate(draws):
        whole = fewshot.draw(np.array(images.targets), 2, 0, number)
        assert (np.array(part.indices)[chosen] == whole).all()


def test_standardising_needs_the_training_split_alone():
    train, test = np.random.default_rng(0).normal(3, 5, (50, 4)), np.full((2, 4), 3.0)
    train[:, 3] = 7.0  # a constant channel: no division by zero
    first, second = fewshot.normalized(train, test, "standard")
    assert np.allclose(first[:, :3].mean(0), 0) and np.allclose(first[:, :3].std(0), 1)
    assert np.allclose(second[:, :3], ((test - train.mean(0)) / np.where(train.std(0) > 0, train.std(0), 1))[:, :3])
    assert np.isfinite(second).all() and (first[:, 3] == 0).all()


# Similarities ---------------------------------------------------------------------------------------------------------


def test_ratio_of_two_directions():
    """Two classes on rays 60 degrees apart: similarity 1 within a class, 1/2 between classes, regardless of length."""
    features = torch.tensor([[1.0, 0.0], [5.0, 0.0], [0.5, math.sqrt(0.75)], [1.0, math.sqrt(3.0)]])
    result = tsne.class_similarity(features, torch.tensor([0, 0, 1, 1]))
    # float32 input: seven digits
    assert result == pytest.approx({"intra": 1.0, "inter": 0.5, "ratio": 2.0}, rel=1e-6)


def test_ratio_against_all_pairs():
    """Classes of different sizes, one with a single image, and one unused label."""
    features, labels = torch.randn(40, 6) + 0.5, torch.tensor([0] * 20 + [1] * 14 + [3] * 5 + [4])
    cosine = torch.nn.functional.cosine_similarity
    alike: dict[bool, list] = {True: [], False: []}
    for i, j in itertools.combinations(range(40), 2):
        alike[bool(labels[i] == labels[j])].append(cosine(features[i], features[j], dim=0).item())
    intra, inter = (float(np.mean(alike[same])) for same in (True, False))
    result = tsne.class_similarity(features, labels)
    # The pairs are float32 cosines, our sums are in float64.
    assert result == pytest.approx({"intra": intra, "inter": inter, "ratio": intra / inter}, rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 2]])
def test_ratio_without_pairs(labels):
    with pytest.raises(UserError, match="at least two classes, one of them with two images"):
        tsne.class_similarity(torch.randn(3, 4), torch.tensor(labels))


def test_clusters_stay_clusters():
    """t-SNE keeps distant clusters apart: the nearest other point in the plane is of the same class."""
    features, labels = clusters(40.0, images=100)
    points = tsne.embed(torch.tensor(features), 10.0, 0)
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(100)
    assert points.shape == (100, 2) and (labels[distance.argmin(1)] == labels).all()
    with pytest.raises(UserError, match="--perplexity 100 must be below the number of images, 100"):
        tsne.embed(torch.tensor(features), 100.0, 0)


# The commands ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_judged_in_every_way(pretrained, tmp_path):
    """From pretraining to a table: JSON, TensorBoard and ledger of every command hold the same values."""
    file = pretrained / "checkpoint-0.pth"
    found = run(knn, file, *DATA.split(), "--k", 5, "--out", tmp_path / "knn.json")
    few = run(fewshot, file, *DATA.split(), "--shots", 1, 5, "--draws", 3, "--out", tmp_path / "fewshot.json")
    first, rows = ledger.read(pretrained / "results.jsonl"), ledger.read(tmp_path / "results.jsonl")
    assert [row["command"] for row in first + rows] == ["main_pretrain", "knn", "fewshot"]
    published = [{f"eval/{name}": value for name, value in result.items()} for result in (found, few)]
    assert [row["metrics"] for row in rows] == published
    assert all(row["source"]["flags"] == first[0]["flags"] for row in rows)
    assert all(row["images_seen"] == 1797 and row["data"]["test"]["images"] == 360 for row in rows)
    for name, result in zip(("knn", "fewshot"), published):
        assert json.loads((tmp_path / f"{name}.json").read_text())["result"] == result
    content = json.loads((tmp_path / "fewshot.json").read_text())
    assert content["pool"] == "avg" and content["model"] == "vit_micro_patch4" and content["input_size"] == 16
    assert np.mean(content["draws_acc1"]["5"]) == pytest.approx(few["fewshot5_acc1"])
    # Five labels a class are better than one; both are above chance (10 %).
    assert few["fewshot5_acc1"] > few["fewshot1_acc1"] > 10
    ((x, value),) = scalars(tmp_path / "tensorboard-fewshot", "eval/fewshot5_acc1")
    assert x == 1000 and value == pytest.approx(few["fewshot5_acc1"])  # after epoch 0
    flags = [str(pretrained), str(tmp_path), "--by", "mask_ratio", "--metric", "eval/knn5_acc1", "fewshot5_acc1"]
    table = collect.main(collect.get_args_parser().parse_args(flags))
    ((values, cells),) = table.rows
    assert values == (0.5,) and [cell.mean for cell in cells.values()] == [found["knn5_acc1"], few["fewshot5_acc1"]]


def test_names_of_a_checkpoint(pretrained, image_folder, capsys):
    """A checkpoint is an argument or --finetune, a checkpoint or encoder file; `random` is the encoder of a probe
    without a file."""
    flags = ["--data_path", image_folder, *DATA.split()[2:], "--k", 1]
    files = [pretrained / "checkpoint-0.pth", pretrained / "encoder.safetensors"]
    by_file = [run(knn, *where, *flags) for where in ([files[0]], [files[1]], ["--finetune", files[0]])]
    assert by_file[0] == by_file[1] == by_file[2]
    random = ["--model", "vit_micro_patch4", "--input_size", "16"]
    assert run(knn, "random", *flags, *random) == run(knn, "random", *flags, *random, "--global_pool")
    assert "the encoder is random" in capsys.readouterr().out
    assert run(knn, "random", *flags, *random, "--cls_token") == run(knn, "random", *flags, *random, "--pool", "cls")
    with pytest.raises(UserError, match="are aliases; give one of them"):
        run(knn, "random", "--finetune", "a.pth", *flags)


def test_a_timm_model_by_name(monkeypatch):
    """Features are those of timm; mean, standard deviation and size come from its configuration. Nothing is
    downloaded."""
    create = timm.create_model
    made = []

    def without_download(name, pretrained, **kwargs):
        assert pretrained
        made.append(create(name, pretrained=False, **kwargs).eval())
        return made[-1]

    monkeypatch.setattr(timm, "create_model", without_download)
    args = knn.get_args_parser().parse_args(["vit_tiny_patch16_224", *DATA.split(), "--pool", "cls"])
    judged = judging.open_encoder(args, args.checkpoint)
    assert judged.config.model == "vit_tiny_patch16"
    assert judged.images.mean == list(made[0].pretrained_cfg["mean"]) and judged.flags["input_size"] == 224
    imgs = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        ours, theirs = judged.model.norm(judged.model.forward_tokens(imgs)), made[0].forward_features(imgs)
    # The same float32 operations; the attention kernels may sum in another order.
    assert torch.allclose(ours, theirs, atol=1e-4)

    def offline(*args, **kwargs):
        raise OSError("no network\nmore")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"vit_tiny_patch16_224 is a model of timm's, but .*: no network$"):
        judging.open_encoder(args, args.checkpoint)


def test_tsne_side_by_side(pretrained, tmp_path, capsys):
    out = tmp_path / "new" / "tsne.png"
    flags = ["random", pretrained / "checkpoint-0.pth", *DATA.split(), "--images", 120, "--perplexity", 10]
    results = run(tsne, *flags, "--out", out)
    width, height = Image.open(out).size
    assert width > 1.8 * height  # two squares and a legend
    assert [result["checkpoint"] for result in results] == ["random", str(pretrained / "checkpoint-0.pth")]
    assert all(0 < result["inter"] < result["intra"] <= 1 for result in results)
    assert json.loads(out.with_suffix(".json").read_text())["result"] == results
    rows = {row["flags"]["checkpoint"]: row for row in ledger.read(out.parent / "results.jsonl")}
    for result in results:
        row = rows[result["checkpoint"]]
        assert row["metrics"] == {f"eval/{name}": result[name] for name in ("intra", "inter", "ratio")}
        # Random: like the other model.
        assert row["flags"]["model"] == "vit_micro_patch4" and row["flags"]["input_size"] == 16
        assert row["data"]["test"]["images"] == 120
    assert rows["random"]["source"] is None


@pytest.mark.parametrize(
    ("tool", "flags", "message"),
    [
        (fewshot, "random --shots 0", "--shots 0 must be positive"),
        (fewshot, "random --shots 5 5", "--shots 5 5 must be positive numbers, each once"),
        (fewshot, "random --draws 1", "--draws 1 must be at least 2"),
        (fewshot, "random --C 0", "--C 0.0 must be positive and finite"),
        (fewshot, "random --out here.png", "--out here.png must be a .json file"),
        (fewshot, "random --dataset folder --data_path {images}", "has no labels"),
        (fewshot, "{run}/checkpoint-0.pth --shots 200", "--shots 200: class 0 has only"),
        (fewshot, "{run}/none.pth", "none.pth does not exist"),
        (knn, "random --k 0", "--k must be positive"),
        (knn, "random --batch_size 0", "--batch_size 0 must be positive"),
        (knn, "random --out {run}/checkpoint-0.pth/a.json", "cannot be written"),
        (tsne, "--out a.png", "give a CHECKPOINT, or several"),
        (tsne, "random --out a.json", "--out a.json must be a .png, .pdf or .svg file"),
        (tsne, "random --titles a b --out a.png", "--titles has 2 for 1 checkpoints"),
        (tsne, "random --perplexity 1 --out a.png", "--perplexity 1.0 must be a number above 1"),
        (tsne, "{run}/checkpoint-0.pth --images 20 --out {tmp}/a.png", "--perplexity 30 must be below the number"),
    ],
)
def test_mistakes(pretrained, image_folder, tmp_path, tool, flags, message):
    flags = flags.format(run=pretrained, images=image_folder, tmp=tmp_path).split()
    data = [] if "--dataset" in flags else ["--dataset", "digits"]
    random = ["--model", "vit_micro_patch4"] if flags[0] == "random" else []
    with pytest.raises(UserError, match=message):
        run(tool, *flags, *data, *random, "--num_workers", "0", "--device", "cpu")
