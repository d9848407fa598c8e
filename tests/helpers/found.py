"""Random data sets and files as people have them, each written together with what must be read from it.

Every function takes a `random.Random` and an empty folder, writes one data set, reads it, and asserts that it was read
as it was meant. The fuzz test and the soak call them with their own random numbers.
"""

import argparse
import collections
import csv
import datetime
import io
import pathlib
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

import models_mae
from helpers.plain_images import finetune_flags, flags, save, value_of
from util.data.build import build_loader
from util.data.labels import read_labelled
from util.data.pixel_range import limits, settle_pixel_range
from util.data.readers import read_images
from util.data.samples import KeyedDataset
from util.data.transforms import eval_transform
from util.errors import UserError
from util.weights.load import read_weights

LEFTOVERS = [
    *(".ipynb_checkpoints", "__MACOSX", "@eaDir", ".git", "lost+found", "$RECYCLE.BIN", ".Trash-1000", "~snapshot"),
    *(".@__thumb", "#recycle", "System Volume Information", "@Recycle"),
]
CLASSES = ["cat", "dog", "Ü b", "10", "9", "a,b", "n01440764", "No Finding", "x.y", "-"]


def _grey(path: Path, value: int) -> None:
    save(path, value, size=(4, 4))


def folders(chance: Random, root: Path) -> None:
    """Class folders under some name of the splits, or without splits, among what other programs leave behind."""
    names = chance.sample(CLASSES, chance.randint(1, 4))
    split = chance.random() < 0.7
    train = chance.choice(("train", "Train", "training")) if split else ""
    held_out = chance.choice(("val", "valid", "validation", "dev", "test", "Test", "testing")) if split else ""
    expected = {part: {} for part in {train, held_out}}
    for part in expected:
        for number, name in enumerate(names):
            count = chance.randint(2, 5)
            for i in range(count):
                _grey(root / part / name / chance.choice(("", "deeper")) / f"{i}.png", 10 * number + i)
            expected[part][name] = count
    for _ in range(chance.randint(0, 6)):
        where = root / chance.choice((train, held_out)) / chance.choice(("", *names))
        thing = chance.choice((*(f"{folder}/x.png" for folder in LEFTOVERS), "._0.png", ".nfs1.png", "~$0.png"))
        _grey(where / thing, 255)
    words = ["--data_path", root] + ([] if split else ["--val_fraction", "0.3"])
    read = [read_images(flags(*words), part) for part in (True, False)]
    assert read[0].classes == read[1].classes == sorted(names)
    if split:
        for images, part in zip(read, (train, held_out)):
            counts = collections.Counter(images.classes[target] for target in images.targets)
            assert counts == expected[part], (counts, expected[part])
    else:
        assert len(read[0]) + len(read[1]) == sum(expected[""].values())
        assert not {read[0].name(i) for i in range(len(read[0]))} & {read[1].name(i) for i in range(len(read[1]))}
    assert all(value_of(images.load(i)) < 255 for images in read for i in range(len(images)))


def _table(chance: Random, path: Path, header: list[str], rows: list[list[str]]) -> bool:
    """Write a table in a random dialect. Return whether it has its header."""
    delimiter = chance.choice("\t,;")
    quoting = chance.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
    has_header = len(header) > 2 or chance.random() < 0.5
    with open(path, "w", newline="", encoding=chance.choice(("utf-8", "utf-8-sig"))) as file:
        lines = csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=chance.choice(("\n", "\r\n")))
        lines.writerows([*([header] if has_header else []), *rows])
    return has_header


