"""Folders as people have them: what other programs leave behind, other names of the splits, an evaluation set alone."""

import shutil
import zipfile

import pytest
import torch
from helpers.launch import SMALL
from helpers.plain_images import class_folders, contents, finetune_flags, flags, save

import main_finetune
import main_linprobe
import main_pretrain
from util.data.leftovers import in_leftover, is_leftover
from util.data.readers import read_images
from util.errors import UserError

# Leftovers ------------------------------------------------------------------------------------------------------------

LEFT_BEHIND = (
    ".ipynb_checkpoints/000-checkpoint.png",  # Jupyter: a copy of an image
    "__MACOSX/a/._000.png",  # macOS, in zip archives
    "@eaDir/000.png/SYNOPHOTO_THUMB_B.jpg",  # Synology: thumbnails
    "a/@eaDir/000.png/SYNOPHOTO_THUMB_B.jpg",
    "a/._000.png",  # macOS: attributes
    "a/.nfs000000001.png",  # NFS: deleted, and still open
    "a/.000.png.Xy12.png",  # rsync: half copied
    "a/~$000.png",
    ".Trash-1000/files/000.png",
    "$RECYCLE.BIN/000.png",
    "lost+found/000.png",
    ".git/000.png",
    ".@__thumb/000.png",  # QNAP
    "~snapshot/daily/a/000.png",  # NetApp
)


@pytest.mark.parametrize("split", ["train", "val"])
def test_leftovers_are_no_classes_and_no_images(tmp_path, split, capsys):
    class_folders(tmp_path / "train", a=[0, 10], b=[20])
    class_folders(tmp_path / "val", a=[1], b=[21])
    for name in LEFT_BEHIND:
        save(tmp_path / split / name, 99)
    for name in (".DS_Store", "Thumbs.db", "a/desktop.ini"):
        (tmp_path / split / name).write_bytes(b"\0")
    for dataset, path in (("imagefolder", tmp_path), ("folder", tmp_path)):
        images = read_images(flags("--dataset", dataset, "--data_path", path), split == "train")
        assert [value for value, _ in contents(images)] == ([0, 10, 20] if split == "train" else [1, 21])
        out = capsys.readouterr().out
        assert out.count("note: ") == 1 and "files and folders below" in out and "are left out" in out
    assert read_images(flags("--data_path", tmp_path), True).classes == ["a", "b"]


def test_a_folder_below_a_hidden_one_is_read(tmp_path):
    class_folders(tmp_path / ".cache" / "data" / "train", a=[0], b=[1])
    assert len(read_images(flags("--data_path", tmp_path / ".cache" / "data"), True)) == 2


def test_a_dangling_link_of_another_program_is_no_class(tmp_path):
    class_folders(tmp_path / "train", a=[0], b=[1])
    (tmp_path / "train" / ".snapshot").symlink_to(tmp_path / "gone")
    assert read_images(flags("--data_path", tmp_path), True).classes == ["a", "b"]


def test_names_of_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("__MACOSX/train/._x.png", b"")
        archive.writestr("./train/x.png", b"")
    left = [in_leftover(name) for name in zipfile.ZipFile(tmp_path / "x.zip").namelist()]
    assert left == [True, False] and is_leftover(".x") and not is_leftover("x.y")


def test_endings_are_counted(tmp_path, capsys):
    class_folders(tmp_path, a=[0])
    for name in ("scan.dcm", "scan.nii.gz", "IMG.HEIC", ".photo.png.icloud"):
        (tmp_path / "a" / name).write_bytes(b"x")
    assert len(read_images(flags("--dataset", "folder", "--data_path", tmp_path), True)) == 1
    out = capsys.readouterr().out
    assert "3 files" in out and all(ending in out for ending in (".dcm", ".nii.gz", ".heic"))


# Names of the splits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["valid", "validation", "dev", "test", "Val", "TEST", "Testing"])
def test_other_names_of_the_evaluation_folder(tmp_path, name, capsys):
    class_folders(tmp_path / "train", a=[0], b=[1])
    class_folders(tmp_path / name, a=[2], b=[3])
    assert contents(read_images(flags("--data_path", tmp_path), False)) == [(2, 0), (3, 1)]
    assert f"evaluation images are those of {tmp_path / name}" in capsys.readouterr().out


