"""Sets of labels and synthetic noise: targets, loss and scores by independent computations, and refusals."""

import argparse
import json
import math
import threading

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint, ranks
from PIL import Image
from scipy.stats import binom

import main_finetune
from evaluation.scores import MultiLabel, MultiLabelSigmoid, label_scores, mean_average_precision, precision_at_1
from util.data.build import build_loader
from util.data.labels import LabelSets, hashtag_noise, read_labelled, read_vocabulary, uniform_noise, with_noise
from util.data.samples import KeyedDataset
from util.data.sources import Arrays
from util.errors import UserError
from util.training.losses import build_criterion

BASE = "--dataset filelist --targets multilabel --model vit_micro_patch4 --input_size 16 --batch_size 8 --epochs 1"
BASE += " --in_chans 3 --warmup_epochs 0 --lr 1e-3 --num_workers 0 --device cpu --amp_dtype fp32 --aug crop"
COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A folder with 24 training and 9 test images of one to three colours, train.txt and val.txt."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 9)):
        lines = []
        for i in range(count):
            names = rng.permutation(list(COLOURS))[: 1 + i % 3]
            colours = np.repeat(np.array([COLOURS[name] for name in names]), 16 // len(names) + 1, axis=0)[:16]
            pixels = np.clip(colours[:, None] + rng.normal(0, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{split}{i}.png")
            lines.append(f"{split}{i}.png\t{','.join(names)}")
        (root / f"{split}.txt").write_text("\n".join(lines))
    return root


def parse(root, flags=""):
    data = f"--data_path {root} --train_list {root / 'train.txt'} --val_list {root / 'val.txt'}"
    return main_finetune.get_args_parser().parse_args(f"{BASE} {data} {flags}".split())


def flags_of(**given):
    return argparse.Namespace(**{"seed": 0, "label_noise": 0.25, "dataset": "made up", "in_chans": 3, **given})


def test_rows_sum_to_one(lists):
    """The labels of a line have equal shares, in the order of the vocabulary."""
    images = read_labelled(parse(lists), train=True)
    assert images.classes == ["blue", "green", "red"]
    lines = (lists / "train.txt").read_text().splitlines()
    for i, line in enumerate(lines):
        names = line.split("\t")[1].split(",")
        row = [1 / len(names) if label in names else 0 for label in images.classes]
        assert images.target(i).tolist() == pytest.approx(row, rel=1e-6)  # float32
    batch = next(iter(build_loader(images, lambda img: torch.zeros(3, 2, 2), parse(lists), 8, True).begin(0)))
    assert batch.target.shape == (8, 3) and batch.target.dtype == torch.float32
    assert torch.equal(batch.target, torch.stack([images.target(int(i)) for i in batch.index]))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_soft_target_loss(smoothing):
    """-sum_k t_k log p_k, written out; smoothing distributes a share of the targets over all classes equally."""
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    targets = torch.rand(5, 7, dtype=torch.float64).softmax(1)
    loss = build_criterion(False, "multilabel", smoothing)(logits, targets)
    soft = (1 - smoothing) * targets + smoothing / 7
    expected = -(soft * (logits.exp() / logits.exp().sum(1, keepdim=True)).log()).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (logits.softmax(1) - soft) / 5)  # in closed form


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_without_labels_in_the_loss(smoothing):
    """A row of zeros has no softmax loss, with smoothing neither; in the binary loss all its labels are 0."""
    logits = torch.randn(4, 5, dtype=torch.float64)
    sets = [(0, 2), (), (4,), ()]
    targets = torch.zeros(4, 5, dtype=torch.float64)
    for row, labels in enumerate(sets):
        targets[row, list(labels)] = 1 / max(1, len(labels))
    softmax = build_criterion(False, "multilabel", smoothing)
    torch.testing.assert_close(softmax(logits, targets), softmax(logits[::2], targets[::2]) / 2)
    expected = 0
    for row, labels in enumerate(sets):
        for label in range(5):
            t = (1 - smoothing) * (label in labels) + smoothing / 2
            p = torch.sigmoid(logits[row, label])
            expected -= (t * p.log() + (1 - t) * (1 - p).log()) / 20
    loss = build_criterion(False, "multilabel", smoothing, "bce")(logits, targets)
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)  # computed in float32


def test_scores_with_images_without_labels():
    """AUC by counting pairs; a label that all images or none have is left out; precision@1 of labelled images only."""
    rng = np.random.default_rng(0)
    logits, holds = torch.from_numpy(rng.normal(size=(30, 5))).float(), torch.from_numpy(rng.random((30, 5)) < 0.4)
    holds[::3] = False  # without labels
    holds[:, 4] = False
    kept = MultiLabelSigmoid(torch.device("cpu"))
    targets = holds / holds.sum(1, keepdim=True).clamp(min=1)
    for part in torch.arange(30).split(7):
        kept.add(logits[part], targets[part], torch.ones(len(part), dtype=torch.bool))
    stats, details = kept.read(), kept.details(list("abcde"))
    pairs = [logits[holds[:, i], i][:, None] > logits[~holds[:, i], i] for i in range(4)]
    aucs = [100 * pair.float().mean().item() for pair in pairs]
    *values, none = details["auc"].values()
    assert values == pytest.approx(aucs, rel=1e-5) and none is None and details["labels_without_auc"] == 1
    assert stats["auc"] == pytest.approx(sum(aucs) / 4, rel=1e-5)
    labelled = holds.any(1)
    assert not labelled.all() and "1 labels that all images or none have" in kept.summary(stats)
    first = holds[labelled][range(int(labelled.sum())), logits[labelled].argmax(1)]
    assert stats["precision1"] == pytest.approx(100 * first.float().mean().item(), rel=1e-6)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, holds.float()).item()
    assert stats["loss"] == pytest.approx(expected, rel=1e-6)
    assert np.isnan(label_scores(np.ones((3, 1)), np.ones((3, 1), bool))[1, 0])  # a label of all images


