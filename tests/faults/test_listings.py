"""Untrusted folders, lists and shards: missing, duplicate and outside files are reported, refused or counted."""

import os
import tarfile

import pytest
from helpers.plain_images import PLAIN, class_folders, contents, flags, save
from helpers.strange import DARK, encoded, plain, write_shard
from torchvision import transforms as tvt

from util.data.build import build_loader
from util.data.file_lists import images_below
from util.data.readers import read_images
from util.data.shards import count_images
from util.errors import UserError

PLAIN8 = tvt.Compose([tvt.CenterCrop((8, 8)), PLAIN])

# Folders --------------------------------------------------------------------------------------------------------------


def test_an_empty_class_keeps_its_number(tmp_path, capsys):
    class_folders(tmp_path / "train", ant=[1], bee=[], cat=[3])
    class_folders(tmp_path / "val", cat=[4])
    args = flags("--data_path", tmp_path)
    train, val = read_images(args, True), read_images(args, False)
    assert train.classes == val.classes == ["ant", "bee", "cat"]
    assert contents(train) == [(1, 0), (3, 2)] and contents(val) == [(4, 2)]
    assert "1 class folders without images, among them 'bee'; each counts as a class" in capsys.readouterr().out


def test_a_class_with_a_broken_link(tmp_path):
    class_folders(tmp_path / "train", ant=[1])
    (tmp_path / "train" / "bee").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="bee is a broken link"):
        read_images(flags("--data_path", tmp_path), True)
    (tmp_path / "train" / "bee").unlink()
    (tmp_path / "train" / "bee").symlink_to("bee")
    with pytest.raises(UserError, match="bee is a broken link"):
        read_images(flags("--data_path", tmp_path), True)


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    class_folders(tmp_path / "train", ant=[1])
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    (tmp_path / "train" / "ant" / "secret").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"secret cannot be read \(Permission denied\): its images would be missing"):
        images_below(tmp_path)


def test_other_endings_are_reported(tmp_path, capsys):
    save(tmp_path / "a.png", 1)
    for name in ("b.gif", "c.GIF", "d.heic", "notes.txt"):
        (tmp_path / name).touch()
    assert len(read_images(flags("--dataset", "folder", "--data_path", tmp_path), True)) == 1
    output = capsys.readouterr().out
    assert "note: 3 files below" in output and "(.gif .heic)" in output


# Lists ----------------------------------------------------------------------------------------------------------------


def listed(root, text: str | bytes, *argv):
    for value in range(3):
        save(root / "in" / f"{value}.png", value)
    save(root / "in" / "u\u2028v.png", 9)
    (root / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    words = ["--dataset", "filelist", "--data_path", root / "in", "--train_list", root / "list.txt", "--num_workers", 0]
    return read_images(flags(*words, *argv), True)


def test_lists_of_other_editors(tmp_path):
    """A byte order mark, carriage returns, a name with a Unicode line separator, and empty lines."""
    images = listed(tmp_path, b"\xef\xbb\xbf0.png\tx\r\n\r\n1.png\ty\r\n" + "u\u2028v.png\tx\r\n".encode())
    assert contents(images) == [(0, 0), (1, 1), (9, 0)] and images.classes == ["x", "y"]


def test_missing_paths_are_counted(tmp_path, capfd):
    images = listed(tmp_path, "0.png\ngone.png\n2.png\n\x00.png\n" + "x" * 5000 + ".png\n")
    args = flags("--num_workers", 0)
    batch = next(iter(build_loader(images, PLAIN8, args, 5, train=False)))
    assert batch.bad.tolist() == [0, 1, 0, 1, 1]
    assert capfd.readouterr().err.count("unreadable image") == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('0.png\n"1.png"\n', 'has quotes in "1.png"'),
        ('0.png\n1.png"\n', 'has quotes in 1.png"'),
        ("'0.png'\tx\n", "has quotes in '0.png'"),
        ('0.png\tx\n1.png\t"x"\n', 'has both labels "x" and x'),
        ("0.png\tx\n1.png\tx'\n", "has both labels x' and x"),
        (b"0.png\n\xff.png\n", "is not a text file in UTF-8"),
    ],
)
def test_stray_quotes(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        listed(tmp_path, text)


def test_intended_quotes(tmp_path):
    save(tmp_path / "in" / "'q\".png", 5)
    images = listed(tmp_path, "'q\".png\t's-Hertogenbosch\n0.png\t7\"\n")
    assert contents(images) == [(5, 0), (0, 1)] and images.classes == ["'s-Hertogenbosch", '7"']


@pytest.mark.parametrize("stray", ["../../../secret.png", "/etc/passwd"])
def test_lists_of_published_sets_name_nothing_outside(tmp_path, stray):
    save(tmp_path / "train" / "n01" / "0.png")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "val_annotations.txt").write_text(f"{stray}\tn01\n")
    with pytest.raises(UserError, match="which is not below --data_path"):
        read_images(flags("--dataset", "tiny_imagenet", "--data_path", tmp_path), False)
    (tmp_path / "images").mkdir()
    for name, text in {
        "images": f"1 a.jpg\n2 {stray}",
        "image_class_labels": "1 1\n2 1",
        "train_test_split": "1 1\n2 1",
        "classes": "1 a",
    }.items():
        (tmp_path / f"{name}.txt").write_text(text)
    save(tmp_path / "images" / "a.jpg")
    with pytest.raises(UserError, match="which is not below --data_path"):
        read_images(flags("--dataset", "cub200", "--data_path", tmp_path), True)


