"""Readers of objects: COCO's json and VOC's xml, what training leaves out and evaluation keeps, and refusals."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from helpers.dense_sets import SIZE, coco_content, coco_set, dense_flags, voc_set, voc_xml
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.data.dense.annotated import DetectedPart, boxes_of_masks
from util.data.dense.detection import read_detection
from util.data.dense.records import Records, fault_of
from util.data.dense.scenes import DetectedScenes
from util.data.readers import read_images
from util.data.samples import BadAnnotation
from util.errors import UserError


def read(root, train=True, *flags, dataset="coco", masks=True, categories=None):
    args = dense_flags("--dataset", dataset, "--data_path", root, *flags, task="detection")
    if dataset == "coco":
        args.max_bad_fraction = 0.5 if args.max_bad_fraction == 0.01 else args.max_bad_fraction
    return read_detection(args, train, masks and dataset == "coco", categories)


# COCO -----------------------------------------------------------------------------------------------------------------


def test_coco_for_training(tmp_path, capsys):
    """Categories 3 and 7 are labels 1 and 2. Groups, boxes without width and images without objects are left out."""
    images = read(coco_set(tmp_path))
    assert images.categories == ["dog", "cat"] and images.category_ids == [3, 7]
    assert [images.name(i)[-6:] for i in range(len(images))] == ["11.jpg", "13.jpg"]
    first = images.annotation(0, SIZE)
    assert first.boxes.tolist() == [[2, 1, 6, 4]] and first.labels.tolist() == [2] and first.image_id == 11
    expected = np.zeros((8, 10))
    expected[1:4, 2:6] = 1
    assert (first.masks[0] == expected).all()
    assert images.annotation(1, SIZE).boxes.tolist() == [[6, 2, 9, 5]]
    output = capsys.readouterr().out
    assert "1 of 3 objects" in output and "boxes without an area" in output and "object 7 of" in output
    assert "1 groups (crowd) and 1 images without objects" in output
    assert images.load(0).size == SIZE and read(tmp_path, masks=False).annotation(0, SIZE).masks is None


def test_coco_for_evaluation(tmp_path):
    """Everything in the file is kept, for numbers that agree with others'."""
    images = read(coco_set(tmp_path), False)
    assert [images.annotation(i, SIZE).image_id for i in range(3)] == [11, 12, 13]
    first = images.annotation(0, SIZE)
    assert first.crowd.tolist() == [False, True] and first.labels.tolist() == [2, 1]
    assert len(images.annotation(1, SIZE).boxes) == 0 and len(images.annotation(2, SIZE).boxes) == 2
    truth = images.ground_truth()
    theirs = {note["id"]: note for note in coco_content()["annotations"]}
    assert [note["bbox"] for note in truth["annotations"]] == [theirs[i]["bbox"] for i in (5, 6, 7, 8)]
    for key in ("area", "category_id", "image_id", "segmentation"):
        assert [note[key] for note in truth["annotations"]] == [theirs[i][key] for i in (5, 6, 7, 8)]
    assert [note["iscrowd"] for note in truth["annotations"]] == [0, 1, 0, 0]
    blank = images.blank(2, (32, 32))
    assert blank.image_id == 13 and blank.boxes.shape == (0, 4)
    part = DetectedPart(images, [2])
    assert part.ground_truth()["images"] == [{"id": 13, "height": 8, "width": 10}] and part.has_masks