def test_average_precision_by_hand():
    """Class 0: hits at ranks 1 and 3 of four, (1 + 2/3) / 2; class 1: none, left out; class 2: the hit is last, 1/4."""
    scores = np.array([[0.9, 0.1, 0.4], [0.8, 0.5, 0.3], [0.7, 0.2, 0.2], [0.6, 0.3, 0.1]])
    holds = np.array([[1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 1]], bool)
    assert mean_average_precision(scores, holds) == pytest.approx(100 * (5 / 6 + 1 / 4) / 2)
    assert precision_at_1(scores, holds) == 50  # class 0 ranks first everywhere, and holds for images 0 and 2
    assert mean_average_precision(scores, np.zeros_like(holds)) == 0


def test_scores_over_batches():
    """Batches with unreadable images against all images at once, with average precision written out as a sum."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(40, 6))).float()
    holds = torch.from_numpy(rng.random((40, 6)) < 0.3)
    holds[torch.arange(40), torch.from_numpy(rng.integers(0, 5, 40))] = True
    holds[:, 5] = False  # class 5 never occurs
    targets = holds / holds.sum(1, keepdim=True)
    good = torch.from_numpy(rng.random(40) < 0.8)
    kept = MultiLabel(torch.device("cpu"))
    for part in torch.arange(40).split(7):
        kept.add(logits[part], targets[part], good[part])
    scores, p, held = kept.read(), logits.softmax(1)[good], holds[good]
    values = []
    for place in range(5):
        order = held[p[:, place].argsort(descending=True), place].float()  # no ties
        values.append((order.cumsum(0) / torch.arange(1, len(order) + 1) * order).sum() / order.sum())
    assert scores["mAP"] == pytest.approx(100 * float(sum(values)) / 5, rel=1e-5)  # float32 sums
    assert scores["precision1"] == pytest.approx(100 * float(held[range(len(p)), p.argmax(1)].float().mean()), rel=1e-5)
    assert scores["loss"] == pytest.approx(-float((targets[good] * p.log()).sum(1).mean()), rel=1e-5)
    assert scores["skipped"] == 40 - len(p)


def test_scores_of_three_ranks(monkeypatch):
    """Equal to the scores of one rank, although each computes a part of the classes and one of them has no image. Ranks
    are threads here, which synchronise as processes would."""
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(rng.normal(size=(30, 7))).float()
    targets = torch.from_numpy(rng.random((30, 7)) < 0.3).float()
    alone = MultiLabel(torch.device("cpu"))
    alone.add(logits, targets, torch.ones(30, dtype=torch.bool))
    expected, meeting, here = alone.read(), threading.Barrier(3), threading.local()
    parts, given, results = [(0, 17), (17, 17), (17, 30)], [None] * 3, [None] * 3

    def gather(value):
        given[here.rank] = value
        meeting.wait(timeout=60)
        everyone = list(given)
        meeting.wait(timeout=60)
        return everyone

    def rank(number):
        here.rank = number
        kept = MultiLabel(torch.device("cpu"))
        for first in range(*parts[number], 5):
            part = slice(first, min(first + 5, parts[number][1]))
            kept.add(logits[part], targets[part], torch.ones(len(targets[part]), dtype=torch.bool))
        results[number] = kept.read()

    monkeypatch.setattr(MultiLabel, "AT_ONCE", 2)
    for name, replacement in dict(gather_objects=gather, get_rank=lambda: here.rank, get_world_size=lambda: 3).items():
        monkeypatch.setattr(f"evaluation.scores.{name}", replacement)
    threads = [threading.Thread(target=rank, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2]
    assert results[0]["mAP"] == expected["mAP"] > 0  # the same numbers, with exact sums
    assert results[0] == pytest.approx(expected, rel=1e-6)  # losses are summed in float32 inside a batch


# Noise ----------------------------------------------------------------------------------------------------------------


def within(count, trials, share):
    """Return whether a count lies between the 0.00005 and 0.99995 quantiles of its binomial distribution."""
    low, high = binom.interval(0.9999, trials, share)
    return low <= count <= high


def test_uniform_noise():
    targets = [i % 10 for i in range(5000)]
    noisy = uniform_noise(targets, 10, 0.3, np.random.default_rng(0))
    hit = [(a, b) for a, b in zip(targets, noisy) if a != b]
    assert within(len(hit), 5000, 0.3)
    shifts = np.bincount([(b - a) % 10 for a, b in hit], minlength=10)
    assert all(within(count, len(hit), 1 / 9) for count in shifts[1:])  # all other classes equally often
    assert uniform_noise(targets, 10, 0.0, np.random.default_rng(0)) == targets
    assert all(a != b for a, b in zip(targets, uniform_noise(targets, 10, 1.0, np.random.default_rng(0))))


def test_hashtag_noise():
    """Classes 0 and 1 in every image, 2 to 9 in none, 10 and 11 in every second; sets stay sorted and non-empty."""
    targets = [(0, 1, *((10, 11) if i % 2 else ())) for i in range(4000)]
    noisy = hashtag_noise(targets, 12, 0.2, np.random.default_rng(0))
    assert all(labels == tuple(sorted(set(labels))) and labels for labels in noisy)
    # Classes that never occur are never added.
    assert not {label for labels in noisy for label in labels} & set(range(2, 10))
    # An even image has two labels. 10 or 11 holds a third of all: in it by an addition of 0, 1, 2 (probabilities .64,
    # .32, .04), or, where both labels were forgotten (.04), of one at least.
    even = noisy[::2]
    added = 0.32 * 1 / 3 + 0.04 * (1 - (2 / 3) ** 2) + 0.04 * 0.64 / 3
    assert within(sum(bool({10, 11} & set(labels)) for labels in even), 2000, added)
    # Label 0 is dropped with probability 0.2, and added again with its share, a third of all occurrences.
    back = 0.32 / 3 + 0.04 * (1 - (2 / 3) ** 2)
    empty = 0.2 * 0.64 / 3  # the other label dropped too, nothing added: one is drawn
    assert within(sum(0 not in labels for labels in even), 2000, 0.2 * (1 - back - empty))


def test_noise_of_images_without_labels(tmp_path):
    """Empty sets stay empty, the noise of the others is the same as without them."""
    sets = [(0, 1), (), (2,), ()] * 20
    noisy = hashtag_noise(sets, 3, 0.5, np.random.default_rng(0))
    assert noisy[1::2] == [()] * 40 and noisy[::2] == hashtag_noise(sets[::2], 3, 0.5, np.random.default_rng(0))
    arrays = Arrays(np.zeros((80, 8, 8, 3), np.uint8), [0] * 80, list("abc"))
    assert with_noise(LabelSets(arrays, sets, list("abc")), flags_of()).target(1).tolist() == [0, 0, 0]


def test_noise_depends_on_the_seed_alone():
    """Labels depend on the seed and not on the number of workers; the reader's list is unchanged."""
    arrays = Arrays(np.zeros((64, 8, 8, 3), np.uint8), [i % 4 for i in range(64)], list("abcd"))

    def seen(seed, workers):
        images = with_noise(arrays, flags_of(seed=seed))
        args = flags_of(num_workers=workers, pin_mem=False, seed=0)
        loader = build_loader(images, lambda img: torch.zeros(1), args, 16, True)
        pairs = [(int(i), int(t)) for batch in loader.begin(0) for i, t in zip(batch.index, batch.target)]
        return [target for _, target in sorted(pairs)]

    one = seen(0, 0)
    assert one == seen(0, 2) == with_noise(arrays, flags_of()).targets != arrays.targets
    assert seen(1, 0) != one and arrays.targets == [i % 4 for i in range(64)]
    assert with_noise(arrays, flags_of(label_noise=0.0)) is arrays
    sets = LabelSets(arrays, [(i % 4,) for i in range(64)], list("abcd"))
    noisy = with_noise(sets, flags_of(label_noise=0.5))
    sample = KeyedDataset(noisy, lambda img: torch.zeros(1), seed=0, in_chans=3)[3]
    assert torch.equal(sample.target, noisy.target(3)) and sample.target.sum() == 1


