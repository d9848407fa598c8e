"""Sheets of tiles: where titles, labels, notes and the colour bar stand, and the files that they are written to."""

import re
from itertools import pairwise

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from util.report.curves import COLOURS, MARKERS, style
from util.report.pictures import mask_sheet, shown_range
from util.report.sheet import GAP, SIDE, Bar, Row, draw_sheet, save_figure


def tiles(count=2, size=(16, 16), value=0.5):
    return torch.full((count, 3, *size), value)


def at(sheet) -> dict[str, tuple[float, float]]:
    return {words: (left, top) for left, top, words in sheet.texts}


def test_texts_stand_beside_their_tiles():
    """A title above its column, a label before its row, a note below its tile, and nothing over a tile."""
    rows = [Row(tiles(), "first", ["", "0 to 1"]), Row(tiles(), "second", ["2 to 3", ""])]
    sheet = draw_sheet(rows, ["left", "right"], "the caption", Bar("low", "high", "the scale"))
    texts, picture = at(sheet), sheet.tensor()
    left, right = texts["left"][0], texts["right"][0]
    assert right - left == SIDE + GAP and texts["2 to 3"][0] == left and texts["0 to 1"][0] == right
    assert texts["first"][0] < left and texts["first"][1] < texts["0 to 1"][1] < texts["second"][1] < texts["2 to 3"][1]
    assert texts["2 to 3"][1] < texts["the scale"][1] < texts["low"][1] == texts["high"][1] < texts["the caption"][1]
    for row in (texts["0 to 1"][1], texts["2 to 3"][1]):
        for column in (left, right):  # a whole tile, grey
            tile = picture[:, int(row) - SIDE : int(row), int(column) : int(column) + SIDE]
            assert (tile - 0.5).abs().max() < 0.01
    bar = picture[:, int(texts["low"][1]) + 6, int(texts["low"][0]) :].mean(dim=0)
    assert bar.min() < 0.1  # its dark end


def test_sizes_of_tiles():
    """Small images are enlarged by a whole factor, pixel by pixel; `side` is exact, also for images of other sizes."""
    board = torch.rand(1, 3, 4, 8)
    sheet = draw_sheet([Row(board)], ["a"])
    left, _ = at(sheet)["a"]
    tile = sheet.tensor()[:, -SIDE // 2 - 2 * GAP - GAP // 2 : -2 * GAP - GAP // 2, int(left) : int(left) + SIDE]
    assert (tile - board[0].repeat_interleave(12, 1).repeat_interleave(12, 2)).abs().max() < 0.01
    for side, usual in ((200, 96), (40, 96), (None, 300)):
        rows = [Row(tiles(size=(300, 150) if side is None else (32, 16))), Row(tiles(size=(16, 8)))]
        height = draw_sheet(rows, ["a", "b"], side=side).pixels.height
        assert 2 * (side or usual) < height < 2 * (side or usual) + 80


def test_columns_are_as_wide_as_their_words():
    """No word of a title is split, however small the tiles; a long label is, and stays before the tiles."""
    sheet = draw_sheet([Row(tiles(), "a_very_long_folder/" + "x" * 60)], ["original", "reconstruction"], side=32)
    texts = at(sheet)
    assert {"original", "reconstruction"} <= texts.keys()
    assert all(left + 7 * len(words) < texts["original"][0] for words, (left, _) in texts.items() if "x" in words)


@pytest.mark.parametrize("ending", ["png", "pdf", "svg"])
def test_files(tmp_path, ending):
    """Every file is written alike each time; .pdf and .svg have the texts as letters and the tiles pixel by pixel."""
    sheet = draw_sheet([Row(tiles(), "$row_1$")], ["original", "reconstruction"], "caption")
    figure = Figure()
    figure.subplots().plot([0, 1])
    for number in range(2):
        sheet.save(tmp_path / f"{number}.{ending}")
        save_figure(figure, tmp_path / f"figure{number}.{ending}")
    for name in ("", "figure"):
        first, second = ((tmp_path / f"{name}{number}.{ending}").read_bytes() for number in range(2))
        assert first == second
    content = (tmp_path / f"0.{ending}").read_bytes()
    if ending == "png":
        assert Image.open(tmp_path / "0.png").size == sheet.pixels.size
    elif ending == "svg":
        assert b"<!-- reconstruction -->" in content and b"<!-- $row_1$ -->" in content
    else:
        assert content.startswith(b"%PDF") and b"/Type0" in content and b"/FontFile2" in content
        assert re.search(rb"/Width %d\b" % sheet.pixels.width, content) and b"/Subtype /Image" in content


def test_colours_and_markers_differ():
    """As pairs for every class of a legend, and both between neighbours."""
    pairs = [(style(i)["color"], style(i)["marker"]) for i in range(60)]
    assert len(set(pairs)) == 60
    assert all(one[0] != other[0] and one[1] != other[1] for one, other in pairwise(pairs))
    assert len(set(COLOURS)) == len(COLOURS) and len(set(MARKERS)) == len(MARKERS)


def test_ranges_are_told_apart():
    for values, text in (
        ([0.25, 0.5], "0.25 to 0.5"),
        ([0.5001, 0.5002], "0.5001 to 0.5002"),
        ([2, 2], "2 everywhere"),
    ):
        assert shown_range(torch.tensor(values, dtype=torch.float64)) == text


def test_masks_have_their_range_below():
    one = torch.rand(3, 4, 3, 8, 8), [["", "", "", f"0.{i} to 0.9"] for i in range(3)]
    texts = [words for _, _, words in mask_sheet([one, one], ["a", "b"], "75% removed").texts]
    assert texts.count("0.0 to 0.9") == texts.count("0.2 to 0.9") == 2 and texts.count("a") == 2
    assert {"learned mask", "random mask", "lowest", "highest of the image"} <= set(texts)
