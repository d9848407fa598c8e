"""Small dense data sets in the layouts of the published ones, and the flags to read them."""

import json
from types import SimpleNamespace

import numpy as np
from PIL import Image

import main_detect
import main_segment
from util.data.dense.flags import add_dense_data_arguments
from util.parser import Parser

SIZE = 10, 8  # width and height of the images


def dense_flags(*argv, task="segmentation", **more):
    """Return the flags of a main for a dense task."""
    parser = (main_segment if task == "segmentation" else main_detect).get_args_parser()
    args = parser.parse_args([str(word) for word in argv])
    for name, value in {"num_workers": 0, "input_size": 16, **more}.items():
        setattr(args, name, value)
    return args


def dense_parser(task: str) -> Parser:
    parser = Parser("dense", "")
    add_dense_data_arguments(parser.add_argument_group("dense data"), task)
    return parser


def image(path, value=0, size=SIZE):
    """Save an image of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def mask(path, *values, size=SIZE, kind=np.uint8):
    """Save a mask whose first pixels, row by row, have `values`; the others have the last of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(size[0] * size[1], values[-1], kind)
    pixels[: len(values)] = values
    Image.fromarray(pixels.reshape(size[1], size[0])).save(path)


def masks_set(root, count=3, labels=(0, 1, 2), **options):
    """Write a `masks` set: image i is of grey value i, and all masks have `labels`."""
    for split in ("train", "val"):
        for index in range(count):
            image(root / split / "images" / f"{index}.jpg", index)
            mask(root / split / "masks" / f"{index}.png", *labels, **options)
    return root


def coco_content(**changes) -> dict:
    """Return a COCO file of three images, the second without objects, and categories 3 and 7. The first image has an
    object with a polygon of 4 x 3 pixels at (2, 1), a crowd with a run-length code of column 0, and a box of no
    width."""
    square = dict(
        id=5, image_id=11, category_id=7, bbox=[2, 1, 4, 3], area=12.0, segmentation=[[2, 1, 6, 1, 6, 4, 2, 4]]
    )
    crowd = dict(id=6, image_id=11, category_id=3, bbox=[0, 0, 1, 8], area=8, iscrowd=1)
    crowd["segmentation"] = {"size": [8, 10], "counts": [0, 8, 72]}
    thin = dict(
        id=7, image_id=13, category_id=3, bbox=[3, 3, 0, 4], area=0, iscrowd=0, segmentation=[[3, 3, 3, 7, 3, 5]]
    )
    small = dict(id=8, image_id=13, category_id=3, bbox=[6, 2, 3, 3], area=9, iscrowd=0)
    small["segmentation"] = [[6, 2, 9, 2, 9, 5, 6, 5]]
    content = {
        "images": [dict(id=i, file_name=f"{i}.jpg", width=10, height=8) for i in (11, 12, 13)],
        "annotations": [square, crowd, thin, small],
        "categories": [dict(id=7, name="cat"), dict(id=3, name="dog")],
    }
    return {**content, **changes}


def coco_set(root, train=None, val=None):
    for split, content in (("train", train), ("val", val)):
        content = coco_content() if content is None else content
        for number in (11, 12, 13):
            image(root / f"{split}2017" / f"{number}.jpg", number)
        (root / "annotations").mkdir(exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (root / "annotations" / f"instances_{split}2017.json").write_text(text)
    return root


def voc_xml(*objects, size=SIZE) -> str:
    """Return an annotation of VOC; an object is (class, xmin, ymin, xmax, ymax, difficult)."""
    parts = []
    for name, *corners, difficult in objects:
        keys = zip(("xmin", "ymin", "xmax", "ymax"), corners)
        box = "".join(f"<{key}>{value}</{key}>" for key, value in keys)
        parts.append(f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>")
    sides = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation>{sides}{''.join(parts)}</annotation>"


def voc_set(root, year=2007, splits=None, annotations=None):
    """Write VOC<year> with the lists `splits` (name -> ids), annotations (id -> text), and masks with the classes 0
    and 20 and the border 255."""
    top = root / "VOCdevkit" / f"VOC{year}"
    splits = splits or {"trainval": ["1", "2"], "test": ["3"], "train": ["1"], "val": ["2"]}
    usual = voc_xml(("dog", 1, 1, 4, 3, 0), ("person", 5, 2, 10, 8, 1))
    for kind in ("Main", "Segmentation"):
        (top / "ImageSets" / kind).mkdir(parents=True, exist_ok=True)
        for split, ids in splits.items():
            (top / "ImageSets" / kind / f"{split}.txt").write_text("\n".join(ids) + "\n")
    (top / "Annotations").mkdir(exist_ok=True)
    for name in {name for ids in splits.values() for name in ids}:
        image(top / "JPEGImages" / f"{name}.jpg", int(name))
        (top / "Annotations" / f"{name}.xml").write_text((annotations or {}).get(name, usual))
        palette_mask(top / "SegmentationClass" / f"{name}.png", 0, 20, 255)
    return top


def palette_mask(path, *values):
    """Save a palette image: its indices are `values`, and its colours have nothing to do with them."""
    mask(path, *values)
    img = Image.open(path)
    img.putpalette([value % 256 for index in range(256) for value in (7 * index, 11 * index, 13 * index)])
    img.save(path)


def plain_args(**values) -> SimpleNamespace:
    return SimpleNamespace(in_chans=3, num_workers=0, pin_mem=False, seed=0, **values)
