"""tools/predict.py: the rows of a csv file and their order, unreadable images, lists and shards, odd names, features,
and a file that is complete or not there."""

import ast
import csv
import errno
import json
import os
import shutil
import weakref

import numpy as np
import pytest
import torch
from helpers.launch import SMALL
from helpers.small_models import refusal
from helpers.strange import encoded, plain, write_shard
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from evaluation.encoder import load_encoder, token_feature
from evaluation.predictions import Rows, columns_of, readable, write_csv, write_npz
from tools import predict
from util.errors import RunFailed
from util.weights.load import read_weights

CPU = "--device cpu --amp_dtype fp32 --num_workers 0"
STATISTICS = "--mean 0.4 0.5 0.3 --std 0.2 0.1 0.3"


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """A run of fine-tuning with its own mean and standard deviation, and the evaluation of its checkpoint."""
    folder = tmp_path_factory.mktemp("finetuned")
    flags = f"--data_path {image_folder} --batch_size 32 {CPU} {STATISTICS}"
    train = f"{flags} --model vit_micro_patch4 --input_size 16 --epochs 1 --warmup_epochs 0 --lr 1e-4"
    evaluation = f"{flags} --eval --resume {folder}/checkpoint-0.pth --output_dir {folder}/eval"
    for line in (f"{train} --output_dir {folder}", evaluation):
        main_finetune.main(main_finetune.get_args_parser().parse_args(line.split()))
    return folder


def call(*words, out, checkpoint):
    flags = [str(checkpoint), *CPU.split(), *map(str, words), "--out", str(out)]
    return predict.main(predict.get_args_parser().parse_args(flags))


def table(path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def predicted(run, tmp_path):
    """A function that predicts with the flags given and returns the rows."""

    def predicted(*words, name="p.csv"):
        call(*words, out=tmp_path / name, checkpoint=run / "checkpoint-0.pth")
        return table(tmp_path / name)

    return predicted


# Predictions ----------------------------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_evaluation(run, image_folder, predicted):
    """Accuracy from the csv equals that of main_finetune.py --eval, with --data and with --data_path alike; rows are in
    the order of the paths, and mean and standard deviation are the checkpoint's."""
    rows = predicted("--data", image_folder / "val")
    names = sorted(str(path.relative_to(image_folder / "val")) for path in (image_folder / "val").rglob("*.png"))
    assert [row["image"] for row in rows] == names
    pairs = [f"{title}_{rank}" for rank in (1, 2, 3, 4) for title in ("label", "probability")]
    assert list(rows[0]) == ["image", *pairs, "error"]  # four classes, fewer than --topk
    accuracy = 100 * np.mean([row["label_1"] == row["image"].split("/")[0] for row in rows])
    result = json.loads((run / "eval" / "eval.json").read_text())["result"]
    assert accuracy == pytest.approx(result["eval/acc1"], abs=1e-9) and 30 < accuracy < 100
    likelihood = [dict(zip((row[f"label_{k}"] for k in range(1, 5)), range(1, 5))) for row in rows]
    own = [float(row[f"probability_{at[row['image'].split('/')[0]]}"]) for row, at in zip(rows, likelihood)]
    assert -np.log(own).mean() == pytest.approx(result["eval/loss"], rel=1e-4)  # six digits are written
    split = predicted("--data_path", image_folder)
    assert [row | {"image": row["image"].removeprefix("val/")} for row in split] == rows
    assert len(predicted("--data_path", image_folder, "--split", "train")) == 96


def test_all_probabilities(image_folder, predicted):
    rows = predicted("--data", image_folder / "val", "--probabilities", "all")
    best = predicted("--data", image_folder / "val", "--topk", 1)
    assert list(best[0]) == ["image", "label_1", "probability_1", "error"]
    classes = [f"probability_class{i}" for i in range(4)]
    assert list(rows[0]) == ["image", *classes, "error"]
    for row, top in zip(rows, best):
        shares = {name: float(row[name]) for name in classes}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)  # six digits are written
        assert max(shares, key=shares.get) == f"probability_{top['label_1']}"
        assert max(shares.values()) == float(top["probability_1"])


