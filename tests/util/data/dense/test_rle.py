"""Run-length codes and polygons against pycocotools, and codes that do not fit their image."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from util.data.dense.rle import decode, draw_segmentation, encode, encode_segmentation, usable_polygons


def test_codes_are_those_of_pycocotools():
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 40, 2)
        mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
        code = encode(mask)
        size = (int(width), int(height))
        assert (decode(code, size) == mask).all()
        assert (coco_mask.decode(code) == mask).all()
        flat = mask.T.ravel()  # column by column
        changes = np.flatnonzero(np.diff(flat)) + 1
        lengths = np.diff([0, *changes, flat.size]).tolist()
        plain = {"size": [int(height), int(width)], "counts": [0, *lengths] if flat[0] else lengths}
        assert (decode(plain, size) == mask).all()


def test_polygons_are_drawn_as_by_pycocotools():
    rng = np.random.default_rng(1)
    coco = COCO()
    coco.imgs = {1: {"height": 30, "width": 40}}
    for _ in range(50):
        polygons = [(rng.random(2 * rng.integers(3, 9)) * 50 - 5).tolist() for _ in range(rng.integers(1, 3))]
        expected = coco.annToMask({"image_id": 1, "segmentation": polygons})
        assert (draw_segmentation(polygons, (40, 30)) == expected).all()


def test_polygons_are_encoded_without_being_drawn():
    """The code is that of the drawn mask, to the letter: also of several polygons that overlap or touch, reach beyond
    the image, have whole numbers, or all points in one place."""
    rng = np.random.default_rng(2)
    for index in range(300):
        size = tuple(rng.integers(1, 200, 2).tolist())
        points = [rng.uniform(-0.3, 1.3, (rng.integers(3, 20), 2)) * size for _ in range(rng.integers(1, 4))]
        points[0] = points[0].round() if index % 3 == 0 else points[0]
        points[-1] = points[-1] * 0 + size[0] / 2 if index % 10 == 0 else points[-1]
        polygons = [(each * (100 if index % 7 == 0 else 1)).ravel().tolist() for each in points]
        assert encode_segmentation(polygons, size) == encode(draw_segmentation(polygons, size))
    code = encode(np.eye(8, 10, dtype=np.uint8))
    assert encode_segmentation(code, (10, 8)) == code
    assert encode_segmentation([[2.0, 1.0, 6.0, 4.0]], (10, 8)) == encode_segmentation([], (10, 8))


def test_polygons_of_two_points_are_no_boxes():
    """pycocotools takes a list of four numbers for a box, of width 6 here."""
    assert usable_polygons([[2.0, 1.0, 6.0, 4.0]]) == []
    assert draw_segmentation([[2.0, 1.0, 6.0, 4.0]], (10, 8)).sum() == 0
    square = [2, 1, 6, 1, 6, 4, 2, 4]
    assert draw_segmentation([[0.0, 0.0, 9.0, 9.0], square], (10, 8)).sum() == 12


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ({"size": [8, 10], "counts": [0, 8, 73]}, "lengths"),
        ({"size": [8, 10], "counts": [90, -10]}, "lengths"),
        ({"size": [8, 10], "counts": [[80]]}, "lengths"),
        ({"size": [8, 10], "counts": ["x"]}, "whole numbers"),
        ({"size": [8, 10], "counts": [2**70]}, "whole numbers"),
        ({"size": [8, 10], "counts": None}, "lengths|whole numbers"),
        ({"size": [8, 10], "counts": "\x01\x02"}, "characters"),
        ({"size": [8, 10], "counts": "ooooooooooooooo"}, "characters"),
        ({"size": [8, 10], "counts": "0"}, "lengths"),
        ({"size": [10, 8], "counts": [80]}, "size"),
        ({"counts": [80]}, "size"),
        ({"size": [1 << 40, 1 << 40], "counts": [80]}, "size"),
    ],
)
def test_codes_that_do_not_fit_are_refused(code, message):
    """In pycocotools some of them write outside the mask."""
    with pytest.raises(ValueError, match=message):
        decode(code, (10, 8))


@pytest.mark.parametrize("polygon", [[1, 2, 3], "text", [0, 0, float("nan"), 1, 2, 2], [0, 0, float("inf"), 1, 2, 2]])
def test_polygons_that_are_none(polygon):
    for use in (draw_segmentation, encode_segmentation):
        with pytest.raises(ValueError, match="polygon"):
            use([polygon], (10, 8))


def test_far_coordinates_take_no_memory():
    assert draw_segmentation([[-1e12, -1e12, 1e12, -1e12, 1e12, 1e12, -1e12, 1e12]], (10, 8)).all()
