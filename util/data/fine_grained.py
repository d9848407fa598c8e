"""Readers of fine-grained data sets in their published layout: CUB-200-2011 (Wah et al. 2011), Stanford Cars (Krause et
al. 2013, read by torchvision) and iNaturalist 2019 (Van Horn et al. 2018, the challenge's JSON). Each returns the
paths, labels from 0 and class names of one split."""

import json
from pathlib import Path

from util.errors import UserError

Split = tuple[list[str], list[int], list[str]]


def _needed(path: Path, dataset: str, layout: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing: --dataset {dataset} needs {layout} below --data_path")
    return path


def _table(root: Path, name: str) -> dict[str, str]:
    """Return {number: text} of a file with a number and a text on every line."""
    path = _needed(
        root / name, "cub200", "images/, images.txt, image_class_labels.txt, train_test_split.txt, classes.txt"
    )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a text file in UTF-8") from error
    rows = [line.split(maxsplit=1) for line in text.split("\n") if line.strip()]
    bad = next((row for row in rows if len(row) < 2), None)
    if bad is not None:
        raise UserError(f"{path} has the line {bad[0]!r}: every line must be a number and a value")
    return {number: value.strip() for number, value in rows}


def cub200(root: Path, train: bool) -> Split:
    """CUB_200_2011: 5,994 training and 5,794 test images of 200 birds. Its attributes and boxes are not used."""
    root = root / "CUB_200_2011" if (root / "CUB_200_2011").is_dir() else root
    paths, labels = _table(root, "images.txt"), _table(root, "image_class_labels.txt")
    splits, classes = _table(root, "train_test_split.txt"), _table(root, "classes.txt")
    wrong = next((number for number in classes if not number.isdecimal()), None)
    if wrong is not None:
        raise UserError(f"{root / 'classes.txt'} has the number {wrong!r}: every line must be a number and a name")
    class_index = {number: i for i, number in enumerate(sorted(classes, key=int))}
    chosen = [number for number in paths if splits.get(number) == ("1" if train else "0")]
    unknown = next((number for number in chosen if labels.get(number) not in class_index), None)
    if unknown is not None:
        raise UserError(f"{root / 'image_class_labels.txt'} assigns image {unknown} no class of classes.txt")
    if not chosen:
        raise UserError(f"{root / 'train_test_split.txt'} has no image with {int(train)}, the value for this split")
    files = [str(root / "images" / paths[number]) for number in chosen]
    _needed(Path(files[0]), "cub200", "the images in images/")
    return files, [class_index[labels[number]] for number in chosen], [classes[number] for number in class_index]


def cars(root: Path, train: bool) -> Split:
    """Stanford Cars: 8,144 training and 8,041 test images of 196 cars, in the layout of torchvision.datasets."""
    from scipy.io.matlab import MatReadError
    from torchvision.datasets import StanfordCars

    root = root.parent if root.name == "stanford_cars" else root
    layout = "stanford_cars/ with devkit/, cars_train/, cars_test/ and cars_test_annos_withlabels.mat"
    folder = root / "stanford_cars"
    split = ("devkit/cars_train_annos.mat", "cars_train") if train else ("cars_test_annos_withlabels.mat", "cars_test")
    for name in ("devkit/cars_meta.mat", *split):
        _needed(folder / name, "cars", layout)
    try:
        data = StanfordCars(root, split="train" if train else "test")
    except (OSError, ValueError, KeyError, RuntimeError, MatReadError) as error:
        raise UserError(f"{folder} cannot be read by torchvision's StanfordCars: {error}") from error
    samples = data._samples  # pairs of path and label; its public interface decodes every image
    return [path for path, _ in samples], [int(label) for _, label in samples], list(data.classes)


def inat19(root: Path, train: bool) -> Split:
    """iNaturalist 2019: 265,213 training and 3,030 validation images of 1,010 species, listed in train2019.json and
    val2019.json. The species' names were published later, in categories.json; it is read if it is beside them."""
    layout = "train2019.json, val2019.json and the images that they list (train_val2019/...)"
    path = _needed(root / ("train2019.json" if train else "val2019.json"), "inat19", layout)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = {image["id"]: image["file_name"] for image in content["images"]}
        labels = {note["image_id"]: note["category_id"] for note in content["annotations"]}
        names = {category["id"]: str(category["name"]) for category in _categories(root, content)}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not the annotation file of iNaturalist 2019: {error!r}") from error
    class_index = {number: i for i, number in enumerate(sorted(names))}
    unknown = next((number for number in files if labels.get(number) not in class_index), None)
    if unknown is not None:
        raise UserError(f"{path} assigns image {unknown} no known category")
    paths = [str(root / file) for file in files.values()]
    if not paths:
        raise UserError(f"{path} lists no images")
    _needed(Path(paths[0]), "inat19", layout)
    return paths, [class_index[labels[number]] for number in files], [names[number] for number in class_index]


def _categories(root: Path, content: dict) -> list[dict]:
    file = root / "categories.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else content["categories"]


READERS = {"cub200": cub200, "cars": cars, "inat19": inat19}
