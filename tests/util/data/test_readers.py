"""Readers of every layout: their images and labels, and refusals; mean and standard deviation."""

import pickle
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from helpers.plain_images import class_folders, contents, finetune_flags, flags, save, value_of

from util.data.file_lists import images_below
from util.data.image_format import IMAGENET, MEAN_STD, mean_std
from util.data.readers import read_images
from util.data.sources import HuggingFaceImages
from util.datasets import build_dataset
from util.errors import UserError

# Readers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["imagefolder", "torch/image_folder"])
def test_folders_of_classes_are_numbered_by_the_training_folder(tmp_path, name):
    class_folders(tmp_path / "train", cat=[1, 2], ant=[3], dog=[4])
    class_folders(tmp_path / "val", dog=[5], cat=[6])
    args = flags("--dataset", name, "--data_path", tmp_path)
    train, val = read_images(args, True), read_images(args, False)
    assert train.classes == val.classes == ["ant", "cat", "dog"]
    assert contents(train) == [(3, 0), (1, 1), (2, 1), (4, 2)]
    assert contents(val) == [(6, 1), (5, 2)]  # although val has no ants
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
    with pytest.raises(UserError, match="contains no images"):
        read_images(flags("--data_path", tmp_path), True)
    with pytest.raises(UserError, match="no val/"):
        read_images(flags("--data_path", tmp_path), False)


def test_folder(tmp_path):
    args = flags("--dataset", "folder", "--data_path", tmp_path)
    with pytest.raises(UserError, match="contains no images"):
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

    def read(self, train: bool, train_rows=None, val_rows=None, outside=False):
        argv = ["--dataset", "filelist", "--data_path", self.root / "pictures"] + ["--allow_outside"] * outside
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
    val = lists.read(False, rows, [f"{tmp_path}/pictures/4.png\t10"])  # an absolute path stays unchanged
    assert contents(val) == [(4, 2)] and val.classes == train.classes
    words = lists.read(True, ["0.png\tzebra", "1.png\t7", "2.png\tant", "3.png\t07"])
    assert words.classes == ["07", "7", "ant", "zebra"]


@pytest.mark.parametrize(
    ("rows", "train", "message"),
    [
        ((["0.png\ta", "1.png"], None), True, "mixes lines"),
        ((["0.png\ta\tb"], None), True, "several tabs"),
        (([], None), True, "is empty"),
        ((None, None), True, "needs two text files: --train_list"),
        ((["0.png\ta"], ["1.png\tb"]), False, "'b'"),
        ((["0.png"], ["1.png\tb"]), False, "'b'"),
        ((["0.png\ta"], None), False, "needs two text files"),
    ],
)
def test_filelist_refuses(tmp_path, rows, train, message):
    with pytest.raises(UserError, match=message):
        Lists(tmp_path).read(train, *rows)


def test_a_list_names_nothing_outside(tmp_path):
    """`..`, absolute paths and links to files outside are refused, and accepted with --allow_outside."""
    lists = Lists(tmp_path / "in")
    save(tmp_path / "secret" / "7.png", 7)
    (tmp_path / "in" / "pictures" / "link.png").symlink_to(tmp_path / "secret" / "7.png")
    (tmp_path / "in" / "pictures" / "linked").symlink_to(tmp_path / "secret")
    (tmp_path / "in" / "pictures" / "here.png").symlink_to("3.png")
    for stray in ("../../secret/7.png", f"{tmp_path}/secret/7.png"):
        with pytest.raises(UserError, match=r"not below --data_path .* --allow_outside"):
            lists.read(True, ["0.png", stray])
        assert contents(lists.read(True, ["0.png", stray], outside=True)) == [(0, -1), (7, -1)]
    images = lists.read(True, ["0.png", "link.png", "linked/7.png", "here.png", "../pictures/1.png"])
    for place in (1, 2):
        for read in (images.load, images.open):
            with pytest.raises(OSError, match="a link out of --data_path"):
                read(place)
    assert [np.asarray(images.load(place)).flat[0] for place in (0, 3, 4)] == [0, 3, 1]
    assert contents(lists.read(True, ["link.png"], outside=True)) == [(7, -1)]


def test_circular_links(tmp_path):
    """Each image is read once despite circular links; a link to another folder is followed."""
    save(tmp_path / "a" / "b" / "1.png", 1)
    save(tmp_path / "other" / "2.png", 2)
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "a" / "other").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "a")
    paths = [path.removeprefix(f"{tmp_path}/a/") for path in images_below(tmp_path / "a")]
    assert paths == ["b/1.png", "other/2.png"]


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
    for value, wnid in ((3, "n02"), (4, "n02")):  # a copy in class folders
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
    assert len(set(key)) == 1797 and sorted(ours) == sorted(key)  # so the splits are disjoint and complete
    label = dict(zip(key, everything.target.tolist()))
    assert [label[picture] for picture in ours] == train.targets + val.targets
    fair = np.bincount(everything.target) * 360 / 1797
    assert np.abs(np.bincount(val.targets) - fair).max() < 1  # as close as whole images permit
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
    with pytest.raises(UserError, match=r"does not contain cifar-10-batches-py.*--download"):
        read_images(flags("--dataset", "cifar10", "--data_path", tmp_path), True)


