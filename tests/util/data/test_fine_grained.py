"""CUB-200-2011, Stanford Cars and iNaturalist 2019: small copies of their layouts, and missing files."""

import argparse
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

import main_finetune
from evaluation.encoder import count_classes
from util.data.readers import read_images
from util.errors import UserError


def picture(path, level: int):
    """Save an image of one grey level, which identifies it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, level, level)).save(path, quality=95)


def cub(root):
    """Write twelve classes, so that numbers and strings sort differently. Image n has level 2n and is a test image if n
    is even. The numbers of images are not in the order of their classes."""
    root = root / "CUB_200_2011"
    rows = [(n, 1 + (5 * n) % 12) for n in range(1, 37)]
    classes = {number: f"{number:03d}.Bird_{number}" for number in range(1, 13)}
    for n, number in rows:
        picture(root / "images" / classes[number] / f"Bird_{n:04d}.jpg", 2 * n)
    tables = {
        "images.txt": [f"{n} {classes[number]}/Bird_{n:04d}.jpg" for n, number in rows],
        "image_class_labels.txt": [f"{n} {number}" for n, number in rows],
        "train_test_split.txt": [f"{n} {n % 2}" for n, _ in rows],
        "classes.txt": [f"{number} {name}" for number, name in classes.items()],
    }
    for name, lines in tables.items():
        (root / name).write_text("\n".join(lines) + "\n")
    labels = {2 * n: number - 1 for n, number in rows}
    return [{level: label for level, label in labels.items() if level // 2 % 2 == train} for train in (1, 0)]


def cars(root):
    root = root / "stanford_cars"
    expected = []
    (root / "devkit").mkdir(parents=True)
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012", "Audi TT RS Coupe 2012"], dtype=object)
    savemat(root / "devkit" / "cars_meta.mat", {"class_names": names})
    for file, folder, first in (
        ("devkit/cars_train_annos.mat", "cars_train", 10),
        ("cars_test_annos_withlabels.mat", "cars_test", 100),
    ):
        rows = [(f"{i:05d}.jpg", 1 + i * 2 % 3, first + 10 * i) for i in range(6)]
        for name, _, level in rows:
            picture(root / folder / name, level)
        kinds = [("fname", object), ("class", int)]
        savemat(root / file, {"annotations": np.array([(name, label) for name, label, _ in rows], dtype=kinds)})
        expected.append({level: label - 1 for _, label, level in rows})
    return expected


def inat19(root):
    """Write a set whose categories are 3, 7 and 1000, listed in another order."""
    expected = []
    for split, first in (("train", 10), ("val", 100)):
        rows = [(first + i, [1000, 3, 7][i % 3], f"train_val2019/Birds/{i % 3}/{split}{i}.jpg") for i in range(6)]
        for number, _, file in rows:
            picture(root / file, number)
        content = {
            "images": [{"id": number, "file_name": file} for number, _, file in rows],
            "annotations": [{"id": n, "image_id": n, "category_id": label} for n, label, _ in reversed(rows)],
            "categories": [{"id": number, "name": f"c{number}"} for number in (7, 1000, 3)],
        }
        (root / f"{split}2019.json").write_text(json.dumps(content))
        expected.append({number: {3: 0, 7: 1, 1000: 2}[label] for number, label, _ in rows})
    return expected


LAYOUTS = {"cub200": cub, "cars": cars, "inat19": inat19}


def flags(name: str, root) -> argparse.Namespace:
    return main_finetune.get_args_parser().parse_args(["--dataset", name, "--data_path", str(root)])


@pytest.mark.parametrize("name", LAYOUTS)
def test_labels_belong_to_the_images(name, tmp_path):
    """Both splits have every image, identified by its level, with its label; class names are in the order of labels."""
    expected = LAYOUTS[name](tmp_path)
    args = flags(name, tmp_path)
    splits = [read_images(args, train) for train in (True, False)]
    for images, known in zip(splits, expected):
        levels = [np.asarray(images.load(i)).mean() for i in range(len(images))]
        # JPEG changes the level by less than one; levels are at least 2 apart.
        assert {
            min(known, key=lambda k, level=level: abs(k - level)): t for level, t in zip(levels, images.targets)
        } == known
    assert count_classes(args, *splits) == len(splits[0].classes)
    first = {"cub200": "001.Bird_1", "cars": "AM General Hummer SUV 2000", "inat19": "c3"}[name]
    assert splits[0].classes == splits[1].classes and splits[0].classes[0] == first


def test_names_published_later(tmp_path):
    inat19(tmp_path)
    later = [{"id": 3, "name": "Turdus merula"}, {"id": 7, "name": "Parus major"}, {"id": 1000, "name": "Sitta"}]
    (tmp_path / "categories.json").write_text(json.dumps(later))
    assert read_images(flags("inat19", tmp_path), True).classes == ["Turdus merula", "Parus major", "Sitta"]


def test_the_folder_itself_may_be_named(tmp_path):
    for name, folder in (("cub200", "CUB_200_2011"), ("cars", "stanford_cars")):
        LAYOUTS[name](tmp_path)
        outer, inner = (read_images(flags(name, path), True) for path in (tmp_path, tmp_path / folder))
        assert list(outer.paths) == list(inner.paths) and outer.targets == inner.targets


def test_fine_tuning_reads_it(tmp_path):
    cub(tmp_path / "data")
    args = "--model vit_micro_patch4 --input_size 16 --batch_size 6 --epochs 1 --num_workers 0 --device cpu".split()
    parser = main_finetune.get_args_parser()
    where = ["--dataset", "cub200", "--data_path", str(tmp_path / "data"), "--output_dir", str(tmp_path / "out")]
    result = main_finetune.main(parser.parse_args([*args, *where]))
    assert 0 <= result["acc1"] <= 100 and result["skipped"] == 0


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("cub200", "rm CUB_200_2011/train_test_split.txt", "train_test_split.txt is missing: --dataset cub200 needs"),
        ("cub200", "rm CUB_200_2011/images", "is missing: --dataset cub200 needs the images in images/"),
        ("cub200", "write CUB_200_2011/image_class_labels.txt 1 99", "assigns image 1 no class of classes.txt"),
        ("cub200", "write CUB_200_2011/images.txt 1", "has the line '1': every line must be a number and a value"),
        ("cub200", "write CUB_200_2011/train_test_split.txt 1 2", "has no image with 1, the value for this split"),
        (
            "cars",
            "rm stanford_cars/devkit",
            "cars_meta.mat is missing: --dataset cars needs stanford_cars/ with devkit/",
        ),
        ("cars", "rm stanford_cars/cars_train", "cars_train is missing: --dataset cars needs"),
        ("cars", "write stanford_cars/devkit/cars_train_annos.mat x", "cannot be read by torchvision's StanfordCars"),
        ("inat19", "rm train2019.json", "train2019.json is missing: --dataset inat19 needs train2019.json"),
        ("inat19", "rm train_val2019", "is missing: --dataset inat19 needs"),
        ("inat19", "write train2019.json {}", "is not the annotation file of iNaturalist 2019: KeyError"),
        ("inat19", "write train2019.json []", "is not the annotation file of iNaturalist 2019: TypeError"),
    ],
)
def test_mistakes(name, spoil, message, tmp_path):
    LAYOUTS[name](tmp_path)
    verb, path, *text = spoil.split(maxsplit=2)
    path = tmp_path / path
    if verb == "write":
        path.write_text(text[0] + "\n")
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=message):
        read_images(flags(name, tmp_path), True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_folder(name, tmp_path):
    with pytest.raises(UserError, match=f"--dataset {name} needs --data_path"):
        read_images(flags(name, ""), True)
    with pytest.raises(UserError, match=f"is missing: --dataset {name} needs"):
        read_images(flags(name, tmp_path), False)