def test_without_iscrowd(tmp_path):
    content = coco_content()
    for note in content["annotations"]:
        note.pop("iscrowd", None)
    images = read(coco_set(tmp_path, val=content), False)
    assert not images.annotation(0, SIZE).crowd.any()


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_perfect_predictions_score_100(kind):
    """pycocotools accepts the ground truth of scenes, and gives 100 for the objects themselves."""
    scenes = DetectedScenes(0, False, 6, 64, [0, 1, 7])
    truth, results = COCO(), []
    truth.dataset = scenes.ground_truth()
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        for note in truth.dataset["annotations"]:
            keys = ("image_id", "category_id", "bbox", "segmentation")
            results.append({**{key: note[key] for key in keys}, "score": 0.5})
        scored = COCOeval(truth, truth.loadRes(results), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    assert scored.stats[0] == pytest.approx(1, abs=1e-9)


def test_a_box_is_the_extent_of_its_mask():
    masks = np.zeros((4, 6, 9), np.uint8)
    masks[0, 2, 3] = masks[1] = masks[2, 1:4, 8] = 1
    assert boxes_of_masks(masks).tolist() == [[3, 2, 4, 3], [0, 0, 9, 6], [8, 1, 9, 4], [0, 0, 0, 0]]
    assert boxes_of_masks(masks[:0]).shape == (0, 4)


@pytest.mark.parametrize(
    ("box", "fault"),
    [
        ([0, 0, 10, 8], ""),
        ([-3, -3, 2, 2], ""),
        ([9, 7, 10, 8], ""),
        ([4, 4, 4, 6], "without an area"),
        ([5, 5, 3, 7], "exchanged"),
        ([10, 0, 15, 5], "outside"),
        ([-5, 0, 0, 5], "outside"),
        ([2, 2, 2.5, 8], "below 1 pixel"),
        ([-3, 0, 0.5, 5], "below 1 pixel"),
    ],
)
def test_boxes_that_cannot_be_used(box, fault):
    found = fault_of(box, 10, 8)
    assert (fault in found) if fault else not found
    assert not fault_of([2, 2, 300, 8], 0, 0)  # the size is not known


def broken(**changes):
    """Return COCO's content with changes of the first annotation."""
    content = coco_content()
    content["annotations"][0].update(changes)
    return content


CASES = {
    "not JSON": ("{", "is not JSON"),
    "too deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[]", "has a list at its top"),
    "no annotations": (
        {k: v for k, v in coco_content().items() if k != "annotations"},
        "no list 'annotations'.*image_info",
    ),
    "no categories": ({k: v for k, v in coco_content().items() if k != "categories"}, "no list 'categories'"),
    "text for images": (coco_content(images="x"), "no list 'images'"),
    "nothing annotated": (coco_content(annotations=[]), "annotates no object at all"),
    "unknown image": (broken(image_id=99), "annotation 5 is for the image 99"),
    "unknown category": (broken(category_id=1), "annotation 5 has the category 1"),
    "text for a category": (broken(category_id="7"), "category_id '7', not a whole number"),
    "NaN": (broken(bbox=[2, 1, float("nan"), 3]), "annotation 5 has the bbox .*not four finite numbers"),
    "infinity": (broken(bbox=[2, 1, float("inf"), 3]), "not four finite numbers"),
    "three numbers": (broken(bbox=[2, 1, 3]), "not four finite numbers"),
    "no box": (broken(bbox=None), "not four finite numbers"),
    "odd polygon": (broken(segmentation=[[1, 2, 3]]), "annotation 5: it has a polygon"),
    "text for a mask": (broken(segmentation="x"), "neither polygons"),
    "no mask": (broken(segmentation=None), "annotation 5 has no segmentation, nor have 0 others.*--detector faster"),
    "two images": (
        coco_content(images=[*coco_content()["images"], coco_content()["images"][0]]),
        "two images of id 11",
    ),
    "no name": (coco_content(images=[dict(id=11, width=10, height=8)]), "image 11 has no file_name"),
    "no size": (coco_content(images=[dict(id=11, file_name="a", width=0, height=8)]), "are no sizes"),
    "outside": (
        coco_content(images=[*coco_content()["images"], dict(id=1, file_name="../../x.jpg", width=1, height=1)]),
        "not below",
    ),
    "no images": (coco_content(images=[], annotations=[]), "lists no images"),
}


@pytest.mark.parametrize("name", CASES)
def test_coco_is_refused(tmp_path, name):
    content, message = CASES[name]
    with pytest.raises(UserError, match=message) as caught:
        read(coco_set(tmp_path, content))
    assert "instances_train2017.json" in str(caught.value) and "\n" not in str(caught.value)


