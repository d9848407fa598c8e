"""Objects of PASCAL VOC's annotation files (Annotations/*.xml)."""

from pathlib import Path
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

from util.data.dense import layouts
from util.data.dense.records import Split, finite
from util.data.images import open_regular, printable
from util.errors import UserError

VOC_CLASSES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant sheep "
    "sofa train tvmonitor"
).split()
_LARGEST = 1 << 24  # bytes of an annotation file


def read_voc(root: Path, train: bool, args, classes: list[str]) -> Split:
    """Read the objects of the images in a list of ImageSets/Main, of one year or several; for evaluation of the first
    year alone. Raises UserError for missing and broken files, and for classes that are not in `classes`."""
    years = layouts.voc_years(root, getattr(args, "voc_year", None))
    if len(years) > 1 and not getattr(args, "voc_year", None):
        raise UserError(f"--data_path {root} has {', '.join(y.name for y in years)}: choose with --voc_year")
    split = layouts.voc_split(years, "Main", train, args)
    paths, records, labels = [], [], {name: label for label, name in enumerate(classes, 1)}
    for year in years if train else years[:1]:
        source = layouts.voc_list(year, "Main", split)
        ids = layouts.voc_ids(source)
        files = layouts.voc_images(year, ids, source)
        missing = [name for name in ids if not (year / "Annotations" / f"{name}.xml").is_file()]
        if missing:
            others = f", nor have {len(missing) - 1} others" if len(missing) > 1 else ""
            raise UserError(f"the image {files[missing[0]]} has no {missing[0]}.xml in {year / 'Annotations'}{others}")
        print(f"{'training' if train else 'evaluation'} images: {len(files)} of {source}")
        for name, path in files.items():
            record = read_annotation(year / "Annotations" / f"{name}.xml", labels)
            records.append({**record, "id": len(records)})
            paths.append(path)
    return Split(paths, records, classes, list(range(1, len(classes) + 1)), str(years[0] / "Annotations"))


def shared_images(root: Path, args) -> None:
    """Raise UserError if the lists of training and evaluation have images in common (trainval contains val)."""
    year = layouts.voc_years(root, getattr(args, "voc_year", None))[0]
    lists = [layouts.voc_split([year], "Main", train, args) for train in (True, False)]
    paths = [year / "ImageSets" / "Main" / f"{name}.txt" for name in lists]
    if all(path.is_file() for path in paths):
        common = set(layouts.voc_ids(paths[0])) & set(layouts.voc_ids(paths[1]))
        if common:
            raise UserError(
                f"--train_split {lists[0]} and --val_split {lists[1]} have {len(common)} images in common, such as "
                f"{min(common)}: choose others"
            )


def read_annotation(path: Path, labels: dict[str, int]) -> dict:
    """Return the record of an image. Coordinates in the file count from 1 and include the last pixel; here they count
    from 0, half-open. The size is 0 if the file does not have it. Raises UserError for a file that is not VOC's."""
    tree = _parse(path)
    sides = [tree.findtext(f"size/{side}", "0").strip() for side in ("height", "width")]
    height, width = (int(side) if side.isdecimal() and len(side) < 7 else 0 for side in sides)
    objects = []
    for number, each in enumerate(tree.findall("object"), 1):
        name = each.findtext("name", "").strip()
        if name not in labels:
            raise UserError(f"{path} has an object of the class {name!r}, which is none of the {len(labels)} classes")
        corners = [each.findtext(f"bndbox/{key}", "") for key in ("xmin", "ymin", "xmax", "ymax")]
        try:
            left, top, right, bottom = (float(text) for text in corners)
        except ValueError as error:
            raise UserError(f"{path}: object {number} has the corners {corners}, not four numbers") from error
        if not finite([left, top, right, bottom]):
            raise UserError(f"{path}: object {number} has the corners {corners}, which are not finite")
        box = [left - 1, top - 1, right, bottom]
        objects.append(
            {
                "name": number,
                "box": box,
                "label": labels[name],
                "crowd": False,
                "difficult": each.findtext("difficult", "0").strip() == "1",
                "area": max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1]),
                "segmentation": None,
            }
        )
    return {"height": height, "width": width, "objects": objects}


def _parse(path: Path) -> Element:
    """Return the root of an XML file. Documents that declare types or entities are refused: entities can expand to
    gigabytes, or name other files."""
    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.buffer_text = True

    def refuse(*_):
        raise UserError(f"{path} declares a document type, which annotations of VOC do not have: it is not read")

    parser.StartDoctypeDeclHandler = refuse
    try:
        with open_regular(path) as file:
            content = file.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UserError(f"{path} has more than {_LARGEST >> 20} MiB: it is no annotation of VOC")
        parser.Parse(content, True)
        return builder.close()
    except (expat.ExpatError, OSError, ValueError, LookupError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not XML: {printable(str(error))}") from error
