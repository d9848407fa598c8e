"""Pictures of dense predictions beside the ground truth: classes of pixels, boxes and masks of objects."""

import colorsys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from evaluation.detect_scores import intersections
from util.data.dense.rle import decode
from util.data.dense.transforms import resize_masks, scaled_shape
from util.report.curves import COLOURS
from util.report.pictures import rgb, rows_of_images
from util.report.sheet import Colour, Mark, Sheet, draw_sheet, resized, tag_size

SURE = 0.5  # score from which detections are drawn
TILE = 320  # pixels: longer side of a tile that is not given; small images are enlarged by a whole factor up to it
UNLABELLED = (1.0, 1.0, 1.0)
Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class Shown:
    """An image as RGB (3, h, w) in [0, 1], its `size` (H, W) in its file, and prediction and ground truth of that size:
    labels (H, W), or detections and objects as `evaluation.detect_scores` takes them."""

    picture: torch.Tensor
    size: Size
    prediction: Any
    truth: Any


def to_show(img: torch.Tensor, size: Sequence[int], resize, prediction, truth) -> Shown:
    """Return what is drawn of an image whose input (C, h, w) to the network the transform `resize` made."""
    height, width = resize.shape(*size)  # without the padding
    picture = (img.cpu() * resize.std + resize.mean).clamp(0, 1)[None, :, :height, :width]
    return Shown(rgb(picture)[0], (int(size[0]), int(size[1])), prediction, truth)


