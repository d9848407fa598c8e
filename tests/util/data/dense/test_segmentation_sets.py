"""Readers of masks in every layout, what stored values mean, and refusals."""

import re

import numpy as np
import pytest
from helpers.dense_sets import SIZE, dense_flags, dense_parser, image, mask, masks_set, palette_mask, voc_set
from PIL import Image

from util.data.dense import mask_survey
from util.data.dense.annotated import SegmentedPart
from util.data.dense.segmentation import read_segmentation
from util.data.readers import read_images
from util.data.samples import BadAnnotation
from util.errors import UserError


def read(root, train=True, *flags, dataset="masks", categories=None, **more):
    args = dense_flags("--dataset", dataset, "--data_path", root, *flags, **more)
    return read_segmentation(args, train, categories)


def labels(images, index=0, count=4):
    return images.annotation(index, SIZE).ravel()[:count].tolist()


# Layouts --------------------------------------------------------------------------------------------------------------


def test_ade20k(tmp_path):
    """0 is unlabelled, and category i is stored as i + 1."""
    root = tmp_path / "ADEChallengeData2016"
    for part in ("training", "validation"):
        for name in ("ADE_1", "ADE_2"):
            image(root / "images" / part / f"{name}.jpg")
            mask(root / "annotations" / part / f"{name}.png", 0, 1, 150)
    images = read(tmp_path, dataset="ade20k")
    assert len(images) == 2 and labels(images) == [255, 0, 149, 149] and len(images.categories) == 150
    assert labels(read(tmp_path, True, "--ignore_label", 200, dataset="ade20k")) == [200, 0, 149, 149]
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName", *(f"{i}\t0.1\t1\t1\t1\tthing {i}, item {i}" for i in range(1, 149))]
    rows += ["149\t0\t1\t1\t0\tscreen, crt", "150\t0\t1\t1\t0\tscreen, silver"]
    (root / "objectInfo150.txt").write_text("\n".join(rows))
    names = read(tmp_path, False, dataset="ade20k").categories
    assert names[0] == "thing 1" and names[-2:] == ["screen, crt", "screen, silver"]
    mask(root / "annotations/validation/ADE_2.png", 151)
    with pytest.raises(UserError, match=r"ADE_2.png has the label 151, but the 150 classes of ADE20K are 1..150"):
        read(tmp_path, False, dataset="ade20k")


def test_cityscapes(tmp_path):
    """Ids become the 19 training classes; other ids are unlabelled."""
    for part in ("train", "val"):
        for city in ("aachen", "ulm"):
            image(tmp_path / "leftImg8bit" / part / city / f"{city}_1_leftImg8bit.png")
            mask(tmp_path / "gtFine" / part / city / f"{city}_1_gtFine_labelIds.png", 7, 8, 33, 0)
            image(tmp_path / "gtFine" / part / city / f"{city}_1_gtFine_color.png")
    images = read(tmp_path, dataset="cityscapes")
    assert len(images) == 2 and labels(images) == [0, 1, 18, 255]
    assert images.categories[0] == "road" and images.categories[18] == "bicycle" and len(images.categories) == 19


def test_voc(tmp_path):
    """Palette images are read as indices. Lists choose the images, and trainaug the masks of SegmentationClassAug."""
    top = voc_set(tmp_path, 2012, {"train": ["1", "2"], "val": ["3"], "trainaug": ["1", "2", "4"]})
    images = read(tmp_path, dataset="voc")
    assert len(images) == 2 and labels(images) == [0, 20, 255, 255]
    assert images.categories[20] == "tvmonitor" and len(images.categories) == 21
    assert len(read(tmp_path, False, dataset="voc")) == 1
    for name in "124":
        palette_mask(top / "SegmentationClassAug" / f"{name}.png", 3, 20, 255)
    augmented = read(tmp_path, True, "--train_split", "trainaug", dataset="voc")
    assert len(augmented) == 3 and labels(augmented) == [3, 20, 255, 255]
    voc_set(tmp_path, 2007)
    with pytest.raises(UserError, match="VOC2007, VOC2012: choose one with --voc_year"):
        read(tmp_path, dataset="voc")
    assert len(read(tmp_path, True, "--voc_year", 2012, dataset="voc")) == 2
    with pytest.raises(UserError, match="--voc_year 2010"):
        read(tmp_path, True, "--voc_year", 2010, dataset="voc")
    with pytest.raises(UserError, match=r"nothing\.txt does not exist: choose"):
        read(tmp_path, True, "--voc_year", 2012, "--train_split", "nothing", dataset="voc")


