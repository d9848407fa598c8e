"""Made-up scenes: exact annotations, one scene per seed and index, disjoint splits, and the layouts on disk."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.dense_sets import dense_flags
from PIL import Image
from sklearn.datasets import load_digits

from tools import make_scenes
from util.data.dense import scenes
from util.data.dense.detection import read_detection
from util.data.dense.scenes import DetectedScenes, SegmentedScenes, make_scene, settings_of
from util.data.dense.segmentation import read_segmentation
from util.data.readers import read_images
from util.errors import UserError

DIGITS = (0, 1, 7)


@pytest.mark.parametrize("size", [24, 64, 200])
def test_annotations_are_exact(size):
    """Boxes are the masks' extents, masks do not overlap, and every object has one colour that nothing else has where
    the mask says it is."""
    for index in range(20):
        scene = make_scene(3, True, index, size, DIGITS)
        assert scene.image.shape == (size, size, 3) and 1 <= len(scene.masks) <= 6
        assert scene.masks.sum(axis=0).max() <= 1
        for number, (mask, box, label) in enumerate(zip(scene.masks, scene.boxes.astype(int), scene.labels), 1):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert (scene.classes[mask == 1] == label).all() and ((scene.instances == number) == mask).all()
            assert len(np.unique(scene.image[mask == 1], axis=0)) == 1
        assert ((scene.classes > 0) == scene.masks.any(axis=0)).all()


def test_a_scene_depends_on_seed_split_and_index_alone():
    def pixels(*words):
        return make_scene(*words, 48, DIGITS).image.tobytes()

    first = pixels(0, True, 5)
    pixels(0, True, 6)
    np.random.seed(4)
    assert pixels(0, True, 5) == first
    assert len({first, pixels(1, True, 5), pixels(0, False, 5), pixels(0, True, 6)}) == 4


def test_the_scenes_are_the_same_on_every_machine():
    """The numbers of a scene are pinned: results on made-up scenes must stay comparable. Pixels of the photographs may
    differ by a level between versions of JPEG decoders, so they are not."""
    scene = make_scene(0, True, 0, 64, DIGITS)
    assert scene.labels.tolist() == [2, 3, 1, 3, 2]
    assert scene.boxes.astype(int).tolist() == [
        [20, 41, 27, 60],
        [33, 11, 47, 36],
        [22, 9, 33, 23],
        [20, 23, 34, 53],
        [5, 17, 21, 49],
    ]


def test_occlusion_leaves_a_part_visible():
    hidden = 0
    for index in range(100):
        scene = make_scene(0, True, index, 64, tuple(range(10)))
        assert (scene.masks.reshape(len(scene.masks), -1).sum(axis=1) > 0).all()
        left, top, right, bottom = scene.boxes.T
        hidden += any(
            left[i] < right[j] and left[j] < right[i] and top[i] < bottom[j] and top[j] < bottom[i]
            for i in range(len(left))
            for j in range(i)
        )
    assert hidden > 20  # of 100 scenes: boxes overlap


def test_splits_have_other_digits_and_other_photographs():
    train, val = ({digit.tobytes() for digit in scenes._digits(part)[0]} for part in (True, False))
    assert not train & val and len(train) + len(val) <= len(load_digits().target)
    for left, right in zip(scenes._photographs(True), scenes._photographs(False)):
        assert left.width + right.width == 640 and left.height == right.height == 427


def test_flags():
    args = dense_flags("--dataset", "scenes", "--scene_digits", 4, 2, "--scene_count", 30, "--scene_size", 32)
    train, val = (read_segmentation(args, part) for part in (True, False))
    assert (len(train), len(val)) == (30, 3) and train.categories == val.categories == ["background", "4", "2"]
    objects = read_detection(args, True, masks=True)
    assert objects.categories == ["4", "2"] and objects.annotation(3, (32, 32)).masks.shape[1:] == (32, 32)
    plain = read_images(args, True)  # for pretraining
    assert len(plain) == 30 and plain.classes is None and plain.load(1).tobytes() == train.load(1).tobytes()
    assert train.blank(0, (5, 4)).shape == (4, 5) and (train.blank(0, (5, 4)) == 255).all()
    with pytest.raises(UserError, match="'5' where the training set has '4'"):
        args.scene_digits = [5, 2]
        read_detection(args, False, True, objects.categories)


def test_sides_and_number_of_digits():
    """Without the flags the scenes are those of before, and so is what their hash is made of."""
    flags = ("--dataset", "scenes", "--scene_count", 40, "--scene_size", 40)
    plain, large = (
        read_detection(dense_flags(*flags, *more), True, masks=True)
        for more in ([], ["--scene_sides", 0.6, 0.9, "--scene_most", 2])
    )
    assert list(plain.described()) == ["(0, True, 40, (0, 1, 2, 3, 4, 5, 6, 7, 8, 9))"] != list(large.described())
    numbers, sides = ([], []), ([], [])
    for images, count, longest in zip((plain, large), numbers, sides):
        for index in range(40):
            scene = images.scene(index)
            count.append(len(scene.labels))
            longest.append((scene.boxes[-1, 2:] - scene.boxes[-1, :2]).max())  # nothing hides the last one
    assert max(numbers[0]) > 2 >= max(numbers[1]) > min(numbers[1]) == 1
    assert max(sides[0]) <= 21 and min(sides[1]) > 0.5 * 40 and max(sides[1]) <= 0.9 * 40 + 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scene_digits", [1, 10]),
        ("scene_digits", [1, 1]),
        ("scene_count", [0]),
        ("scene_count", [1, 2, 3]),
        ("scene_size", 8),
        ("scene_seed", -1),
        ("scene_sides", [0.5, 0.2]),
        ("scene_sides", [0, 1.1]),
        ("scene_most", 0),
    ],
)
def test_flags_out_of_range(name, value):
    with pytest.raises(UserError, match=f"--{name} "):
        settings_of(SimpleNamespace(**{name: value}), True)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    flags = f"{out} --digits 0 1 7 --count 12 4 --size 32 --seed 2"
    make_scenes.main(make_scenes.get_args_parser().parse_args(flags.split()))
    return out


def test_layouts_hold_the_same_scenes(written):
    """What make_scenes writes is read back as --dataset scenes makes it, through all three layouts."""
    for train, count in ((True, 12), (False, 4)):
        pixels, objects = (kind(2, train, count, 32, [0, 1, 7]) for kind in (SegmentedScenes, DetectedScenes))
        for dataset in ("masks", "voc"):
            names = ["--class_names", written / "classes.txt"] * (dataset == "voc")
            read = read_segmentation(dense_flags("--dataset", dataset, "--data_path", written, *names), train)
            assert len(read) == count and read.categories == pixels.categories
            for i in range(count):
                assert (read.annotation(i, (32, 32)) == pixels.annotation(i, None)).all()
                assert read.load(i).tobytes() == pixels.load(i).tobytes()
        for dataset in ("coco", "voc"):
            names = ["--class_names", written / "voc_classes.txt"] * (dataset == "voc")
            args = dense_flags("--dataset", dataset, "--data_path", written, *names, task="detection")
            read = read_detection(args, train, masks=dataset == "coco")
            assert len(read) == count and read.categories == objects.categories
            for i in range(count):
                mine, theirs = objects.annotation(i, None), read.annotation(i, (32, 32))
                assert (mine.boxes == theirs.boxes).all() and (mine.labels == theirs.labels).all()
                assert theirs.masks is None or (mine.masks == theirs.masks).all()


def test_files_are_as_other_programs_read_them(written):
    content = json.loads((written / "annotations" / "instances_val2017.json").read_text())
    assert {*content} >= {"images", "annotations", "categories"} and len(content["images"]) == 4
    names = {image["file_name"] for image in content["images"]}
    assert names == {path.name for path in (written / "val2017").iterdir()}
    masks = sorted((written / "VOCdevkit" / "VOC2007" / "SegmentationObject").iterdir())
    assert len(masks) == 16 and Image.open(masks[0]).mode == "P"
    assert (written / "classes.txt").read_text().split() == ["background", "0", "1", "7"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--digits 12", "--digits 12"), ("--count 0", "--count 0"), ("--size 4", "--size 4"), ("--seed -1", "--seed -1")],
)
def test_make_scenes_refuses(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        make_scenes.main(make_scenes.get_args_parser().parse_args([str(tmp_path / "new"), *flags.split()]))
    assert not (tmp_path / "new").exists()


def test_make_scenes_overwrites_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    for out, message in ((tmp_path, "not empty"), (tmp_path / "file", "not a folder")):
        with pytest.raises(UserError, match=message):
            make_scenes.main(make_scenes.get_args_parser().parse_args([str(out), "--count", "1"]))
