"""Data sets of objects by name (`--dataset`): COCO's json, VOC's xml, and scenes."""

import numpy as np

from util.data.dense.annotated import Detected, Objects, check_categories, no_objects
from util.data.dense.coco_json import read_coco
from util.data.dense.mask_labels import read_class_names
from util.data.dense.records import Records, Split, usable
from util.data.dense.rle import draw_segmentation
from util.data.dense.scenes import DetectedScenes, settings_of
from util.data.dense.voc_xml import VOC_CLASSES, read_voc, shared_images
from util.data.images import printable
from util.data.readers import need_path
from util.data.samples import BadAnnotation
from util.data.sources import Files
from util.errors import UserError

DETECTION = ("coco", "voc", "scenes")
CATEGORY = "category", "categories"  # what messages call a class


class DetectedFiles(Files, Detected):
    """Images in files with the records of an annotation file. With `draws`, annotations have the masks of the objects,
    if they `has_masks`; for evaluation the records suffice."""

    def __init__(self, split: Split, has_masks: bool, draws: bool = True):
        super().__init__(split.paths, [-1] * len(split.paths), None)
        self.categories, self.category_ids = split.categories, split.category_ids
        self._records, self.source = Records(split.records), split.source
        self.has_masks, self.draws = has_masks, has_masks and draws

    def described(self):
        yield from super().described()
        yield from self._records.texts()

    def record(self, index):
        return self._records[index]

    def annotation(self, index, size):
        record = self.record(index)
        objects = record["objects"]
        self._check_size(record, index, size)
        masks = None
        if self.draws:
            try:
                masks = [draw_segmentation(each["segmentation"] or [], size) for each in objects]
            except ValueError as error:
                if isinstance(error, UserError):
                    raise
                raise BadAnnotation(f"{self.source}: an object of {printable(self.name(index))}: {error}") from error
            masks = np.stack(masks) if masks else no_objects(0, size).masks
        return Objects(
            np.array([each["box"] for each in objects], np.float32).reshape(-1, 4),
            np.array([each["label"] for each in objects], np.int64),
            np.array([each["crowd"] for each in objects], bool),
            np.array([each["difficult"] for each in objects], bool),
            masks,
            record["id"],
        )

    def blank(self, index, size):
        return no_objects(self.record(index)["id"], size if self.draws else None)

    def _check_size(self, record: dict, index: int, size) -> None:
        """Raise BadAnnotation if an image has not the size that the annotation file says, if it says one."""
        listed = record["width"], record["height"]
        if all(listed) and listed != size:
            raise BadAnnotation(
                f"{self.source} says that {printable(self.name(index))} has {listed[0]} x {listed[1]} pixels, but it "
                f"has {size[0]} x {size[1]}: boxes and masks would not fit"
            )


def read_detection(args, train: bool, masks: bool, categories: list[str] | None = None) -> Detected:
    """Return the images and objects of one split, with the `masks` of the objects or without. For training, groups
    (crowd), images without objects and objects that cannot be used are left out; evaluation keeps everything that the
    file has. `categories`, of the training set or of a checkpoint, are those that this split must have.

    Raises UserError for missing files and for annotations that are wrong, such as unknown images and categories.
    """
    if args.dataset == "scenes":
        images = DetectedScenes(*settings_of(args, train), has_masks=masks)
        check_categories(images.categories, categories, "--scene_digits", CATEGORY)
        return images
    if args.dataset not in DETECTION:
        raise UserError(f"--dataset {args.dataset} has no boxes of objects: give one of {', '.join(DETECTION)}")
    if masks and args.dataset == "voc":
        raise UserError("--dataset voc has boxes, but no masks of objects: give --detector faster")
    root, names = need_path(args), getattr(args, "class_names", "")
    if args.dataset == "voc":
        if train:
            shared_images(root, args)
        split = read_voc(root, train, args, read_class_names(names) if names else VOC_CLASSES)
    elif names:
        raise UserError("--class_names has no effect with --dataset coco, whose annotation file has the names")
    else:
        split = read_coco(root, train)
    check_categories(split.categories, categories, split.source, CATEGORY)
    _check_objects(split, masks)
    if train:
        split = usable(split, masks, getattr(args, "max_bad_fraction", 0.01))
    return DetectedFiles(split, masks, draws=train)


def _check_objects(split: Split, masks: bool) -> None:
    """Raise UserError if a split has no objects, or no masks although `masks` are needed."""
    objects = [each for record in split.records for each in record["objects"]]
    if not objects:
        raise UserError(f"{split.source} annotates no object at all")
    if not masks:
        return
    bare = [each for each in objects if each["segmentation"] is None]
    if len(bare) == len(objects):
        raise UserError(f"{split.source} has boxes, but no masks (segmentation): give --detector faster")
    if bare:
        raise UserError(
            f"{split.source}: the annotation {bare[0]['name']} has no segmentation, nor have {len(bare) - 1} others: "
            f"give --detector faster, which needs boxes alone"
        )
