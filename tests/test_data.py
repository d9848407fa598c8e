"""Data: readers, image modes, corrupt files, random numbers per sample, batches of ranks and workers, transforms."""

import builtins
import math
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from PIL import Image
from timm.data.readers.shared_count import SharedCount
from torch.utils.data import IterableDataset, get_worker_info
from torchvision import transforms as tvt

import main_finetune
import main_pretrain
import util.loading
from util import transforms
from util.datasets import (
    IMAGENET,
    MEAN_STD,
    Arrays,
    Files,
    HuggingFaceImages,
    Images,
    build_dataset,
    input_size,
    mean_std,
    read_images,
)
from util.distributed import setup_for_distributed
from util.errors import UserError
from util.loading import EpochBatches, KeyedDataset, UnreadableData, build_loader
from util.rng import get_rng_state, sample_noise, seeded, set_rng_state

ROOT = Path(__file__).resolve().parent.parent
PLAIN = tvt.ToTensor()


def flags(*argv, size=32):
    args = main_pretrain.get_args_parser().parse_args([str(word) for word in argv])
    args.input_size = size
    return args


def finetune_flags(*argv, size=32):
    args = main_finetune.get_args_parser().parse_args([str(word) for word in argv])
    args.input_size, args.in_chans, args.aug = size, args.in_chans or 3, args.aug or "rrc"
    return args