def lists(chance: Random, root: Path) -> None:
    """A table of images and classes, sets of labels, one-hot columns or numbers."""
    kind = chance.choice(("single", "multilabel", "one-hot", "regression"))
    names = [
        f"{chance.choice(('', 'sub/', 'a b/'))}scan_{i:04d}{chance.choice(('', '.0', ' (1)'))}.png" for i in range(12)
    ]
    for i, name in enumerate(names):
        _grey(root / "data" / name, i)
    bare = chance.random() < 0.3 and all("." not in Path(name).stem for name in names)
    written = [name.removesuffix(".png") if bare else name for name in names]
    if chance.random() < 0.2:
        written = [name.replace("/", "\\") for name in written]
    image = chance.choice(("image", "path", "Image Index", "file_name", "id"))
    label = chance.choice(("label", "class", "Finding Labels", "dx"))
    words, separator = [], chance.choice("|;,")
    if kind == "single":
        expected = [chance.choice(("cat", "dog", "Ü b")) for _ in names]
        header, rows = [image, label], [[name, cell] for name, cell in zip(written, expected)]
    elif kind == "multilabel":
        expected = [chance.sample(("mass", "edema", "nodule"), chance.randint(0, 3)) for _ in names]
        expected[0] = ["mass"]
        header = [image, label]
        rows = [[name, separator.join(labels)] for name, labels in zip(written, expected)]
        words = ["--targets", "multilabel", "--label_sep", separator]
    elif kind == "one-hot":
        columns = ["MEL", "NV", "BCC"]
        expected = [chance.choice(columns) for _ in names]
        header = [image, *columns]
        rows = [[name, *(f"{float(column == own)}" for column in columns)] for name, own in zip(written, expected)]
        words = ["--label_column", *columns]
    else:
        expected = [round(chance.uniform(-5, 5), 3) for _ in names]
        header, rows = [image, label], [[name, str(value)] for name, value in zip(written, expected)]
        words = ["--targets", "regression"]
    if chance.random() < 0.4:  # a further column
        header.append("Patient Age")
        rows = [[*row, str(chance.randint(20, 90))] for row in rows]
    _table(chance, root / "list.csv", header, rows)
    where = ["--dataset", "filelist", "--data_path", root / "data", "--train_list", root / "list.csv"]
    images = read_labelled(finetune_flags(*where, *words), True)
    assert [value_of(images.load(i)) for i in range(len(images))] == list(range(12))
    if kind == "regression":
        assert [target[0] for target in images.targets] == expected
    elif kind == "multilabel":
        assert [{images.classes[i] for i in target} for target in images.targets] == [
            set(labels) for labels in expected
        ]
    else:
        assert [images.classes[target] for target in images.targets] == expected


def scene(chance: Random, root: Path) -> None:
    """Images of one type and scale: without a flag they are refused or all lie in one range; with auto, the lowest is
    black and the highest white."""
    dtype = chance.choice((np.uint16, np.int32, np.float32))
    top = chance.choice((0.7, 1, 200, 255, 256, 400, 4095, 60_000, 70_000))
    low = 0 if dtype == np.uint16 or chance.random() < 0.7 else -chance.choice((1, 1024))
    top = min(max(top, 2 if dtype != np.float32 else 0), 65535 if dtype == np.uint16 else top)
    for i in range(chance.randint(1, 4)):
        values = np.random.RandomState(chance.randrange(1000)).uniform(low, top * chance.uniform(0.3, 1), (6, 5))
        values[0, 0], values[0, 1] = (low, top) if i == 0 else values[0, :2]
        Image.fromarray(values.astype(dtype)).save(root / f"{i}.tif")
    images = read_images(flags("--dataset", "folder", "--data_path", root), True)
    arrays = [np.asarray(Image.open(images.name(i))).astype(np.float64) for i in range(len(images))]
    args = flags()
    try:
        settle_pixel_range(args, images)
        low_end, high_end = limits(args.pixel_range or ["16bit"])
        assert all(low_end <= array.min() and array.max() <= high_end for array in arrays)
    except UserError as error:
        assert "--pixel_range LOW HIGH" in str(error) and dtype != np.uint16
        args = flags("--pixel_range", "auto")
        settle_pixel_range(args, images)
        low_end, high_end = args.pixel_range
        assert low_end == min(array.min() for array in arrays) and high_end == max(array.max() for array in arrays)
    transform = eval_transform((5, 5), (0.0,), (1.0,))
    dataset = KeyedDataset(images, transform, 0, 1, replace=False, pixel_range=args.pixel_range)
    for i, array in enumerate(arrays):
        shown = dataset[i].image[0].double().numpy()
        np.testing.assert_allclose(shown, ((array - low_end) / (high_end - low_end))[:5], atol=1e-6)  # float32


