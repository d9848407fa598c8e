"""Objects of COCO's annotation files (instances_train2017.json)."""

import json
from pathlib import Path
from typing import Any

from util.data.dense.layouts import coco_images
from util.data.dense.records import Split, finite
from util.data.dense.rle import usable_polygons
from util.data.file_lists import check_below
from util.data.images import printable
from util.errors import MissingSplit, UserError


def read_coco(root: Path, train: bool) -> Split:
    """Read annotations/instances_train2017.json (or another year) and the names of the images in train2017/. Images
    keep the order of the file; numbers of categories may have gaps. Raises UserError for a file that is not COCO's."""
    folder = coco_images(root, train)
    path = root / "annotations" / f"instances_{folder.name}.json"
    if not path.is_file():
        raise MissingSplit(f"{path} does not exist: --dataset coco needs it for the images in {folder}")
    content = _read_json(path)
    images, notes, categories = (_part(content, key, path) for key in ("images", "annotations", "categories"))
    by_number = {_number(c, "id", "a category", path): str(c.get("name", c["id"])) for c in categories}
    ids = sorted(by_number)
    labels = {number: label for label, number in enumerate(ids, 1)}
    records, files = {}, {}
    for image in images:
        number = _number(image, "id", "an image", path)
        if number in records:
            raise UserError(f"{path} has two images of id {number}")
        name = image.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f"{path}: the image {number} has no file_name")
        sides = [image.get(key) for key in ("height", "width")]
        if not all(isinstance(side, int) and 0 < side < 1 << 20 for side in sides):
            raise UserError(f"{path}: the image {number} has the height and width {sides}, which are no sizes")
        records[number] = {"id": number, "height": sides[0], "width": sides[1], "objects": []}
        files[number] = str(folder / name)
    check_below(list(files.values()), folder, path)
    for note in notes:
        _add_object(note, records, labels, path)
    if not records:
        raise UserError(f"{path} lists no images")
    names = [by_number[number] for number in ids]
    return Split(list(files.values()), list(records.values()), names, ids, str(path))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {printable(str(error)[:200])}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has a {type(content).__name__} at its top, not COCO's images, annotations, categories")
    return content


def _part(content: dict, key: str, path: Path) -> list[dict]:
    """Return one of the lists of the file. Raises UserError if it is missing."""
    part = content.get(key)
    if not isinstance(part, list) or not all(isinstance(each, dict) for each in part):
        hint = " (image_info files have none)" if key == "annotations" and part is None else ""
        raise UserError(f"{path} has no list {key!r}{hint}: COCO's format of objects (instances) is needed")
    return part


def _number(entry: dict, key: str, what: str, path: Path) -> int:
    value = entry.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 1 << 62:
        raise UserError(f"{path}: {what} has the {key} {value!r}, not a whole number")
    return value


def _add_object(note: dict, records: dict[int, dict], labels: dict[int, int], path: Path) -> None:
    """Append an annotation to the record of its image."""
    name = note.get("id", "without id")
    number, category = (_number(note, key, f"the annotation {name}", path) for key in ("image_id", "category_id"))
    if number not in records:
        raise UserError(f"{path}: the annotation {name} is for the image {number}, which the file does not list")
    if category not in labels:
        raise UserError(f"{path}: the annotation {name} has the category {category}, which the file does not list")
    box = note.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not finite(box):
        raise UserError(f"{path}: the annotation {name} has the bbox {box}, not four finite numbers")
    left, top, width, height = box
    area = note.get("area")
    segmentation = note.get("segmentation") or None
    try:
        if isinstance(segmentation, list):
            usable_polygons(segmentation)
        elif segmentation is not None and not isinstance(segmentation, dict):
            raise ValueError("its segmentation is neither polygons nor a run-length code")
    except ValueError as error:
        raise UserError(f"{path}: the annotation {name}: {error}") from error
    records[number]["objects"].append(
        {
            "name": name,
            "box": [left, top, left + width, top + height],
            "label": labels[category],
            "crowd": bool(note.get("iscrowd", 0)),
            "difficult": False,
            "area": area if isinstance(area, (int, float)) and finite([area]) else width * height,
            "segmentation": segmentation,
        }
    )
