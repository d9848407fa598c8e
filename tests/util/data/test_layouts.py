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
from util.arguments import check_numbers
from util.data.leftovers import in_leftover, is_leftover
from util.data.readers import read_images
from util.data.samples import KeyedDataset
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
    for given, message in (
        (
            ["--dataset", "digits", "--eval_path", "x"],
            "--eval_path is for --dataset imagefolder and folder, not digits",
        ),
        (["--dataset", "folder", "--val_fraction", 0.1], "--val_fraction is for --dataset imagefolder"),
        (["--val_fraction", 1.5], "must lie between 0 and 1"),
        (["--val_fraction", 0.5, "--eval_path", "x"], "both choose the evaluation images"),
    ):
        with pytest.raises(UserError, match=message):
            check_numbers(flags(*given))
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


# Layouts of public data sets ------------------------------------------------------------------------------------------


def test_class_folders_without_splits(tmp_path, capsys):
    """EuroSAT, Caltech 101, many dumps: the message says what to do, and that works alike for every seed and split."""
    class_folders(tmp_path, AnnualCrop=range(10), Forest=range(100, 105), River=[200])
    with pytest.raises(UserError, match=r"no train/ .*folders of images \(AnnualCrop, Forest, River\).*--val_fr"):
        read_images(flags("--data_path", tmp_path), True)
    words = ["--data_path", tmp_path, "--val_fraction", "0.2"]
    train, held = (read_images(flags(*words, "--seed", seed), part) for seed, part in ((0, True), (7, False)))
    assert train.classes == held.classes == ["AnnualCrop", "Forest", "River"]
    both = contents(train) + contents(held)
    assert sorted(value for value, _ in both) == [*range(10), *range(100, 105), 200]
    assert [label for _, label in contents(held)] == [0, 0, 1]  # a fifth of each class; the only river is for training
    assert "--val_fraction 0.2: 3 of 16 images are for evaluation" in capsys.readouterr().out
    class_folders(tmp_path / "val", AnnualCrop=[1])
    with pytest.raises(UserError, match=r"--val_fraction is for a folder of class folders, but .* has val/"):
        read_images(flags(*words), True)


def test_held_out_images_stay_when_others_are_added(tmp_path):
    """A run that is resumed after files were added must not evaluate what it was trained on."""
    class_folders(tmp_path, a=range(0, 200, 2), b=[1])
    words = ["--data_path", tmp_path, "--val_fraction", "0.3"]
    before = {value for value, _ in contents(read_images(flags(*words), False))}
    class_folders(tmp_path, a=range(201, 211, 2))
    after = {value for value, _ in contents(read_images(flags(*words), False))}
    assert len(before) == 30 and len(before - after) <= 3 and len({v for v in after if v < 200} - before) <= 1
    with pytest.raises(UserError, match="leaves no image for evaluation"):
        class_folders(tmp_path / "single", a=[1], b=[2])
        read_images(flags("--data_path", tmp_path / "single", "--val_fraction", "0.3"), False)


def test_image_folder_of_torchvision(tmp_path):
    class_folders(tmp_path / "train", a=[0], b=[1])
    class_folders(tmp_path / "val", a=[2], b=[3])
    for split in ("train", "val"):
        save(tmp_path / split / ".ipynb_checkpoints" / "0.png", 99)
    words = ["--dataset", "torch/image_folder", "--data_path", tmp_path]
    images = read_images(flags(*words), True)
    assert images.classes == ["a", "b"] and contents(images) == [(0, 0), (1, 1)]
    assert contents(read_images(flags(*words), False)) == [(2, 0), (3, 1)]


def test_flat_evaluation_images_with_a_list(tmp_path):
    """ImageNet of Kaggle: train/<class>/, val/*.JPEG and LOC_val_solution.csv with boxes."""
    class_folders(tmp_path / "train", n01440764=[0], n01443537=[1])
    for i in range(4):
        save(tmp_path / "val" / f"ILSVRC2012_val_{i}.png", 10 * i)
    with pytest.raises(UserError, match=r"no class folders.*--val_list"):
        read_images(flags("--data_path", tmp_path), False)
    rows = [f"ILSVRC2012_val_{i},{('n01440764', 'n01443537')[i % 2]} {i} 1 499 272 " for i in range(4)]
    solution = tmp_path / "LOC_val_solution.csv"
    solution.write_text("ImageId,PredictionString\n" + "\n".join(rows) + "\n")
    words = ["--data_path", tmp_path, "--val_list", solution]
    assert contents(read_images(flags(*words), False)) == [(0, 0), (10, 1), (20, 0), (30, 1)]
    solution.write_text(
        "ImageId,PredictionString\nILSVRC2012_val_0,n02000000 1 1 2 2\nILSVRC2012_val_1,n01440764 1 1 2 2\n"
    )
    with pytest.raises(UserError, match="has the label 'n02000000', which is not a class of the training images"):
        read_images(flags(*words), False)


def test_a_windows_archive(tmp_path):
    """A naive extractor keeps the backslashes in file names."""
    for split in ("train", "val"):
        for label in "ab":
            save(tmp_path / f"{split}\\{label}\\0.png")
    with pytest.raises(UserError, match=r"file names with backslashes .*extract it with unzip"):
        read_images(flags("--data_path", tmp_path), True)


@pytest.mark.parametrize(
    "name, hint",
    [
        ("train-00000-of-00001.parquet", "--dataset hfds/"),
        ("train/camelyonpatch_level_2_split_train_x.h5", "HDF5 is not read"),
        ("store/zarr.json", "Zarr is not read"),
        ("images.zarr/.zgroup", "Zarr is not read"),
        ("data.tfrecord", "--dataset tfds/"),
        ("data.mdb", "LMDB is not read"),
        ("scan.dcm", "convert it to 16-bit PNG or TIFF, and give --pixel_range"),
        ("brain.nii.gz", "NIfTI is not read"),
        ("train.zip", "extract the archive"),
        ("00000.tar", "--dataset wds"),
    ],
)
def test_containers_are_refused_with_what_helps(tmp_path, name, hint):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match=f"contains no images.*{hint}"):
        read_images(flags("--dataset", "folder", "--data_path", tmp_path), True)
    if not name.endswith(("zarr.json", ".zgroup")):
        with pytest.raises(UserError, match=f"is not a folder: .*{hint.removeprefix('extract')}"):
            read_images(flags("--data_path", tmp_path / name), True)


def test_what_a_file_is(tmp_path, capfd):
    """Content behind an image's ending: the reason says what it is, and pillow adds no lines of its own."""
    tiff = b"II*\0" + bytes(100)
    kinds = {
        "HDF5": b"\x89HDF\r\n\x1a\n",
        "a NumPy array": b"\x93NUMPY\1\0",
        "a DICOM file": bytes(128) + b"DICM",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
        "HTML": b"<!DOCTYPE html>",
        "gzip data": b"\x1f\x8b\x08",
        "a TIFF that tifffile cannot read": tiff,
        "the file is empty": b"",
    }
    for i, content in enumerate(kinds.values()):
        (tmp_path / f"{i}.tif").write_bytes(content)
    dataset = KeyedDataset(read_images(flags("--dataset", "folder", "--data_path", tmp_path), True), None, 0, 3)
    for i, kind in enumerate(kinds):
        with pytest.raises(OSError, match=kind):
            dataset.images.load(i)
    assert capfd.readouterr().err == ""
