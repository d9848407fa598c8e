"""The ledger of finished runs."""

import hashlib
import json
import multiprocessing
from functools import partial

import pytest
from helpers.dense_sets import coco_content, coco_set, dense_flags, masks_set
from helpers.launch import DIGITS, ranks, scalars
from helpers.ledgers import write

import main_finetune
import main_linprobe
import main_pretrain
from evaluation import runs
from util.data.dense.detection import read_detection
from util.data.dense.segmentation import read_segmentation
from util.data.readers import read_images
from util.errors import UserError
from util.notes import note_once
from util.report import ledger

TINY = f"{DIGITS} --num_workers 0 --epochs 1 --warmup_epochs 0"


def run(main, flags: str):
    return main.main(main.get_args_parser().parse_args(flags.split()))


# The file -------------------------------------------------------------------------------------------------------------


def test_lines_are_strict_json(tmp_path):
    ledger.append(
        tmp_path, {"command": "a", "flags": {"x": (1, tmp_path)}, "metrics": {"a": float("nan"), "b": -1e999}}
    )

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    row = json.loads((tmp_path / "results.jsonl").read_text(), parse_constant=refuse)
    assert row == {"command": "a", "flags": {"x": [1, str(tmp_path)]}, "metrics": {"a": None, "b": None}}


def test_a_line_that_a_crash_cut_off(tmp_path, capsys):
    """Only this line is lost, neither its neighbours nor the next line."""
    write(tmp_path, seed=0)
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"command": "main_lin')
    write(tmp_path, seed=1)
    assert [row["flags"]["seed"] for row in ledger.read(tmp_path / "results.jsonl")] == [0, 1]
    assert "line 2 of" in capsys.readouterr().err


def _append_many(folder, number):
    for count in range(20):
        ledger.append(folder, {"command": f"{number}-{count}", "flags": {"long": "x" * 20000}, "metrics": {}})


def test_many_runs_end_at_once(tmp_path):
    """Lines longer than an atomic write to a pipe, from four processes: each is complete and appears once."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(tmp_path, number)) for number in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    names = [row["command"] for row in ledger.read(tmp_path / "results.jsonl")]
    assert sorted(names) == sorted(f"{number}-{count}" for number in range(4) for count in range(20))


def test_a_ledger_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/results.jsonl cannot be written"):
        write(tmp_path / "file")
    ledger.append("", {"command": "nowhere"})


def test_the_hash_of_a_split(image_folder):
    """The hash covers names and labels; it depends on order, subset and labels, and not on the folder."""
    args = main_pretrain.get_args_parser().parse_args(["--data_path", str(image_folder)])
    from util.data.readers import read_images
    from util.data.sources import Subset

    images = read_images(args, train=False)
    result = ledger.describe_images(images, str(image_folder))
    lines = [f"val/class{label}/{i:03d}.png\t{label}\n" for label in range(4) for i in range(5)]
    assert result == {"images": 20, "sha256": hashlib.sha256("".join(lines).encode()).hexdigest()}
    part = Subset(images, [3, 4, 7])
    expected = hashlib.sha256("".join(lines[place] for place in (3, 4, 7)).encode()).hexdigest()
    assert ledger.describe_images(part, str(image_folder) + "/") == {"images": 3, "sha256": expected}


def hash_of(images, root="") -> str:
    return ledger.describe_images(images, str(root))["sha256"]


@pytest.mark.parametrize("read", [read_segmentation, partial(read_detection, masks=True)])
def test_the_hash_of_scenes(read):
    """They have no names and no labels: the hash covers what they are made from."""
    changes = {}, {"scene_seed": 1}, {"scene_size": 40}, {"scene_digits": [0, 2]}
    given = [{"dataset": "scenes", "scene_digits": [0, 1], "scene_count": [3, 3], **change} for change in changes]
    hashes = {hash_of(read(dense_flags(**flags), train=train)) for flags in given for train in (True, False)}
    assert len(hashes) == 8


def test_the_hash_covers_annotations(tmp_path):
    """Of objects everything that the file says; of masks, which are not read before, the meaning of their values."""
    hashes = []
    for name, category in (("one", 3), ("same", 3), ("other", 7)):
        (tmp_path / name).mkdir()
        content = coco_content()
        content["annotations"][0]["category_id"] = category
        args = dense_flags("--dataset", "coco", "--data_path", coco_set(tmp_path / name, val=content), task="detection")
        hashes.append(hash_of(read_detection(args, False, True), tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]
    masks_set(tmp_path)
    flags = "--dataset", "masks", "--data_path", tmp_path
    meanings = ("--no_zero_is_ignored",), ("--zero_is_ignored",), ("--ignore_label", 2)
    assert len({hash_of(read_segmentation(dense_flags(*flags, *words), False), tmp_path) for words in meanings}) == 3


# What runs write ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A run of two processes, one of which must not write to the ledger."""
    folder = tmp_path_factory.mktemp("pretrained")
    flags = TINY.replace("--batch_size 64", "--batch_size 32")
    ranks("main_pretrain", f"{flags} --rc_mae --output_dir {folder}", 2)
    return folder


def test_the_line_of_a_pretraining(pretrained):
    (row,) = ledger.read(pretrained / "results.jsonl")
    log = json.loads((pretrained / "log.txt").read_text())
    assert row["command"] == "main_pretrain" and row["source"] is None
    assert row["metrics"]["train/loss"] == log["train/loss"] and "epoch" not in row["metrics"]
    assert row["images_seen"] == 1437 // 64 * 64  # an incomplete batch is dropped
    assert row["data"]["train"]["images"] == 1437 and row["seconds"] > log["seconds"]
    assert row["flags"]["rc_mae"] is True and row["flags"]["rc_momentum"] == 0.996
    assert row["hardware"]["processes"] == 2 and row["revision"] == ledger.revision()


