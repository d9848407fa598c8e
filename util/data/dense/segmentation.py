"""Data sets for semantic segmentation by name (`--dataset`): images in files with masks in files, and scenes."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from util.data.compact import PathList
from util.data.dense import layouts
from util.data.dense.annotated import Segmented, check_categories
from util.data.dense.mask_labels import ColorTable, Labelling, read_class_names, read_color_table
from util.data.dense.mask_survey import Found, read_mask, settle_labelling, wrong_size
from util.data.dense.scenes import SegmentedScenes, settings_of
from util.data.dense.voc_xml import VOC_CLASSES
from util.data.file_lists import read_lines
from util.data.images import printable
from util.data.readers import need_path
from util.data.samples import BadAnnotation
from util.data.sources import Files
from util.errors import UserError
from util.parallel.distributed import from_main_process_or_error

# COCO-Stuff stores the id of a category minus one. These of the 182 ids belong to no category.
_NO_STUFF = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}


class SegmentedFiles(Files, Segmented):
    """Images in files with masks in files."""

    def __init__(self, paths: Iterable[str], masks: Iterable[str], labelling: Labelling):
        paths = PathList(paths)
        super().__init__(paths, [-1] * len(paths), None)
        self.masks, self.labelling = PathList(masks), labelling
        self.categories, self.ignore_label = labelling.categories, labelling.ignore_label

    def described(self):
        yield from super().described()
        yield repr((self.ignore_label, self.labelling.zero_is_ignored, self.labelling.stored))

    def annotation(self, index, size):
        path = self.masks[index]
        img = read_mask(path)
        if img.size != size:
            raise BadAnnotation(wrong_size(path, img.size, self.paths[index], size))
        return self.labelling.decode(img, path)


def _ade20k(args, root: Path, train: bool) -> Found:
    images, root = layouts.ade20k(root, train, args), layouts.ade20k_root(root)
    folder = layouts.need_folder(root, "ade20k", f"annotations/{'training' if train else 'validation'}")
    file = root / "objectInfo150.txt"
    names = [str(number) for number in range(1, 151)]
    if file.is_file():
        rows = [line.split("\t") for line in read_lines(file, "the table of classes")]
        rows = [row[-1] for row in rows if row[0].strip().isdecimal()]
        if len(rows) != 150:
            raise UserError(f"{file} has {len(rows)} rows that begin with a number, not 150")
        short = [layouts.synonym(name) for name in rows]
        names = [name if short.count(name) == 1 else full.strip() for name, full in zip(short, rows)]
    return Found(images, layouts.keyed(folder), str(folder), names, file.is_file(), " of ADE20K", None, True)


def _cityscapes(args, root: Path, train: bool) -> Found:
    from torchvision.datasets import Cityscapes

    folder = layouts.need_folder(root, "cityscapes", f"gtFine/{'train' if train else 'val'}")
    classes = sorted((c for c in Cityscapes.classes if 0 <= c.train_id < 255), key=lambda c: c.train_id)
    return Found(
        layouts.cityscapes(root, train, args),
        layouts.keyed(folder, "_gtFine_labelIds.png"),
        str(folder),
        [c.name for c in classes],
        stored=[c.id for c in classes],
        zero_is_ignored=False,
    )


def _voc(args, root: Path, train: bool) -> Found:
    years = layouts.voc_years(root, getattr(args, "voc_year", None))
    if len(years) != 1:
        raise UserError(f"--data_path {root} has {', '.join(y.name for y in years)}: choose one with --voc_year")
    split = layouts.voc_split(years, "Segmentation", train, args)
    source = layouts.voc_list(years[0], "Segmentation", split)
    ids = layouts.voc_ids(source)
    augmented = years[0] / "SegmentationClassAug"  # the masks of Hariharan et al. 2011
    folder = augmented if "aug" in split and augmented.is_dir() else years[0] / "SegmentationClass"
    images = layouts.voc_images(years[0], ids, source)
    masks = {name: f"{folder}/{name}.png" for name in ids}
    missing = {name for name, path in masks.items() if not os.path.isfile(path)}
    masks = {name: path for name, path in masks.items() if name not in missing}
    print(f"{'training' if train else 'evaluation'} images: {len(ids)} of {source}")
    return Found(images, masks, str(folder), ["background", *VOC_CLASSES], zero_is_ignored=False)


def _coco_stuff(args, root: Path, train: bool) -> Found:
    part = "train2017" if train else "val2017"
    folder = layouts.need_folder(root, "coco_stuff", f"stuffthingmaps/{part}", f"annotations/{part}")
    ids = [number for number in range(1, 183) if number not in _NO_STUFF]
    file, names = root / "labels.txt", {number: str(number) for number in ids}
    if file.is_file():  # lines such as "1: person"
        rows = [line.partition(":") for line in read_lines(file, "the names of the classes")]
        names |= {int(number): name.strip() for number, _, name in rows if number.strip().isdecimal()}
    names = [names[number] for number in ids]
    stored = [number - 1 for number in ids]
    images = layouts.coco_stuff(root, train, args)
    return Found(images, layouts.keyed(folder), str(folder), names, file.is_file(), "", stored, False)


def _masks(args, root: Path, train: bool) -> Found:
    images, folder = layouts.masks_folders(root, train)
    file = root / "classes.txt"
    names = read_class_names(file, "the file of class names") if file.is_file() else None
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: --dataset masks needs a mask for every image in {images}")
    return Found(layouts.keyed(images), layouts.keyed(folder), str(folder), names, source=f" of {file}")


FILES: dict[str, Callable[..., Found]] = {
    "ade20k": _ade20k,
    "cityscapes": _cityscapes,
    "coco_stuff": _coco_stuff,
    "masks": _masks,
    "voc": _voc,
}
SEGMENTATION = (*FILES, "scenes")


def read_segmentation(args, train: bool, categories: list[str] | None = None) -> Segmented:
    """Return the images and masks of one split. `categories`, of the training set or of a checkpoint, are the classes
    that the masks of this split must have.

    Settles `args.zero_is_ignored`, unless it is given. Raises UserError for missing files, for masks that are none, and
    for labels that are no classes; masks that are not among those that are checked here raise BadAnnotation when they
    are read.
    """
    ignore = getattr(args, "ignore_label", 255)
    if not 0 <= ignore < 1 << 16:
        raise UserError(f"--ignore_label {ignore} must be a value that masks can store, 0 to 65535")
    if args.dataset == "scenes":
        images = SegmentedScenes(*settings_of(args, train), ignore_label=ignore)
        check_categories(images.categories, categories, "--scene_digits")
        return images
    if args.dataset not in FILES:
        raise UserError(f"--dataset {args.dataset} has no masks of classes: give one of {', '.join(SEGMENTATION)}")
    found = FILES[args.dataset](args, need_path(args), train)
    paths, masks = _paired(found)
    colors = _names_of_flags(args, found, ignore)
    source = found.source.removeprefix(" of ") or args.dataset
    check_categories(found.names, categories, source, same_names=found.certain)
    if categories is not None:
        found.source = found.source if found.names else " of the training set"
        found.names = categories
    given = getattr(args, "zero_is_ignored", None)
    labelling = from_main_process_or_error(lambda: settle_labelling(found, given, paths, masks, colors, ignore))
    args.zero_is_ignored = labelling.zero_is_ignored
    return SegmentedFiles(paths, masks, labelling)


def _paired(found: Found) -> tuple[list[str], list[str]]:
    """Return the paths of images and of their masks, in the order of the images. Raises UserError for images without
    a mask; masks without an image are counted in a note."""
    missing = [key for key in found.images if key not in found.masks]
    if missing:
        others = f", nor have {len(missing) - 1} others of {len(found.images)} images" if len(missing) > 1 else ""
        raise UserError(
            f"the image {printable(found.images[missing[0]])} has no mask of its name in {found.folder}{others}"
        )
    extra = len(found.masks) - len(found.images)
    if extra:
        print(f"note: {extra} masks in {found.folder} have no image, and are not read")
    return list(found.images.values()), [found.masks[key] for key in found.images]


def _names_of_flags(args, found: Found, ignore: int) -> ColorTable | None:
    """Replace the names of the classes by those of the flags, and return the table of colours, if there is one."""
    names, table = getattr(args, "class_names", ""), getattr(args, "color_table", "")
    colors = None
    if table:
        if args.dataset != "masks":
            raise UserError(f"--color_table is for --dataset masks, not {args.dataset}")
        if getattr(args, "zero_is_ignored", None):
            raise UserError(
                "--zero_is_ignored has no effect with --color_table: call such a colour ignore in the table"
            )
        colors, found.names = read_color_table(table, ignore)
        found.certain, found.source, found.zero_is_ignored = True, f" of --color_table {table}", False
    if names:
        listed = read_class_names(names)
        expected = len(found.names or ())
        if colors is not None and len(listed) != expected:
            raise UserError(f"--class_names {names} has {len(listed)} classes, but --color_table {expected}")
        if found.stored is not None and len(listed) != expected:
            raise UserError(f"--class_names {names} has {len(listed)} classes, but {args.dataset} {expected}")
        found.names, found.certain, found.source = listed, True, f" of --class_names {names}"
    return colors
