"""Data that contradicts the flags, and folders that cannot be written to."""

from urllib.error import URLError

import pytest
from helpers.refusals import assert_names, assert_refused, call, cases, command, parameters, refusal

# flags, and the words that the sentence must contain (separated by " | ")
SHARED = {
    "--dataset imagenet21": "--dataset | imagenet21 | imagefolder | digits",
    "--dataset nobody/knows": "--dataset | nobody/knows",
    "--dataset torch/nothing": "--dataset | torch/nothing",
    "--data_path ": "--data_path",
    "--data_path {box}/data/missing": "--data_path | data/missing",
    "--data_path {box}/file": "--data_path | {box}/file",
    "--data_path {box}/data/empty": "data/empty | train/",
    "--data_path {box}/data/no_train": "data/no_train | train/",
    "--data_path {box}/data/flat": "data/flat/train",
    "--data_path {box}/data/hollow": "data/hollow/train",
    "--dataset folder --data_path ": "--data_path",
    "--dataset folder --data_path {box}/data/missing": "data/missing",
    "--dataset folder --data_path {box}/data/empty": "data/empty",
    "--dataset folder --data_path {box}/data/texts": "data/texts",
    "--dataset filelist --data_path ": "--data_path",
    "--dataset filelist --data_path {box}/data/good": "--train_list",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/no.txt": "--train_list | lists/no.txt",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists": "--train_list | {box}/lists",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/empty.txt": "lists/empty.txt",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/mixed.txt": "lists/mixed.txt",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/files/pictures/0.png": "pictures/0.png",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/ghosts.txt": (
        "lists/ghosts.txt | nowhere/0.png"
    ),
    "--dataset cifar10 --data_path {box}/data/empty": "--data_path | data/empty | --download",
    "--dataset cifar100 --data_path {box}/data/missing": "--data_path | data/missing | --download",
    "--dataset tiny_imagenet --data_path ": "--data_path",
    "--dataset tiny_imagenet --data_path {box}/data/empty": "data/empty | train/",
    "--dataset tiny_imagenet --data_path {box}/data/hollow": "data/hollow/train",
    "--dataset digits --batch_size 1438": "--batch_size | 1437 images",
    "--data_path {box}/data/good --batch_size 5": "--batch_size | 4 images",
    f"--data_path {'{box}'}/{'x' * 300}": "--data_path",
    # folders
    "--output_dir {box}/file": "--output_dir | {box}/file",
    "--output_dir {box}/file/below": "--output_dir | {box}/file/below",
    "--output_dir /proc/nothing": "--output_dir | /proc/nothing",
    f"--output_dir {'{box}'}/{'x' * 300}": "--output_dir",
    "--log_dir {box}/file": "--log_dir | {box}/file",
    "--log_dir {box}/file/below": "--log_dir | {box}/file/below",
}
PRETRAIN = {
    "--knn_freq 1 --dataset folder --data_path {box}/data/good": "--knn_freq",
    "--knn_freq 1 --data_path {box}/data/no_val": "data/no_val | val/",
    "--vis_freq 1 --dataset filelist --data_path {box}/data/good "
    "--train_list {box}/lists/labelled.txt --val_list {box}/lists/stranger.txt --knn_freq 1": "lists/stranger.txt",
}
TRANSFER = {
    "--dataset folder --data_path {box}/data/good": "--dataset folder | labels",
    "--dataset folder --data_path {box}/data/good --nb_classes 2": "--dataset folder | labels",
    "--data_path {box}/data/no_val": "data/no_val | val/",
    "--data_path {box}/data/stranger": "data/stranger/val | 'c'",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/labelled.txt": "--val_list",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/labelled.txt "
    "--val_list {box}/lists/stranger.txt": "lists/stranger.txt | 'c'",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/labelled.txt "
    "--val_list {box}/lists/unlabelled.txt": "labels",
    "--dataset tiny_imagenet --data_path {box}/data/tiny_plain": "val_annotations.txt",
    "--dataset tiny_imagenet --data_path {box}/data/tiny_foreign": "val_annotations.txt | n9",
    "--dataset tiny_imagenet --data_path {box}/data/tiny_cut": "val_annotations.txt",
}


@pytest.mark.parametrize("program, flags, names", parameters(cases(SHARED, TRANSFER, pretrain=PRETRAIN)))
def test_is_refused(program, flags, names, box, capsys):
    assert_refused(capsys, program, flags, names, box)


@pytest.mark.parametrize("error", [URLError("no route to host"), PermissionError(13, "Permission denied")])
def test_a_download_that_fails(error, box, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    flags = "--dataset cifar10 --data_path {box}/data/empty --download"
    line = refusal(capsys, "pretrain", flags, box, "--output_dir", "{box}/pretrain", "--overwrite")
    assert_names(line, f"{box}/data/empty | {error.args[-1]}")


def test_unreadable_images_end_the_run_by_name(box, capsys, tmp_path):
    """Only reading the images shows the fault, so the run has begun: its folder exists, every image is named, and it
    ends with our message."""
    flags = ["--data_path", "{box}/data/corrupt", "--output_dir", f"{tmp_path}/new"]
    with pytest.raises(SystemExit) as caught:
        call("pretrain", command("pretrain", box, *flags), box / "here")
    *named, last = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert all(line.startswith("unreadable image ") and "corrupt/train/a" in line for line in named) and named
    assert last.startswith("main_pretrain.py: error: ") and "corrupt/train/a" in last