def save(path, value=0, size=(8, 8)):
    """An image of one colour, lossless whatever the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def value_of(img) -> int:
    return img.convert("RGB").getpixel((0, 0))[0]


def contents(images) -> list[tuple[int, int]]:
    """(grey value, label) of every image."""
    return [(value_of(images.load(i)), images.targets[i]) for i in range(len(images))]


# Readers -------------------------------------------------------------------------------------------------------------


def class_folders(root, **classes):
    for name, values in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for value in values:
            save(root / name / f"{value:03d}.png", value)


@pytest.mark.parametrize("name", ["imagefolder", "torch/image_folder"])
def test_folders_of_classes_are_numbered_by_the_training_folder(tmp_path, name):
    class_folders(tmp_path / "train", cat=[1, 2], ant=[3], dog=[4])
    class_folders(tmp_path / "val", dog=[5], cat=[6])
    args = flags("--dataset", name, "--data_path", tmp_path)
    train, val = read_images(args, True), read_images(args, False)
    assert train.classes == val.classes == ["ant", "cat", "dog"]
    assert contents(train) == [(3, 0), (1, 1), (2, 1), (4, 2)]
    assert contents(val) == [(6, 1), (5, 2)]  # though val has no ants
    class_folders(tmp_path / "val", eel=[7])
    with pytest.raises(UserError, match="'eel'"):
        read_images(args, False)


def test_imagefolder_finds_nested_images_of_any_ending(tmp_path):
    save(tmp_path / "train" / "a" / "deep" / "er" / "1.BMP", 1)
    save(tmp_path / "train" / "b" / "2.tif", 2)
    (tmp_path / "train" / "b" / "notes.txt").write_text("no image")
    images = read_images(flags("--data_path", tmp_path), True)
    assert contents(images) == [(1, 0), (2, 1)]
    assert images.name(0).endswith("1.BMP")


def test_imagefolder_without_its_layout(tmp_path):
    with pytest.raises(UserError, match="needs --data_path"):
        read_images(flags(), True)
    with pytest.raises(UserError, match="is not a folder"):
        read_images(flags("--data_path", tmp_path / "nowhere"), True)
    with pytest.raises(UserError, match="no train/"):
        read_images(flags("--data_path", tmp_path), True)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        read_images(flags("--data_path", tmp_path), True)
    (tmp_path / "train" / "a").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        read_images(flags("--data_path", tmp_path), True)
    with pytest.raises(UserError, match="no val/"):
        read_images(flags("--data_path", tmp_path), False)


def test_folder(tmp_path):
    args = flags("--dataset", "folder", "--data_path", tmp_path)
    with pytest.raises(UserError, match="holds no images"):
        read_images(args, True)
    save(tmp_path / "b.png", 2)
    save(tmp_path / "a.png", 1)
    flat = read_images(args, True)
    assert contents(flat) == [(1, -1), (2, -1)] and flat.classes is None
    save(tmp_path / "sub" / "sub" / "c.png", 3)
    assert [value for value, _ in contents(read_images(args, True))] == [1, 2, 3]
    with pytest.raises(UserError, match="no val/"):
        read_images(args, False)
    save(tmp_path / "val" / "x" / "d.png", 4)
    save(tmp_path / "train" / "e.png", 5)
    assert contents(read_images(args, True)) == [(5, -1)]
    assert contents(read_images(args, False)) == [(4, -1)]


class Lists:
    def __init__(self, root):
        self.root = root
        for value in range(8):
            save(root / "pictures" / f"{value}.png", value)

    def read(self, train: bool, train_rows=None, val_rows=None):
        argv = ["--dataset", "filelist", "--data_path", self.root / "pictures"]
        for name, rows in (("train_list", train_rows), ("val_list", val_rows)):
            if rows is not None:
                (self.root / name).write_text("\n".join(rows) + "\n\n")
                argv += [f"--{name}", self.root / name]
        return read_images(flags(*argv), train)


def test_filelist(tmp_path):
    lists = Lists(tmp_path)
    unlabelled = lists.read(True, ["3.png", "1.png"])
    assert contents(unlabelled) == [(3, -1), (1, -1)] and unlabelled.classes is None
    rows = ["0.png\t10", "1.png\t9", "2.png\t10", "3.png\t2"]
    train = lists.read(True, rows)
    assert train.classes == ["2", "9", "10"]  # as numbers, not as words
    assert contents(train) == [(0, 2), (1, 1), (2, 2), (3, 0)]
    val = lists.read(False, rows, [f"{tmp_path}/pictures/4.png\t10"])  # an absolute path is taken as it is
    assert contents(val) == [(4, 2)] and val.classes == train.classes
    words = lists.read(True, ["0.png\tzebra", "1.png\t7", "2.png\tant", "3.png\t07"])
    assert words.classes == ["07", "7", "ant", "zebra"]


@pytest.mark.parametrize(
    ("rows", "train", "message"),
    [
        ((["0.png\ta", "1.png"], None), True, "mixes lines"),
        ((["0.png\ta\tb"], None), True, "several tabs"),
        (([], None), True, "is empty"),
        ((None, None), True, "needs --train_list"),
        ((["0.png\ta"], ["1.png\tb"]), False, "'b'"),
        ((["0.png"], ["1.png\tb"]), False, "'b'"),
        ((["0.png\ta"], None), False, "none is no file"),
    ],
)
def test_filelist_refuses(tmp_path, rows, train, message):
    with pytest.raises(UserError, match=message):
        Lists(tmp_path).read(train, *rows)


def test_tiny_imagenet(tmp_path):
    for wnid, value in (("n02", 2), ("n01", 1)):
        save(tmp_path / "train" / wnid / "images" / f"{wnid}_0.png", value)
        (tmp_path / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    args = flags("--dataset", "tiny_imagenet", "--data_path", tmp_path)
    assert contents(read_images(args, True)) == [(1, 0), (2, 1)]
    with pytest.raises(UserError, match=r"val_annotations\.txt is missing"):
        read_images(args, False)
    for name, value in (("val_0.png", 7), ("val_1.png", 8), ("val_2.png", 9)):
        save(tmp_path / "val" / "images" / name, value)
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text("val_1.png\tn02\t0\t0\t62\t62\nval_0.png\tn01\t1\t2\t3\t4\nval_2.png\tn02\t1\t2\t3\t4\n")
    val = read_images(args, False)
    assert contents(val) == [(8, 1), (7, 0), (9, 1)] and val.classes == ["n01", "n02"]
    annotations.write_text("val_1.png\tn03\t0\t0\t62\t62\n")
    with pytest.raises(UserError, match="n03"):
        read_images(args, False)
    annotations.unlink()
    for value, wnid in ((3, "n02"), (4, "n02")):  # a copy that somebody has sorted
        save(tmp_path / "sorted" / wnid / f"{value}.png", value)
    (tmp_path / "val").rename(tmp_path / "old")
    (tmp_path / "sorted").rename(tmp_path / "val")
    assert contents(read_images(args, False)) == [(3, 1), (4, 1)]


def test_digits():
    args = flags("--dataset", "digits")
    train, val = read_images(args, True), read_images(args, False)
    assert (len(train), len(val)) == (1437, 360)
    from sklearn.datasets import load_digits

    everything = load_digits()
    key = [picture.tobytes() for picture in (everything.images * 255 / 16).round().astype(np.uint8)]
    ours = [picture.tobytes() for split in (train, val) for picture in split.arrays]
    assert len(set(key)) == 1797 and sorted(ours) == sorted(key)  # so the splits are disjoint and nothing is lost
    label = dict(zip(key, everything.target.tolist()))
    assert [label[picture] for picture in ours] == train.targets + val.targets
    fair = np.bincount(everything.target) * 360 / 1797
    assert np.abs(np.bincount(val.targets) - fair).max() < 1  # as close as whole images come
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = read_images(flags("--dataset", "digits", "--seed", 9), True)
    assert (again.arrays == train.arrays).all() and again.targets == train.targets


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "torch/cifar10"])
def test_cifar(tmp_path, monkeypatch, name):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    hundred = name == "cifar100"
    folder = tmp_path / ("cifar-100-python" if hundred else "cifar-10-batches-py")
    folder.mkdir()
    labels = "fine_labels" if hundred else "labels"
    names = [f"class {i}" for i in range(100 if hundred else 10)]
    (folder / ("meta" if hundred else "batches.meta")).write_bytes(
        pickle.dumps({"fine_label_names" if hundred else "label_names": names})
    )
    batches = ["train", "test"] if hundred else [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for number, batch in enumerate(batches):
        data = np.zeros((2, 3, 32, 32), np.uint8)
        data[:, 1], data[:, 2, 3, 5] = number, 200  # plane 1 is green; row 3, column 5 is blue
        entry = {"data": data.reshape(2, -1), labels: [number, 9]}
        (folder / batch).write_bytes(pickle.dumps(entry))
    args = flags("--dataset", name, "--data_path", tmp_path)
    train, val = read_images(args, True), read_images(args, False)
    assert len(train) == 2 * (len(batches) - 1) and len(val) == 2
    assert train.classes == val.classes == names
    assert val.targets == [len(batches) - 1, 9] and train.targets[:2] == [0, 9]
    img = val.load(0)
    assert img.getpixel((0, 0)) == (0, len(batches) - 1, 0) and img.getpixel((5, 3))[2] == 200


def test_cifar_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"does not hold cifar-10-batches-py.*--download"):
        read_images(flags("--dataset", "cifar10", "--data_path", tmp_path), True)


@pytest.mark.parametrize("name", ["imagnet", "hdfs/imagenet-1k", "image/folder"])
def test_unknown_dataset_lists_the_known_ones(tmp_path, name):
    class_folders(tmp_path / "train", a=[1])  # timm would read this folder whatever stands before the slash
    for argv in ([], ["--data_path", tmp_path]):
        with pytest.raises(UserError) as error:
            read_images(flags("--dataset", name, *argv), True)
        for known in ("imagefolder", "filelist", "cifar100", "tiny_imagenet", "digits", "wds", "hfds/..."):
            assert known in str(error.value)


@pytest.mark.parametrize("name", ["torch/no_such_set", "torch/cifar10", "wds/nothing", "tfds/nothing", "hfds/nothing"])
def test_factory_names_that_cannot_be_opened(tmp_path, name, monkeypatch):
    for module in ("datasets", "tensorflow", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed, so that nothing asks the network
    with pytest.raises(UserError, match=name):
        read_images(flags("--dataset", name, "--data_path", tmp_path), True)
    if name[:3] in ("tor", "wds"):
        with pytest.raises(UserError, match="needs --data_path"):
            read_images(flags("--dataset", name), True)


class Table:
    """What `HuggingFaceImages` uses of a `datasets.Dataset`."""

    def __init__(self, rows):
        self.rows, self.column_names = rows, list(rows[0])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


@pytest.mark.parametrize("labelled", [True, False])
def test_hugging_face_table(tmp_path, labelled):
    save(tmp_path / "x.png", 5)
    rows = [
        {"image": {"bytes": (tmp_path / "x.png").read_bytes(), "path": "in the table"}, "label": 1},
        {"image": {"bytes": None, "path": str(tmp_path / "x.png")}, "label": 0},
        {"image": {"bytes": b"no image", "path": "broken"}, "label": 0},
    ]
    rows = rows if labelled else [{"image": row["image"]} for row in rows]
    mapping = {"second": 1, "first": 0} if labelled else {}
    images = HuggingFaceImages(
        SimpleNamespace(dataset=Table(rows), image_key="image", label_key="label", class_to_idx=mapping)
    )
    assert images.targets == ([1, 0, 0] if labelled else [-1] * 3)  # known without reading an image
    assert images.classes == (["first", "second"] if labelled else None)
    assert [value_of(images.load(i)) for i in (0, 1)] == [5, 5]
    with pytest.raises(OSError):
        images.load(2)
    assert "broken" in images.name(2)


# Streams -------------------------------------------------------------------------------------------------------------


class Reader:
    """Behaves like timm's streaming readers: sets itself up at its first use, keeps to its worker's and rank's part."""

    def __init__(self, count):
        self.num_samples, self.order, self.worker_seed = count, None, 0
        self.dist_rank, self.dist_num_replicas, self.epoch = 0, 1, SharedCount()

    def __iter__(self):
        if self.order is None:
            info = get_worker_info()
            worker, workers = (info.id, info.num_workers) if info else (0, 1)
            part = range(self.dist_rank * workers + worker, self.num_samples, self.dist_num_replicas * workers)
            self.order = list(part)
            self.shuffle = random.Random(info.seed if info else self.worker_seed)
        self.shuffle.shuffle(self.order)
        for value in self.order:
            yield Image.new("RGB", (8, 8), (value,) * 3), value