def test_val_comes_before_test(tmp_path, capsys):
    class_folders(tmp_path / "Training", a=[0], b=[1])
    class_folders(tmp_path / "test", a=[2], b=[3])
    class_folders(tmp_path / "val", a=[4], b=[5])
    assert [value for value, _ in contents(read_images(flags("--data_path", tmp_path), False))] == [4, 5]
    assert [value for value, _ in contents(read_images(flags("--data_path", tmp_path), True))] == [0, 1]


def test_eval_path(tmp_path):
    class_folders(tmp_path / "data" / "train", a=[0], b=[1])
    class_folders(tmp_path / "data" / "val", a=[2], b=[3])
    class_folders(tmp_path / "hospital B", b=[7])
    words = ["--data_path", tmp_path / "data", "--eval_path", tmp_path / "hospital B"]
    assert contents(read_images(flags(*words), False)) == [(7, 1)]
    assert len(read_images(flags(*words), True)) == 2
    assert len(read_images(flags("--dataset", "folder", *words), False)) == 1
    with pytest.raises(UserError, match=r"--eval_path .*gone is not a folder"):
        read_images(flags("--data_path", tmp_path / "data", "--eval_path", tmp_path / "gone"), False)
    with pytest.raises(UserError, match="--eval_path is for --dataset imagefolder and folder, not digits"):
        read_images(flags("--dataset", "digits", "--eval_path", tmp_path), False)
    class_folders(tmp_path / "hospital B", c=[7])
    with pytest.raises(UserError, match="class folder 'c', which is not a class of the training images"):
        read_images(flags(*words), False)


def test_the_message_names_what_would_do(tmp_path):
    class_folders(tmp_path / "train", a=[0], b=[1])
    with pytest.raises(UserError, match=r"has no val/ folder \(nor valid/, .*\): give --eval_path"):
        read_images(flags("--data_path", tmp_path), False)


# An evaluation set alone ----------------------------------------------------------------------------------------------


def call(module, *words):
    words = [*words, "--num_workers", 0, "--batch_size", 4, "--device", "cpu"]
    return module.main(module.get_args_parser().parse_args([str(word) for word in words]))


def test_eval_without_training_images(tmp_path):
    """A checkpoint stores its classes: val/, test/ or --eval_path is enough, and classes may be missing there."""
    for split in ("train", "val"):
        class_folders(tmp_path / "data" / split, a=range(0, 80, 10), b=range(100, 180, 10), c=range(200, 250, 10))
    data, once = ["--data_path", tmp_path / "data"], ["--epochs", 1, "--warmup_epochs", 0]
    call(main_pretrain, *SMALL.split(), *data, *once, "--vis_freq", 0, "--output_dir", tmp_path)
    start = ["--finetune", tmp_path / "checkpoint-0.pth"]
    call(main_finetune, *start, *data, *once, "--output_dir", tmp_path / "tuned")
    call(main_linprobe, *start, *data, *once, "--output_dir", tmp_path / "probe")
    tuned, probe = (tmp_path / name / "checkpoint-0.pth" for name in ("tuned", "probe"))
    assert torch.load(tuned, weights_only=True)["classes"] == ["a", "b", "c"]
    shutil.copytree(tmp_path / "data" / "val", tmp_path / "alone" / "test")
    alone = ["--data_path", tmp_path / "alone"]
    for module, words in ((main_finetune, ["--finetune", tuned]), (main_linprobe, ["--resume", probe])):
        expected = call(module, "--eval", *words, *data)
        assert call(module, "--eval", *words, *alone) == expected
        assert call(module, "--eval", *words, "--eval_path", tmp_path / "alone" / "test") == expected
        with pytest.raises(UserError, match="class folder 'd', which is not a class of the"):
            class_folders(tmp_path / "strange" / "val", a=[0], d=[1])
            call(module, "--eval", *words, "--data_path", tmp_path / "strange")
    shutil.rmtree(tmp_path / "alone" / "test" / "a")  # b keeps its index
    assert 0 <= call(main_finetune, "--eval", "--finetune", tuned, *alone)["acc1"] <= 100


def test_lists_without_the_training_list(tmp_path):
    class_folders(tmp_path, a=[0], b=[1])
    (tmp_path / "val.txt").write_text("b/001.png\tb\n")
    words = ["--dataset", "filelist", "--data_path", tmp_path, "--val_list", tmp_path / "val.txt"]
    images = read_images(finetune_flags(*words), False, ["a", "b"])
    assert contents(images) == [(1, 1)] and images.classes == ["a", "b"]
