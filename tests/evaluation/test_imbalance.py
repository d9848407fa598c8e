"""Imbalanced data: notes, balanced accuracy, AUC, recalls and the confusion matrix, by independent computations; and
--best_metric."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint, ranks
from helpers.plain_images import class_folders
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, recall_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_finetune
import main_linprobe
from evaluation.confusion import Confusion, draw
from evaluation.scores import TopK, balanced_scores
from tools import knn
from util.errors import UserError
from util.training.checkpointing import Checkpointer

SMALL = "--model vit_micro_patch4 --input_size 16 --num_workers 0 --device cpu --amp_dtype fp32"
TRAIN = f"{SMALL} --batch_size 8 --warmup_epochs 0 --epochs 1"


def batches(count: int, classes: int, seed=0):
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(count, classes))).float()
    targets = torch.from_numpy(rng.integers(0, max(2, classes - 1), count))  # the last of many classes has no images
    return logits, targets, torch.from_numpy(rng.random(count) < 0.8)


def scored(logits, targets, good, rows=None):
    scores = TopK(torch.device("cpu"))
    for part in torch.as_tensor(range(len(logits)) if rows is None else rows).split(7):
        scores.add(logits[part], targets[part], good[part])
    return scores


@pytest.mark.parametrize("classes", [2, 7])
def test_scores_against_scikit_learn(classes, monkeypatch):
    logits, targets, good = batches(60, classes)
    scores = scored(logits, targets, good)
    stats, details = scores.read(), scores.details([f"c{i}" for i in range(classes)])
    true, predicted = targets[good].numpy(), logits[good].argmax(1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class that is predicted and has no images
        assert stats["balanced_acc"] == pytest.approx(100 * balanced_accuracy_score(true, predicted))
    matrix = confusion_matrix(true, predicted, labels=range(classes))
    assert (
        list(details["confusion_matrix"].values()) == matrix.tolist() and sum(details["images"].values()) == good.sum()
    )
    recalls = 100 * recall_score(true, predicted, labels=range(classes), average=None, zero_division=0)
    assert list(details["recall"].values())[: classes - 1] == pytest.approx(recalls[: classes - 1])
    assert ("auc" in stats) == (classes == 2) and (details["recall"]["c6"] is None if classes == 7 else True)
    if classes == 2:
        assert stats["auc"] == pytest.approx(100 * roc_auc_score(true, logits[good].softmax(1)[:, 1]))
    alone = balanced_scores(logits[good].numpy(), true)
    assert alone == pytest.approx({name: stats[name] for name in alone}) and len(alone) == (2 if classes == 2 else 1)
    # The sums of before, in the same order of additions.
    loss = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    sums = torch.zeros(2, dtype=torch.float64)
    for part in torch.arange(60).split(7):
        hit = (logits[part].argmax(1) == targets[part]).float()
        sums += torch.stack([(loss[part] * good[part]).sum(), (hit * good[part]).sum()])
    assert [stats["loss"], stats["acc1"]] == [
        sums[0].item() / good.sum().item(),
        100 * sums[1].item() / good.sum().item(),
    ]


def test_more_classes_than_a_matrix_holds(monkeypatch):
    monkeypatch.setattr(Confusion, "MOST_CLASSES", 6)
    scores = scored(*batches(60, 7))
    few, details = scores.read(), scores.details(None)
    assert "confusion_matrix" not in details and scores.picture(None) is None
    monkeypatch.setattr(Confusion, "MOST_CLASSES", 7)
    again = scored(*batches(60, 7))
    assert again.read() == few and again.details(None)["recall"] == details["recall"]


def test_unknown_labels_and_one_class():
    """Labels that are not known count as wrong, as before, and are in no matrix; one class has no AUC."""
    logits = torch.tensor([[2.0, 1.0]] * 4)
    scores = scored(logits, torch.tensor([0, 0, -1, 0]), torch.ones(4, dtype=torch.bool))
    stats = scores.read()
    assert stats["acc1"] == 75 and stats["balanced_acc"] == 100 and "auc" not in stats
    assert scores.details(None)["confusion_matrix"] == {"0": [3, 0], "1": [0, 0]}
    nothing = TopK(torch.device("cpu"))
    assert nothing.read()["balanced_acc"] == 0


@pytest.mark.parametrize("count", [2, 20, 21, 150, 300])
def test_pictures_of_confusion(count):
    names = [f"${i} _x^ {'long ' * 9}" for i in range(count)]
    picture = draw(np.eye(count, dtype=int) * 5, names)
    assert picture.dtype == np.uint8 and picture.shape[2] == 3 and picture.shape[0] == picture.shape[1] <= 1600
    assert (picture < 128).any() and (picture == 255).any()


def parse(main, text):
    return main.get_args_parser().parse_args(text.split())


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """Two classes, dark with 30 images and bright with 3; the same for validation."""
    root = tmp_path_factory.mktemp("uneven")
    for split in ("train", "val"):
        class_folders(root / split, dark=range(0, 60, 2), bright=(200, 210, 220))
    return root


def test_notes_and_files(uneven, tmp_path, capsys):
    out = tmp_path / "out"
    stats = main_finetune.main(parse(main_finetune, f"{TRAIN} --data_path {uneven} --output_dir {out}"))
    text = capsys.readouterr().out
    assert "note: 90.9 % of the 33 training images are of the class 'dark'" in text
    assert "note: 90.9 % of the 33 evaluation images" in text and "a top-1 of 90.9 %" in text and "AUC " in text
    written = json.loads((out / "scores.json").read_text())
    published = {f"eval/{name}": value for name, value in stats.items()}
    assert written["result"] == published and written["details"]["images"] == {"bright": 3, "dark": 30}
    matrix = written["details"]["confusion_matrix"]
    assert written["details"]["recall"]["dark"] == pytest.approx(100 * matrix["dark"][1] / 30)
    assert Image.open(out / "confusion.png").mode == "RGB"
    events = EventAccumulator(str(out), size_guidance={"images": 0})
    events.Reload()
    assert "eval/confusion_matrix" in events.Tags()["images"] and "eval/balanced_acc" in events.Tags()["scalars"]
    flags = f"{SMALL} --data_path {uneven} --eval --finetune {out / 'checkpoint-best.pth'} --batch_size 8"
    again = main_finetune.main(parse(main_finetune, f"{flags} --output_dir {tmp_path / 'eval'}"))
    judged = json.loads((tmp_path / "eval" / "eval.json").read_text())
    assert again == stats and judged["details"] == written["details"]
    assert (tmp_path / "eval" / "eval_confusion.png").is_file()
    output = ranks("main_finetune", f"{flags} --output_dir {tmp_path / 'two'}", 2)
    assert f"balanced {stats['balanced_acc']:.2f} %  AUC {stats['auc']:.2f} % on 33 images" in output
    two = json.loads((tmp_path / "two" / "eval.json").read_text())
    assert two["details"] == written["details"]  # exact counts over ranks
    main_finetune.main(
        parse(main_finetune, f"{TRAIN} --data_path {uneven} --output_dir {out} --overwrite --max_steps 1")
    )
    assert json.loads((out / "scores.json").read_text())["result"] != published


def test_one_class(tmp_path, capsys):
    for split in ("train", "val"):
        class_folders(tmp_path / "one" / split, only=range(20))
    main_finetune.main(parse(main_finetune, f"{TRAIN} --data_path {tmp_path / 'one'} --output_dir {tmp_path / 'out'}"))
    text = capsys.readouterr().out
    assert "note: all 20 training images are of one class, 'only'" in text
    assert text.count("note: all 20") == 2


def test_probes_and_tools_note_it(uneven, tmp_path, capsys):
    flags = f"{SMALL} --data_path {uneven} --cache_features --epochs 1 --output_dir {tmp_path} --batch_size 8"
    result = main_linprobe.main(parse(main_linprobe, flags))
    assert 0 <= result["eval/balanced_acc"] <= 100 and 0 <= result["eval/auc"] <= 100
    assert "note: 90.9 % of the 33 test images" in capsys.readouterr().out
    knn.main(
        parse(
            knn,
            f"random --model vit_micro_patch4 --input_size 16 --data_path {uneven} --num_workers 0 --device cpu --k 1",
        )
    )
    assert capsys.readouterr().out.count("note: 90.9 %") == 2


# --best_metric --------------------------------------------------------------------------------------------------------


def test_best_of_scores(monkeypatch):
    """The first score is the best so far, also if it is zero or negative; NaN and no score never are."""
    for lower, given, expected in (
        (False, [None, math.nan, -2.0, -3.0, 0.0, -1.0], [-2.0, 0.0]),
        (True, [math.nan, 3.0, 4.0, 1.0, 2.0], [3.0, 1.0]),
    ):
        checkpoints, kept = Checkpointer("", 0, []), []
        for score in given:
            before = checkpoints.best
            checkpoints.save_best(None, score, lower)
            kept += [checkpoints.best] if checkpoints.best != before else []
        assert kept == expected


@pytest.mark.parametrize("main", [main_finetune, main_linprobe])
def test_best_metric(main, uneven, tmp_path):
    flags = f"{TRAIN} --epochs 3 --data_path {uneven} --output_dir {tmp_path}"
    main.main(parse(main, f"{flags} --best_metric loss"))
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    losses = [row["eval/loss"] for row in log]
    assert [row["eval/best_loss"] for row in log] == [min(losses[: i + 1]) for i in range(3)]
    assert "eval/best_acc1" not in log[0]
    best = checkpoint(tmp_path, "checkpoint-best.pth")
    assert best["epoch"] == int(np.argmin(losses)) and best["args"]["best_metric"] == "loss"
    # Resumed with another metric, the best loss is not compared with an accuracy.
    main.main(parse(main, f"{flags} --epochs 4 --resume auto"))
    last = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert last["eval/best_acc1"] == last["eval/acc1"] and checkpoint(tmp_path, "checkpoint-best.pth")["epoch"] == 3


@pytest.mark.parametrize(
    ("main", "flags", "words"),
    [
        (main_finetune, "--best_metric map", "mAP is not one of acc1, acc5, balanced_acc, auc, loss"),
        (main_finetune, "--best_metric auc --dataset digits", "needs two classes, and the data set has 10"),
        (main_finetune, "--best_metric loss --eval --finetune x", "--best_metric has no effect with --eval"),
        (main_linprobe, "--best_metric loss --cache_features", "--best_metric has no effect with --cache_features"),
        (main_linprobe, "--best_metric r2", "r2 is not one of"),
    ],
)
def test_refusals(main, flags, words, uneven, tmp_path):
    with pytest.raises(UserError, match=words):
        main.main(parse(main, f"{TRAIN} --data_path {uneven} --output_dir {tmp_path / 'out'} {flags}"))
    assert not (tmp_path / "out").exists()
