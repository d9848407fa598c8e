"""Unusual and damaged images through every reader: their pixels are right, or they are named and counted."""

import io
import os
import resource
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from helpers.plain_images import PLAIN, class_folders, flags, save
from helpers.strange import BAD, DARK, EPS, GOOD, encoded, huge, plain, png, write_shard
from PIL import Image
from torchvision import transforms as tvt

from util.data.build import build_loader
from util.data.cache import Decoder, cache_images
from util.data.images import printable
from util.data.jpeg_decoder import JpegDecoder
from util.data.readers import read_images
from util.data.samples import KeyedDataset, UnreadableData
from util.data.sources import Files
from util.data.transforms import to_channels
from util.report.ledger import describe_images

PLAIN8 = tvt.Compose([tvt.CenterCrop((8, 8)), PLAIN])


class ImageSet:
    """The same images laid out for every reader, with the same indices and labels."""

    def __init__(self, root, contents: list[bytes], ending="png"):
        self.root, self.ending = root, ending
        for number, content in enumerate(contents):
            for folder in (root / "train" / "a", root / "val" / "a"):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:03d}.{ending}").write_bytes(content)
        names = [f"train/a/{number:03d}.{ending}" for number in range(len(contents))]
        (root / "list.txt").write_text("\n".join(names))
        write_shard(root / "x-train-000.tar", {f"{n:03d}.{ending}": c for n, c in enumerate(contents)})

    def read(self, reader: str, *argv):
        """Return {index: sample} of an evaluation through the loader."""
        path = f"{self.root}/x-train-000.tar" if reader == "wds" else self.root
        words = ["--dataset", reader, "--data_path", path, "--num_workers", 0, "--max_bad_fraction", 1, *argv]
        args = flags(*words, "--train_list", self.root / "list.txt", size=8)
        images = read_images(args, True)
        if args.data_cache != "none":
            images = cache_images(images, args, torch.device("cpu"))
        batches = build_loader(images, PLAIN8, args, 5, train=False).begin(0)
        result = [
            (i, (pixels, bad))
            for pixels, _, index, bads in batches
            for pixels, i, bad in zip(pixels, index.tolist(), bads.tolist())
        ]
        return dict(result)


READERS = [("imagefolder",), ("folder",), ("filelist",), ("wds",), ("folder", "--data_cache", "ram", "--cache_size", 8)]


@pytest.mark.parametrize("reader", READERS, ids=lambda words: "-".join(map(str, words)))
def test_strange_images_are_read(tmp_path, reader):
    """The pixels are those of the file's first picture, without rotation and regardless of alpha."""
    result = ImageSet(tmp_path, list(GOOD.values())).read(*reader)
    assert len(result) == len(GOOD)
    for number, name in enumerate(GOOD):
        pixels, bad = result[number]
        assert not bad, name
        lossy = "JPEG" in name or "LAB" in name or "EXIF" in name  # YCbCr and LAB are rounded twice to 8 bits
        for column in (1, 6):
            colour = (pixels[:, 1, column] * 255).round().tolist()
            assert max(abs(a - b) for a, b in zip(colour, DARK)) <= 3 * lossy, (name, colour)
            assert "EXIF" not in name or pixels[:, 6, column].min() > 0.98  # its lower half is white


@pytest.mark.parametrize("reader", READERS, ids=lambda words: "-".join(map(str, words)))
def test_files_that_are_no_images_are_counted(tmp_path, reader, capfd):
    """Each is named once, and no memory is allocated for the size in its header: less than 150 MB are added, although
    a text chunk expands to 200 MB (pillow reads 64 MB of it)."""
    image_set = ImageSet(tmp_path, [encoded(plain(), "PNG"), *BAD.values()])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = image_set.read(*reader)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 150 << 10
    assert [result[number][1] for number in range(len(result))] == [0] + [1] * len(BAD)
    output = capfd.readouterr().err
    assert output.count("unreadable image") == len(BAD) * (2 if "ram" in reader else 1)


def test_no_program_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow recognises EPS by its first bytes and would start Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "x.png").write_bytes(EPS)
    dataset = KeyedDataset(Files([str(tmp_path / "x.png")], [0], None), PLAIN, seed=0, in_chans=3, replace=False)
    assert dataset[0].bad == 1 and not (tmp_path / "started").exists()


def test_memory_of_large_grey_images():
    """4 bytes a pixel for the scaled values, 1 for the result, 1 for pillow's copy, and numpy's buffers."""
    picture = Image.fromarray(np.full((2000, 2000), 257, np.uint16))
    tracemalloc.start()
    result = to_channels(picture, 1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.getpixel((0, 0)) == 1
    assert peak < 9 * 4_000_000  # with the 2 bytes of its values


def test_sixteen_bits_are_rounded():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    exact = np.floor(values.astype(np.int64) * 255 / 65535 + 0.5)  # no value is half-way
    assert (np.asarray(to_channels(Image.fromarray(values), 1)) == exact).all()


def test_a_transparent_value_of_sixteen_bits(tmp_path):
    content = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 7 * 257, 65535), (b"tRNS", struct.pack(">H", 65535)))
    with Image.open(io.BytesIO(content)) as picture:
        assert list(to_channels(picture, 2).getdata()) == [(7, 255), (255, 0)]
        assert list(to_channels(picture, 3).getdata()) == [(7, 7, 7), (255, 255, 255)]


# Files ----------------------------------------------------------------------------------------------------------------


NAMES = [
    "a b.png",
    "ünï ☃.png",
    "-rf.png",
    "$(touch x).png",
    "new\nline.png",
    "esc\x1b[31m.png",
    "u\u2028v.png",
    " lead.png",
    "'q\".png",
    os.fsdecode(b"latin\xe9.png"),
    "%s {} \\n.png",
    "CAT.png",
    "cat.png",
]


