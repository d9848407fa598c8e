"""Compact lists of paths and labels behave as the lists that they replace, and take little memory."""

import hashlib
import os
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from helpers.plain_images import save

from util.data.compact import IntList, PathList, Repeated, compact
from util.data.file_lists import RealPaths, check_below, is_below
from util.data.sources import Arrays, Files, Subset
from util.errors import UserError
from util.report.ledger import describe_images

NAMES = ["", "a.png", "ä/ß.png", "日本/🙂.jpg", os.fsdecode(b"\xff\xfe bad.png"), "new\nline", "\ud800 from a list.png"]


def test_paths_are_those_of_the_list():
    paths = PathList(iter(NAMES))
    assert list(paths) == NAMES and len(paths) == len(NAMES) and paths[-1] == NAMES[-1]
    assert paths[np.int64(2)] == NAMES[2] and type(paths[1]) is str
    assert paths[1:4] == NAMES[1:4] and list(pickle.loads(pickle.dumps(paths))) == NAMES
    assert "a.png" in paths and len(PathList([])) == 0
    with pytest.raises(IndexError):
        paths[len(NAMES)]


def test_parts_of_a_list():
    """`take`, `below` and `encoded` give what the same on strings gives, also where a name has no bytes."""
    rng = np.random.default_rng(0)
    rows = rng.integers(0, len(NAMES), 20)
    assert list(PathList(NAMES).take(rows)) == [NAMES[row] for row in rows] and len(PathList(NAMES).take([])) == 0
    names = NAMES[:-1]  # those with bytes
    data = [os.fsencode(name) for name in names]
    paths = PathList.of_bytes(np.frombuffer(b"".join(data), np.uint8), np.array([len(d) for d in data]), "/data/é/")
    expected = [f"/data/é/{name}" for name in names]
    assert list(paths) == expected and list(paths.encoded()) == [os.fsencode(path) for path in expected]
    assert list(paths.take([4, 0, 4])) == [expected[4], expected[0], expected[4]]
    assert list(paths.below("/data/é")) == names and list(paths.below("/data")) == [f"é/{name}" for name in names]
    assert list(PathList(["/a/b.png", "c"]).below("/a")) == ["b.png", os.path.relpath("c", "/a")]
    assert list(pickle.loads(pickle.dumps(paths))) == expected
    with pytest.raises(UnicodeEncodeError):
        list(PathList(NAMES).encoded())


def test_groups_are_those_of_the_list():
    texts = ["b", "a", "b", "\ud800", "a"]
    groups = Repeated(texts)
    assert list(groups) == texts and groups == texts and groups != texts[:4] and groups[1:3] == ["a", "b"]
    assert groups[-1] == "a" and list(groups.take([4, 2])) == ["a", "b"] and list(Repeated([])) == []
    assert Repeated.of_codes([1, 0], ["x", "y"]) == ["y", "x"]
    images = Files(["1", "2", "3"], [0, 1, 0], None, groups=["p", "q", "p"])
    assert isinstance(images.groups, Repeated) and Subset(images, [2, 1]).groups == ["p", "q"]
    assert Subset(images, np.array([2])).targets == [0] and Subset(images, range(2)).targets == [0, 1]


def test_names_that_are_no_utf8(tmp_path):
    """A file whose name has any bytes is opened; the label stays with it."""
    path = os.path.join(tmp_path, os.fsdecode(b"\xff\xfe.png"))
    save(tmp_path / "plain.png", 7)
    os.rename(tmp_path / "plain.png", path)
    images = Files([path], [3], None)
    assert images.load(0).getpixel((0, 0))[0] == 7 and images.name(0) == images.file(0) == path


def test_labels_are_those_of_the_list():
    labels = compact([3, -1, 2**40])
    assert isinstance(labels, IntList) and labels == [3, -1, 2**40] and labels != [3]
    assert labels == compact(iter([3, -1, 2**40])) and type(labels[0]) is int
    assert np.asarray(labels).dtype == np.int64 and torch.tensor(labels).dtype == torch.int64
    for others in ([(0, 1), (2,)], [0.5, 1.0], [2**70]):  # label sets, continuous targets
        assert compact(others) == others and type(compact(others)) is list