@pytest.mark.parametrize("flags", ["--num_workers 3 --batch_size 3", "--batch_size 1"])
def test_workers_and_batches_change_nothing(flags, image_folder, predicted):
    usual, other = (predicted("--data", image_folder / "val", *words) for words in ([], flags.split()))
    for one, two in zip(usual, other, strict=True):
        for key in ("image", "error", *(f"label_{rank}" for rank in range(1, 5))):
            assert one[key] == two[key]
        for rank in range(1, 5):  # the rounding of sums depends on the batch
            assert float(one[f"probability_{rank}"]) == pytest.approx(float(two[f"probability_{rank}"]), rel=1e-4)


def test_normalisation_of_the_training(run, image_folder, tmp_path):
    """A checkpoint that stores only the name of its data set is used with that set's statistics, on any data."""
    content = torch.load(run / "checkpoint-0.pth", weights_only=False)
    content["args"] = vars(content["args"]) if not isinstance(content["args"], dict) else content["args"]
    content["args"] |= {"dataset": "digits", "mean": None, "std": None}
    torch.save(content, tmp_path / "digits.pth")
    rows = []
    flags = f"--data {image_folder}/val", f"--dataset folder --data_path {image_folder}/val --split train"
    for words in (*flags, f"{flags[0]} --mean 0.30543 0.30543 0.30543 --std 0.37596 0.37596 0.37596"):
        call(*words.split(), checkpoint=tmp_path / "digits.pth", out=tmp_path / "p.csv")
        rows.append(table(tmp_path / "p.csv"))
    assert rows[0] == rows[1] == rows[2]


def test_a_probe(pretrained, image_folder, tmp_path):
    """A linear probe with its BatchNorm has the accuracy that main_linprobe.py reports."""
    flags = f"--data_path {image_folder} --finetune {pretrained} --cache_features --epochs 4 --warmup_epochs 0 {CPU}"
    flags += f" {STATISTICS} --probe_blrs 0.1 --output_dir {tmp_path}"
    result = main_linprobe.main(main_linprobe.get_args_parser().parse_args(flags.split()))
    call("--data", image_folder / "val", checkpoint=tmp_path / "probe.pth", out=tmp_path / "p.csv")
    hits = [row["label_1"] == row["image"].split("/")[0] for row in table(tmp_path / "p.csv")]
    assert 100 * np.mean(hits) == pytest.approx(result["eval/acc1"], abs=1e-4)  # a float32


def test_classes(run, image_folder, tmp_path):
    """Without names in the checkpoint labels are numbers; --classes names them."""
    content = torch.load(run / "checkpoint-0.pth", weights_only=False)
    del content["classes"]
    torch.save(content, tmp_path / "nameless.pth")
    flags = dict(checkpoint=tmp_path / "nameless.pth", out=tmp_path / "p.csv")
    call("--data", image_folder / "val", **flags)
    assert {row["label_1"] for row in table(tmp_path / "p.csv")} <= set("0123")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\ngrey, or none\n")
    call("--data", image_folder / "val", "--probabilities", "all", "--classes", tmp_path / "names.txt", **flags)
    assert "probability_grey, or none" in table(tmp_path / "p.csv")[0]


def test_independent_labels_and_values():
    """Multilabel models: softmax, as their loss, or sigmoid for binary cross-entropy. Regressions: the values, in the
    units of the targets."""
    logits = torch.tensor([[0.0, 2.0], [-1.0, -3.0]])
    for flags, expected in (({}, logits.softmax(1)), ({"multilabel_loss": "bce"}, logits.sigmoid())):
        stored = {"targets": "multilabel", **flags}
        cells = columns_of(stored, ["a", "b"], 2, None).cells(logits)
        assert torch.tensor([[float(cell) for cell in row] for row in cells]) == pytest.approx(expected, rel=1e-5)
        top = columns_of(stored, ["a", "b"], 2, 5)
        assert [row[0] for row in top.cells(logits)] == ["b", "a"] and len(top.names) == 4
    stored = {"targets": "regression", "target_mean": [10.0, 20.0], "target_std": [2.0, 3.0]}
    values = columns_of(stored, ["height", "width"], 2, 5)
    assert values.names == ["value_height", "value_width"] and values.cells(logits)[0] == ["10", "26"]
    alone = columns_of({"targets": "regression"}, None, 1, 5)
    assert alone.names == ["value"] and alone.cells(torch.tensor([[0.5]])) == [["0.5"]]
    scaled = columns_of({"targets": "regression", "target_mean": 1.0, "target_std": 4.0}, None, 1, None)
    assert scaled.cells(torch.tensor([[0.5]])) == [["3"]]