def test_a_list_of_voc_names_nothing_outside(tmp_path):
    top = voc_set(tmp_path, 2012)
    (top / "ImageSets/Segmentation/train.txt").write_text("../../../secret\n")
    with pytest.raises(UserError, match="not below"):
        read(tmp_path, dataset="voc")


def test_coco_stuff(tmp_path):
    """Ids from 1 with gaps are stored minus one; 171 classes remain."""
    for part in ("train2017", "val2017"):
        image(tmp_path / "images" / part / "0001.jpg")
        mask(tmp_path / "stuffthingmaps" / part / "0001.png", 0, 10, 12, 181)
    images = read(tmp_path, dataset="coco_stuff")
    assert labels(images) == [0, 10, 11, 170] and len(images.categories) == 171  # 12 is no category
    (tmp_path / "labels.txt").write_text("0: unlabeled\n1: person\n182: wood\n")
    assert read(tmp_path, dataset="coco_stuff").categories[::170] == ["person", "wood"]
    mask(tmp_path / "stuffthingmaps" / "train2017" / "0001.png", 255)
    with pytest.raises(UserError, match="the masks have no label"):
        read(tmp_path, dataset="coco_stuff")


@pytest.mark.parametrize("names", [("train", "val"), ("Training", "validation")])
def test_masks(tmp_path, names):
    masks_set(tmp_path)
    for old, new in zip(("train", "val"), names):
        (tmp_path / old).rename(tmp_path / new)
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    train, val = read(tmp_path), read(tmp_path, False)
    assert train.categories == val.categories == ["sky", "sea", "land"] and len(train) == 3
    assert labels(train) == [0, 1, 2, 2]
    assert [np.asarray(train.load(i)).max() for i in range(3)] == [0, 1, 2]


def test_masks_with_the_splits_inside(tmp_path):
    for part in ("train", "val"):
        image(tmp_path / "images" / part / "deep" / "a.b.png")
        mask(tmp_path / "masks" / part / "deep" / "a.b.tif", 0, 1)
    assert labels(read(tmp_path)) == [0, 1, 1, 1]


def test_pretraining_reads_the_images_alone(tmp_path):
    """The masks need not exist; evaluation images are those of the other split."""
    for part in ("training", "validation"):
        image(tmp_path / "ade" / "images" / part / "1.jpg")
    masks_set(tmp_path / "masks")
    voc_set(tmp_path / "voc")
    for dataset, count in (("ade", 1), ("masks", 3), ("voc", 2)):
        args = dense_flags("--dataset", {"ade": "ade20k"}.get(dataset, dataset), "--data_path", tmp_path / dataset)
        images = read_images(args, True)
        assert len(images) == count and images.classes is None and set(images.targets) == {-1}
        assert images.load(0).size == SIZE and read_images(args, False).name(0) != images.name(0)


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "palette", "1 bit", "tiff of 32 bits"])
def test_types_of_masks(tmp_path, kind):
    """Each type gives its stored values; 16 bits reach beyond 255."""
    values = {"1 bit": [0, 1, 1, 1], "16 bits": [0, 300, 1, 1]}.get(kind, [0, 2, 1, 1])
    for part in ("train", "val"):
        image(tmp_path / part / "images" / "0.png")
        path = tmp_path / part / "masks" / ("0.tif" if kind.startswith("tiff") else "0.png")
        kinds = {"16 bits": np.uint16, "tiff of 32 bits": np.int32, "1 bit": bool}
        if kind == "palette":
            palette_mask(path, *values)
        else:
            mask(path, *values, kind=kinds.get(kind, np.uint8))
    (tmp_path / "classes.txt").write_text("\n".join(map(str, range(2 if kind == "1 bit" else 301))))
    images = read(tmp_path, True, "--ignore_label", 65535)
    assert labels(images) == values


def test_without_names_the_highest_label_gives_the_classes(tmp_path, capsys):
    """All masks are read for it, not only a sample: the last of 100 has the highest label."""
    masks_set(tmp_path, 100)
    mask(tmp_path / "train/masks/50.png", 6, 255)
    images = read(tmp_path)
    assert images.categories == [str(i) for i in range(7)]
    output = capsys.readouterr().out
    assert "without classes.txt or --class_names there are 7 classes" in output
    assert "3 classes occur in no mask" in output
    assert read(tmp_path, False, categories=images.categories).categories == images.categories