# Runs -----------------------------------------------------------------------------------------------------------------


def test_a_run_its_evaluation_and_fine_tuning(lists, tmp_path, capsys):
    """Two processes have the scores of one; the checkpoint stores its labels, an evaluation needs no training list, and
    fine-tuning reports the replaced head."""
    stats = main_finetune.main(parse(lists, f"--label_noise 0.2 --output_dir {tmp_path}"))
    assert stats.keys() == {"loss", "mAP", "auc", "precision1", "skipped"} and math.isfinite(stats["loss"])
    state = checkpoint(tmp_path, "checkpoint-0.pth")
    assert state["classes"] == checkpoint(tmp_path, "checkpoint-best.pth")["classes"] == ["blue", "green", "red"]
    again = parse(lists, f"--eval --finetune {tmp_path / 'checkpoint-0.pth'} --output_dir {tmp_path / 'eval'}")
    again.train_list = ""
    assert main_finetune.main(again) == pytest.approx(stats, rel=1e-6)
    flags = f"{BASE} --data_path {lists} --val_list {lists / 'val.txt'} --output_dir {tmp_path / 'two'}"
    output = ranks("main_finetune", f"{flags} --eval --finetune {tmp_path / 'checkpoint-0.pth'}", 2)
    assert f"mAP {stats['mAP']:.2f} %  precision@1 {stats['precision1']:.2f} %" in output
    capsys.readouterr()
    main_finetune.main(parse(lists, f"--finetune {tmp_path / 'checkpoint-0.pth'} --output_dir {tmp_path / 'next'}"))
    assert "its 3 labels: blue, green and 1 more" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_a_run_with_images_without_findings(loss, lists, tmp_path, capsys):
    """Half of the images have no label, by an empty cell or by a name for it. The scores of each label are in eval.json
    under its name."""
    for split in ("train", "val"):
        lines = (lists / f"{split}.txt").read_text().splitlines()
        names = [line.split("\t")[0] for line in lines]
        lines[::4] = [f"{name}\t" for name in names[::4]]
        lines[1::4] = [f"{name}\tNo Finding" for name in names[1::4]]
        (tmp_path / f"{split}.txt").write_text("\n".join(lines))
    where = f"--train_list {tmp_path / 'train.txt'} --val_list {tmp_path / 'val.txt'} --multilabel_loss {loss}"
    args = parse(lists, where)
    args.no_finding, args.output_dir = "No Finding", str(tmp_path / "out")
    stats = main_finetune.main(args)
    assert "12 of 24 images have no label" in capsys.readouterr().out
    again = parse(lists, f"{where} --eval --finetune {tmp_path / 'out/checkpoint-0.pth'}")
    again.no_finding, again.output_dir = "No Finding", str(tmp_path / "eval")
    assert main_finetune.main(again) == pytest.approx(stats, rel=1e-6)
    details = json.loads((tmp_path / "eval" / "eval.json").read_text())["details"]
    assert sum(details["auc"].values()) / 3 == pytest.approx(stats["auc"]) and list(details["auc"]) == sorted(COLOURS)