def test_a_run_resumed_at_its_end(tmp_path):
    """The run has its line already; if it was killed between checkpoint and line, the line is added as it would have
    been."""
    run(main_pretrain, f"{TINY} --output_dir {tmp_path}")
    path = tmp_path / "results.jsonl"
    (first,) = ledger.read(path)
    run(main_pretrain, f"{TINY} --output_dir {tmp_path} --resume auto")
    assert ledger.read(path) == [first]
    path.unlink()
    run(main_pretrain, f"{TINY} --output_dir {tmp_path} --resume auto")
    (again,) = ledger.read(path)
    for key in ("metrics", "images_seen", "data", "revision", "source"):
        assert again[key] == first[key]
    run(main_pretrain, f"{TINY} --output_dir {tmp_path} --overwrite")
    assert len(ledger.read(path)) == 1


@pytest.mark.parametrize("name", ["checkpoint-0.pth", "encoder.safetensors"])
def test_a_probe_records_its_pretraining(pretrained, tmp_path, name):
    """The probe records flags, epoch, images and hash of its pretraining, from each of the run's files."""
    flags = f"{DIGITS.split('--model')[0]} --num_workers 0 --cache_features --epochs 1 --batch_size 256"
    result = run(main_linprobe, f"{flags} --finetune {pretrained / name} --output_dir {tmp_path}")
    (row,) = ledger.read(tmp_path / "results.jsonl")
    source, (before,) = row["source"], ledger.read(pretrained / "results.jsonl")
    assert row["metrics"] == result and row["data"]["test"]["images"] == 360
    assert source["sha256"] == hashlib.sha256((pretrained / name).read_bytes()).hexdigest()
    assert source["flags"]["rc_mae"] is True and source["flags"]["mask_ratio"] == 0.75 and source["epoch"] == 0
    assert source["images_seen"] == before["images_seen"] and source["data"] == before["data"]
    (found,) = runs.read_runs([str(tmp_path)])
    assert found.get("method") == found.get("pretrain.method") == "rc_mae" and found.get("rc_momentum") == 0.996


def test_finetuning_and_its_evaluation(pretrained, tmp_path):
    """The evaluation has its own line with both earlier runs, and agrees with the last evaluation of the training."""
    flags = f"{DIGITS.split('--model')[0]} --num_workers 0 --batch_size 64 --epochs 1 --device cpu"
    run(main_finetune, f"{flags} --finetune {pretrained}/checkpoint-0.pth --output_dir {tmp_path}")
    run(main_finetune, f"{flags} --eval --resume auto --output_dir {tmp_path}")
    trained, judged = ledger.read(tmp_path / "results.jsonl")
    assert (trained["command"], judged["command"]) == ("main_finetune", "main_finetune --eval")
    assert judged["metrics"]["eval/acc1"] == pytest.approx(trained["metrics"]["eval/acc1"])
    assert json.loads((tmp_path / "eval.json").read_text())["result"] == judged["metrics"]
    ((x, value),) = scalars(tmp_path / "tensorboard-eval", "eval/acc1")
    assert x == 1000 and value == pytest.approx(judged["metrics"]["eval/acc1"])  # after epoch 0
    assert trained["source"]["flags"]["mask_ratio"] == 0.75
    assert judged["source"]["flags"]["layer_decay"] == 0.75 and judged["source"]["source"] == trained["source"]
    result = {one.row["command"]: one for one in runs.read_runs([str(tmp_path)])}
    assert result["main_finetune --eval"].get("pretrain.mask_ratio") == 0.75
    assert result["main_finetune --eval"].get("finetune.layer_decay") == 0.75


def test_ranks_with_other_data_or_code(image_folder, tmp_path, monkeypatch):
    """A difference in data or revision is detected at the start; a rank outside a checkout has no revision."""

    def others(change):
        monkeypatch.setattr("util.parallel.distributed.gather_objects", lambda value: [value, change(value)])
        monkeypatch.setattr("util.report.ledger.gather_objects", lambda value: [value, change(value)])

    def record():
        args = main_pretrain.get_args_parser().parse_args(["--data_path", str(image_folder)])
        return ledger.Record("main_pretrain", args, train=read_images(args, True), test=read_images(args, False))

    def other_names(value):
        return {**value, "test": {**value["test"], "sha256": "0"}} if isinstance(value, dict) else value

    others(lambda value: value)
    assert record().data["train"]["images"] == 96
    others(other_names)
    with pytest.raises(UserError, match=r"rank 1 has other images for test below --data_path than rank 0 \(20 and 20"):
        record()
    others(lambda value: value if isinstance(value, dict) else "abc")
    with pytest.raises(UserError, match="rank 1 runs revision abc of the code and rank 0"):
        record()
    others(lambda value: value if isinstance(value, dict) else "")
    record()


@pytest.mark.parametrize(
    "script, words",
    [
        (None, "git is not installed"),
        (
            "echo \"fatal: detected dubious ownership in repository at '/x'\" >&2; exit 128",
            "belongs to another user | git config --global --add safe.directory",
        ),
        ("echo 'fatal: not a git repository (or any of the parent directories): .git' >&2; exit 128", "clone"),
        ("echo 'fatal: bad object' >&2; exit 128", "fatal: bad object"),
        ("exit 1", "without a message"),
    ],
)
def test_a_missing_revision_is_explained_once(tmp_path, monkeypatch, capsys, script, words):
    note_once.cache_clear()
    if script:
        (tmp_path / "git").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [ledger.revision(), ledger.revision()] == ["", ""]
    shown = capsys.readouterr().out
    assert shown.count("note: ") == shown.count("\n") == 1 and "lack the revision of the code" in shown
    assert all(word in shown for word in words.split(" | "))