def test_an_offset_is_found_and_said(tmp_path, capsys):
    masks_set(tmp_path, labels=(0, 1, 3))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    args = dense_flags("--dataset", "masks", "--data_path", tmp_path)
    images = read_segmentation(args, True)
    assert labels(images) == [255, 0, 2, 2] and args.zero_is_ignored is True
    assert "0 is read as unlabelled (--zero_is_ignored)" in capsys.readouterr().out
    for flag in ("--zero_is_ignored", "--reduce_zero_label"):
        assert labels(read(tmp_path, True, flag)) == [255, 0, 2, 2]
    with pytest.raises(
        UserError, match=r"0.png has the label 3, but the 3 classes of .*classes.txt are 0..2.*then give"
    ):
        read(tmp_path, True, "--no_zero_is_ignored")


def test_zero_is_ignored_without_names(tmp_path):
    images = read(masks_set(tmp_path, labels=(0, 1, 3)), True, "--zero_is_ignored")
    assert images.categories == ["1", "2", "3"] and labels(images) == [255, 0, 2, 2]


def test_masks_in_colour(tmp_path):
    """With a table of colours. Tables of lines `R G B name` and CamVid's csv are read; one colour is ignored."""
    masks_set(tmp_path)
    pixels = np.zeros((SIZE[1], SIZE[0], 3), np.uint8)
    pixels[0, :3] = [[64, 0, 128], [0, 0, 192], [9, 9, 9]]
    for part in ("train", "val"):
        for index in range(3):
            Image.fromarray(pixels).save(tmp_path / part / "masks" / f"{index}.png")
    with pytest.raises(UserError, match=r"0.png is an image in colour \(mode RGB\): class indices are needed"):
        read(tmp_path)
    table = tmp_path / "colours.txt"
    table.write_text("64 0 128 tree\n0 0 192 side walk\n9 9 9 ignore\n0 0 0 car\n")
    images = read(tmp_path, True, "--color_table", table)
    assert labels(images) == [0, 1, 255, 2] and images.categories == ["tree", "side walk", "car"]
    table.write_text("name,r,g,b\ntree,64,0,128\nroad,0,0,192\nVoid,9,9,9\ncar,0,0,0\n")
    assert labels(read(tmp_path, True, "--color_table", table)) == [0, 1, 255, 2]
    table.write_text("64 0 128 tree\n0 0 192 road\n0 0 0 car\n")
    with pytest.raises(UserError, match=r"has the colour 9 9 9, which is not in --color_table .*colours.txt"):
        read(tmp_path, True, "--color_table", table)
    for text, message in (("1 2 tree", "line '1 2 tree'"), ("1 2 999 x", "line"), ("1 1 1\n1 1 1", "repeats a colour")):
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read(tmp_path, True, "--color_table", table)
    table.write_text("0 0 0 a\n")
    with pytest.raises(UserError, match="--zero_is_ignored has no effect"):
        read(tmp_path, True, "--color_table", table, "--zero_is_ignored")
    with pytest.raises(UserError, match="--color_table is for --dataset masks"):
        voc_set(tmp_path, 2012)
        read(tmp_path, True, "--color_table", table, dataset="voc")


# Refusals -------------------------------------------------------------------------------------------------------------


def test_images_without_masks(tmp_path):
    masks_set(tmp_path, 5)
    for index in (1, 3, 4):
        (tmp_path / "train/masks" / f"{index}.png").unlink()
    with pytest.raises(
        UserError, match=r"images/1.jpg has no mask of its name in .*masks, nor have 2 others of 5 images"
    ):
        read(tmp_path)


def test_masks_without_images_are_counted(tmp_path, capsys):
    masks_set(tmp_path, 5)
    (tmp_path / "train/images/2.jpg").unlink()
    assert len(read(tmp_path)) == 4
    assert "1 masks in" in capsys.readouterr().out


def test_a_mask_of_another_size(tmp_path):
    masks_set(tmp_path)
    mask(tmp_path / "train/masks/1.png", 0, 1, size=(5, 8))
    message = r"masks/1.png has 5 x 8 pixels, but its image .*images/1.jpg has 10 x 8"
    with pytest.raises(UserError, match=message):
        read(tmp_path)
    mask(tmp_path / "train/masks/1.png", 0, 1)
    images = read(tmp_path)
    mask(tmp_path / "train/masks/1.png", 0, 1, size=(5, 8))
    with pytest.raises(BadAnnotation, match=message):
        images.annotation(1, SIZE)


