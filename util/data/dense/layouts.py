"""Where published dense data sets, and folders of images and masks, keep their images. Each function returns the images
of one split by a key, which names their annotation."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from util.data.file_lists import check_below, images_below, read_lines
from util.data.image_folders import find_split
from util.data.images import printable
from util.data.leftovers import Skipped
from util.errors import MissingSplit, UserError

Keyed = dict[str, str]  # key -> path


def need_folder(root: Path, dataset: str, *choices: str) -> Path:
    """Return the first of the folders `choices` below `root` that exists. Raises UserError if none does."""
    found = next((root / choice for choice in choices if (root / choice).is_dir()), None)
    if found is None:
        raise MissingSplit(f"--dataset {dataset} needs the folder {' or '.join(choices)} below --data_path {root}")
    return found


def keyed(folder: Path, ending: str = "") -> Keyed:
    """Return the images below a folder by their path in it without the file's ending, or, if it is given, without
    `ending` (files with another one are passed over). Raises UserError when there are none, or two of one name."""
    skipped, images = Skipped(), {}
    for path in images_below(folder, skipped):
        if not path.endswith(ending):
            continue
        name = path[len(str(folder)) + 1 :]
        key = name.removesuffix(ending) if ending else name[: name.rindex(".")]
        if key in images:
            raise UserError(f"{printable(path)} and {printable(images[key])} have the same name: remove one of them")
        images[key] = path
    skipped.note(folder)
    if not images:
        raise UserError(f"{folder} contains no images{f' whose names end with {ending}' if ending else ''}")
    return images


def ade20k(root: Path, train: bool, args) -> Keyed:
    """SceneParse150: images/training/*.jpg and images/validation/*.jpg."""
    part = "training" if train else "validation"
    return keyed(need_folder(ade20k_root(root), "ade20k", f"images/{part}"))


def ade20k_root(root: Path) -> Path:
    return root / "ADEChallengeData2016" if (root / "ADEChallengeData2016").is_dir() else root


def cityscapes(root: Path, train: bool, args) -> Keyed:
    """leftImg8bit/{train,val}/<city>/<city>_..._leftImg8bit.png."""
    folder = need_folder(root, "cityscapes", f"leftImg8bit/{'train' if train else 'val'}")
    return keyed(folder, "_leftImg8bit.png")


def coco_stuff(root: Path, train: bool, args) -> Keyed:
    """train2017/*.jpg and val2017/*.jpg, also below images/."""
    part = "train2017" if train else "val2017"
    return keyed(need_folder(root, "coco_stuff", part, f"images/{part}"))


def coco(root: Path, train: bool, args) -> Keyed:
    return keyed(coco_images(root, train))


def coco_images(root: Path, train: bool) -> Path:
    """Return the folder of the images of one split: train2017/ or another year, also below images/."""
    pattern = f"{'train' if train else 'val'}[0-9]*"
    folders = [path for top in (root, root / "images") for path in sorted(top.glob(pattern)) if path.is_dir()]
    if len(folders) != 1:
        found = "has several: " + ", ".join(path.name for path in folders) if folders else "has none"
        raise MissingSplit(f"--dataset coco needs one folder such as {pattern[:-6]}2017; --data_path {root} {found}")
    return folders[0]


def masks(root: Path, train: bool, args) -> Keyed:
    return keyed(masks_folders(root, train)[0])


def masks_folders(root: Path, train: bool) -> tuple[Path, Path]:
    """Return the folders of images and of masks of one split: {train,val}/{images,masks}/ or {images,masks}/{train,
    val}/; other names of the splits as in `util.data.image_folders`."""
    split = find_split(root, train)
    if split is not None:
        return need_folder(split, "masks", "images"), split / "masks"
    images = find_split(root / "images", train) if (root / "images").is_dir() else None
    if images is None:
        part = "train" if train else "val"
        raise MissingSplit(f"--dataset masks needs {part}/images/ and {part}/masks/ below --data_path {root}")
    return images, root / "masks" / images.name


# VOC ------------------------------------------------------------------------------------------------------------------


def voc_years(root: Path, wanted: Iterable[int] | None) -> list[Path]:
    """Return the folders VOC<year>, which are in `root`, in its VOCdevkit/, or `root` itself, of the `wanted` years
    (None: all). Raises UserError if one is missing."""
    tops = [root, *sorted(root.glob("VOC[0-9]*")), *sorted(root.glob("VOCdevkit/VOC[0-9]*"))]
    found = [top for top in tops if (top / "JPEGImages").is_dir() and (top / "ImageSets").is_dir()]
    if wanted:
        by_name = {top.name: top for top in found}
        missing = next((year for year in wanted if f"VOC{year}" not in by_name), None)
        if missing is not None:
            raise UserError(f"--voc_year {missing}: --data_path {root} has no VOCdevkit/VOC{missing}/")
        found = [by_name[f"VOC{year}"] for year in wanted]
    if not found:
        raise UserError(f"--data_path {root} has no VOCdevkit/VOC2007/ or VOC2012/ with JPEGImages/ and ImageSets/")
    return found


def voc_list(year: Path, kind: str, split: str) -> Path:
    """Return the list ImageSets/<kind>/<split>.txt. Raises UserError if it does not exist."""
    path = year / "ImageSets" / kind / f"{split}.txt"
    if not path.is_file():
        raise MissingSplit(f"{path} does not exist: choose another list with --train_split and --val_split")
    return path


def voc_split(years: list[Path], kind: str, train: bool, args) -> str:
    """Return the name of a split's list: what --train_split and --val_split say; for segmentation train and val; for
    detection trainval and test, or train and val where the first year has no test."""
    given = getattr(args, "train_split" if train else "val_split", None)
    if given:
        return given
    if kind == "Main" and (years[0] / "ImageSets" / kind / "test.txt").is_file():
        return "trainval" if train else "test"
    return "train" if train else "val"


def voc_ids(path: Path) -> list[str]:
    """Return the names of the images in a list of VOC; a second column (of the lists of classes) is passed over."""
    return [line.split()[0] for line in read_lines(path, "the list")]


def voc_images(year: Path, ids: list[str], source: Path) -> Keyed:
    """Return the images of a list. The usual ending is .jpg; others are looked for if the first image has not this
    one."""
    folder = year / "JPEGImages"
    check_below([str(folder / name) for name in ids], folder, source)
    if ids and not (folder / f"{ids[0]}.jpg").is_file():
        existing = keyed(folder)
        return {name: existing.get(name, str(folder / f"{name}.jpg")) for name in ids}
    return {name: str(folder / f"{name}.jpg") for name in ids}


def voc(root: Path, train: bool, args) -> Keyed:
    """The images of a list in ImageSets/Main, or in ImageSets/Segmentation where that does not exist, of all years."""
    images = {}
    years = voc_years(root, getattr(args, "voc_year", None))
    for year in years:
        kind = "Main" if (year / "ImageSets" / "Main").is_dir() else "Segmentation"
        split = voc_split(years, kind, train, args)
        if not (year / "ImageSets" / kind / f"{split}.txt").is_file():  # trainaug, say
            kind = "Segmentation"
        source = voc_list(year, kind, split)
        for name, path in voc_images(year, voc_ids(source), source).items():
            images[f"{year.name}/{name}"] = path
    return images


IMAGES: dict[str, Callable[..., Keyed]] = {
    "ade20k": ade20k,
    "cityscapes": cityscapes,
    "coco": coco,
    "coco_stuff": coco_stuff,
    "masks": masks,
    "voc": voc,
}


def synonym(text: str) -> str:
    """Return the first of several names of a class: "door, double door" is a door."""
    return re.split(r"[;,]", text)[0].strip()