def test_memory():
    """Paths of 60 characters: 68 bytes each and 8 for the label; as UCS-4 with a list, 248 and more."""
    count = 100_000
    tracemalloc.start()
    images = Files(
        (f"/data/imagenet/train/n{i % 1000:08d}/n{i % 1000:08d}_{i:012d}_x.JPEG" for i in range(count)),
        range(count),
        None,
    )
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 90 * count and peak < 130 * count  # the buffer grows by an eighth at a time, and may move
    assert images.name(count - 1).endswith("_000000099999_x.JPEG")


def test_the_hash_of_a_record_is_unchanged():
    """Of names below the folder and of labels, as earlier revisions computed it from lists."""
    paths = [f"/data/a/{i}.png" for i in range(5)] + [os.fsdecode(b"/data/\xff.png")]
    images = Files(paths, [0, 1, 2, 1, 0, 300], None)
    lines = [f"{path.removeprefix('/data/')}\t{t}\n" for path, t in zip(paths, [0, 1, 2, 1, 0, 300])]

    def digest(parts):
        return hashlib.sha256("".join(parts).encode(errors="surrogateescape")).hexdigest()

    assert describe_images(images, "/data") == {"images": 6, "sha256": digest(lines)}
    part = Subset(Subset(images, [5, 3, 1]), [0, 2])
    assert describe_images(part, "/data")["sha256"] == digest([lines[5], lines[1]])
    arrays = Arrays(np.zeros((3, 2, 2), np.uint8), [1, 0, 1], ["a", "b"])
    lines = b"2\t1\n0\t1\n"
    assert describe_images(Subset(arrays, [2, 0]))["sha256"] == hashlib.sha256(lines).hexdigest()


# Paths below a folder -------------------------------------------------------------------------------------------------


def test_is_below():
    for path, folder, expected in (
        ("/a", "/a", True),
        ("/a/b", "/a", True),
        ("/ab", "/a", False),
        ("/a", "/a/b", False),
        ("/a", "/", True),
        ("/", "/", True),
    ):
        assert is_below(path, folder) is expected, (path, folder)


def test_only_suspects_are_normalised(tmp_path, monkeypatch):
    calls, original = [], os.path.abspath
    monkeypatch.setattr(os.path, "abspath", lambda path: calls.append(path) or original(path))
    check_below([f"{tmp_path}/{i}.png" for i in range(100)], tmp_path, "the list")
    assert len(calls) < 5
    check_below([f"{tmp_path}/a/../b.png", f"{tmp_path}/a..b.png"], tmp_path, "the list")
    for stray in (f"{tmp_path}/../b.png", "/etc/passwd", f"{tmp_path}x/b.png", f"{tmp_path}/a/../../b.png"):
        with pytest.raises(UserError, match=r"the list names .*, which is not below --data_path"):
            check_below([f"{tmp_path}/a.png", stray], tmp_path, "the list")


def test_real_paths_of_many_files(tmp_path, monkeypatch):
    """The same as os.path.realpath, which is called for folders and links only."""
    for name in ("a/x/1.png", "a/x/2.png", "b/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b" / "link.png").symlink_to("../a/x/1.png")
    (tmp_path / "b" / "broken.png").symlink_to("nowhere.png")
    (tmp_path / "c").symlink_to("a")
    (tmp_path / "loop").symlink_to("loop")
    names = [
        "a/x/1.png",
        "a/x/2.png",
        "b/3.png",
        "b/link.png",
        "b/broken.png",
        "b/gone.png",
        "c/x/1.png",
        "c/../b/3.png",
    ]
    names += ["loop/1.png", "b/..", "gone/1.png"]
    paths = [str(tmp_path / name) for name in names] + [f"{tmp_path}/b/../c/x/2.png"]
    expected = [os.path.realpath(path) for path in paths]
    real = RealPaths()
    assert [real(path) for path in paths] == expected
    monkeypatch.chdir(tmp_path)
    assert RealPaths()("a/x/1.png") == expected[0] and RealPaths()("gone.png") == str(tmp_path / "gone.png")
    calls, original = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: calls.append(path) or original(path))
    real = RealPaths()
    for _ in range(50):
        real(paths[0]), real(paths[1])
    assert len(calls) == 1