def write(folder, name, text):
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    "flags,text,words",
    [
        ("--dataset digits", "", "--targets multilabel needs --dataset filelist"),
        ("--mixup 0.8", "", "excludes --mixup and --cutmix"),
        ("--targets single --label_vocab x", "", "--label_vocab has no effect"),
        ("--label_noise 1.5", "", r"--label_noise 1.5 must lie in \[0, 1\]"),
        ("--eval --finetune x --label_noise 0.5", "", "--label_noise has no effect with --eval"),
        ("--train_list {}", "train0.png\ntrain1.png", "has no labels; --targets multilabel needs"),
        ("--train_list {}", "train0.png\t\ntrain1.png\t , ", "has no label for any image"),
        ("--targets single --multilabel_loss bce", "", "--multilabel_loss has no effect without"),
        ("--targets single --no_finding none", "", "--no_finding has no effect without"),
        ("--targets single --label_sep ;", "", "--label_sep has no effect without"),
        ("--val_list {}", "val0.png\tpink", "has the label 'pink', which is not in .*train.txt"),
        ("--label_vocab {}", "red\ngreen", "has the label 'blue', which is not in --label_vocab"),
        ("--label_vocab {}", "red\ngreen\nred", "repeats 'red'"),
        ("--label_vocab {}", "\n", "has 0 labels: two or more"),
        ("--label_vocab missing", "", "--label_vocab missing is not a text file"),
    ],
)
def test_refusals(flags, text, words, lists, tmp_path):
    given = write(tmp_path, "given", text)
    with pytest.raises(UserError, match=words):
        main_finetune.main(parse(lists, f"--output_dir {tmp_path / 'out'} {flags.format(given)}"))
    assert not (tmp_path / "out").exists()


def test_vocabulary_is_that_of_the_checkpoint(lists, tmp_path):
    """A vocabulary in another order is refused by --eval and --resume."""
    own, other = write(tmp_path, "own", "red\ngreen\nblue\npink"), write(tmp_path, "other", "green\nred\nblue\npink")
    assert read_vocabulary(own) == ["red", "green", "blue", "pink"]
    main_finetune.main(parse(lists, f"--label_vocab {own} --output_dir {tmp_path / 'out'}"))
    assert checkpoint(tmp_path / "out", "checkpoint-0.pth")["classes"] == read_vocabulary(own)
    with pytest.raises(UserError, match="is not the vocabulary of"):
        main_finetune.main(parse(lists, f"--eval --resume {tmp_path / 'out/checkpoint-0.pth'} --label_vocab {other}"))
    with pytest.raises(UserError, match="was trained on other labels"):
        main_finetune.main(
            parse(lists, f"--label_vocab {other} --output_dir {tmp_path / 'out'} --resume auto --epochs 2")
        )


def test_noise_needs_labels():
    images = Arrays(np.zeros((4, 8, 8), np.uint8), [-1] * 4, [])
    with pytest.raises(UserError, match="--label_noise needs labels that are known"):
        with_noise(images, flags_of())