def test_labels_out_of_range(tmp_path):
    """In a sample of the masks at the start, and in any mask when it is read."""
    masks_set(tmp_path)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    images = read(tmp_path)
    mask(tmp_path / "train/masks/2.png", 9, 1)
    message = r"masks/2.png has the label 9, but the 3 classes of .*classes.txt are 0..2, and --ignore_label is 255"
    with pytest.raises(BadAnnotation, match=message):
        images.annotation(2, SIZE)
    with pytest.raises(UserError, match=message):
        read(tmp_path)
    assert labels(read(tmp_path, True, "--ignore_label", 9), 2) == [9, 1, 1, 1]


def test_one_sentence_each(tmp_path):
    cases = {
        "--dataset imagefolder": "has no masks of classes: give one of ade20k",
        "--ignore_label -1": "--ignore_label -1",
        "--ignore_label 70000": "--ignore_label 70000",
        "--ignore_label 1 --zero_is_ignored": "--ignore_label 1 is also one of the",
        "--class_names {}/no.txt": "no.txt is not a text file",
        "--class_names {}/twice.txt": "repeats 'a'",
        "--class_names {}/empty.txt": "is empty",
        "--dataset ade20k": "needs the folder images/training",
        "--dataset cityscapes": "needs the folder gtFine/train",
        "--dataset coco_stuff": "needs the folder stuffthingmaps/train2017",
        "--dataset voc": "has no VOCdevkit/VOC2007/",
    }
    masks_set(tmp_path)
    (tmp_path / "twice.txt").write_text("a\nb\na\n")
    (tmp_path / "empty.txt").write_text("\n")
    for flags, message in cases.items():
        with pytest.raises(UserError, match=re.escape(message)):
            read(tmp_path, True, *flags.format(tmp_path).split())
    with pytest.raises(UserError, match="needs --data_path"):
        read("")
    with pytest.raises(UserError, match="has 3 classes, but those of the training set are 2"):
        (tmp_path / "classes.txt").write_text("a\nb\nc\n")
        read(tmp_path, categories=["a", "b"])
    with pytest.raises(UserError, match="has the class 'b' where the training set has 'x'"):
        read(tmp_path, categories=["a", "x", "c"])


@pytest.mark.parametrize("values", [(0, 255), (255, 255), (0, 0)])
def test_masks_that_teach_nothing(tmp_path, values):
    """0 and 255 alone are a binary mask whose object would be ignored; all 255, or all 0 and unlabelled, is nothing."""
    masks_set(tmp_path, labels=values)
    flags = ["--zero_is_ignored"] * (values == (0, 0))
    with pytest.raises(UserError, match=r"only the values 0 and 255|have no label"):
        read(tmp_path, True, *flags)


def test_files_that_are_no_masks(tmp_path):
    masks_set(tmp_path)
    path = tmp_path / "train/masks/0.png"
    path.unlink()
    image(path.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"masks/0.jpg is a JPEG, whose values are not exact"):
        read(tmp_path)
    path.with_suffix(".jpg").unlink()
    Image.fromarray(np.full((8, 10), 70_000, np.int32)).save(path.with_suffix(".tif"))
    with pytest.raises(UserError, match=r"0.tif has labels from 70000 to 70000"):
        read(tmp_path)
    path.with_suffix(".tif").unlink()
    path.write_bytes(b"no image")  # unreadable: counted when it is used
    images = read(tmp_path)
    with pytest.raises(OSError, match=r"its mask .*0.png: cannot identify"):
        images.annotation(0, SIZE)


def test_two_images_of_one_name(tmp_path):
    masks_set(tmp_path)
    image(tmp_path / "train/images/0.png")
    with pytest.raises(UserError, match=r"0\.(png|jpg) and .*0\.(png|jpg) have the same name"):
        read(tmp_path)


def test_a_sample_is_checked_where_the_classes_are_known(tmp_path, monkeypatch):
    masks_set(tmp_path, 9)
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    reads = []
    original = mask_survey.read_mask
    monkeypatch.setattr(mask_survey, "read_mask", lambda path: reads.append(path) or original(path))
    monkeypatch.setattr(mask_survey, "SAMPLE", 4)
    read(tmp_path)
    assert len(reads) == 4


def test_a_part(tmp_path):
    images = read(masks_set(tmp_path))
    part = SegmentedPart(images, [2, 0])
    assert len(part) == 2 and part.name(0) == images.name(2) and part.categories == images.categories
    assert (part.annotation(1, SIZE) == images.annotation(0, SIZE)).all() and part.ignore_label == 255


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_the_flags_are_explained(task):
    parser = dense_parser(task)
    assert "--voc_year" in parser.format_help() and all(action.help for action in parser._actions)
    assert ("--ignore_label" in parser.format_help()) == (task == "segmentation")
