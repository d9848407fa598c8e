"""Frozen features on segmentation: planted tasks with known answers, the linear head against pixel cross-entropy and
scikit-learn, the held-out choice, and what is refused."""

import json
import shlex

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.launch import scalars
from PIL import Image
from sklearn.linear_model import LogisticRegression

from evaluation import judging
from evaluation.dense_probe import Bank, LinearHeads, Neighbours, labels_of, pixel_loss
from evaluation.features import knn_predict
from tools import dense_probe
from util.data.dense.patch_labels import patch_counts
from util.data.dense.transforms import SegmentationInput
from util.errors import UserError

COLOURS = np.array([[200, 30, 30], [30, 200, 30], [30, 30, 200]], np.uint8)
MODEL = "random --model vit_micro_patch4 --num_workers 0 --device cpu --amp_dtype fp32"
SCENES = "--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 20 5 --input_size 32 --bank 500 --k 1 5"


def probe(flags: str) -> list[dict]:
    return dense_probe.main(dense_probe.get_args_parser().parse_args(shlex.split(flags)))


def stripes(root, seed=0, counts=(12, 6)):
    """Write a `masks` set of images of 32 x 64 pixels: columns of 8 pixels have a class each, which is their colour.
    In the encoder's input of 16 x 32 they are columns of patches, so that bilinear outputs keep their borders."""
    rng = np.random.default_rng(seed)
    for split, count in zip(("train", "val"), counts):
        for name in ("images", "masks"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            labels = np.tile(np.repeat(rng.integers(0, 3, 8), 8), (32, 1)).astype(np.uint8)
            labels[0, :3] = 0, 1, 2  # every mask has every class
            Image.fromarray(COLOURS[labels]).save(root / split / "images" / f"{index}.png")
            labels[0, :3] = 255
            Image.fromarray(labels).save(root / split / "masks" / f"{index}.png")
    (root / "classes.txt").write_text("red\ngreen\nblue\n")
    return f"--dataset masks --data_path {root} --input_size 16 32 --mean 0.5 0.5 0.5 --std 0.3 0.3 0.3"


def colours(_, imgs):
    """Tokens that carry the label: the mean colour of each patch."""
    return F.avg_pool2d(imgs, 4).flatten(2).transpose(1, 2)


def noise(_, imgs):
    """Tokens that know nothing of the image."""
    seed = int(imgs.double().abs().sum() * 1000) % 2**31
    return torch.randn(len(imgs), 32, 16, generator=torch.Generator().manual_seed(seed))


def test_features_that_carry_the_label(tmp_path, monkeypatch):
    """All pixels are right, also of rectangular images, at the original size, with unlabelled pixels."""
    monkeypatch.setattr(dense_probe.Probe, "encode", colours)
    flags = f"{MODEL} {stripes(tmp_path / 'set')} --k 1 3 --out {tmp_path}/out/a.json"
    (row,) = probe(flags)
    assert row["knn_mIoU"] == row["linear_mIoU"] == row["linear_pixel_acc"] == 100
    assert list(row["details"]["knn"]["iou"]) == ["red", "green", "blue"]
    assert sum(row["details"]["knn"]["pixels"].values()) == 6 * (32 * 64 - 3)
    written = json.loads((tmp_path / "out" / "a.json").read_text())
    assert written["result"]["eval/knn_mIoU"] == 100 and written["chosen"] == row["chosen"]
    assert set(written["held_out_mIoU"]["knn"]) == {"1", "3"}
    (entry,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text().splitlines())
    assert entry["metrics"]["eval/linear_mIoU"] == 100
    assert scalars(tmp_path / "out" / "tensorboard-dense_probe", "eval/linear_mIoU")


def test_features_without_information_give_chance(tmp_path, monkeypatch):
    """A third of the pixels is right, and a quarter of the union at most: 1/5 for predictions that are drawn, less for
    constant ones. 6 points are four standard deviations of 60 images of 8 columns."""
    monkeypatch.setattr(dense_probe.Probe, "encode", noise)
    (row,) = probe(f"{MODEL} {stripes(tmp_path, counts=(20, 60))} --k 20 --batch_size 1")
    for name in ("knn", "linear"):
        assert row[f"{name}_pixel_acc"] == pytest.approx(100 / 3, abs=6) and row[f"{name}_mIoU"] < 25


def test_the_choice_does_not_open_the_evaluation_images(tmp_path, monkeypatch):
    """The choice does not change with the evaluation images, and works without them."""
    monkeypatch.setattr(dense_probe.Probe, "encode", noise)
    flags = f"{MODEL} {stripes(tmp_path)} --k 1 5 20 --batch_size 1"
    (one,) = probe(flags)
    labels = [tmp_path / "val" / "masks" / f"{index}.png" for index in range(6)]
    for path in labels:
        Image.fromarray(2 - np.minimum(np.asarray(Image.open(path)), 2)).save(path)
    (other,) = probe(flags)
    assert one["chosen"] == other["chosen"] and one["held_out_mIoU"] == other["held_out_mIoU"]
    assert one["details"] != other["details"]
    args = dense_probe.get_args_parser().parse_args(flags.split())
    (judged,) = judging.open_each(args, judging.open_encoder)
    images, held_out = dense_probe.read_splits(args)
    for path in labels:
        path.unlink()
    subject = dense_probe.Probe(judged, images)
    chosen, values, _ = dense_probe.choose(subject)
    assert {name: each.settings for name, each in chosen.items()} == {k: [v] for k, v in one["chosen"].items()}
    assert values["knn"][5] == one["held_out_mIoU"]["knn"]["5"]
    with pytest.raises(UserError, match="unreadable"):
        subject.scores(held_out, chosen, "evaluation")


def test_batches_and_workers_do_not_matter(tmp_path):
    """0.2: tokens differ in the last bits, which moves few of 5,120 pixels. The sample is the same."""
    one, other = (
        probe(f"{MODEL} {SCENES} {more}")[0] for more in ("--batch_size 64", "--batch_size 3 --num_workers 2")
    )
    assert one["chosen"] == other["chosen"]
    for name in ("knn_mIoU", "linear_mIoU", "knn_pixel_acc", "linear_pixel_acc"):
        assert one[name] == pytest.approx(other[name], abs=0.2)


def test_several_checkpoints(tmp_path):
    """Each has its line in the ledger; the JSON file has them side by side. The same encoder has the same scores."""
    rows = probe(f"{MODEL.replace('random', 'random random')} {SCENES} --out {tmp_path}/a.json")
    written = json.loads((tmp_path / "a.json").read_text())["result"]
    assert [row["checkpoint"] for row in written] == ["random", "random"]
    assert rows[0]["linear_mIoU"] == rows[1]["linear_mIoU"]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2


def test_the_loss_is_pixel_cross_entropy():
    """Value and gradient in float64, 1e-12: rounding. Patches are rectangular, and some pixels have no label."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 12, 10), generator=generator)
    labels[labels == 3], labels[labels == 4] = 255, -1
    pixels = logits.repeat_interleave(4, dim=2).repeat_interleave(2, dim=3)
    ignored = torch.where(labels < 0, 255, labels)
    expected = F.cross_entropy(pixels, ignored, ignore_index=255)
    counts = patch_counts(labels, (4, 2), 3, 255)[..., :-1]
    ours = pixel_loss(logits.permute(0, 2, 3, 1).reshape(-1, 3), counts.reshape(-1, 3))
    assert counts.sum() == (ignored != 255).sum() and abs(ours - expected) < 1e-12
    one, other = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (ours, expected))
    assert (one - other).abs().max() < 1e-12


def test_the_head_is_logistic_regression():
    """Probabilities agree with scikit-learn's, where a patch is one sample for each class, weighted by its pixels.
    2e-3: where L-BFGS stops in float32."""
    generator = torch.Generator().manual_seed(0)
    tokens, counts = torch.randn(60, 4, generator=generator), torch.randint(0, 9, (60, 3), generator=generator).float()
    heads = LinearHeads(Bank(tokens, counts, 1), [0.1, 0.001], "cpu")
    standard = ((tokens - heads.mean) * heads.scale).double().numpy()
    for penalty, logits in heads(tokens).items():
        weights = (counts / counts.sum()).T.flatten().double().numpy()
        model = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=5000)
        model.fit(np.tile(standard, (3, 1)), np.repeat(np.arange(3), 60), weights)
        assert np.abs(logits.softmax(1).numpy() - model.predict_proba(standard)).max() < 2e-3


def test_neighbours_vote_as_in_knn():
    """Patches of one class each: the votes are those of images. 1e-5: float32."""
    generator = torch.Generator().manual_seed(0)
    tokens, queries = (torch.randn(count, 8, generator=generator) for count in (50, 7))
    labels = torch.randint(0, 3, (50,), generator=generator)
    votes = Neighbours(Bank(tokens, 16.0 * F.one_hot(labels, 3), 1), [1, 5], "cpu")(queries)
    for k, ours in votes.items():
        expected = F.normalize(knn_predict(tokens, labels, queries, 3, k), p=1, dim=1)
        assert torch.allclose(ours, expected, atol=1e-5)


def test_sizes():
    """Labels of the input are those of the original, resized; outside the image they are ignored. Outputs are read
    where the image lies."""
    resize = SegmentationInput((16, 16), (0.5,) * 3, (0.5,) * 3, ignore_label=9)
    labels = np.repeat([[0, 1]], 16, axis=1).repeat(8, axis=0).astype(np.int32)  # 8 x 32: 4 x 16 in the input
    image, target = resize(Image.fromarray(np.zeros((8, 32, 3), np.uint8)), labels)
    assert image.shape == (3, 16, 16) and target.shape == (16, 16) and (target[4:] == 9).all()
    assert (target[:4, :8] == 0).all() and (target[:4, 8:] == 1).all()
    outputs = torch.zeros(2, 4, 4)
    outputs[1, 0, 2:] = outputs[0, 0, :2] = 1
    assert torch.equal(labels_of(outputs, (16, 16), (4, 16), (8, 32)), torch.from_numpy(labels).long())


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--dataset digits", "--dataset digits has no masks of classes: give one of ade20k"),
        ("--dataset coco", "--dataset coco has no masks of classes"),
        ("--k 0", "--k 0 must be positive numbers"),
        ("--k 5 5", "--k 5 5 must be positive numbers, each once"),
        ("--k 501", "--k 501: there are only 500 labelled training patches"),
        ("--penalty -1", "--penalty -1 must be finite"),
        ("--bank 0", "--bank 0 must be positive"),
        ("--holdout 1", "--holdout 1 must lie between 0 and 1"),
        ("--scene_count 1 1", "--holdout needs at least 2 training images"),
        ("--crop_pct 0.9", "--crop_pct has no effect here"),
        ("--nb_classes 7", "--nb_classes 7 contradicts the data set, which has 3 classes"),
        ("--input_size 30", "30"),
        ("--out a.txt", "--out a.txt must be a .json file"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(UserError) as error:
        probe(f"{MODEL} {SCENES} {flags}")
    assert message in str(error.value)


def test_a_checkpoint_is_needed():
    with pytest.raises(UserError, match="give a CHECKPOINT"):
        probe(f"{MODEL.removeprefix('random ')} {SCENES}")


def test_a_file_without_a_vision_transformer(tmp_path):
    torch.save({"model": {"conv1.weight": torch.zeros(2, 3, 7, 7)}}, tmp_path / "cnn.pth")
    with pytest.raises(UserError, match="contains no ViT weights"):
        probe(f"{MODEL.replace('random', str(tmp_path / 'cnn.pth'))} {SCENES}")