def test_names(tmp_path, capfd):
    """Unusual but legal names of files and classes; two names that differ in case are two images."""
    for label, folder in enumerate(("Cat é", "cat é", os.fsdecode(b"c\xff"))):
        for number, name in enumerate(NAMES):
            save(tmp_path / "train" / folder / name, 20 * label + number)
        (tmp_path / "train" / folder / "bad\n\x1b[2J.png").write_bytes(b"")
    args = flags("--data_path", tmp_path, "--num_workers", 1)
    images = read_images(args, True)
    assert "'Cat é' and 'cat é' differ only in case; they count as 2 classes" in capfd.readouterr().out
    good = [index for index in range(len(images)) if "bad" not in images.name(index)]
    read = [(images.load(index).getpixel((0, 0))[0], images.targets[index]) for index in good]
    assert sorted(read) == sorted((20 * label + number, label) for label in range(3) for number in range(len(NAMES)))
    samples = build_loader(images, PLAIN8, args, 42, train=False)
    assert int(next(iter(samples.begin(0))).bad.sum()) == 3
    output = capfd.readouterr().err
    assert output.count("\n") == 3 and "\x1b" not in output  # one line each, which moves no cursor
    assert describe_images(images, str(tmp_path))["images"] == 42


def test_escaped_names():
    assert [printable(name) for name in ("a b ü", "a\nb", "\udcff")] == ["a b ü", r"'a\nb'", r"'\udcff'"]


def test_vanished_files_are_counted_and_replaced(tmp_path, capfd):
    """Files vanish in the middle of an epoch: its length and its other images stay the same."""
    class_folders(tmp_path / "train", a=range(40))
    args = flags("--data_path", tmp_path, "--num_workers", 0)
    images = read_images(args, True)
    loader = build_loader(images, PLAIN8, args, 4, train=True)
    whole = list(loader.begin(0))
    batches = iter(loader.begin(0))
    seen = [next(batches) for _ in range(3)]
    gone = {int(index) for batch in whole[3:6] for index in batch.index}
    for index in gone:
        os.unlink(images.name(index))
    seen += batches
    assert len(seen) == len(whole) == 10
    for ours, theirs in zip(seen, whole):
        assert torch.equal(ours.index, theirs.index)
        kept = torch.tensor([int(index) not in gone for index in ours.index])
        assert torch.equal(ours.bad > 0, ~kept) and torch.equal(ours.image[kept], theirs.image[kept])
    values = {round(float(batch.image[i, 0, 0, 0]) * 255) for batch in seen for i in range(4) if batch.bad[i]}
    assert values and not values & gone  # others took their place
    assert capfd.readouterr().err.count("No such file") == sum(int(batch.bad.sum()) for batch in seen)


def test_a_disk_that_is_unmounted(tmp_path):
    class_folders(tmp_path / "train", a=range(40))
    args = flags("--data_path", tmp_path, "--num_workers", 0)
    batches = iter(build_loader(read_images(args, True), PLAIN8, args, 4, train=True))
    next(batches)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    with pytest.raises(UnreadableData, match="20 images in a row"):
        next(batches)


@pytest.mark.parametrize("reader", ["folder", "filelist", "imagefolder"])
def test_pipes_devices_and_links(tmp_path, reader, capfd):
    """Reading neither waits for them nor reads them without end."""
    folder = tmp_path / "train" / "a"
    save(folder / "0.png", 5)
    os.mkfifo(folder / "1.png")
    (folder / "2.png").symlink_to("/dev/zero")
    (folder / "3.png").symlink_to("3.png")
    (folder / "4.png").symlink_to("nowhere.png")
    (folder / "5.png").mkdir()
    (folder / "6.png").symlink_to("0.png")
    (tmp_path / "list.txt").write_text("".join(f"train/a/{number}.png\n" for number in (0, 1, 2, 3, 4, 6)))
    args = flags(
        "--dataset", reader, "--data_path", tmp_path, "--train_list", tmp_path / "list.txt", "--num_workers", 0
    )
    images = read_images(args, True)
    assert [os.path.basename(images.name(i)) for i in range(len(images))] == [f"{n}.png" for n in (0, 1, 2, 3, 4, 6)]
    batch = next(iter(build_loader(images, PLAIN8, args, 6, train=False)))
    assert batch.bad.tolist() == [0, 1, 1, 1, 1, 0]
    for index in (1, 2):
        with pytest.raises(OSError, match=r"not a file|a link out"):
            images.open(index)
    output = capfd.readouterr().err
    assert "it is a pipe or a device" in output and "symbolic links" in output


# Decoding by nvJPEG ---------------------------------------------------------------------------------------------------


def test_decoding_on_a_device_follows_no_link_outside(tmp_path, monkeypatch):
    """Links that lead outside are not followed, and files that are too large take no memory."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jpg").write_bytes(encoded(plain(), "JPEG"))
    (tmp_path / "in" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "in" / "huge.jpg").write_bytes(huge("JPEG"))
    (tmp_path / "in" / "good.jpg").write_bytes(encoded(plain(), "JPEG"))
    given = []
    original = JpegDecoder.decode
    monkeypatch.setattr(JpegDecoder, "decode", lambda *call: given.append(len(call[1])) or original(*call))
    paths = [str(tmp_path / "in" / f"{name}.jpg") for name in ("good", "link", "huge")]
    decoder = Decoder(Files(paths, [0] * 3, None, str(tmp_path / "in")), 3, None, torch.device("cpu"))
    given.clear()
    assert [decoder._decoded(index) is not None for index in range(3)] == [True, False, False]
    assert given == [len(encoded(plain(), "JPEG"))]
