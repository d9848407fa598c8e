"""Class weights in the loss and balanced sampling: by independent computations, on any number of ranks, on resuming."""

import json

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint, ranks
from helpers.plain_images import class_folders
from scipy.stats import binom
from sklearn.utils.class_weight import compute_class_weight
from timm.data import Mixup

import main_finetune
import main_linprobe
from util.data.labels import balanced_weights, known_labels
from util.data.loader import EpochBatches
from util.data.samples import KeyedDataset
from util.data.shards import Shards
from util.data.sources import Arrays
from util.errors import UserError
from util.training.losses import build_criterion

SMALL = "--model vit_micro_patch4 --input_size 16 --num_workers 0 --device cpu --amp_dtype fp32 --batch_size 8"
SMALL += " --warmup_epochs 0"
LABELS = [0] * 30 + [2] * 6 + [3] * 4  # class 1 has no images


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    root = tmp_path_factory.mktemp("uneven")
    for split in ("train", "val"):
        class_folders(root / split, dark=range(0, 60, 2), bright=(200, 210))
    return root


def parse(main, text):
    return main.get_args_parser().parse_args(text.split())


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_are_those_of_scikit_learn():
    weights = balanced_weights(LABELS, 5)
    present = np.unique(LABELS)
    assert weights[present].tolist() == pytest.approx(
        compute_class_weight("balanced", classes=present, y=LABELS), rel=1e-6
    )
    assert weights[[1, 4]].tolist() == [0, 0] and weights[LABELS].mean().item() == pytest.approx(1, rel=1e-6)
    sets = balanced_weights([(0,), (0, 1), (), (0,)], 3)
    assert sets.tolist() == pytest.approx([1 / 3, 3, 1], rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_weighted_loss(smoothing):
    """Each image's loss times its weight, for one label and for mixed images; the mean of two halves is that of all."""
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    logits, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 1, 0])
    weighted = build_criterion(False, "single", smoothing, weights=weights)
    plain = build_criterion(False, "single", smoothing)
    expected = sum(plain(logits[i : i + 1], labels[i : i + 1]) * weights[labels[i]] for i in range(6)) / 6
    torch.testing.assert_close(weighted(logits, labels), expected)
    torch.testing.assert_close((weighted(logits[:3], labels[:3]) + weighted(logits[3:], labels[3:])) / 2, expected)
    _, soft = Mixup(mixup_alpha=1.0, num_classes=3, label_smoothing=smoothing)(torch.zeros(6, 3, 8, 8), labels)
    soft = soft.double()
    mixed = build_criterion(True, "single", smoothing, weights=weights)(logits, soft)
    by_image = -(soft * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(mixed, (by_image * (soft @ weights)).mean())
    same = build_criterion(True, "single", smoothing, weights=torch.ones(3).double())(logits, soft)
    torch.testing.assert_close(same, build_criterion(True, "single", smoothing)(logits, soft))


def test_weighted_sets():
    logits, targets = torch.randn(4, 3), torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0, 0, 0], [1, 0, 0]])
    weights = balanced_weights([(0,), (0, 1), (), (0,)], 3)
    expected = 0
    for row, column in np.ndindex(4, 3):
        p, weight = torch.sigmoid(logits[row, column]), weights[column]
        expected -= weight * p.log() if targets[row, column] else (1 - p).log()
    loss = build_criterion(False, "multilabel", 0.0, "bce", weights)(logits, targets)
    torch.testing.assert_close(loss, expected / 12, rtol=1e-5, atol=0)  # float32


@pytest.mark.parametrize("main", [main_finetune, main_linprobe, "cached"])
def test_weights_change_training(main, uneven, tmp_path):
    """The rare class, "bright", gets a higher bias."""
    flags = f"{SMALL} --data_path {uneven} --epochs 4 --log_dir  --output_dir "
    cached = main == "cached"
    module = main_linprobe if cached else main
    more = ["--cache_features", "--probe_blrs", "0.01"] if cached else ["--lr", "1e-3"]
    for weights in ("none", "balanced"):
        argv = [*flags.split(" "), *more, "--class_weights", weights]
        argv[argv.index("--output_dir") + 1] = str(tmp_path / weights)
        module.main(module.get_args_parser().parse_args(argv))
    file = "probe.pth" if cached else "checkpoint-3.pth"
    states = [checkpoint(tmp_path / weights, file)["model"] for weights in ("none", "balanced")]
    name = "head.bias" if main is main_finetune else "head.1.bias"
    (bright, dark), (weighted_bright, weighted_dark) = (state[name].tolist() for state in states)
    assert weighted_bright - weighted_dark > bright - dark


# Sampler --------------------------------------------------------------------------------------------------------------


def indices_of(sampler, epoch=0, start=0):
    sampler.set_epoch(epoch, start)
    return [list(batch) for batch in sampler]