# Images ---------------------------------------------------------------------------------------------------------------


def test_unreadable_images_keep_their_rows(run, image_folder, predicted, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val" / "class0", folder / "a" / "b")
    (folder / "a" / "b" / "001.png").write_bytes(b"no image")
    rows = predicted("--data", folder, "--num_workers", 1)
    assert [row["image"] for row in rows] == [f"a/b/00{i}.png" for i in range(5)]
    assert [bool(row["error"]) for row in rows] == [False, True, False, False, False]
    assert "cannot identify image file" in rows[1]["error"] and not rows[1]["label_1"] and not rows[1]["probability_1"]
    assert "predictions of 5 images, 1 unreadable (column error)" in capsys.readouterr().out
    flags = predict.get_args_parser().parse_args(
        [str(run / "checkpoint-0.pth"), *CPU.split(), "--data", str(folder), "--out", str(tmp_path / "few.csv")]
        + ["--max_bad_fraction", "0.1"]
    )
    assert "--max_bad_fraction 0.1" in refusal(predict.main, flags)
    assert len(table(tmp_path / "few.csv")) == 5  # what has been computed is not lost


def test_no_readable_image(run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(b"no image")
    (tmp_path / "p.csv").write_text("of an earlier run\n")
    message = refusal(call, "--data", tmp_path / "images", checkpoint=run / "checkpoint-0.pth", out=tmp_path / "p.csv")
    assert "none of the 1 images of --data" in message and "cannot identify image file" in message
    assert (tmp_path / "p.csv").read_text() == "of an earlier run\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "p.csv"]


def test_lists(image_folder, predicted, tmp_path):
    """Paths relative to the list's folder, and absolute ones, in the order of the lines; a missing file has a row.
    Labels behind a tab are not read, so that a --val_list can be given."""
    source = image_folder / "val"
    shutil.copytree(source / "class1", tmp_path / "near")
    (tmp_path / "list.txt").write_text(f"near/003.png\n{source}/class2/000.png\nnear/gone.png\nnear/000.png\n")
    rows = predicted("--data", tmp_path / "list.txt")
    names = ["near/003.png", f"{source}/class2/000.png", "near/gone.png", "near/000.png"]
    assert [row["image"] for row in rows] == names
    assert [bool(row["error"]) for row in rows] == [False, False, True, False] and "No such file" in rows[2]["error"]
    (tmp_path / "labelled.txt").write_text("near/003.png\tclass0\nnear/000.png\tclass1\n")
    assert predicted("--data", tmp_path / "labelled.txt") == [rows[0], rows[3]]
    assert predicted("--data", tmp_path / "near" / "003.png") == [rows[0] | {"image": "003.png"}]


def test_odd_names(image_folder, predicted, tmp_path):
    """Names of files come back from the csv as they are, also those that a spreadsheet takes for formulas; one that is
    not UTF-8 is the literal of its bytes."""
    names = [b"a,b.png", b'a"b.png', b"a\nb.png", b"a\rb.png", b"a\r\nb.png", b"=1+1.png", b"-1.png", b"@a.png"]
    names += [b"+.png", "ä \N{SNOWMAN}.png".encode(), b"caf\xe9.png", b"a'\xff\n.png", b" a.png"]
    folder = tmp_path / "images"
    folder.mkdir()
    for name in names:
        shutil.copy(image_folder / "val" / "class0" / "000.png", os.path.join(os.fsencode(folder), name))
    found = [row["image"] for row in predicted("--data", folder)]
    raw = [ast.literal_eval(name) if name.startswith(("b'", 'b"')) else name.encode() for name in found]
    assert sorted(raw) == sorted(names)
    assert r"b'caf\xe9.png'" in found


def picture(value) -> bytes:
    return encoded(plain((value, 40, 255 - value)), "PNG")


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_shards(workers, predicted, tmp_path):
    """Rows are in the order of the shards, for any number of workers. A damaged shard loses its last images, which have
    rows too."""
    folder = tmp_path / "shards"
    folder.mkdir()
    sizes = [4, 1, 5, 3, 2]
    for number, size in enumerate(sizes):
        write_shard(folder / f"x-{number}.tar", {f"{number}{i}.png": picture(40 * i + number) for i in range(size)})
    labels = {"32.cls": b"cat"}  # not read
    write_shard(folder / "x-3.tar", {"30.png": picture(3), "31.png": b"no image", "32.png": picture(83), **labels})
    splits = {"validation": {"filenames": [f"x-{i}.tar" for i in range(5)], "shard_lengths": [4, 1, 6, 3, 2]}}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))  # one more than there is in x-2.tar
    flags = ("--dataset", "wds", "--data_path", folder, "--batch_size", 2, "--num_workers", workers, "--nb_classes", 4)
    rows = predicted(*flags)
    names = [f"x-{n}.tar: {n}{i}.png" for n, size in enumerate(sizes) for i in range(size)]
    names.insert(10, "x-2.tar: image 5")
    assert [row["image"] for row in rows] == names
    errors = {row["image"]: row["error"] for row in rows if row["error"]}
    assert list(errors) == ["x-2.tar: image 5", "x-3.tar: 31.png"]
    assert "its shard is damaged: it ends after 5 images" in errors["x-2.tar: image 5"]
    assert errors["x-3.tar: 31.png"] == "cannot identify image file"  # without an address in memory
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "a.png").write_bytes(picture(82))
    alone = predicted("--data", tmp_path / "plain")[0]
    row = next(row for row in rows if row["image"] == "x-2.tar: 22.png")
    assert row["label_1"] == alone["label_1"]
    assert float(row["probability_1"]) == pytest.approx(float(alone["probability_1"]), rel=1e-4)  # rounding