def test_boxes_alone(tmp_path):
    content = coco_content()
    for note in content["annotations"]:
        del note["segmentation"]
    with pytest.raises(UserError, match=r"has boxes, but no masks \(segmentation\): give --detector faster"):
        read(coco_set(tmp_path, content))
    assert read(tmp_path, masks=False).annotation(0, SIZE).boxes.tolist() == [[2, 1, 6, 4]]


def test_too_many_objects_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=r"1 of 3 objects cannot be used, a larger share than --max_bad_fraction 0.02"):
        read(coco_set(tmp_path), True, "--max_bad_fraction", 0.02)
    content = broken(segmentation=[[2, 1, 6, 4]])  # two points
    with pytest.raises(UserError, match="fewer than three points"):
        read(coco_set(tmp_path, content), True, "--max_bad_fraction", 0.4)
    content = coco_content(annotations=coco_content()["annotations"][1:3])
    with pytest.raises(UserError, match="no object that can be used"):
        read(coco_set(tmp_path, content), True, "--max_bad_fraction", 1)


def test_coco_with_other_folders(tmp_path):
    with pytest.raises(UserError, match="needs one folder such as train2017"):
        read(tmp_path)
    coco_set(tmp_path)
    (tmp_path / "train2014").mkdir()
    with pytest.raises(UserError, match="has several: train2014, train2017"):
        read(tmp_path)
    (tmp_path / "train2014").rmdir()
    (tmp_path / "annotations/instances_train2017.json").unlink()
    with pytest.raises(UserError, match=r"instances_train2017.json does not exist"):
        read(tmp_path)
    assert len(read_images(dense_flags("--dataset", "coco", "--data_path", tmp_path), True)) == 3


def test_categories_that_do_not_match(tmp_path):
    coco_set(tmp_path)
    with pytest.raises(UserError, match="2 categories, but those of the training set are 3"):
        read(tmp_path, False, categories=["dog", "cat", "cow"])
    with pytest.raises(UserError, match="the category 'cat' where the training set has 'cow'"):
        read(tmp_path, False, categories=["dog", "cow"])


def test_an_image_of_another_size(tmp_path):
    images = read(coco_set(tmp_path))
    with pytest.raises(BadAnnotation, match=r"11.jpg has 10 x 8 pixels, but it has 20 x 16"):
        images.annotation(0, (20, 16))
    wrong = broken(segmentation={"size": [8, 10], "counts": [0, 90]})
    images = read(coco_set(tmp_path, wrong))
    with pytest.raises(BadAnnotation, match=r"instances_train2017.json: an object of .*11.jpg: the lengths of its"):
        images.annotation(0, SIZE)


def test_records_are_what_they_were():
    values = [{"a": [1, 2.5, None]}, {"é\ud800": "x\n"}, []]
    records = Records(values)
    assert list(records) == json.loads(json.dumps(values)) and len(records) == 3


# VOC ------------------------------------------------------------------------------------------------------------------


def test_voc(tmp_path, capsys):
    """Corners from 1, the last pixel included, become half-open boxes from 0."""
    voc_set(tmp_path)
    train, val = read(tmp_path, dataset="voc"), read(tmp_path, False, dataset="voc")
    assert len(train) == 2 and len(val) == 1 and len(train.categories) == 20
    objects = val.annotation(0, SIZE)
    assert objects.boxes.tolist() == [[0, 0, 4, 3], [4, 1, 10, 8]] and objects.difficult.tolist() == [False, True]
    assert [val.categories[label - 1] for label in objects.labels] == ["dog", "person"] and objects.masks is None
    output = capsys.readouterr().out
    assert "trainval.txt" in output and "test.txt" in output
    args = dense_flags("--dataset", "voc", "--data_path", tmp_path, task="detection")
    with pytest.raises(UserError, match="--dataset voc has boxes, but no masks of objects: give --detector faster"):
        read_detection(args, True, masks=True)