def test_each_class_equally_often():
    """The counts of each class over 50 epochs lie in their binomial interval, and so do those of the images."""
    sampler = EpochBatches(40, 8, seed=3, labels=LABELS)
    drawn = [key[1] for epoch in range(50) for batch in indices_of(sampler, epoch) for key in batch]
    low, high = binom.interval(0.9999, 2000, 1 / 3)
    counts = np.bincount([LABELS[index] for index in drawn], minlength=4)
    assert counts[1] == 0 and all(low <= count <= high for count in counts[[0, 2, 3]])
    images = np.bincount(drawn, minlength=40)
    for label, members in ((0, 30), (2, 6), (3, 4)):
        low, high = binom.interval(0.999999, 2000, 1 / 3 / members)
        assert all(low <= images[i] <= high for i in range(40) if LABELS[i] == label)
    assert drawn[:40] != drawn[40:80]


def test_ranks_and_resuming(monkeypatch):
    """Two ranks read the samples of one, in the same places, and an epoch continues at any batch."""
    one = [key for batch in indices_of(EpochBatches(40, 8, seed=1, labels=LABELS), 2) for key in batch]
    parts = []
    for rank in range(2):
        monkeypatch.setattr("util.data.loader.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("util.data.loader.get_world_size", lambda: 2)
        sampler = EpochBatches(40, 4, seed=1, labels=LABELS)
        whole = indices_of(sampler, 2)
        assert indices_of(sampler, 2, start=3) == whole[3:]
        parts.append([key for batch in whole for key in batch])
    assert [key for pair in zip(*parts) for key in pair] == one


def test_an_image_drawn_again_is_augmented_anew():
    arrays = Arrays(np.random.default_rng(0).integers(0, 255, (2, 8, 8, 3), dtype=np.uint8), [0, 1], ["a", "b"])
    data = KeyedDataset(arrays, lambda image: torch.rand(3), seed=0, in_chans=3)
    draws = [data[key].image for key in ((1, 0, 4), (1, 0, 9), (1, 0), (1, 0, 4))]
    assert (
        torch.equal(draws[0], draws[3]) and not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    )


def test_a_balanced_run_on_two_ranks_and_resumed(uneven, tmp_path):
    """The same images in the same order: two processes have the losses of one, and so has a run that is resumed."""
    flags = f"--data_path {uneven} --epochs 2 --balanced_sampler --aa none --reprob 0 --drop_path 0 --lr 1e-3 --keep 0"
    main_finetune.main(parse(main_finetune, f"{SMALL} {flags} --output_dir {tmp_path / 'one'}"))
    ranks("main_finetune", f"{SMALL} {flags} --batch_size 4 --output_dir {tmp_path / 'two'}", 2)

    def losses(name):
        return [json.loads(line)["train/loss"] for line in (tmp_path / name / "log.txt").read_text().splitlines()]

    expected = losses("one")
    assert losses("two") == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    start = tmp_path / "one" / "checkpoint-0.pth"
    main_finetune.main(parse(main_finetune, f"{SMALL} {flags} --resume {start} --output_dir {tmp_path / 'one'}"))
    assert losses("one") == expected


@pytest.mark.parametrize("flag", ["--class_weights", "--balanced_sampler", "--label_noise"])
def test_labels_must_be_known(flag):
    for images in (Shards(["a.tar"], [5]), Arrays(np.zeros((2, 8, 8)), [0, -1], ["a"])):
        with pytest.raises(UserError, match=f"{flag} needs labels that are known in advance"):
            known_labels(images, flag)


MULTI = "--targets multilabel --dataset filelist"


@pytest.mark.parametrize(
    ("main", "flags", "words"),
    [
        (main_finetune, "--class_weights balanced --balanced_sampler", "correct the same imbalance"),
        (main_finetune, "--class_weights balanced --eval --finetune x", "--class_weights has no effect with --eval"),
        (main_finetune, "--balanced_sampler --eval --finetune x", "--balanced_sampler has no effect with --eval"),
        (main_finetune, f"--balanced_sampler {MULTI}", "needs one class per image"),
        (
            main_finetune,
            f"--class_weights balanced {MULTI}",
            "needs --multilabel_loss bce",
        ),
        (main_finetune, "--class_weights balanced --targets regression --dataset filelist", "which has no classes"),
        (
            main_linprobe,
            "--balanced_sampler --cache_features",
            "--balanced_sampler has no effect with --cache",
        ),
        (main_linprobe, "--class_weights balanced --eval --resume x", "--class_weights has no effect with --eval"),
    ],
)
def test_refusals(main, flags, words, uneven, tmp_path):
    with pytest.raises(UserError, match=words):
        main.main(parse(main, f"{SMALL} --data_path {uneven} --output_dir {tmp_path / 'out'} {flags}"))
    assert not (tmp_path / "out").exists()