def strips(chance: Random, root: Path) -> None:
    """Long strips become ordinary inputs."""
    size = chance.choice((1, 2, 3)), chance.choice((1000, 20_000, 60_000))
    size = size if chance.random() < 0.5 else size[::-1]
    Image.frombytes("L", size, chance.randbytes(size[0] * size[1])).save(root / "x.png")
    images = read_images(flags("--dataset", "folder", "--data_path", root), True)
    sample = KeyedDataset(images, eval_transform((224, 224), (0.5,) * 3, (0.5,) * 3), 0, 3, replace=False)[0]
    assert sample.image.shape == (3, 224, 224) and not sample.bad


def shards(chance: Random, root: Path) -> None:
    """Shards whose names have dots, in folders, among other members."""
    expected, members = {}, {}
    labelled, prefix = chance.random() < 0.6, chance.choice(("", "./", "images/", "train/a.b/"))
    dots = chance.choice(("", "_2024.01.00", ".v2", ".seg", " (1).copy"))
    for i in range(8):
        key = f"{prefix}{i:03d}{dots}"
        file = io.BytesIO()
        Image.new("L", (8, 8), 10 * i).save(file, "PNG")
        members[f"{key}.{chance.choice(('png', 'PNG'))}"] = file.getvalue()
        if labelled:
            members[f"{key}.cls"] = str(i % 3).encode()
        for ending, content in (("json", b"{}"), ("txt", b"a caption")):
            if chance.random() < 0.3:
                members[f"{key}.{ending}"] = content
        if chance.random() < 0.2:
            members[f"{prefix}._{i:03d}{dots}.png"] = b"\0\5\x16\7"
        expected[10 * i] = i % 3 if labelled else -1
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    args = flags("--dataset", "wds", "--data_path", root, "--num_workers", 0)
    loader = build_loader(read_images(args, True), eval_transform((8, 8), (0.0,) * 3, (1.0,) * 3), args, 8, train=False)
    (batch,) = loader.begin(0)
    seen = {round(255 * image.mean().item()): target for image, target in zip(batch.image, batch.target.tolist())}
    assert seen == expected and not batch.bad.any()


METADATA = {
    "numpy": np.float64(0.5),
    "bool": np.bool_(True),
    "default": collections.defaultdict(list, {"a": [1]}),
    "ordered": collections.OrderedDict(b=2),
    "date": datetime.datetime(2024, 1, 2, 3, 4),
    "path": pathlib.PurePosixPath("a/b"),
    "flags": argparse.Namespace(lr=1e-3),
    "set": {1, 2},
}
PREFIXES = [
    "",
    "model.",
    "backbone.",
    "encoder.",
    "student.",
    "module.base_encoder.",
    "module.",
    "_orig_mod.",
    "module.model.",
]


def weights(chance: Random, root: Path) -> None:
    """An encoder below some prefix, beside harmless metadata."""
    with torch.random.fork_rng():
        torch.manual_seed(chance.randrange(1000))
        state = models_mae.build_model("mae_vit_micro_patch4", img_size=16).state_dict()
    encoder = {name: tensor for name, tensor in state.items() if "decoder" not in name and name != "mask_token"}
    prefix = chance.choice(PREFIXES)
    content = {
        chance.choice(("model", "state_dict", "teacher")): {prefix + key: value for key, value in encoder.items()}
    }
    content |= {name: METADATA[name] for name in chance.sample(sorted(METADATA), chance.randint(0, 4))}
    content["epoch"] = chance.choice((3, np.int64(3)))
    torch.save(content, root / "weights.pth")
    read = read_weights(str(root / "weights.pth")).state
    assert read.keys() == encoder.keys() and all(torch.equal(read[name], encoder[name]) for name in encoder)


KINDS = {kind.__name__: kind for kind in (folders, lists, scene, strips, shards, weights)}