@pytest.mark.parametrize("name", ["imagnet", "hdfs/imagenet-1k", "image/folder"])
def test_unknown_dataset_lists_the_known_ones(tmp_path, name):
    class_folders(tmp_path / "train", a=[1])  # timm would read this folder whatever the name before the slash
    for argv in ([], ["--data_path", tmp_path]):
        with pytest.raises(UserError) as error:
            read_images(flags("--dataset", name, *argv), True)
        for known in ("imagefolder", "filelist", "cifar100", "tiny_imagenet", "digits", "wds", "hfds/..."):
            assert known in str(error.value)


@pytest.mark.parametrize("name", ["torch/no_such_set", "torch/cifar10", "wds/nothing", "tfds/nothing", "hfds/nothing"])
def test_factory_names_that_cannot_be_opened(tmp_path, name, monkeypatch):
    for module in ("datasets", "tensorflow", "tensorflow_datasets"):
        monkeypatch.setitem(sys.modules, module, None)  # as if not installed, so that nothing is downloaded
    with pytest.raises(UserError, match=name):
        read_images(flags("--dataset", name, "--data_path", tmp_path), True)
    if name[:3] in ("tor", "wds"):
        with pytest.raises(UserError, match="needs --data_path"):
            read_images(flags("--dataset", name), True)


class Table:
    """The part of a `datasets.Dataset` that `HuggingFaceImages` uses."""

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
    assert images.targets == ([1, 0, 0] if labelled else [-1] * 3)  # available without reading an image
    assert images.classes == (["first", "second"] if labelled else None)
    assert [value_of(images.load(i)) for i in (0, 1)] == [5, 5]
    with pytest.raises(OSError):
        images.load(2)
    assert "broken" in images.name(2)


def table(rows, image="image", label="label"):
    return HuggingFaceImages(SimpleNamespace(dataset=Table(rows), image_key=image, label_key=label, class_to_idx={}))


def test_hugging_face_columns(tmp_path, capsys):
    """CIFAR's images are in the column img; for a name that does not exist, the library adds an empty column."""
    save(tmp_path / "x.png", 5)
    image = {"bytes": (tmp_path / "x.png").read_bytes(), "path": None}
    images = table([{"img": image, "fine_label": 3, "image": None}], label="fine_label")
    assert value_of(images.load(0)) == 5 and images.targets == [3] and "the column img" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="no images in the column 'image': choose one of left, right with --image_column"
    ):
        table([{"left": image, "right": image, "image": None}])
    with pytest.raises(UserError, match="choose one of text, image"):
        table([{"text": "a", "image": None}])
    with pytest.raises(UserError, match="the column label has 'cat', which is no class"):
        table([{"image": image, "label": "cat"}])


def test_build_dataset_is_made_for_a_loader(tmp_path):
    class_folders(tmp_path / "train", a=[10], b=[20])
    class_folders(tmp_path / "val", b=[30])
    args = finetune_flags("--data_path", tmp_path, "--mean", 0, 0, 0, "--std", 1, 1, 1)
    val = build_dataset(False, args)
    assert len(val) == 1 and val[0].target == 1
    assert torch.allclose(val[0].image, torch.full((3, 32, 32), 30 / 255))
    assert build_dataset(True, args)[1].image.shape == (3, 32, 32)


# Mean and standard deviation ------------------------------------------------------------------------------------------


def test_mean_std_defaults():
    for name in ("cifar10", "cifar100", "tiny_imagenet", "digits"):
        assert mean_std(name, 3) == MEAN_STD[name]
    for name in ("imagefolder", "folder", "hfds/x"):
        assert mean_std(name, 3) == IMAGENET
    for channels in (1, 2, 4):
        mean, std = mean_std("imagefolder", channels)
        assert mean == pytest.approx([sum(IMAGENET[0]) / 3] * channels)
        assert std == pytest.approx([sum(IMAGENET[1]) / 3] * channels)


def test_mean_std_flags():
    assert mean_std("digits", 3, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert mean_std("digits", 1, [0.1], [0.4]) == ((0.1,), (0.4,))
    with pytest.raises(UserError, match="go together"):
        mean_std("digits", 3, mean=[0.1, 0.2, 0.3])
    with pytest.raises(UserError, match="go together"):
        mean_std("digits", 3, std=[0.1, 0.2, 0.3])
    for given in (([0.1], [0.4]), ([0.1, 0.2, 0.3], [0.4])):
        with pytest.raises(UserError, match="one number per channel"):
            mean_std("digits", 3, *given)
    with pytest.raises(UserError, match="positive"):
        mean_std("digits", 1, [0.1], [0.0])


def test_mean_std_of_digits_is_theirs():
    values = read_images(flags("--dataset", "digits"), True).arrays / 255
    mean, std = MEAN_STD["digits"]
    assert mean == pytest.approx([values.mean()] * 3, abs=1e-5) and std == pytest.approx([values.std()] * 3, abs=1e-5)
