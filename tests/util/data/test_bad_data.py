"""Data that contradicts the flags, and folders that cannot be written to."""

from urllib.error import URLError

import pytest
from helpers.refusals import assert_names, assert_refused, call, cases, command, parameters, refusal

# flags, and the words that the sentence must contain (separated by " | ")
IMAGES = {
    "--dataset imagenet21": "--dataset | imagenet21 | imagefolder | digits",
    "--dataset nobody/knows": "--dataset | nobody/knows",
    "--dataset torch/nothing": "--dataset | torch/nothing",
    "--data_path ": "--data_path",
    "--data_path {dir}/data/missing": "--data_path | data/missing",
    "--data_path {dir}/file": "--data_path | {dir}/file",
    "--data_path {dir}/data/empty": "data/empty | train/",
    "--data_path {dir}/data/no_train": "data/no_train | train/",
    "--data_path {dir}/data/flat": "data/flat/train",
    "--data_path {dir}/data/hollow": "data/hollow/train",
    "--dataset folder --data_path ": "--data_path",
    "--dataset folder --data_path {dir}/data/missing": "data/missing",
    "--dataset folder --data_path {dir}/data/empty": "data/empty",
    "--dataset folder --data_path {dir}/data/texts": "data/texts",
    "--dataset filelist --data_path ": "--data_path",
    "--dataset filelist --data_path {dir}/data/good": "--train_list",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists/no.txt": "--train_list | lists/no.txt",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists": "--train_list | {dir}/lists",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists/empty.txt": "lists/empty.txt",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists/mixed.txt": "lists/mixed.txt",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/files/pictures/0.png": "pictures/0.png",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists/ghosts.txt": (
        "lists/ghosts.txt | nowhere/0.png"
    ),
    "--dataset cifar10 --data_path {dir}/data/empty": "--data_path | data/empty | --download",
    "--dataset cifar100 --data_path {dir}/data/missing": "--data_path | data/missing | --download",
    "--dataset tiny_imagenet --data_path ": "--data_path",
    "--dataset tiny_imagenet --data_path {dir}/data/empty": "data/empty | train/",
    "--dataset tiny_imagenet --data_path {dir}/data/hollow": "data/hollow/train",
    "--dataset digits --batch_size 1438": "--batch_size | 1437 images",
    "--data_path {dir}/data/good --batch_size 5": "--batch_size | 4 images",
    f"--data_path {'{dir}'}/{'x' * 300}": "--data_path",
}
FOLDERS = {
    "--output_dir {dir}/file": "--output_dir | {dir}/file",
    "--output_dir {dir}/file/below": "--output_dir | {dir}/file/below",
    "--output_dir /proc/nothing": "--output_dir | /proc/nothing",
    f"--output_dir {'{dir}'}/{'x' * 300}": "--output_dir",
    "--log_dir {dir}/file": "--log_dir | {dir}/file",
    "--log_dir {dir}/file/below": "--log_dir | {dir}/file/below",
}
PRETRAIN = {
    "--knn_freq 1 --dataset folder --data_path {dir}/data/good": "--knn_freq",
    "--knn_freq 1 --data_path {dir}/data/no_val": "data/no_val | val/",
    "--vis_freq 1 --dataset filelist --data_path {dir}/data/good "
    "--train_list {dir}/lists/labelled.txt --val_list {dir}/lists/stranger.txt --knn_freq 1": "lists/stranger.txt",
}
DENSE = {
    "--dataset imagenet21": "--dataset imagenet21 | scenes",
    "--dataset digits": "--dataset digits | scenes",
    "--dataset voc --data_path ": "--data_path",
    "--dataset voc --data_path {dir}/data/missing": "data/missing",
    "--dataset voc --data_path {dir}/file": "{dir}/file",
    "--dataset voc --data_path {dir}/data/empty": "data/empty",
    "--dataset voc --data_path {dir}/data/good": "data/good",
    "--batch_size 5": "--batch_size | 4 images",
    "--scene_count 0": "--scene_count 0",
    "--scene_digits 1 1": "--scene_digits 1 1",
}
TRANSFER = {
    "--dataset folder --data_path {dir}/data/good": "--dataset folder | labels",
    "--dataset folder --data_path {dir}/data/good --nb_classes 2": "--dataset folder | labels",
    "--data_path {dir}/data/no_val": "data/no_val | val/",
    "--data_path {dir}/data/stranger": "data/stranger/val | 'c'",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists/labelled.txt": "--val_list",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists/labelled.txt "
    "--val_list {dir}/lists/stranger.txt": "lists/stranger.txt | 'c'",
    "--dataset filelist --data_path {dir}/data/good --train_list {dir}/lists/labelled.txt "
    "--val_list {dir}/lists/unlabelled.txt": "labels",
    "--dataset tiny_imagenet --data_path {dir}/data/tiny_plain": "val_annotations.txt",
    "--dataset tiny_imagenet --data_path {dir}/data/tiny_foreign": "val_annotations.txt | n9",
    "--dataset tiny_imagenet --data_path {dir}/data/tiny_cut": "val_annotations.txt",
}


@pytest.mark.parametrize(
    "program, flags, names", parameters(cases(FOLDERS, IMAGES, TRANSFER, DENSE, pretrain=PRETRAIN))
)
def test_is_refused(program, flags, names, refusal_dir, capsys):
    assert_refused(capsys, program, flags, names, refusal_dir)


@pytest.mark.parametrize("error", [URLError("no route to host"), PermissionError(13, "Permission denied")])
def test_a_download_that_fails(error, refusal_dir, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    flags = "--dataset cifar10 --data_path {dir}/data/empty --download"
    line = refusal(capsys, "pretrain", flags, refusal_dir, "--output_dir", "{dir}/pretrain", "--overwrite")
    assert_names(line, f"{refusal_dir}/data/empty | {error.args[-1]}")


def test_unreadable_images_end_the_run_by_name(refusal_dir, capsys, tmp_path):
    """Only reading the images shows the fault, so the run has begun: its folder exists, every image is named, and it
    ends with our message."""
    flags = ["--data_path", "{dir}/data/corrupt", "--output_dir", f"{tmp_path}/new"]
    with pytest.raises(SystemExit) as caught:
        call("pretrain", command("pretrain", refusal_dir, *flags), refusal_dir / "here")
    *named, last = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert all(line.startswith("unreadable image ") and "corrupt/train/a" in line for line in named) and named
    assert last.startswith("main_pretrain.py: error: ") and "corrupt/train/a" in last