# Shards ---------------------------------------------------------------------------------------------------------------


def link(member_type: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo()
    member.type, member.linkname = member_type, target
    return member


def test_shards_do_not_escape(tmp_path, monkeypatch, capfd):
    """Names with `..`, absolute names, links and devices: only the shard is opened, and nothing is written."""
    secret = encoded(plain((99, 99, 99)), "PNG")
    (tmp_path / "secret.png").write_bytes(secret)
    (tmp_path / "shards").mkdir()
    image, path = encoded(plain(), "PNG"), tmp_path / "shards" / "x-train-000.tar"
    members = {
        "../../escaped.png": image,
        f"{tmp_path}/absolute.png": image,
        "soft.png": link(tarfile.SYMTYPE, "../secret.png"),
        "hard.png": link(tarfile.LNKTYPE, f"{tmp_path}/secret.png"),
        "pipe.png": link(tarfile.FIFOTYPE, ""),
        "device.png": link(tarfile.CHRTYPE, ""),
        "inside.png": image,
    }
    write_shard(path, members)
    before = sorted(tmp_path.rglob("*"))
    opened = []
    original = os.open
    monkeypatch.setattr(
        os, "open", lambda name, *rest, **more: opened.append(str(name)) or original(name, *rest, **more)
    )
    args = flags("--dataset", "wds", "--data_path", path, "--num_workers", 0)
    images = read_images(args, True)
    (batch,) = build_loader(images, PLAIN8, args, 3, train=False).begin(0)
    assert images.counts == [3] and not batch.bad.any()
    assert (batch.image[:, :, 0, 0] * 255).round().tolist() == [list(DARK)] * 3
    beside = str(path.with_name("_info.json"))  # the index, which does not exist
    assert {name for name in opened if str(tmp_path) in name} - {beside} == {str(path)}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_member_that_would_fill_the_memory(tmp_path, capfd):
    """A sparse member: a terabyte of zeros in two blocks."""
    path, image = tmp_path / "x.tar", encoded(plain(), "PNG")
    sparse = tarfile.TarInfo()
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "b.png"}
    sparse.pax_headers |= {"GNU.sparse.size": str(1 << 40), "GNU.sparse.map": "0,0"}
    write_shard(path, {"a.png": image, "b.png": sparse, "c.png": image})
    assert count_images(str(path)) == 2
    args = flags("--dataset", "wds", "--data_path", path, "--num_workers", 0)
    (batch,) = build_loader(read_images(args, True), PLAIN8, args, 2, train=False).begin(0)
    assert not batch.bad.any()
    assert "b.png has 1099511627776 bytes; it is skipped" in capfd.readouterr().err


def test_one_name_twice_in_a_shard(tmp_path, capsys):
    """Names that differ in case only: one sample is read, and the other is named."""
    image = encoded(plain(), "PNG")
    write_shard(tmp_path / "x.tar", {"a.png": image, "a.PNG": image, "A.png": image})
    assert read_images(flags("--dataset", "wds", "--data_path", tmp_path / "x.tar"), True).counts == [2]
    assert "that occur twice (perhaps in different case) (a.PNG)" in capsys.readouterr().out


@pytest.mark.parametrize("label", [b"7", b"-2", b"99999999999999999999", b"cat", b"\xff", b"1" * 5000])
def test_labels_of_shards(tmp_path, label, capfd):
    image = encoded(plain(), "PNG")
    write_shard(tmp_path / "x.tar", {"a.png": image, "a.cls": b"4", "b.png": image, "b.cls": label})
    args = flags("--dataset", "wds", "--data_path", tmp_path / "x.tar", "--num_workers", 0)
    args.nb_classes = 5
    (batch,) = build_loader(read_images(args, True), PLAIN8, args, 2, train=False).begin(0)
    assert batch.bad.tolist() == [0, 1] and batch.target.tolist() == [4, -1]
    assert "b.png" in capfd.readouterr().err


def test_a_pipe_among_the_shards(tmp_path, capfd):
    os.mkfifo(tmp_path / "x-train-000.tar")
    write_shard(tmp_path / "x-train-001.tar", {"a.png": encoded(plain(), "PNG")})
    images = read_images(flags("--dataset", "wds", "--data_path", tmp_path), True)
    assert images.counts == [0, 1] and "it is a pipe or a device" in capfd.readouterr().err
