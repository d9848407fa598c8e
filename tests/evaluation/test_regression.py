"""Regression: targets, scores by independent computations, a run and its evaluation, and refusals."""

import json

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint
from PIL import Image
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

import main_finetune
from evaluation.regression import RegressionScores
from tools import robustness
from util.data.labels import read_labelled
from util.errors import UserError

BASE = "--dataset filelist --targets regression --model vit_micro_patch4 --input_size 16 --batch_size 8 --in_chans 3"
BASE += " --warmup_epochs 0 --lr 1e-2 --num_workers 0 --device cpu --amp_dtype fp32 --aug crop --drop_path 0"


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """48 training and 16 test images whose brightness determines two numbers in other units."""
    root, rng = tmp_path_factory.mktemp("numbers"), np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 16)):
        lines = ["file,age,depth,note"]
        for i, value in enumerate(rng.random(count)):
            pixels = np.clip(255 * value + rng.normal(0, 5, (16, 16, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / f"{split}{i}.png")
            lines.append(f"{split}{i}.png,{20 + 60 * value:.3f},{-1e6 - 100 * value:.1f},x")
        (root / f"{split}.csv").write_text("\n".join(lines))
    return root


def parse(root, flags=""):
    data = f"--data_path {root} --train_list {root / 'train.csv'} --val_list {root / 'val.csv'}"
    return main_finetune.get_args_parser().parse_args(f"{BASE} {data} {flags}".split())


def scores_by_hand(outputs, targets):
    return {
        "r2": r2_score(targets, outputs),
        "mae": mean_absolute_error(targets, outputs),
        "rmse": np.mean([root_mean_squared_error(targets[:, i], outputs[:, i]) for i in range(targets.shape[1])]),
    }


def test_scores(monkeypatch):
    """Against scikit-learn in original units, over batches with unreadable images; two ranks have the sums of one."""
    rng = np.random.default_rng(0)
    mean, std = [50.0, -1e6], [20.0, 30.0]
    targets, good = torch.from_numpy(rng.normal(size=(40, 2))), torch.from_numpy(rng.random(40) < 0.8)
    outputs = targets + torch.from_numpy(rng.normal(size=(40, 2)))
    outputs[~good] = torch.nan

    def of(rows):
        scores = RegressionScores(torch.device("cpu"), mean, std)
        for part in torch.tensor(rows).split(7):
            scores.add(outputs[part].float(), targets[part].float(), good[part])
        return scores

    scores = of(range(40))
    stats = scores.read()
    units = [
        (values[good].float().double() * torch.tensor(std) + torch.tensor(mean)).numpy()
        for values in (outputs, targets)
    ]
    assert {name: stats[name] for name in ("r2", "mae", "rmse")} == pytest.approx(scores_by_hand(*units), rel=1e-6)
    assert stats["skipped"] == (~good).sum() and scores.details(["age", "depth"])["mae"].keys() == {"age", "depth"}
    ranks = [of(range(0, 11)), of(range(11, 40))]
    total = ranks[0].sums + ranks[1].sums
    monkeypatch.setattr("evaluation.regression.all_reduce_sum", lambda sums: total)
    assert ranks[0].read() == pytest.approx(stats, rel=1e-12)  # float64 sums in another order


def test_constant_outputs_have_no_r2():
    scores = RegressionScores(torch.device("cpu"), [3.0], [2.0])
    scores.add(torch.ones(4, 1), torch.full((4, 1), 0.5), torch.ones(4, dtype=torch.bool))
    stats = scores.read()
    assert "r2" not in stats and stats["mae"] == 1.0 and "R2 undefined" in scores.summary(stats)
    assert scores.details(["y"])["r2"] == {"y": None}


def test_a_run_and_its_evaluation(lists, tmp_path, capsys):
    """It learns; the checkpoint has the units, and --eval (without a training list) and --resume use them."""
    flags = "--label_column age depth --epochs 12"
    stats = main_finetune.main(parse(lists, f"{flags} --output_dir {tmp_path}"))
    assert stats["r2"] > 0.5 and 1 < stats["mae"] < 40  # half of age's and depth's errors, which have std 17 and 29
    state = checkpoint(tmp_path, "checkpoint-11.pth")
    images = read_labelled(parse(lists, flags), True)
    values = np.array(images.targets)
    assert state["args"]["target_mean"] == values.mean(0).tolist() and state["classes"] == ["age", "depth"]
    assert state["args"]["target_std"] == values.std(0).tolist()
    rows = torch.stack([images.target(i) for i in range(48)])
    assert rows.mean(0).tolist() == pytest.approx([0, 0], abs=1e-6) and rows.std(
        0, correction=0
    ).tolist() == pytest.approx([1, 1])
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert log[-1]["eval/best_r2"] == max(row["eval/r2"] for row in log)
    again = parse(lists, f"{flags} --eval --resume {tmp_path / 'checkpoint-11.pth'} --output_dir {tmp_path / 'eval'}")
    again.train_list = ""
    assert main_finetune.main(again) == pytest.approx(stats, rel=1e-6)
    details = json.loads((tmp_path / "eval" / "eval.json").read_text())["details"]
    assert np.mean(list(details["mae"].values())) == pytest.approx(stats["mae"])
    fewer = (lists / "train.csv").read_text().splitlines()[:40]
    (tmp_path / "fewer.csv").write_text("\n".join(fewer))
    longer = parse(lists, f"{flags} --epochs 13 --resume auto --output_dir {tmp_path}")
    longer.train_list = str(tmp_path / "fewer.csv")
    main_finetune.main(longer)
    assert checkpoint(tmp_path, "checkpoint-12.pth")["args"]["target_mean"] == state["args"]["target_mean"]


def test_a_negative_r2_is_the_best_so_far(lists, tmp_path):
    """Untrained outputs explain less than the mean does; there is a best checkpoint all the same."""
    stats = main_finetune.main(parse(lists, f"--label_column age --lr 1e-9 --epochs 1 --output_dir {tmp_path}"))
    assert stats["r2"] < 0 and checkpoint(tmp_path, "checkpoint-best.pth")["epoch"] == 0


def test_images_without_numbers_are_left_out(lists, tmp_path, capsys):
    lines = (lists / "train.csv").read_text().splitlines()
    for row, text in ((3, "nan"), (7, ""), (9, "NA")):
        name, _, *rest = lines[row].split(",")
        lines[row] = ",".join([name, text, *rest])
    (tmp_path / "list.csv").write_text("\n".join(lines))
    args = parse(lists, "--label_column age")
    args.train_list = str(tmp_path / "list.csv")
    images = read_labelled(args, True)
    assert len(images) == 45 and "note: 3 of 48 images" in capsys.readouterr().out
    assert not any(images.name(i).endswith("train2.png") for i in range(45))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset digits", "--targets regression needs --dataset filelist, whose lists hold path<TAB>number"),
        ("--mixup 0.8", "--targets regression excludes --mixup and --cutmix"),
        ("--label_noise 0.1", "--targets regression has none"),
        ("--label_vocab x", "--label_vocab has no effect"),
        ("", "choose the labels with --label_column"),
        ("--label_column note", "has 'x' for .*train0.png, which is no number"),
        ("--label_column age --nb_classes 2", "--nb_classes 2 contradicts"),
    ],
)
def test_refusals(flags, words, lists, tmp_path):
    with pytest.raises(UserError, match=words):
        main_finetune.main(parse(lists, f"--output_dir {tmp_path / 'out'} --epochs 1 {flags}"))
    assert not (tmp_path / "out").exists()


def test_numbers_are_no_classes(lists, tmp_path):
    """A tool that judges classifiers refuses the checkpoint."""
    main_finetune.main(parse(lists, f"--label_column age --max_steps 1 --output_dir {tmp_path}"))
    args = robustness.get_args_parser().parse_args(
        [str(tmp_path / "checkpoint-best.pth"), "--dataset", "digits", "--corrupt", "--device", "cpu"]
    )
    with pytest.raises(UserError, match="was trained with --targets regression: it predicts numbers"):
        robustness.main(args)


def test_a_classifier_predicts_no_numbers(lists, image_folder, tmp_path):
    flags = "--model vit_micro_patch4 --input_size 16 --batch_size 8 --epochs 1 --num_workers 0 --device cpu"
    flags += f" --data_path {image_folder} --output_dir {tmp_path} --max_steps 1"
    main_finetune.main(main_finetune.get_args_parser().parse_args(flags.split()))
    with pytest.raises(UserError, match="was not trained with --targets regression"):
        main_finetune.main(parse(lists, f"--label_column age --eval --resume {tmp_path / 'checkpoint-best.pth'}"))
