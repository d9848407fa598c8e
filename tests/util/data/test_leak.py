"""--check_leak: an evaluation image among the training images is detected, whatever its path."""

import shutil

import numpy as np
import pytest
from helpers.dense_sets import coco_set, masks_set
from helpers.launch import SMALL
from PIL import Image

import main_detect
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from tools import fewshot, knn
from util.data.leak import check_leak
from util.data.sources import Arrays, Subset
from util.errors import UserError

VIT = "--model vit_micro_patch4 --input_size 16 --device cpu --num_workers 0 --check_leak"
COMMANDS = {
    "pretrain": (main_pretrain, f"{SMALL} --check_leak --num_workers 0 --vis_freq 0 --epochs 1"),
    "finetune": (main_finetune, f"{VIT} --epochs 1"),
    "linprobe": (main_linprobe, f"{VIT} --epochs 1"),
    "cached probe": (main_linprobe, f"{VIT} --epochs 1 --cache_features"),
    "knn": (knn, f"{VIT} random"),
    "fewshot": (fewshot, f"{VIT} random --shots 1"),
    "labels": (
        main_pretrain,
        f"{SMALL} --check_leak --num_workers 0 --vis_freq 0 --epochs 1 --mlo_mae --dataset digits",
    ),
}


@pytest.fixture
def leaking(image_folder, tmp_path):
    """The image folder with one test image among the training images of another class, under another name."""
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    leaked = sorted((folder / "val").glob("*/*"))[0]
    classes = sorted((folder / "train").iterdir())
    shutil.copy(leaked, classes[-1] / "another name.png")
    return folder


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_detects_one_image(name, leaking, tmp_path):
    module, flags = COMMANDS[name]
    out = f"--output_dir {tmp_path}/out --batch_size 8" if "main" in module.__name__ else ""
    data = f"--mlo_labels {leaking}" if name == "labels" else f"--data_path {leaking}"
    with pytest.raises(UserError, match=r"1 of 97 training images are also among the 20 .*another name.png = .*val/"):
        module.main(module.get_args_parser().parse_args(f"{flags} {out} {data}".split()))
    assert not list(tmp_path.glob("out/*"))  # before training and before any file is written


@pytest.mark.parametrize(
    "main, make, flags", [(main_segment, masks_set, "--dataset masks"), (main_detect, coco_set, "--dataset coco")]
)
def test_dense_sets(main, make, flags, tmp_path):
    """Both splits of these sets have the same images."""
    make(tmp_path)
    words = f"{VIT} --batch_size 1 --max_bad_fraction 1 {flags} --data_path {tmp_path}"
    with pytest.raises(UserError, match=r"--check_leak: \d+ of \d+ training images are also among the 3 evaluation"):
        main.main(main.get_args_parser().parse_args(f"{words} --output_dir {tmp_path}/out".split()))
    with pytest.raises(UserError, match="--check_leak has no effect with --eval"):
        main.main(main.get_args_parser().parse_args(f"{words} --eval --finetune x.pth".split()))


def test_disjoint_splits_pass(image_folder, capsys):
    flags = f"{VIT} random --data_path {image_folder}"
    knn.main(knn.get_args_parser().parse_args(flags.split()))
    assert "none of 20 evaluation images is among the 96 training images" in capsys.readouterr().out


def test_arrays_subsets_and_unreadable_images(tmp_path):
    """Arrays are compared by pixels, not by index; an unreadable image equals no other."""
    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    images = Arrays(pixels, range(10), "abcdefghij")
    check_leak(Subset(images, [0, 1, 2]), Subset(images, [3, 4]))
    with pytest.raises(UserError, match=r"2 of 3 .*image 4 = image 4, image 5 = image 5"):
        check_leak(Subset(images, [2, 4, 5]), Subset(images, [5, 4, 9]))

    class Broken(Arrays):
        def load(self, index):
            raise OSError("gone")

    check_leak(Broken(pixels, range(10), "abcdefghij"), Broken(pixels, range(10), "abcdefghij"))


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(UserError, match="the training set is a stream"):
        check_leak(iter([]), Arrays(np.zeros((1, 4, 4), np.uint8), [0], ["a"]))


def test_evaluation_alone_trains_on_nothing(image_folder):
    flags = f"{VIT} --eval --finetune x.pth --data_path {image_folder}"
    with pytest.raises(UserError, match="--check_leak has no effect with --eval"):
        main_finetune.main(main_finetune.get_args_parser().parse_args(flags.split()))


def test_the_same_pixels_in_another_file(tmp_path):
    """As documented, an image that was saved again is a different image."""
    from util.data.sources import Files

    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    for name in ("a.png", "b.bmp"):
        Image.fromarray(pixels).save(tmp_path / name)
    shutil.copy(tmp_path / "a.png", tmp_path / "c.jpg")
    files = [Files([str(tmp_path / name)], [0], ["x"]) for name in ("a.png", "b.bmp", "c.jpg")]
    check_leak(files[0], files[1])
    with pytest.raises(UserError, match=r"a\.png = .*c\.jpg"):
        check_leak(files[0], files[2])
