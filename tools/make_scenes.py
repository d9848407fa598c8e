"""Write made-up scenes with exact masks and boxes: handwritten digits on photographs, both from scikit-learn.

python tools/make_scenes.py OUT --digits 0 1 7          all layouts at once: images and masks, COCO, VOC
python tools/make_scenes.py OUT --size 128 --count 500 100

OUT is then the --data_path of --dataset masks, coco and voc. The mains also make the same scenes while they read, with
--dataset scenes; files are for other programs.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from xml.sax.saxutils import escape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image
from tqdm import tqdm

from util.data.dense.scenes import COUNTS, MOST, SIDES, SIZE, DetectedScenes, Scene, settings_of
from util.errors import UserError, user_errors
from util.parser import Flags, Parser

PALETTE = [0, 0, 0, 230, 25, 75, 60, 180, 75, 255, 225, 25, 0, 130, 200, 245, 130, 48, 145, 30, 180, 70, 240, 240]
PALETTE += [240, 50, 230, 210, 245, 60, 250, 190, 212]  # black and ten colours that are easy to tell apart


def get_args_parser():
    parser = Parser((__doc__ or "").partition("\n")[0], "")
    parser.add_argument("out", metavar="OUT", help="folder to write, which is created")
    parser.add_argument(
        "--digits", type=int, nargs="+", default=list(range(10)), help="digits that occur, each a class"
    )
    parser.add_argument(
        "--count",
        type=int,
        nargs="+",
        metavar="N",
        default=COUNTS,
        help="scenes for training, and for validation (without it a tenth)",
    )
    parser.add_argument("--size", type=int, default=SIZE, help="side of an image in pixels")
    parser.add_argument(
        "--sides", type=float, nargs=2, metavar=("LOW", "HIGH"), default=list(SIDES),
        help="range of a digit's side, as a share of the scene's",
    )  # fmt: skip
    parser.add_argument("--most", type=int, metavar="N", default=MOST, help="most digits in a scene")
    parser.add_argument("--seed", type=int, default=0, help="which scenes")
    return parser


def link(path: Path, other: Path) -> None:
    """Give a file a second name, or copy it where the file system has no links."""
    try:
        os.link(path, other)
    except OSError:
        shutil.copyfile(path, other)


def palette_image(values: np.ndarray) -> Image.Image:
    img = Image.fromarray(values)
    img.putpalette(PALETTE)
    return img


def voc_xml(name: str, scene: Scene, categories: list[str]) -> str:
    """Return the annotation of a scene as VOC writes it: coordinates from 1, the last pixel included."""
    size = scene.image.shape[0]
    lines = ["<annotation>", f"<filename>{escape(name)}.png</filename>"]
    lines += [f"<size><width>{size}</width><height>{size}</height><depth>3</depth></size>", "<segmented>1</segmented>"]
    for (left, top, right, bottom), label in zip(scene.boxes.astype(int).tolist(), scene.labels):
        corners = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
        lines.append(f"<object><name>{categories[label - 1]}</name><difficult>0</difficult>")
        lines.append(f"<bndbox>{corners}</bndbox></object>")
    return "\n".join([*lines, "</annotation>", ""])


def write_split(root: Path, scenes: DetectedScenes, train: bool) -> None:
    """Write one split in all layouts."""
    split = "train" if train else "val"
    voc, names, records = root / "VOCdevkit" / "VOC2007", [], []
    images, masks, coco = root / split / "images", root / split / "masks", root / f"{split}2017"
    folders = [voc / name for name in ("Annotations", "JPEGImages", "SegmentationClass", "SegmentationObject")]
    for folder in (images, masks, coco, root / "annotations", *folders):
        folder.mkdir(parents=True, exist_ok=True)
    for index in tqdm(range(len(scenes)), split, unit=" scenes", disable=None):
        scene, name = scenes.scene(index), f"{split}_{index:06d}"
        names.append(name)
        records.append(scenes.record(index))  # at once: only the last scene is kept
        file = f"{name}.png"
        Image.fromarray(scene.image).save(images / file)
        palette_image(scene.classes).save(masks / file)
        link(images / file, coco / file)
        link(images / file, voc / "JPEGImages" / file)
        link(masks / file, voc / "SegmentationClass" / file)
        palette_image(scene.instances).save(voc / "SegmentationObject" / file)
        (voc / "Annotations" / f"{name}.xml").write_text(voc_xml(name, scene, scenes.categories))
    content = scenes.ground_truth(records)
    for image, name in zip(content["images"], names):
        image["file_name"] = f"{name}.png"
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    for kind in ("Main", "Segmentation"):
        (voc / "ImageSets" / kind).mkdir(parents=True, exist_ok=True)
        (voc / "ImageSets" / kind / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))


def main(args) -> None:
    """Write both splits. Raises UserError for bad flags, and for a folder that is not empty or cannot be written."""
    out = Path(args.out)
    names = {f"scene_{name}": getattr(args, name) for name in ("digits", "count", "size", "sides", "most", "seed")}
    try:
        scenes = {train: DetectedScenes(*settings_of(Flags(**names), train)) for train in (True, False)}
    except UserError as error:
        raise UserError(str(error).replace("--scene_", "--")) from error
    if os.path.lexists(out) and (not out.is_dir() or os.listdir(out)):
        raise UserError(f"{out} is {'not empty' if out.is_dir() else 'not a folder'}: give another folder")
    try:
        for train, split in scenes.items():
            write_split(out, split, train)
        (out / "classes.txt").write_text("\n".join(["background", *scenes[True].categories]) + "\n")
        (out / "voc_classes.txt").write_text("\n".join(scenes[True].categories) + "\n")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    print(
        f"{len(scenes[True])} scenes for training and {len(scenes[False])} for validation; read them with\n"
        f"  --dataset masks --data_path {out}\n"
        f"  --dataset coco --data_path {out}\n"
        f"  --dataset voc --data_path {out} --class_names {out / 'voc_classes.txt'}"
    )


if __name__ == "__main__":
    with user_errors("make_scenes.py"):
        main(get_args_parser().parse_args())