# Features -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    flags = f"{SMALL} --data_path {image_folder} --batch_size 32 --epochs 1 --warmup_epochs 0 --vis_freq 0 {CPU}"
    flags += f" {STATISTICS} --output_dir {folder}"
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))
    return folder / "checkpoint-0.pth"


def normalised(path) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(Image.open(path), np.float32) / 255)
    mean, std = (torch.tensor([float(word) for word in part.split()]) for part in STATISTICS[7:].split("--std"))
    return ((pixels - mean) / std).permute(2, 0, 1)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_features(pool, pretrained, image_folder, tmp_path):
    """The features of an encoder without a classifier, computed here from the pixels."""
    folder = tmp_path / "images"
    shutil.copytree(image_folder / "val", folder)
    (folder / "class1" / "002.png").write_bytes(b"no image")
    flags = ("--features", "--pool", pool, "--batch_size", 7)
    call("--data", folder, *flags, checkpoint=pretrained, out=tmp_path / "f.npz")
    model, _ = load_encoder(read_weights(pretrained), {})
    with np.load(tmp_path / "f.npz") as arrays:
        assert set(arrays) == {"images", "features", "error"}
        names, features, errors = (arrays[name] for name in ("images", "features", "error"))
    assert names.tolist() == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert features.dtype == np.float32 and features.shape == (20, 128)
    bad = names.tolist().index("class1/002.png")
    assert np.isnan(features[bad]).all() and "cannot identify" in errors[bad]
    assert all(np.isfinite(np.delete(features, bad, axis=0)).ravel()) and not any(np.delete(errors, bad))
    with torch.no_grad():
        expected = token_feature(model, torch.stack([normalised(folder / names[i]) for i in (0, 19)]), pool)
    assert features[[0, 19]] == pytest.approx(expected.numpy(), abs=1e-5)  # rounding in float32


