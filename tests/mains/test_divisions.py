"""Runs on one table with patients: all commands have the same patients for training and for evaluation, also after a
resume."""

import csv

import pytest
import torch
from helpers.launch import SMALL, checkpoint

import main_finetune
import main_linprobe
import main_pretrain
from tools import knn, make_lesions, predict
from util.data.readers import read_images
from util.report import ledger

CPU = "--num_workers 0 --device cpu"
SHORT = f"{CPU} --batch_size 16 --warmup_epochs 0 --amp_dtype fp32"
MLO = f"{SMALL} {SHORT} --mlo_mae --mlo_labels same --mlo_hidden 16 --aug none --vis_freq 1 --knn_freq 1 --save_freq 1"


def call(module, flags: str):
    return module.main(module.get_args_parser().parse_args(flags.split()))


@pytest.fixture(scope="module")
def lesions(tmp_path_factory):
    """The images of 70 patients: their number, and the flags that read them."""
    root = tmp_path_factory.mktemp("lesions") / "set"
    count = make_lesions.write(root, patients=70, size=16, seed=0)
    table = f"--dataset filelist --data_path {root} --train_list {root}/metadata.csv"
    return count, f"{table} --group_column patient_id --val_fraction 0.25"


@pytest.fixture(scope="module")
def pretrained(lesions, tmp_path_factory):
    """Two epochs of MLO-MAE, whose stage III has patients of its own."""
    out = tmp_path_factory.mktemp("pretrained")
    call(main_pretrain, f"{MLO} {lesions[1]} --epochs 2 --output_dir {out}")
    return out


def owners(images) -> set[str]:
    """The patients of some images, by the names of the files."""
    return {images.name(i).rsplit("/", 1)[1].split("_")[1] for i in range(len(images))}


def test_all_commands_have_the_same_patients(lesions, pretrained, tmp_path, capsys):
    data, start = lesions[1], f"--finetune {pretrained}/checkpoint-1.pth"
    call(main_finetune, f"{data} {SHORT} {start} --epochs 1 --seed 3 --output_dir {tmp_path}/tuned")
    call(main_linprobe, f"{data} {CPU} {start} --epochs 1 --cache_features --output_dir {tmp_path}/probe")
    call(knn, f"{pretrained}/checkpoint-1.pth {data} {CPU} --k 1 --out {tmp_path}/knn/knn.json")
    assert "another division" not in capsys.readouterr().out
    rows = [ledger.read(tmp_path / name / "results.jsonl")[-1]["data"] for name in ("tuned", "probe", "knn")]
    assert rows[0] == rows[1] == rows[2] and rows[0]["train"]["images"] + rows[0]["test"]["images"] == lesions[0]
    by_image = data.replace("--group_column patient_id", "")
    call(knn, f"{pretrained}/checkpoint-1.pth {by_image} {CPU} --k 1")
    assert "checkpoint-1.pth was trained on another division of metadata.csv" in capsys.readouterr().out
    tuned = f"{tmp_path}/tuned/checkpoint-0.pth {data} {CPU} --out {tmp_path}/predictions.csv"
    call(predict, tuned)
    with open(tmp_path / "predictions.csv", encoding="utf-8") as file:
        predicted = {row["image"].split("_")[3] for row in csv.DictReader(file)}
    args = main_pretrain.get_args_parser().parse_args(data.split())
    train, held = (read_images(args, side) for side in (True, False))
    assert predicted == owners(held) and not owners(train) & owners(held)


def test_stage_three_holds_out_patients_of_the_training_set(lesions, pretrained):
    args = main_pretrain.get_args_parser().parse_args(lesions[1].split())
    train = read_images(args, True)
    held = set(checkpoint(pretrained, "checkpoint-1.pth")["methods"]["mlo_mae.held_out"].tolist())
    groups = [{train.groups[i] for i in range(len(train)) if (i in held) == side} for side in (True, False)]
    assert groups[0] and groups[1] and not groups[0] & groups[1]


def test_a_resumed_run_keeps_the_division(lesions, pretrained, tmp_path, capsys):
    """It ends bit for bit as one that was not interrupted; its ledger has no earlier part with other images."""
    again = f"{MLO} {lesions[1]} --epochs 2 --output_dir {tmp_path} --resume {pretrained}/checkpoint-0.pth"
    call(main_pretrain, again)
    ours, theirs = (checkpoint(folder, "checkpoint-1.pth")["model"] for folder in (tmp_path, pretrained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert "images are not those of the checkpoint" not in capsys.readouterr().out
    rows = [ledger.read(folder / "results.jsonl")[-1] for folder in (tmp_path, pretrained)]
    assert rows[0]["data"] == rows[1]["data"] and rows[0]["earlier"] == []