def palette(count: int) -> list[Colour]:
    """Return `count` colours: those of `util.report.curves`, which colour-blind readers can tell apart, then others, of
    which none is near white or black."""
    colours = [tuple(int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)) for code in COLOURS]
    for number in range(count - len(colours)):  # hues by the golden ratio: every next one lies between earlier ones
        lightness, saturation = (0.3, 0.55, 0.75)[number % 3], (1, 0.5, 0.9)[number // 3 % 3]
        colours.append(colorsys.hls_to_rgb(0.618034 * number % 1, lightness, saturation))
    return colours[:count]


def colours_of(present: Sequence[set[int]]) -> dict[int, Colour]:
    """Return the colours of labels. `present` are sets of labels; those of an earlier set have earlier colours."""
    labels = list(dict.fromkeys(label for part in present for label in sorted(part)))
    return dict(zip(labels, palette(len(labels))))


def _sheet(rows: Mapping[str, Sequence[Shown]], columns: Sequence[str], draw, side: int | None, **more) -> Sheet:
    """Draw the images of each title. `draw(image, shape)` returns tiles (columns, 3, h, w) of an image at `shape` (h,
    w), their notes and their marks."""
    images = [each for own in rows.values() for each in own]
    if side is None:
        longest = max(max(each.picture.shape[-2:]) for each in images)
        side = min(TILE, longest * max(1, TILE // longest))
    shapes = [scaled_shape(each.size, (side, side)) for each in images]
    height, width = (max(sides) for sides in zip(*shapes))  # tiles are white where an image has another aspect ratio
    pictures, notes, marks = [], [], []
    for own in rows.values():
        tiles, below, over = zip(*(draw(each, scaled_shape(each.size, (side, side))) for each in own))
        gaps = [height - tile.shape[-2] for tile in tiles]  # a tile stands on its note
        tiles = [F.pad(tile, (0, width - tile.shape[-1], gap, 0), value=1.0) for tile, gap in zip(tiles, gaps)]
        pictures.append(torch.stack(tiles))
        notes.append(below)
        marks.append([[[replace(m, top=m.top + gap) for m in tile] for tile in of] for of, gap in zip(over, gaps)])
    per_row = max(1, min(len(pictures[0]), 4 // len(columns)))
    lines = rows_of_images(pictures, list(rows), notes, per_row, marks)
    return draw_sheet(lines, columns, side=max(height, width), per_row=per_row, **more)


# Segmentation ---------------------------------------------------------------------------------------------------------


def segmentation_sheet(
    rows: Mapping[str, Sequence[Shown]], categories: Sequence[str], ignore: int, side: int | None = None
) -> Sheet:
    """Draw images beside predicted and true classes, with the classes that occur in them as a legend, and their names
    where they have room. `rows` have the images of each checkpoint, by its title ("" for the only one); `ignore` is the
    label that is not evaluated; `side` is the longer side of a tile in pixels."""
    images = [each for own in rows.values() for each in own]
    known = range(len(categories))
    true = set().union(*({*each.truth.unique().tolist()} & {*known} - {ignore} for each in images))
    colours = colours_of([true, set().union(*({*each.prediction.unique().tolist()} & {*known} for each in images))])
    of_truth = {label: colour for label, colour in colours.items() if label != ignore}

    def draw(each: Shown, shape: Size):
        labels = [(resize_masks(each.prediction, shape), colours), (resize_masks(each.truth, shape), of_truth)]
        tiles = [resized(each.picture[None], shape)[0], *(painted(*pair) for pair in labels)]
        marks = [[], *(_names(*pair, categories) for pair in labels)]
        right = (each.prediction == each.truth)[each.truth != ignore]
        note = f"{100 * right.float().mean():.0f} % of pixels right" if len(right) else "nothing labelled"
        return torch.stack(tiles), ["", note, ""], marks

    legend = [(categories[label], colours[label]) for label in sorted(colours)]
    white = any((each.truth == ignore).any() for each in images)
    caption, columns = "white: not evaluated" if white else "", ("image", "prediction", "labels")
    return _sheet(rows, columns, draw, side, caption=caption, legend=legend)


def painted(labels: torch.Tensor, colours: Mapping[int, Colour]) -> torch.Tensor:
    """Return labels (H, W) as a picture (3, H, W); values without a colour are white."""
    picture = torch.tensor(UNLABELLED)[:, None, None].repeat(1, *labels.shape)
    for label, colour in colours.items():
        picture[:, labels == label] = torch.tensor(colour)[:, None]
    return picture


def _names(labels: torch.Tensor, colours: Mapping[int, Colour], names: Sequence[str]) -> list[Mark]:
    """Return the names of the classes of labels (H, W), each once, where it lies on pixels of its class alone."""
    marks = []
    for label, colour in colours.items():
        width, height = tag_size(names[label], max(labels.shape))
        sums = F.pad((labels == label).long().cumsum(0).cumsum(1), (1, 0, 1, 0))
        below, above = sums[height:], sums[:-height]
        # Under the name, by its left top corner.
        pixels = below[:, width:] - below[:, :-width] - above[:, width:] + above[:, :-width]
        corners = (pixels == width * height).nonzero()  # empty if the tile is smaller than the name
        if len(corners):
            middle = (corners - corners.double().mean(dim=0)).square().sum(dim=1).argmin()
            top, left = corners[middle].tolist()
            marks.append(Mark(left, top, width, height, colour, names[label]))
    return marks


# Detection ------------------------------------------------------------------------------------------------------------


def detection_sheet(
    rows: Mapping[str, Sequence[Shown]], categories: Sequence[str], threshold: float = SURE, side: int | None = None
) -> Sheet:
    """Draw detections beside the annotations: boxes with the names of their classes and their scores, and masks.
    Detections with a score below `threshold` are left out. `rows` and `side` are those of `segmentation_sheet`."""
    present: list[set[int]] = [set(), set()]  # labels of annotations, and of detections
    for each in (each for own in rows.values() for each in own):
        for labels, objects in zip(present, (each.truth, _sure(each.prediction, threshold))):
            labels.update(np.asarray(objects["labels"]).tolist())
    colours = colours_of(present)

    def draw(each: Shown, shape: Size):
        sure, picture = _sure(each.prediction, threshold), resized(each.picture[None], shape)[0]
        tiles = [_with_masks(picture, objects, each.size, colours) for objects in (sure, each.truth)]
        marks = [_marks(objects, each.size, shape, colours, categories) for objects in (sure, each.truth)]
        scores = each.prediction["scores"]
        lower = f" (highest {float(max(scores)):.2f})" if len(scores) and not len(sure["scores"]) else ""
        return torch.stack(tiles), [_counted(sure, "detection") + lower, _counted(each.truth, "object")], marks

    caption = f"detections with a score from {threshold:g}"
    return _sheet(rows, ("detections", "annotations"), draw, side, caption=caption)


def _counted(objects: dict, noun: str) -> str:
    count = len(objects["labels"])
    return f"{count} {noun}{'s' * (count != 1)}"


def _sure(found: dict, threshold: float) -> dict:
    kept = found["scores"] >= threshold
    return {name: value[kept] for name, value in found.items()}


def _with_masks(picture, objects: dict, size: Size, colours: Mapping[int, Colour]) -> torch.Tensor:
    """Return a picture (3, h, w) with the masks (M, H, W) or `rles` of objects, filled and with an outline."""
    masks = [decode(code, size[::-1]) for code in objects["rles"]] if "rles" in objects else objects.get("masks", [])
    picture, line = picture.clone(), 1 + max(picture.shape[-2:]) // 240  # pixels: thickness of the outline
    for label, mask in zip(np.asarray(objects["labels"]).tolist(), masks):
        inside = resize_masks(torch.as_tensor(np.asarray(mask).copy()).bool(), picture.shape[-2:])
        outside = F.max_pool2d((~inside)[None].float(), 2 * line + 1, 1, line)[0] > 0
        colour = torch.tensor(colours[label])[:, None]
        picture[:, inside] = 0.5 * picture[:, inside] + 0.5 * colour
        picture[:, inside & outside] = colour
    return picture


def _marks(objects: dict, size: Size, shape: Size, colours: Mapping[int, Colour], names: Sequence[str]) -> list[Mark]:
    """Return frames of the boxes (M, 4), and tags with the classes and, if there are any, the `scores`."""
    factors = [new / old for old, new in zip(size, shape)]
    boxes = (np.asarray(objects["boxes"], float).reshape(-1, 4) * (factors[::-1] * 2)).tolist()
    own = [colours[label] for label in np.asarray(objects["labels"]).tolist()]
    words = [_shortened(text, shape) for text in _words(objects, names)]
    sizes = [tag_size(text, max(shape)) for text in words]
    frames = [Mark(x, y, right - x, bottom - y, colour) for (x, y, right, bottom), colour in zip(boxes, own)]
    tags = zip(place_tags(boxes, sizes, shape), sizes, own, words)
    return frames + [Mark(*corner, *extent, colour, text) for corner, extent, colour, text in tags]


def _words(objects: dict, names: Sequence[str]) -> list[str]:
    """Return what is written beside each object."""
    words = [names[label - 1] for label in np.asarray(objects["labels"]).tolist()]
    if "scores" in objects:
        words = [f"{text} {score:.2f}" for text, score in zip(words, np.asarray(objects["scores"]).tolist())]
    for key, note in (("iscrowd", "crowd"), ("difficult", "difficult")):
        marked = objects.get(key, [False] * len(words))
        words = [f"{text} ({note})" if yes else text for text, yes in zip(words, marked)]
    return words


def _shortened(words: str, shape: Size) -> str:
    """Return words as they fit into a tile, cut with an ellipsis."""
    while tag_size(words, max(shape))[0] > shape[1] and len(words) > 1:
        words = words.removesuffix("…")[:-1] + "…"
    return words


def place_tags(boxes: Sequence, sizes: Sequence[tuple[int, int]], shape: Size) -> list[tuple[float, float]]:
    """Return the left top corners of tags, whose `sizes` are (width, height), for boxes (left, top, right, bottom) in a
    tile of `shape` (rows, columns). A tag stands at an edge of its box, above it if possible, inside the tile, where it
    overlaps the tags before it least."""
    placed = np.zeros((0, 4))
    for (left, top, right, bottom), (width, height) in zip(boxes, sizes):
        rows = [top - height, top, bottom, bottom - height, *np.arange(top + height, bottom - height, height)]
        corners = np.array([(x, y) for y in rows for x in (left, right - width, left - width, right)])
        corners = np.clip(corners, 0, (shape[1] - width, shape[0] - height))
        areas = np.hstack([corners, corners + (width, height)])
        placed = np.vstack([placed, areas[intersections(areas, placed).sum(axis=1).argmin()]])
    return [(left, top) for left, top, _, _ in placed.tolist()]