def test_features_of_a_classifier(run, image_folder, tmp_path):
    """They are the input of its head; the other feature is refused."""
    flags = dict(checkpoint=run / "checkpoint-0.pth", out=tmp_path / "f.npz")
    call("--data", image_folder / "val", "--features", **flags)
    model, _ = load_encoder(read_weights(run / "checkpoint-0.pth"), {})
    with np.load(tmp_path / "f.npz") as arrays, torch.no_grad():
        expected = model.forward_features(normalised(image_folder / "val" / arrays["images"][7])[None])[0]
        assert arrays["features"][7] == pytest.approx(expected.numpy(), abs=1e-5)  # rounding in float32
    message = refusal(call, "--data", image_folder / "val", "--features", "--pool", "cls", **flags)
    assert "was trained on the mean of the patches" in message


def test_parquet(pretrained, image_folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    shutil.copytree(image_folder / "val" / "class0", tmp_path / "images")
    (tmp_path / "images" / "002.png").write_bytes(b"no image")
    for name in ("f.parquet", "f.npz"):
        call("--data", tmp_path / "images", "--features", "--batch_size", 2, checkpoint=pretrained, out=tmp_path / name)
    columns = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    with np.load(tmp_path / "f.npz") as arrays:
        assert columns["image"] == arrays["images"].tolist()
        assert np.array_equal(np.array(columns["feature"], np.float32), arrays["features"], equal_nan=True)
        assert [error or "" for error in columns["error"]] == arrays["error"].tolist()
    assert columns["error"][0] is None


def test_parquet_without_pyarrow(pretrained, image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "find_spec", lambda name: None)
    flags = dict(checkpoint=pretrained, out=tmp_path / "f.parquet")
    assert "needs the package pyarrow" in refusal(call, "--data", image_folder, "--features", **flags)


# Files ----------------------------------------------------------------------------------------------------------------


def parts(count: int, alive: list):
    for i in range(count):
        part = torch.full((2, 3), float(i))
        alive.append(weakref.ref(part))
        yield Rows([f"{i}{'x' * i}", f"{i}b\udce9"], ["", "broken"], part)


@pytest.mark.parametrize("write", ["csv", "npz"])
def test_files_grow_while_rows_come(write, tmp_path):
    """No more than two batches exist at a time, and the file grows with each."""
    alive, sizes = [], []

    def watched(file):
        for i, part in enumerate(parts(40, alive)):
            yield part
            del part
            file.flush()
            sizes.append(os.path.getsize(tmp_path / "out"))
            assert sum(reference() is not None for reference in alive) <= 2, i

    with open(tmp_path / "out", "wb") as file:
        if write == "csv":
            write_csv(file, watched(file), columns_of({}, ["a", "b", "c"], 3, 2))
        else:
            write_npz(file, watched(file), 80)
    assert sizes == sorted(set(sizes))
    if write == "npz":
        with np.load(tmp_path / "out") as arrays:
            assert arrays["images"][78] == "39" + "x" * 39 and ast.literal_eval(arrays["images"][79]) == b"39b\xe9"
            assert arrays["error"].tolist() == ["", "broken"] * 40
            assert arrays["features"][::2].tolist() == [[i] * 3 for i in range(40)]


def test_an_interrupted_run_leaves_the_old_file(run, image_folder, tmp_path, monkeypatch):
    out = tmp_path / "p.csv"
    out.write_text("of an earlier run\n")
    genuine = predict.predict

    def interrupted(*args):
        yield next(genuine(*args))
        assert (tmp_path / ".p.csv.tmp").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "predict", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("--data", image_folder / "val", "--batch_size", 2, checkpoint=run / "checkpoint-0.pth", out=out)
    assert out.read_text() == "of an earlier run\n" and list(tmp_path.iterdir()) == [out]


def test_a_full_disk(run, image_folder, tmp_path, monkeypatch):
    """It is no mistake in a flag: exit code 1."""

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFailed, match=r"p\.csv cannot be written: No space left on device"):
        call("--data", image_folder / "val", checkpoint=run / "checkpoint-0.pth", out=tmp_path / "p.csv")
    assert not list(tmp_path.iterdir())


def test_readable():
    assert [readable(text) for text in ("", "ä", "b'a'")] == ["", "ä", "b'a'"]
    assert ast.literal_eval(readable("a\udcff\n")) == b"a\xff\n"
