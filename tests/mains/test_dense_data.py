"""Dense data that is damaged or wrong, as the mains meet it: counted within --max_bad_fraction, else one sentence."""

import json
import shlex

import numpy as np
import pytest
import torch
from helpers.dense_sets import coco_content, coco_set, image, mask, masks_set, voc_set, voc_xml
from helpers.launch import log_rows
from helpers.refusals import isolated
from PIL import Image

import main_detect
import main_segment
from util.errors import UserError, user_errors
from util.report import ledger

BASE = "--model vit_micro_patch4 --input_size 16 --head_width 8 --batch_size 2 --epochs 1 --num_workers 0 --device cpu"
BASE += " --amp_dtype fp32"
SEGMENT, DETECT = f"{BASE} --dataset masks --head_norm layer", f"{BASE} --dataset coco --window 0"


def start(main, flags: str) -> dict:
    return main.main(main.get_args_parser().parse_args(shlex.split(flags)))


def cut(path, share=0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


def damaged_masks(root):
    """Eight pairs in training: an image is cut off, another one is none, and a mask is cut off; one of the three
    evaluation images is cut off."""
    masks_set(root, 8)
    cut(root / "train/images/1.jpg")
    (root / "train/images/2.jpg").write_bytes(b"")
    cut(root / "train/masks/3.png")
    for index in range(3, 8):
        (root / f"val/images/{index}.jpg").unlink()
    cut(root / "val/images/0.jpg")


def damaged_coco(root):
    """Eight images in training, of which two cannot be read; one of the three evaluation images cannot be read."""
    content = coco_content()
    content["annotations"] = [each for each in content["annotations"] if each["id"] in (5, 8)]
    numbers = range(21, 29)
    objects = [{**content["annotations"][0], "id": number, "image_id": number} for number in numbers]
    images = [{**content["images"][0], "id": number, "file_name": f"{number}.jpg"} for number in numbers]
    coco_set(root, {**content, "images": images, "annotations": objects}, content)
    for number in numbers:
        image(root / f"train2017/{number}.jpg", number)
    cut(root / "train2017/22.jpg")
    (root / "train2017/23.jpg").unlink()
    cut(root / "val2017/11.jpg")


CASES = {
    "masks": (main_segment, damaged_masks, SEGMENT, "train/images/1.jpg | train/images/3.jpg: its mask"),
    "coco": (main_detect, damaged_coco, DETECT, "train2017/22.jpg | train2017/23.jpg"),
}


@pytest.mark.parametrize("case", CASES)
def test_unreadable_files_are_counted(case, tmp_path, capfd):
    """The run ends; each file is named, training counts those that it replaced, evaluation leaves one out. Log, scores
    and ledger have the counts."""
    main, make, flags, names = CASES[case]
    make(tmp_path / "data")
    flags += f" --data_path {tmp_path / 'data'} --output_dir {tmp_path / 'run'}"
    stats = start(main, f"{flags} --max_bad_fraction 0.9")
    error = capfd.readouterr().err
    assert all(name in error for name in names.split(" | "))
    (row,), scores = log_rows(tmp_path / "run"), json.loads((tmp_path / "run" / "scores.json").read_text())
    (line,) = ledger.read(tmp_path / "run" / "results.jsonl")
    assert row["data/bad_images"] >= 2 and stats["skipped"] == 1
    assert row["eval/skipped"] == scores["result"]["eval/skipped"] == line["metrics"]["eval/skipped"] == 1
    if case == "masks":
        assert sum(scores["details"]["pixels"].values()) == 2 * 80  # of two images
    with pytest.raises(UserError, match="unreadable"):
        start(main, f"{flags} --overwrite")  # 1 % is allowed


def test_images_of_floats(tmp_path, capsys):
    """Their range is settled for the whole set, and an evaluation takes that of the run."""
    masks_set(tmp_path / "data", 4)
    for split in ("train", "val"):
        for index in range(4):
            (tmp_path / f"data/{split}/images/{index}.jpg").unlink()
            pixels = np.linspace(100, 4000, 80, dtype=np.float32).reshape(8, 10)
            Image.fromarray(pixels).save(tmp_path / f"data/{split}/images/{index}.tif")
    flags = f"{SEGMENT} --in_chans 1 --mean 0.5 --std 0.5 --data_path {tmp_path / 'data'}"
    start(main_segment, f"{flags} --pixel_range auto --output_dir {tmp_path / 'run'}")
    assert json.loads((tmp_path / "run" / "args.json").read_text())["pixel_range"] == [100, 4000]
    assert log_rows(tmp_path / "run")[0].get("data/bad_images", 0) == 0
    capsys.readouterr()
    start(main_segment, f"{flags} --eval --finetune {tmp_path / 'run'}/checkpoint-best.pth --output_dir ''")
    assert "--pixel_range 100 4000, from the checkpoint" in capsys.readouterr().out


# Annotations that are wrong: the data set, its flags, and the words of the sentence (separated by " | ").


def without_mask(root):
    masks_set(root)
    for index in (0, 2):
        (root / f"train/masks/{index}.png").unlink()


def another_size(root):
    masks_set(root)
    mask(root / "train/masks/1.png", 0, 1, size=(8, 10))


def in_colour(root):
    masks_set(root)
    image(root / "train/masks/1.png", 3)


def out_of_range(root):
    masks_set(root, labels=(0, 1, 3))
    (root / "classes.txt").write_text("a\nb\n")


def one_too_high(root):
    """In the evaluation images alone: nothing says that 0 is unlabelled."""
    masks_set(root)
    for index in range(3):
        mask(root / f"val/masks/{index}.png", 1, 3)


def nothing_labelled(root):
    masks_set(root, labels=(255,))


def of_another_version(root):
    coco_set(root, train=json.dumps({"version": 2, "images": [], "labels": []}))


def no_json(root):
    coco_set(root, train="{")


def unknown_category(root):
    content = coco_content()
    content["annotations"][0]["category_id"] = 99
    coco_set(root, content)


def nan_box(root):
    coco_set(root, json.dumps(coco_content()).replace("[2, 1, 4, 3]", "[NaN, 1, 4, 3]", 1))


def nothing_in_evaluation(root):
    content = coco_content()
    content["annotations"] = [each for each in content["annotations"] if each["id"] in (5, 8)]
    coco_set(root, content, {**content, "annotations": []})


def other_categories(root):
    content = coco_content()
    content["annotations"] = [each for each in content["annotations"] if each["id"] in (5, 8)]
    coco_set(root, content, {**content, "categories": [dict(id=7, name="horse"), dict(id=3, name="dog")]})


def entity_bomb(root):
    bomb = '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + voc_xml(("dog", 1, 1, 4, 3, 0))
    voc_set(root, annotations={"1": bomb})


def unknown_class(root):
    voc_set(root, annotations={"1": voc_xml(("unicorn", 1, 1, 4, 3, 0))})


def inverted_box(root):
    voc_set(root, annotations={"1": voc_xml(("dog", 9, 1, 4, 3, 0), ("dog", 1, 1, 4, 3, 0))})


VOC = f"{BASE} --dataset voc --detector faster --window 0"
WRONG = {
    without_mask: (SEGMENT, "train/images/0.jpg | has no mask | 1 others of 3"),
    another_size: (SEGMENT, "masks/1.png has 8 x 10 pixels | images/1.jpg has 10 x 8"),
    in_colour: (SEGMENT, "masks/1.png | class indices are needed | --color_table"),
    out_of_range: (SEGMENT, "the label 3 | the 2 classes | are 0..1 | --ignore_label is 255"),
    one_too_high: (
        SEGMENT,
        "val/masks/ | the label 3 | the 3 classes of the training set are 0..2 | --zero_is_ignored",
    ),
    nothing_labelled: (SEGMENT, "the masks have no label"),
    of_another_version: (DETECT, "instances_train2017.json | 'annotations'"),
    no_json: (DETECT, "instances_train2017.json is not JSON"),
    unknown_category: (DETECT, "instances_train2017.json | the annotation 5 has the category 99"),
    nan_box: (DETECT, "the annotation 5 has the bbox | not four finite numbers"),
    nothing_in_evaluation: (DETECT, "instances_val2017.json annotates no object"),
    other_categories: (DETECT, "instances_val2017.json has the category 'horse' where the training set has 'cat'"),
    entity_bomb: (VOC, "1.xml declares a document type"),
    unknown_class: (VOC, "1.xml has an object of the class 'unicorn'"),
    inverted_box: (VOC, "cannot be used | --max_bad_fraction 0.01 | corners are exchanged"),
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_one_sentence(make, tmp_path, capsys):
    """Exit code 2, one line that names the file, and no folder of a run."""
    flags, words = WRONG[make]
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    name = "main_segment" if flags is SEGMENT else "main_detect"
    main = main_segment if flags is SEGMENT else main_detect
    with pytest.raises(SystemExit) as left, isolated(tmp_path), user_errors(f"{name}.py"):
        start(main, f"{flags} --data_path {tmp_path / 'data'} --output_dir {tmp_path / 'run'}")
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and error.startswith(f"{name}.py: error: ")
    assert all(word in error for word in words.split(" | ")), error
    assert not (tmp_path / "run").exists() and not torch.distributed.is_initialized()


def test_classes_of_a_checkpoint(tmp_path):
    """An evaluation on other categories than those of the checkpoint is refused."""
    masks_set(tmp_path / "data")
    (tmp_path / "data" / "classes.txt").write_text("a\nb\nc\n")
    flags = f"{SEGMENT} --data_path {tmp_path / 'data'}"
    start(main_segment, f"{flags} --max_steps 1 --output_dir {tmp_path / 'run'}")
    (tmp_path / "data" / "classes.txt").write_text("a\nb\nd\n")
    evaluated = f"{flags} --eval --finetune {tmp_path / 'run'}/checkpoint-best.pth --output_dir ''"
    with pytest.raises(UserError, match=r"has the class 'd' where the training set has 'c'"):
        start(main_segment, evaluated)
