"""Pictures of dense predictions: where frames and tags stand, what is drawn, and in which colours."""

from itertools import combinations

import numpy as np
import pytest
import torch
from helpers.tolerances import close

from evaluation.dense_pictures import (
    Shown,
    colours_of,
    detection_sheet,
    palette,
    place_tags,
    segmentation_sheet,
)
from util.data.dense.rle import encode
from util.report.sheet import ink

GREY = torch.full((3, 20, 40), 0.5)


def objects(*boxes, labels=None, **more):
    return {"boxes": np.array(boxes, float).reshape(-1, 4), "labels": np.array(labels or [1] * len(boxes)), **more}


def found(*boxes, scores, labels=None, masks=None):
    own = {name: torch.as_tensor(value) for name, value in objects(*boxes, labels=labels).items()}
    return {**own, "scores": torch.tensor(scores), **({} if masks is None else {"masks": masks})}


def overlaps(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("seed", range(5))
def test_tags_do_not_overlap_where_it_can_be_avoided(seed):
    """They stay inside the tile and at their box; also those of boxes with a common corner, or at the tile's edges."""
    rng = np.random.default_rng(seed)
    corners = rng.uniform(0, 250, (8, 2)).tolist()
    boxes = [[x, y, x + 60, y + 70] for x, y in corners] + [
        [100, 100, 200, 200],
        [100, 100, 180, 150],
        [0, 0, 320, 320],
    ]
    sizes = [(60, 20)] * len(boxes)
    areas = [(x, y, x + 60, y + 20) for x, y in place_tags(boxes, sizes, (320, 320))]
    assert all(min(area) >= 0 and max(area) <= 320 for area in areas)
    assert not any(overlaps(one, other) for one, other in combinations(areas, 2))
    for (left, top, right, bottom), (x, y, _, _) in zip(boxes, areas):
        assert left - 60 <= x <= right and top - 20 <= y <= bottom
    assert place_tags([[100, 100, 200, 200]], [(60, 20)], (320, 320)) == [(100, 80)]  # above it


def test_many_objects_in_one_place():
    """Tags overlap when there is no room, and none is lost."""
    assert len(place_tags([[10, 10, 40, 40]] * 30, [(50, 20)] * 30, (64, 64))) == 30


def test_colours():
    """All differ, none is the white of unlabelled pixels; the labels of the truth have the first ones."""
    for count, apart in ((8, 0.25), (20, 0.1), (60, 0.005)):  # distances of RGB in [0, 1]
        assert torch.pdist(torch.tensor([*palette(count), (1.0, 1.0, 1.0)])).min() > apart
    assert palette(60)[:8] == palette(8)
    assert colours_of([{7, 3}, {3, 1}]) == dict(zip([3, 7, 1], palette(3)))
    assert [ink(colour) for colour in ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.0, 0.0, 1.0))] == [
        "white",
        "black",
        "white",
    ]


def test_frames_stand_on_their_boxes():
    """In a tile of another scale; tags have names, scores and what is said of an object; nothing below the threshold is
    drawn."""
    truth = objects([0, 0, 10, 10], [20, 10, 40, 20], labels=[2, 1], iscrowd=[False, True])
    image = Shown(GREY, (40, 80), found([20, 10, 60, 30], [0, 0, 9, 9], scores=[0.9, 0.4]), truth)
    sheet = detection_sheet({"": [image]}, ["dog", "cat"])
    assert [words for _, _, words in sheet.texts][:2] == ["detections", "annotations"]
    notes = [text for text in sheet.texts if "1 detection" in text[2] or "2 objects" in text[2]]
    top, left = notes[0][1] - 160, [note[0] for note in notes]  # tiles of 320 x 160 pixels, above their notes
    frames, tags = ([mark for mark in sheet.marks if bool(mark.words) == tagged] for tagged in (False, True))
    drawn = [(mark.left, mark.top - top, mark.width, mark.height) for mark in frames]
    assert drawn == [
        (left[0] + 80, 40, 160, 80),  # four times as large as in the file
        (left[1], 0, 40, 40),
        (left[1] + 80, 40, 80, 40),
    ]
    assert [mark.words for mark in tags] == ["dog 0.90", "cat", "dog (crowd)"]
    assert frames[0].colour == frames[2].colour == tags[0].colour != frames[1].colour
    picture = sheet.tensor()
    close(picture[:, int(frames[0].top) + 30, int(frames[0].left)], torch.tensor(frames[0].colour), 0.01)
    words = [text for _, _, text in detection_sheet({"": [image]}, ["dog", "cat"], threshold=0.95).texts]
    assert "0 detections (highest 0.90)" in words and words[-1] == "detections with a score from 0.95"


