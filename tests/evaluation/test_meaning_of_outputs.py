"""What the outputs of a model mean comes from its checkpoint: units, columns, and the loss of label sets; in --eval, in
predictions, and through an export."""

import csv

import numpy as np
import pytest
import torch
from helpers.plain_images import save

import main_finetune
from evaluation.scores import balanced_scores
from tools import export, predict
from util.errors import UserError
from util.weights.load import read_weights
from util.weights.metadata import without_stand_ins


def call(module, *words):
    return module.main(module.get_args_parser().parse_args([str(word) for word in words]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return {kind: (checkpoint, flags)} of a regression of two columns and of label sets with binary cross-entropy."""
    root, result = tmp_path_factory.mktemp("meaning"), {}
    for i in range(12):
        save(root / "in" / f"{i}.png", 20 * i)
    numbers = "image,p,q\n" + "\n".join(f"{i}.png,{40 + i},{-i}" for i in range(12))
    (root / "numbers.csv").write_text(numbers)
    (root / "sets.csv").write_text(
        "image,label\n" + "\n".join(f'{i}.png,"{"a,b,c"[: 1 + 2 * (i % 3)]}"' for i in range(12))
    )
    model = "--model vit_micro_patch4 --input_size 16 --epochs 1 --warmup_epochs 0 --batch_size 4".split()
    for kind, words in {
        "numbers": ["--targets", "regression", "--label_column", "p", "q"],
        "sets": ["--targets", "multilabel", "--multilabel_loss", "bce"],
    }.items():
        data = f"--dataset filelist --data_path {root}/in --num_workers 0 --device cpu".split()
        data += ["--train_list", root / f"{kind}.csv", "--val_list", root / f"{kind}.csv"]
        call(main_finetune, *data, *words, *model, "--output_dir", root / kind)
        result[kind] = root / kind / "checkpoint-0.pth", [*data, "--output_dir", root / f"eval-{kind}"]
    return result


def test_columns_in_another_order_are_refused(trained):
    path, data = trained["numbers"]
    words = ["--eval", "--finetune", path, "--targets", "regression", "--label_column"]
    with pytest.raises(UserError, match="the checkpoint predicts p q, but the columns here are q p"):
        call(main_finetune, *data, *words, "q", "p")
    assert call(main_finetune, *data, *words, "p", "q")["mae"] < 20


def test_the_loss_of_the_checkpoint_decides(trained, capsys):
    path, data = trained["sets"]
    words = ["--eval", "--finetune", path, "--targets", "multilabel"]
    given = call(main_finetune, *data, *words, "--multilabel_loss", "bce")
    assert call(main_finetune, *data, *words) == given
    assert "was trained with --multilabel_loss bce" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["numbers", "sets"])
def test_an_export_predicts_the_same(trained, tmp_path, kind):
    path, data = trained[kind]
    images = data[data.index("--data_path") + 1]
    call(export, path, "--to", "safetensors", "--out", tmp_path / "x.safetensors")
    tables = []
    for name, weights in (("a", path), ("b", tmp_path / "x.safetensors")):
        call(
            predict, weights, "--data", images, "--out", tmp_path / f"{name}.csv", "--num_workers", 0, "--device", "cpu"
        )
        tables.append(list(csv.reader((tmp_path / f"{name}.csv").read_text().splitlines())))
    assert tables[0] == tables[1] and len(tables[0]) == 13
    assert tables[0][0][1] == {"numbers": "value_p", "sets": "label_1"}[kind]


def test_diverged_models_have_scores():
    logits = np.array([[0.1, np.nan], [0.2, 0.3]], np.float32)
    assert np.isnan(balanced_scores(logits, np.array([0, 1]))["auc"])


def test_shared_containers_are_visited_once():
    """A file of a few hundred bytes took hours."""
    nested, pairs = [1], (1,)
    for _ in range(80):
        nested, pairs = [nested, nested], (pairs, pairs)
    assert without_stand_ins({"x": nested, "y": pairs})["x"] is nested


@pytest.mark.parametrize(
    "classes, expected", [(2, []), ({"b": 1, "a": 0}, ["a", "b"]), ("ab", []), (["x", "y"], ["x", "y"])]
)
def test_foreign_names_of_classes(trained, tmp_path, classes, expected):
    content = torch.load(trained["sets"][0], weights_only=True)
    torch.save({"model": content["model"], "classes": classes}, tmp_path / "x.pth")
    assert read_weights(str(tmp_path / "x.pth")).classes == expected