def test_splits_of_voc(tmp_path):
    """Without test.txt: train and val. Lists that share images are refused."""
    voc_set(tmp_path, splits={"train": ["1"], "val": ["2"], "trainval": ["1", "2"]})
    assert [read(tmp_path, part, dataset="voc").name(0)[-5] for part in (True, False)] == ["1", "2"]
    with pytest.raises(
        UserError, match="--train_split trainval and --val_split val have 1 images in common, such as 2"
    ):
        read(tmp_path, True, "--train_split", "trainval", dataset="voc")
    assert len(read(tmp_path, True, "--train_split", "trainval", "--val_split", "test", dataset="voc")) == 2


def test_several_years_of_voc(tmp_path):
    voc_set(tmp_path, 2007)
    voc_set(tmp_path, 2012, {"trainval": ["7", "8", "9"]})
    with pytest.raises(UserError, match="VOC2007, VOC2012: choose with --voc_year"):
        read(tmp_path, dataset="voc")
    years = ["--voc_year", 2007, 2012]
    train = read(tmp_path, True, *years, dataset="voc")
    assert len(train) == 5 and [train.annotation(i, SIZE).image_id for i in range(5)] == list(range(5))
    assert len(read(tmp_path, False, *years, dataset="voc")) == 1


def test_boxes_of_voc_that_cannot_be_used(tmp_path, capsys):
    inverted = voc_xml(("dog", 5, 5, 2, 7, 0), ("dog", 1, 1, 4, 3, 0), ("cat", 20, 1, 25, 4, 0))
    voc_set(tmp_path, annotations={"1": inverted})
    with pytest.raises(UserError, match=r"--max_bad_fraction 0.01"):
        read(tmp_path, dataset="voc")
    images = read(tmp_path, True, "--max_bad_fraction", 0.9, dataset="voc")
    assert images.annotation(0, SIZE).boxes.tolist() == [[0, 0, 4, 3]]
    output = capsys.readouterr().out
    assert "1 of 5 objects" in output and "boxes outside the image" in output and "corners are exchanged" in output


BOMB = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>'
OUTSIDE = (
    '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation><object><name>&b;</name></object></annotation>'
)
XML = {
    "broken": ("<annotation>", "is not XML"),
    "empty": ("", "is not XML"),
    "text": ("hello", "is not XML"),
    "entity bomb": (BOMB, "declares a document type"),
    "entity bomb in UTF-16": (BOMB.encode("utf-16"), "declares a document type"),
    "a file": (OUTSIDE, "declares a document type"),
    "class": (voc_xml(("dragon", 1, 1, 4, 3, 0)), "class 'dragon', which is none of the 20 classes"),
    "no name": ("<annotation><object/></annotation>", "class ''"),
    "no corner": (voc_xml(("dog", "", 1, 4, 3, 0)), "object 1 has the corners .*not four numbers"),
    "NaN": (voc_xml(("dog", "nan", 1, 4, 3, 0)), "which are not finite"),
}


@pytest.mark.parametrize("name", XML)
def test_voc_is_refused(tmp_path, name):
    content, message = XML[name]
    top = voc_set(tmp_path)
    (top / "Annotations/1.xml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, dataset="voc")
    assert "1.xml" in str(caught.value) and "\n" not in str(caught.value)


def test_voc_without_annotations(tmp_path):
    top = voc_set(tmp_path)
    for name in "12":
        (top / f"Annotations/{name}.xml").unlink()
    with pytest.raises(UserError, match=r"1.jpg has no 1.xml in .*Annotations, nor have 1 others"):
        read(tmp_path, dataset="voc")


def test_other_data_sets_have_no_boxes():
    with pytest.raises(
        UserError, match=re.escape("--dataset digits has no boxes of objects: give one of coco, voc, scenes")
    ):
        read_detection(dense_flags("--dataset", "digits", task="detection"), True, True)