def test_masks():
    """Filled with half of the class's colour, at the place of the object, as masks and as run-length codes."""
    mask = torch.zeros(1, 20, 40, dtype=torch.bool)
    mask[0, 5:15, 10:30] = True
    truth = objects([10, 5, 30, 15], rles=[encode(mask[0].numpy())])
    sheet = detection_sheet(
        {"": [Shown(GREY, (20, 40), found([10, 5, 30, 15], scores=[1.0], masks=mask), truth)]}, ["a"]
    )
    frames, picture = [mark for mark in sheet.marks if not mark.words], sheet.tensor()
    for frame in frames:
        inside = picture[:, int(frame.top) + 60, int(frame.left) + 20]
        close(inside, 0.25 + 0.5 * torch.tensor(frame.colour), 0.01)
        close(picture[:, int(frame.top) + 60, int(frame.left) - 20], torch.full((3,), 0.5), 0.01)


def test_images_of_several_shapes_and_checkpoints():
    """A column is as wide as the widest image; the rows of checkpoints have their titles, and the same truth."""
    tall = Shown(torch.full((3, 40, 20), 0.5), (40, 20), found([0, 0, 9, 9], scores=[0.6]), objects([1, 1, 9, 9]))
    wide = Shown(GREY, (20, 40), found(scores=[]), objects())
    sheet = detection_sheet({"one": [tall, wide], "two": [tall, wide]}, ["dog"], side=200)
    words = [text for _, _, text in sheet.texts]
    assert {"one", "two", "0 detections", "0 objects"} <= set(words) and words.count("annotations") == 2
    assert sheet.pixels.height > 2 * 200 and len(sheet.marks) == 2 * 4
    name = detection_sheet({"": [tall]}, ["a name that is much longer than the tile"], side=64).marks[1].words
    assert name.endswith("…") and len(name) > 3


def test_classes_of_pixels():
    """The legend has the classes that occur, whose names also lie on their pixels; labels that are not evaluated are
    white, and do not count."""
    labels = torch.zeros(20, 40, dtype=torch.long)
    labels[:, 20:], labels[:10, 20:] = 2, 255
    predicted = torch.full((20, 40), 2)
    sheet = segmentation_sheet({"": [Shown(GREY, (20, 40), predicted, labels)]}, ["sky", "sea", "road"], 255)
    words = [text for _, _, text in sheet.texts]
    assert "33 % of pixels right" in words and {"sky", "road"} <= set(words) and "sea" not in words
    colours, picture = colours_of([{0, 2}, {2}]), sheet.tensor()
    left, top = next((x, y) for x, y, text in sheet.texts if text == "labels")
    tile = picture[:, int(top) + 30 :, int(left) :]
    close(tile[:, 80, 40], torch.tensor(colours[0]), 0.01)
    close(tile[:, 30, 280], torch.ones(3), 0.01)
    close(tile[:, 120, 310], torch.tensor(colours[2]), 0.01)
    areas = [(mark.words, mark.left - left, mark.top - int(top) - 30) for mark in sheet.marks if mark.left >= left]
    (sky, x, y), (road, other_x, other_y) = areas
    assert (sky, road) == ("sky", "road") and x < 160 <= other_x and 70 < other_y < 160 and 0 < y < 160
    far = segmentation_sheet({"": [Shown(GREY, (20, 40), predicted, labels)]}, ["a" * 99] * 3, 255)
    assert not far.marks  # no room


def test_an_ignored_class_is_white_in_the_truth():
    """The ignored label may be one of the classes, which is drawn where it is predicted."""
    labels = torch.zeros(20, 40, dtype=torch.long)
    labels[:, 20:] = 1
    predicted = torch.ones(20, 40, dtype=torch.long)
    sheet = segmentation_sheet({"": [Shown(GREY, (20, 40), predicted, labels)]}, ["sky", "sea"], ignore=1)
    middles = {}
    for x, y, text in sheet.texts:
        if text in ("labels", "prediction"):
            middles[text] = sheet.tensor()[:, int(y) + 30 + 20, int(x) + 300]
    close(middles.pop("labels"), torch.ones(3), 0.01)
    (drawn,) = middles.values()
    close(drawn, torch.tensor(colours_of([{0}, {1}])[1]), 0.01)