class Stream(IterableDataset):
    def __init__(self, count):
        self.reader = Reader(count)

    def __iter__(self):
        return iter(self.reader)

    def __len__(self):
        return math.ceil(self.reader.num_samples / self.reader.dist_num_replicas)

    def set_epoch(self, epoch):
        self.reader.epoch.value = epoch


def stream_loader(workers, train=True, batch=4, count=22):
    transform = tvt.Compose([tvt.ToTensor(), lambda x: torch.cat([x, torch.rand_like(x[:1])])])
    return build_loader(Stream(count), transform, flags("--num_workers", workers), batch, train)


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_gives_each_sample_once(workers):
    loader = stream_loader(workers)
    epochs = [list(loader.begin(epoch)) for epoch in (0, 1)]
    for batches in epochs:
        assert len(batches) == len(loader) == 5  # 22 in batches of 4, though both workers end with a part of one
        assert all(len(batch.target) == 4 for batch in batches)
        labels = torch.cat([batch.target for batch in batches]).tolist()
        assert len(set(labels)) == 20 and labels != sorted(labels)
        values = torch.cat([batch.image[:, 0, 0, 0] for batch in batches]) * 255
        assert values.round().int().tolist() == labels
        indices = torch.cat([batch.index for batch in batches]).tolist()
        assert len(set(indices)) == 20
    assert not torch.equal(epochs[0][0].target, epochs[1][0].target)
    # A run that resumes inside epoch 1 sees what the uninterrupted one saw, random numbers included.
    for ours, theirs in zip(list(stream_loader(workers).begin(1, 2)), epochs[1][2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.parametrize("workers", [0, 2])
def test_stream_evaluation_is_complete(workers):
    loader = stream_loader(workers, train=False)
    batches = list(loader.begin(0))
    assert len(batches) == len(loader) == 6
    assert sorted(torch.cat([batch.target for batch in batches]).tolist()) == list(range(22))


def test_stream_of_several_ranks(monkeypatch):
    """Length is that of one rank's share; the reader learns its rank even if it was made before the ranks met."""
    seen = []
    for rank in range(2):
        monkeypatch.setattr(util.loading, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(util.loading, "get_world_size", lambda: 2)
        loader = stream_loader(0)
        batches = list(loader.begin(0))
        assert len(batches) == len(loader) == 2  # 22 // (2 * 4)
        seen += torch.cat([batch.target for batch in batches]).tolist()
    assert len(set(seen)) == 16


# Image modes ---------------------------------------------------------------------------------------------------------


def grey_of(r, g, b) -> int:
    """ITU-R 601 luma."""
    return round(0.299 * r + 0.587 * g + 0.114 * b)


def two_pixels(mode, first, second):
    img = Image.new(mode, (2, 1))
    img.putpixel((0, 0), first)
    img.putpixel((1, 0), second)
    return img


def palette(transparent: bool):
    img = Image.new("P", (2, 1))
    img.putpalette([10, 20, 30, 200, 100, 50])
    img.putpixel((1, 0), 1)
    if transparent:
        img.info["transparency"] = bytes([0, 128])
    return img


DARK, BRIGHT = (10, 20, 30), (200, 100, 50)
# name: file ending, picture, (R, G, B, A) of its two pixels
MODES = {
    "L": ("png", two_pixels("L", 7, 250), (7, 7, 7, 255), (250, 250, 250, 255)),
    "RGB": ("png", two_pixels("RGB", DARK, BRIGHT), (*DARK, 255), (*BRIGHT, 255)),
    "P": ("png", palette(False), (*DARK, 255), (*BRIGHT, 255)),
    "P transparent": ("png", palette(True), (*DARK, 0), (*BRIGHT, 128)),
    "RGBA": ("png", two_pixels("RGBA", (*DARK, 0), (*BRIGHT, 77)), (*DARK, 0), (*BRIGHT, 77)),
    "LA": ("png", two_pixels("LA", (7, 0), (250, 99)), (7, 7, 7, 0), (250, 250, 250, 99)),
    "CMYK": (
        "tif",
        two_pixels("CMYK", (245, 235, 225, 0), (0, 0, 0, 51)),
        (10, 20, 30, 255),
        (204, 204, 204, 255),
    ),
    "1": ("png", two_pixels("1", 0, 1), (0, 0, 0, 255), (255, 255, 255, 255)),
    "I;16": ("png", Image.fromarray(np.array([[7 * 257, 65535]], np.uint16)), (7, 7, 7, 255), (255,) * 4),
    "I;16 dark": ("png", Image.fromarray(np.array([[0, 200]], np.uint16)), (0, 0, 0, 255), (1, 1, 1, 255)),
    "I of 16 bits": ("tif", Image.fromarray(np.array([[7 * 257, 40000]], np.int32)), (7,) * 3 + (255,), None),
    "I of 8 bits": ("tif", Image.fromarray(np.array([[7, 250]], np.int32)), (7, 7, 7, 255), (250,) * 3 + (255,)),
    "F of 0..1": ("tif", Image.fromarray(np.array([[0.2, 1.0]], np.float32)), (51, 51, 51, 255), (255,) * 4),
    "F of 0..255": ("tif", Image.fromarray(np.array([[51, 250]], np.float32)), (51,) * 3 + (255,), (250,) * 3 + (255,)),
}


@pytest.mark.parametrize("name", list(MODES))
def test_every_mode_arrives_with_its_values(tmp_path, name):
    ending, picture, first, second = MODES[name]
    second = second or (round(40000 / 257),) * 3 + (255,)
    path = tmp_path / f"x.{ending}"
    picture.save(path)
    with Image.open(path) as stored:
        assert stored.mode == name.split()[0] and ("transparency" in stored.info) == ("transparent" in name)
    for channels in (1, 2, 3, 4):
        args = flags("--in_chans", channels)
        sample = KeyedDataset(Files([str(path)], [0], None), PLAIN, args)[0]
        assert sample.bad == 0 and sample.image.shape == (channels, 1, 2)
        for got, (*colour, alpha) in zip((sample.image[:, 0, :].T * 255).round().int().tolist(), (first, second)):
            grey = grey_of(*colour)
            assert got == {1: [grey], 2: [grey, alpha], 3: colour, 4: [*colour, alpha]}[channels]


def test_channels_are_checked():
    for channels in (1, 2, 3, 4):
        transforms.check_channels(channels)
    for channels in (0, 5):
        with pytest.raises(UserError, match=f"--in_chans {channels}"):
            transforms.check_channels(channels)


# Corrupt images ------------------------------------------------------------------------------------------------------

BROKEN = ("truncated.jpg", "empty.png", "text.jpg", "broken.png")


def corrupt_folder(root):
    """20 good images of value 10 * i, and after them four that cannot be read."""
    for i in range(20):
        save(root / f"a{i:02d}.png", 10 * i)
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 255, (32, 32, 3), np.uint8))
    noise.save(root / "truncated.jpg")
    noise.save(root / "broken.png")
    for name in ("truncated.jpg", "broken.png"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[: len(whole) // 2])
    chunk = bytearray((root / "broken.png").read_bytes())
    chunk[45:60] = b"\xff" * 15  # and its first pixels are no zlib stream
    (root / "broken.png").write_bytes(bytes(chunk))
    (root / "empty.png").write_bytes(b"")
    (root / "text.jpg").write_text("404: not found")
    return flags("--dataset", "folder", "--data_path", root)


def with_draw(img):
    """The image's value, and the first random number that the transform gets."""
    return torch.cat([PLAIN(img).flatten()[:1], torch.rand(1)])


def test_corrupt_training_images_are_replaced_by_the_same_draw(tmp_path, capfd):
    args = corrupt_folder(tmp_path)
    images = read_images(args, True)
    assert len(images) == 24
    seen = {}
    for workers in (0, 2):
        args.num_workers = workers
        loader = build_loader(images, with_draw, args, 6, train=True)
        for epoch in (0, 1):
            batches = list(loader.begin(epoch))
            rows = zip(*(torch.cat([batch[i] for batch in batches]).tolist() for i in (0, 2, 3)))
            seen[workers, epoch] = {index: (*image, bad) for image, index, bad in rows}
        log = capfd.readouterr().err
        for name in BROKEN:
            assert f"unreadable image {tmp_path}/{name}: " in log
        for name, _, bad in ((images.name(i), *seen[workers, 0][i][1:]) for i in range(24)):
            assert (bad > 0) == name.endswith(BROKEN)
        complaints = sum(bad for epoch in (0, 1) for *_, bad in seen[workers, epoch].values())
        assert complaints == log.count("unreadable image")  # what is named is what is counted
    assert seen[0, 0] == seen[2, 0] and seen[0, 1] == seen[2, 1]
    allowed = {round(10 * i / 255, 4) for i in range(20)}
    assert {round(value, 4) for value, *_ in seen[0, 0].values()} <= allowed
    assert [seen[0, 0][i][0] for i in range(20, 24)] != [seen[0, 1][i][0] for i in range(20, 24)]


def test_corrupt_test_images_are_left_out(tmp_path, capfd):
    args = corrupt_folder(tmp_path)
    args.num_workers = 0
    images = read_images(args, True)
    loader = build_loader(images, tvt.Compose([tvt.Resize((8, 8)), PLAIN]), args, 7, train=False)
    batches = list(loader.begin(0))
    bad = torch.cat([batch.bad for batch in batches])
    index = torch.cat([batch.index for batch in batches])
    assert index.tolist() == list(range(24))
    assert [images.name(i).endswith(BROKEN) for i in index] == bad.bool().tolist() and int(bad.sum()) == 4
    assert torch.cat([batch.image for batch in batches])[bad == 1].abs().max() == 0  # no other image in its place
    assert capfd.readouterr().err.count("unreadable image") == 4


class Unreadable(Images):
    """Ten images, none of which can be read."""

    def __init__(self):
        self.targets = [0] * 10

    def load(self, index):
        raise OSError("gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_twenty_unreadable_images_in_a_row_end_it(workers, capfd):
    loader = build_loader(Unreadable(), PLAIN, flags("--num_workers", workers), 1, train=True)
    batches = iter(loader.begin(0))
    with pytest.raises(UnreadableData, match="20 images in a row") as error:
        next(batches)
    if workers:
        batches._shutdown_workers()
    named = [line for line in capfd.readouterr().err.splitlines() if line.startswith("unreadable image")]
    assert len(named[:20]) == 20
    if workers == 0:
        last = named[-1].removeprefix("unreadable image ").removesuffix(": gone")
        assert len(named) == 20 and str(error.value).endswith(f"the last one {last}")


ABANDONED = """
import sys
from types import SimpleNamespace
for name in ("util.datasets", "util.transforms"):  # take seconds to import and are not needed
    sys.modules[name] = SimpleNamespace(Images=object, to_channels=None)
from torch.utils.data import Dataset
from util.loading import Loader
class Numbers(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, key):
        return key
batches = iter(Loader(Numbers(), SimpleNamespace(num_workers=1, pin_mem=False, seed=0), 2, shuffle=True))
next(batches)
print("reading", flush=True)
"""


def test_workers_end_with_a_process_that_still_holds_them():
    """They survive a SIGTERM, by which python would end them."""
    process = subprocess.Popen([sys.executable, "-c", ABANDONED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "reading\n"
    process.wait(timeout=15)
    assert process.returncode == 0


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mistake", [ValueError, OSError])
def test_a_mistake_in_a_transform_is_no_unreadable_image(train, mistake, capfd):
    def transform(img):
        raise mistake("a bug")

    images = Arrays(np.zeros((4, 8, 8), np.uint8), [0] * 4, ["a"])
    with pytest.raises(mistake, match="a bug"):
        next(iter(build_loader(images, transform, flags("--num_workers", 0), 2, train)))
    assert "unreadable" not in capfd.readouterr().err


def test_unreadable_images_are_named_on_every_rank(monkeypatch, capfd):
    monkeypatch.setattr(builtins, "print", builtins.print)  # put back afterwards
    setup_for_distributed(is_master=False)
    print("silenced")
    sample = KeyedDataset(Unreadable(), PLAIN, flags(), replace=False)[3]
    assert sample.bad == 1
    output = capfd.readouterr()
    assert "unreadable image image 3: gone" in output.err and "silenced" not in output.out + output.err


# Random numbers per sample -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    arrays = np.random.RandomState(0).randint(0, 255, (26, 32, 32, 3), np.uint8)
    return Arrays(arrays, range(26), [str(i) for i in range(26)])


def global_states():
    _, keys, *rest = np.random.get_state()
    return random.getstate(), keys.tolist(), rest, torch.get_rng_state().tolist()


def augmentation(name):
    if name == "randaugment":
        args = finetune_flags("--aa", "rand-m9-mstd0.5-inc1", "--reprob", 0.5)
        return transforms.finetune_transform(args, (32, 32), *IMAGENET), args
    return transforms.pretrain_transform(name, (32, 32), *IMAGENET), flags()


def batches_of(pictures, name, workers, seed=0):
    transform, args = augmentation(name)
    args.num_workers, args.seed = workers, seed
    return build_loader(pictures, transform, args, 4, train=True)


def same(ours, theirs) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for one, other in zip(ours, theirs) for a, b in zip(one, other)
    )


@pytest.mark.parametrize("name", ["mae", "crop", "three", "randaugment"])
def test_images_belong_to_seed_epoch_and_index(pictures, name):
    here, there = batches_of(pictures, name, 0), batches_of(pictures, name, 2)
    epochs = [list(here.begin(epoch)) for epoch in (0, 1)]
    # Neither the number of workers, nor what this process draws meanwhile, nor where one begins matters.
    ours = []
    for batch in there.begin(0):
        random.random(), np.random.rand(3), torch.rand(5)
        ours.append(batch)
    assert same(ours, epochs[0])
    assert same(list(there.begin(1, 3)), epochs[1][3:])
    resumed = iter(there.begin(0, 2))  # and left in the middle, with batches under way
    next(resumed)
    assert same(list(there.begin(1)), epochs[1])
    # Same image, other epoch or seed: other pixels.
    first, second = (
        dict(zip(torch.cat([b.index for b in e]).tolist(), torch.cat([b.image for b in e]))) for e in epochs
    )
    both = first.keys() & second.keys()
    assert len(both) > 20
    assert sum(torch.equal(first[i], second[i]) for i in both) <= (2 if name == "crop" else 0)  # 162 crops in all
    order = [torch.cat([batch.index for batch in e]).tolist() for e in epochs]
    assert order[0] != order[1]
    assert not same(list(batches_of(pictures, name, 0, seed=1).begin(0)), epochs[0])


@pytest.mark.parametrize("name", ["mae", "three", "randaugment"])
def test_reading_leaves_the_global_generators_alone(pictures, name):
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    before = global_states()
    images = list(batches_of(pictures, name, 0).begin(0))
    assert global_states() == before
    random.seed(4), np.random.seed(4), torch.manual_seed(4)
    assert same(list(batches_of(pictures, name, 0).begin(0)), images)


def test_seeded_puts_the_states_back_after_an_error():
    before = global_states()
    with pytest.raises(KeyError), seeded(1, 2, 3):
        random.random(), np.random.rand(), torch.rand(1)
        raise KeyError
    assert global_states() == before


def test_every_word_of_a_seed_counts():
    draws = set()
    for words in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0)):
        with seeded(*words):
            draws.add((random.random(), np.random.rand(), torch.rand(1).item()))
    assert all(len({draw[i] for draw in draws}) == 6 for i in range(3))


def test_rng_state_survives_a_checkpoint(tmp_path):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    random.gauss(0, 1), np.random.randn()  # both keep a second Gaussian for the next call
    torch.save(get_rng_state(torch.device("cpu")), tmp_path / "state")
    draw = lambda: (random.gauss(0, 1), np.random.randn(), np.random.rand(), torch.rand(2).tolist())  # noqa: E731
    expected = draw()
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    set_rng_state(torch.load(tmp_path / "state", weights_only=True), torch.device("cpu"))
    assert draw() == expected


# Batches -------------------------------------------------------------------------------------------------------------


def rank_batches(monkeypatch, world, length, size, shuffle, epoch=0, start=0):
    ranks = []
    for rank in range(world):
        monkeypatch.setattr(util.loading, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(util.loading, "get_world_size", lambda: world)
        sampler = EpochBatches(length, size, seed=5, shuffle=shuffle)
        sampler.set_epoch(epoch, start)
        ranks.append(list(sampler))
        assert len(ranks[-1]) == len(sampler) - start
    return ranks


@pytest.mark.parametrize("length", [48, 53, 71])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_global_batch(monkeypatch, world, length):
    (single,) = rank_batches(monkeypatch, 1, length, 12, True, epoch=3)
    ranks = rank_batches(monkeypatch, world, length, 12 // world, True, epoch=3)
    assert len(single) == length // 12  # the last part of a batch is dropped
    assert {epoch for batch in single for epoch, _ in batch} == {3}
    indices = [index for batch in single for _, index in batch]
    assert len(set(indices)) == len(indices) and set(indices) <= set(range(length)) and indices != sorted(indices)
    for k, batch in enumerate(single):
        parts = [rank[k] for rank in ranks]
        assert all(len(part) == 12 // world for part in parts)
        assert sorted(key for part in parts for key in part) == sorted(batch)
    assert [rank[2:] for rank in ranks] == rank_batches(monkeypatch, world, length, 12 // world, True, 3, start=2)


@pytest.mark.parametrize("length", [1, 23, 24, 25])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_sees_every_index_once(monkeypatch, world, length):
    ranks = rank_batches(monkeypatch, world, length, 3, False)
    indices = [index for rank in ranks for batch in rank for _, index in batch]
    assert sorted(indices) == list(range(length))
    assert max(map(len, ranks)) == math.ceil(math.ceil(length / world) / 3)


def test_orders_differ_between_epochs_and_seeds():
    def order(seed, epoch):
        sampler = EpochBatches(40, 4, seed)
        sampler.set_epoch(epoch)
        return tuple(index for batch in sampler for _, index in batch)

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16
    assert order(1, 2) == order(1, 2)


def test_fewer_samples_than_one_batch(pictures, monkeypatch):
    args = flags("--num_workers", 0)
    build_loader(pictures, PLAIN, args, 26, train=True)
    with pytest.raises(UserError, match="26 images, fewer than one batch of 27"):
        build_loader(pictures, PLAIN, args, 27, train=True)
    assert len(list(build_loader(pictures, PLAIN, args, 27, train=False))) == 1
    monkeypatch.setattr(util.loading, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match=r"batch of 28 .*2 process"):
        build_loader(pictures, PLAIN, args, 14, train=True)


# Noise of the masks --------------------------------------------------------------------------------------------------


def test_noise_belongs_to_the_sample():
    indices = torch.tensor([7, 0, 123456, 7, 3])
    noise = sample_noise(1, 2, indices, 50)
    assert noise.shape == (5, 50) and noise.dtype == torch.float32
    assert noise.min() >= 0 and noise.max() < 1
    for row, index in zip(noise, indices):
        assert torch.equal(row, sample_noise(1, 2, index[None], 50)[0])
    assert torch.equal(sample_noise(1, 2, indices.flip(0), 50), noise.flip(0))
    assert torch.equal(sample_noise(1, 2, indices.to(torch.int32), 50), noise)
    assert torch.equal(sample_noise(1, 2, indices, 20), noise[:, :20])
    far = indices + 2**32  # indices of streams may be large
    assert not torch.equal(sample_noise(1, 2, far, 50), noise)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_is_the_same_on_a_gpu():
    indices = torch.arange(1000)
    assert torch.equal(sample_noise(3, 4, indices.cuda(), 196).cpu(), sample_noise(3, 4, indices, 196))


@pytest.mark.parametrize("seed", [0, 1, 2**31])
def test_noise_is_uniform(seed):
    values = sample_noise(seed, 3, torch.arange(1000), 100).flatten().double()
    count = len(values)
    ordered = values.sort().values
    distance = (ordered - torch.arange(count) / count).abs().max().item()
    assert distance < 2.2 / math.sqrt(count)  # Kolmogorov-Smirnov: chance 1e-4
    for part in (values, values * 2**8 % 1, values * 2**16 % 1):  # high, middle and low bits
        observed = torch.histc(part, 256, 0, 1)
        chi2 = ((observed - count / 256) ** 2 / (count / 256)).sum().item()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)  # five standard deviations
    ties = count - len(values.unique())
    expected = count**2 / 2 / 2**24  # 24 bits: pairs / number of values
    assert ties < expected + 5 * math.sqrt(expected)


def correlation(a, b) -> float:
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].item()


def test_noise_of_neighbours_is_uncorrelated():
    indices = torch.arange(1001)
    base = sample_noise(5, 6, indices, 100)
    pairs = {
        "index": (base[:-1], base[1:]),
        "index, far": (base[:-1], sample_noise(5, 6, indices + 2**32, 100)[:-1]),
        "patch": (base[:, :-1], base[:, 1:]),
        "index and patch": (base[:-1, 1:], base[1:, :-1]),
        "epoch": (base, sample_noise(5, 7, indices, 100)),
        "seed": (base, sample_noise(6, 6, indices, 100)),
        "stream": (base, sample_noise(5, 6, indices, 100, stream=1)),
        "seed and epoch swapped": (base, sample_noise(6, 5, indices, 100)),
        "epoch and index": (base[1:], sample_noise(5, 7, indices, 100)[:-1]),
        "stream and epoch": (sample_noise(5, 7, indices, 100), sample_noise(5, 6, indices, 100, stream=1)),
    }
    for name, (a, b) in pairs.items():
        # The correlation of n independent pairs has deviation 1 / sqrt(n): five of them. Squares see what signs hide.
        bound = 5 / math.sqrt(a.numel())
        assert abs(correlation(a, b)) < bound, name
        assert abs(correlation((a - 0.5) ** 2, (b - 0.5) ** 2)) < bound, name


def test_every_patch_is_masked_equally_often():
    samples, patches, keep = 8000, 64, 16
    kept = sample_noise(0, 0, torch.arange(samples), patches).argsort(dim=1)[:, :keep]
    counts = torch.bincount(kept.flatten(), minlength=patches).double()
    deviation = math.sqrt(samples * keep / patches * (1 - keep / patches))
    assert (counts - samples * keep / patches).abs().max() < 4.5 * deviation


# Transforms ----------------------------------------------------------------------------------------------------------

NO_NORM = ((0.0,) * 3, (1.0,) * 3)


def noise_image(width, height, mode="RGB"):
    values = np.random.RandomState(1).randint(1, 255, (height, width, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def crops(monkeypatch, transform, img, count):
    """(top, left, height, width) of the resized crops that `transform` makes."""
    made = []
    original = tvt.functional.resized_crop

    def resized_crop(img, *box_and_rest, **more):
        made.append(box_and_rest)
        return original(img, *box_and_rest, **more)

    monkeypatch.setattr(tvt.functional, "resized_crop", resized_crop)
    for i in range(count):
        with seeded(i):
            transform(img)
    assert len(made) == count
    assert all(tuple(size) == (32, 32) and mode is tvt.InterpolationMode.BICUBIC for *_, size, mode in made)
    return np.array([box[:4] for box in made])


@pytest.mark.parametrize(("smallest", "kind"), [(0.2, "mae"), (0.2, "three"), (0.08, "rrc")])
def test_resized_crops_cover_the_area_that_the_paper_says(monkeypatch, smallest, kind):
    make = transforms.probe_transform if kind == "rrc" else transforms.pretrain_transform
    boxes = crops(monkeypatch, make(kind, (32, 32), *NO_NORM), noise_image(200, 200), 300)
    areas = boxes[:, 2] * boxes[:, 3] / 200**2
    shapes = boxes[:, 3] / boxes[:, 2]
    assert smallest - 0.005 < areas.min() < smallest + 0.05 and 0.9 < areas.max() <= 1  # sides are whole pixels
    assert 0.73 < shapes.min() < 0.8 and 1.25 < shapes.max() < 1.36
    assert (boxes[:, :2].min(axis=0) == 0).all() and (boxes[:, :2] > 20).any(axis=0).all()


def test_flips_half_of_the_time():
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))).convert("RGB")
    for transform in (
        transforms.pretrain_transform("mae", (32, 32), *NO_NORM),
        transforms.pretrain_transform("crop", (32, 32), *NO_NORM),
        transforms.probe_transform("rrc", (32, 32), *NO_NORM),
        transforms.finetune_transform(finetune_flags("--aa", "", "--reprob", 0), (32, 32), *NO_NORM),
    ):
        flipped = 0
        for i in range(200):
            with seeded(i):
                middle = transform(ramp)[0, 16]
                flipped += bool(middle[14] > middle[18])
        assert abs(flipped - 100) < 5 * math.sqrt(50)


def test_crop_pads_by_an_eighth():
    """Pixels are numbered from one, so that the place of every crop can be read off; padding is zero."""
    numbers = np.arange(1, 1025, dtype=np.int64).reshape(32, 32)
    img = Image.fromarray(np.stack([numbers // 256, numbers % 256, numbers * 0 + 1], -1).astype(np.uint8))
    padded = np.pad(numbers, 4)
    windows = {}
    for dy in range(9):
        for dx in range(9):
            window = padded[dy : dy + 32, dx : dx + 32]
            windows[window.tobytes()] = windows[window[:, ::-1].tobytes()] = (dy - 4, dx - 4)
    places = set()
    for make in (transforms.pretrain_transform, transforms.probe_transform):
        transform = make("crop", (32, 32), *NO_NORM)
        for i in range(150):
            with seeded(i):
                high, low, inside = (transform(img) * 255).round().long().numpy()
            places.add(windows[((high * 256 + low) * inside).tobytes()])
    assert {dy for dy, _ in places} == {dx for _, dx in places} == set(range(-4, 5))


@pytest.mark.parametrize("channels", [1, 3])
def test_three_augment_takes_one_of_three(monkeypatch, channels):
    used = []
    operations = [
        (tvt.Grayscale, "forward"),
        (transforms.Solarization, "__call__"),
        (transforms.GaussianBlur, "__call__"),
    ]

    def counted(kind, original):
        def call(self, img):
            used.append(kind)
            return original(self, img)

        return call

    for kind, method in operations:
        monkeypatch.setattr(kind, method, counted(kind, getattr(kind, method)))
    jitters = []
    monkeypatch.setattr(tvt.ColorJitter, "forward", lambda self, img: (jitters.append(self), img)[1])
    transform = transforms.pretrain_transform("three", (32, 32), (0.0,) * channels, (1.0,) * channels)
    img = noise_image(32, 32, "L" if channels == 1 else "RGB")
    for i in range(300):
        with seeded(i):
            assert transform(img).shape == (channels, 32, 32)
        assert len(used) == len(jitters) == i + 1
    assert all(abs(used.count(kind) - 100) < 5 * math.sqrt(300 * 2 / 9) for kind, _ in operations)
    assert jitters[0].brightness == jitters[0].contrast == jitters[0].saturation == (0.7, 1.3)


def test_solarization_and_blur():
    ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    solarized = np.asarray(transforms.Solarization()(ramp))[0].astype(int)
    assert solarized.tolist() == [v if v < 128 else 255 - v for v in range(256)]
    edge = Image.fromarray(np.repeat([[0, 255]], 32, axis=1).astype(np.uint8).repeat(8, axis=0))
    widths = set()
    for i in range(50):
        with seeded(i):
            row = np.asarray(transforms.GaussianBlur()(edge))[4].astype(int)
        assert (np.diff(row) >= 0).all()
        widths.add(int(((row > 2) & (row < 253)).sum()))
    assert min(widths) <= 2 and 6 <= max(widths) <= 16  # radii from 0.1 to 2 pixels


@pytest.mark.parametrize("channels", [2, 4])
def test_augmentations_that_know_no_alpha_are_refused(channels):
    norm = (0.5,) * channels, (0.5,) * channels
    with pytest.raises(UserError, match="--aug three"):
        transforms.pretrain_transform("three", (32, 32), *norm)
    with pytest.raises(UserError, match="--aa"):
        transforms.finetune_transform(finetune_flags(), (32, 32), *norm)
    transform = transforms.finetune_transform(finetune_flags("--aa", "", "--color_jitter", 0.4), (32, 32), *norm)
    img = transforms.to_channels(noise_image(40, 40), channels)
    for step in (transform, *(transforms.pretrain_transform(aug, (32, 32), *norm) for aug in ("mae", "crop", "none"))):
        for _ in range(20):
            assert step(img).shape == (channels, 32, 32)


def test_none_is_the_evaluation_transform():
    for size, img in (((32, 32), noise_image(40, 32)), ((224, 224), noise_image(300, 280))):
        plain = transforms.eval_transform(size, *IMAGENET)(img)
        for make in (transforms.pretrain_transform, transforms.probe_transform):
            transform = make("none", size, *IMAGENET)
            before = global_states()
            assert torch.equal(transform(img), plain) and torch.equal(transform(img), plain)
            assert global_states() == before


def pixels(img) -> torch.Tensor:
    return torch.from_numpy(np.array(img)).permute(2, 0, 1).float() / 255


def test_evaluation_at_224_is_the_official_recipe():
    img = noise_image(400, 300)
    resized = img.resize((341, 256), Image.Resampling.BICUBIC)
    expected = pixels(resized.crop((58, 16, 282, 240)))  # (341 - 224) / 2 = 58.5, rounded to even
    assert torch.equal(transforms.eval_transform((224, 224), *NO_NORM)(img), expected)
    mean, std = IMAGENET
    normal = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(transforms.eval_transform((224, 224), mean, std)(img), normal)


def test_evaluation_of_small_and_large_sizes_takes_the_whole_image():
    img = noise_image(32, 32)
    assert torch.equal(transforms.eval_transform((32, 32), *NO_NORM)(img), pixels(img))
    for side in (32, 64, 384):
        img = noise_image(100, 100)
        whole = pixels(img.resize((side, side), Image.Resampling.BICUBIC))
        assert torch.equal(transforms.eval_transform((side, side), *NO_NORM)(img), whole)
    half = transforms.eval_transform((32, 32), *NO_NORM, crop_pct=0.5)(noise_image(64, 64))
    assert torch.equal(half, pixels(noise_image(64, 64).crop((16, 16, 48, 48))))


def test_rectangles():
    size = (24, 64)  # (H, W)
    img = noise_image(90, 50)
    whole = pixels(img.resize((64, 24), Image.Resampling.BICUBIC))
    assert torch.equal(transforms.eval_transform(size, *NO_NORM)(img), whole)
    larger = pixels(img.resize((128, 48), Image.Resampling.BICUBIC).crop((32, 12, 96, 36)))
    assert torch.equal(transforms.eval_transform(size, *NO_NORM, crop_pct=0.5)(img), larger)
    args = finetune_flags()
    every = [transforms.pretrain_transform(aug, size, *NO_NORM) for aug in ("mae", "crop", "three", "none")]
    every += [transforms.probe_transform(aug, size, *NO_NORM) for aug in ("rrc", "crop", "none")]
    every += [transforms.finetune_transform(args, size, *NO_NORM)]
    args.aug = "crop"
    every += [transforms.finetune_transform(args, size, *NO_NORM)]
    for transform in every:
        assert transform(img).shape == (3, 24, 64)
    assert input_size(flags(size=[24, 64])) == (24, 64) and input_size(flags(size=40)) == (40, 40)


@pytest.mark.parametrize("crop_pct", [0.0, -0.5, 1.2])
def test_crop_pct_out_of_range(crop_pct):
    with pytest.raises(UserError, match="--crop_pct"):
        transforms.eval_transform((32, 32), *NO_NORM, crop_pct=crop_pct)


def test_finetuning_transform():
    """Pad-and-crop replaces the resized crop; erasing fills with noise; jitter works where there is no policy."""
    img = noise_image(32, 32)
    args = finetune_flags("--aa", "", "--reprob", 0)
    args.aug = "crop"
    kept = transforms.finetune_transform(args, (32, 32), *NO_NORM)
    for i in range(30):  # an unscaled piece of the image: every value of its middle is in the image's rows
        with seeded(i):
            middle = kept(img)[:, 8:24, 8:24]
        windows = pixels(img).unfold(1, 16, 1).unfold(2, 16, 1)  # (3, 17, 17, 16, 16)
        match = [(windows == piece[:, None, None]).all(dim=(0, 3, 4)).any() for piece in (middle, middle.flip(2))]
        assert any(match)
    erased = transforms.finetune_transform(finetune_flags("--aa", "", "--reprob", 1), (32, 32), *NO_NORM)
    values = erased(img)
    assert values.min() < 0 or values.max() > 1  # standard normal pixels
    grey = transforms.finetune_transform(finetune_flags(), (32, 32), (0.5,), (0.5,))
    for i in range(60):
        with seeded(i):
            assert grey(img.convert("L")).shape == (1, 32, 32)
    jitter = finetune_flags("--aa", "", "--reprob", 0, "--color_jitter", 0.4)
    jitter.aug = "crop"
    transform = transforms.finetune_transform(jitter, (32, 32), *NO_NORM)
    flat = Image.new("RGB", (32, 32), (120, 120, 120))
    assert len({transform(flat)[0, 16, 16].item() for _ in range(10)}) > 5


def test_build_dataset_is_made_for_a_loader(tmp_path):
    class_folders(tmp_path / "train", a=[10], b=[20])
    class_folders(tmp_path / "val", b=[30])
    args = finetune_flags("--data_path", tmp_path, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    val = build_dataset(False, args)
    assert len(val) == 1 and val[0].target == 1
    assert torch.allclose(val[0].image, torch.full((3, 32, 32), 30 / 255))
    assert build_dataset(True, args)[1].image.shape == (3, 32, 32)


# Mean and deviation --------------------------------------------------------------------------------------------------


def test_mean_std_defaults():
    for name in ("cifar10", "cifar100", "tiny_imagenet", "digits"):
        assert mean_std(flags("--dataset", name)) == MEAN_STD[name]
    for name in ("imagefolder", "folder", "hfds/x"):
        assert mean_std(flags("--dataset", name)) == IMAGENET
    for channels in (1, 2, 4):
        mean, std = mean_std(flags("--in_chans", channels))
        assert mean == pytest.approx([sum(IMAGENET[0]) / 3] * channels)
        assert std == pytest.approx([sum(IMAGENET[1]) / 3] * channels)


def test_mean_std_flags():
    given = flags("--mean", 0.1, 0.2, 0.3, "--std", 0.4, 0.5, 0.6)
    assert mean_std(given) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert mean_std(flags("--in_chans", 1, "--mean", 0.1, "--std", 0.4)) == ((0.1,), (0.4,))
    with pytest.raises(UserError, match="go together"):
        mean_std(flags("--mean", 0.1, 0.2, 0.3))
    with pytest.raises(UserError, match="go together"):
        mean_std(flags("--std", 0.1, 0.2, 0.3))
    for argv in (("--mean", 0.1, "--std", 0.4), ("--mean", 0.1, 0.2, 0.3, "--std", 0.4)):
        with pytest.raises(UserError, match="one number per channel"):
            mean_std(flags(*argv))
    with pytest.raises(UserError, match="positive"):
        mean_std(flags("--in_chans", 1, "--mean", 0.1, "--std", 0))


def test_mean_std_of_digits_is_theirs():
    values = read_images(flags("--dataset", "digits"), True).arrays / 255
    mean, std = MEAN_STD["digits"]
    assert mean == pytest.approx([values.mean()] * 3, abs=1e-5) and std == pytest.approx([values.std()] * 3, abs=1e-5)
