"""Shards of smaller images: what is stored for each kind of image, and the same bytes for any number of workers."""

import io
import json
import multiprocessing
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.photographs import photograph
from helpers.strange import encoded, with_exif
from PIL import Image

from tools import make_shards
from util.data.reencode import shrinks, smaller
from util.data.transforms import ResizeShortSide, to_channels
from util.errors import UserError

SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of photographs of several sizes, one of which is damaged, and a validation image."""
    root = tmp_path_factory.mktemp("photographs")
    for i in range(23):
        path = root / "train" / f"class{i % 2}" / f"{i:02d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photograph(64, i).resize((40 + 3 * i, 90 - 2 * i)).save(path, quality=95)
    (root / "train" / "class0" / "broken.jpg").write_bytes(b"no image")
    photograph(16).save(root / "train" / "class1" / "small.png")
    (root / "val" / "class0").mkdir(parents=True)
    photograph(48).save(root / "val" / "class0" / "a.jpg")
    (root / "val" / "class1").mkdir()
    return root


def write(folder, out, *flags) -> dict[str, bytes]:
    words = ["--data_path", folder, "--out", out, "--images_per_shard", "7", *flags]
    make_shards.main(make_shards.get_args_parser().parse_args([str(word) for word in words]))
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def members(files: dict[str, bytes], split="train") -> dict[str, bytes]:
    content = {}
    for name in (name for name in files if f"-{split}-" in name):
        with tarfile.open(fileobj=io.BytesIO(files[name])) as tar:
            content |= {member.name: tar.extractfile(member).read() for member in tar}
    return content


@pytest.mark.parametrize("flags", [(), ("--resize", SIDE, "--quality", 80)], ids=["unchanged", "resized"])
def test_the_number_of_workers_does_not_matter(folder, tmp_path, flags, capfd):
    """Files, index, notes and reports of damage are the same; the index counts what is in the shards."""
    outputs, files = [], []
    for workers in (0, 1, 3):
        files.append(write(folder, tmp_path / str(workers), *flags, "--workers", workers))
        printed = capfd.readouterr()
        outputs.append([line for line in (printed.out + printed.err).splitlines() if "broken.jpg" in line])
        outputs[-1] += [line for line in printed.out.splitlines() if line.startswith(("train:", "validation:"))]
    assert files[0] == files[1] == files[2] and outputs[0] == outputs[1] == outputs[2]
    assert len(outputs[0]) == 3 and "left out" in outputs[0][0]
    index = json.loads(files[0]["_info.json"])
    train = index["splits"]["train"]
    assert sum(train["shard_lengths"]) == train["num_samples"] == 24 and index["classes"] == ["class0", "class1"]
    assert sorted(files[0]) == sorted(["_info.json", *train["filenames"], *index["splits"]["validation"]["filenames"]])
    for name, length in zip(train["filenames"], train["shard_lengths"]):
        assert len(members({name: files[0][name]})) == 2 * length


def test_the_copies_are_the_originals_resized(folder, tmp_path, capsys):
    """As the evaluation transform resizes them, up to the rounding of JPEG; smaller images keep their bytes."""
    content = members(write(folder, tmp_path / "out", "--resize", SIDE, "--quality", 100, "--workers", 0))
    assert "train: 24 images in 4 shards, 23 of them resized, 1 unchanged, 1 unreadable" in capsys.readouterr().out
    paths = sorted((folder / "train").rglob("*.*"))
    assert len(content) == 2 * 24
    for name, data in content.items():
        number, ending = name.split(".")
        path = paths[int(number)]
        if ending == "cls":
            assert data.decode() == path.parent.name[-1]
        elif path.name == "small.png":
            assert data == path.read_bytes() and ending == "png"
        else:
            expected, copy = ResizeShortSide(SIDE)(Image.open(path)), Image.open(io.BytesIO(data))
            assert copy.format == "JPEG" and copy.size == expected.size and min(copy.size) == SIDE
            grey = [np.asarray(img.convert("L"), float) for img in (expected, copy)]  # colours have half the resolution
            assert abs(grey[0] - grey[1]).mean() < 1
    sizes = [
        sum(map(len, members(write(folder, tmp_path / f"q{quality}", "--resize", SIDE, *flags)).values()))
        for quality, flags in (("50", ["--quality", 50]), ("90", ["--quality", 90]), ("", []))
    ]
    assert sizes[0] < sizes[1] == sizes[2]


# Kinds of images ------------------------------------------------------------------------------------------------------

WIDE = np.random.default_rng(0).random((48, 64)).astype(np.float32)
HOLE = Image.fromarray(np.where(WIDE > 0.2, 255, 0).astype(np.uint8))


def with_alpha(img: Image.Image, alpha: Image.Image) -> Image.Image:
    img = img.copy()
    img.putalpha(alpha)
    return img


PHOTO = photograph(64).resize((64, 48))
OPAQUE = Image.new("L", PHOTO.size, 255)
KINDS = {  # image, its file's format, ending and mode of the copy
    "colour": (PHOTO, "PNG", "jpg", "RGB"),
    "grey": (PHOTO.convert("L"), "PNG", "jpg", "L"),
    "bits": (PHOTO.convert("1"), "PNG", "jpg", "L"),
    "palette": (PHOTO.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", "jpg", "RGB"),
    "CMYK": (PHOTO.convert("CMYK"), "JPEG", "jpg", "RGB"),
    "LAB": (PHOTO.convert("LAB"), "TIFF", "jpg", "RGB"),
    "alpha": (with_alpha(PHOTO, HOLE), "PNG", "png", "RGBA"),
    "grey and alpha": (with_alpha(PHOTO.convert("L"), HOLE), "PNG", "png", "LA"),
    "opaque alpha": (with_alpha(PHOTO, OPAQUE), "PNG", "jpg", "RGB"),
    "opaque grey": (with_alpha(PHOTO.convert("L"), OPAQUE), "PNG", "jpg", "L"),
    "16 bits": (Image.fromarray((WIDE * 65535).astype(np.uint16)), "PNG", "png", "I;16"),
    "integers": (Image.fromarray((WIDE * 1e6).astype(np.int32)), "TIFF", "tif", "I"),
    "floats": (Image.fromarray(WIDE), "TIFF", "tif", "F"),
}


def read(content: bytes) -> Image.Image:
    img = Image.open(io.BytesIO(content))
    img.load()
    return img


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_of_image(name):
    """The copy looks like the original resized, for any number of channels that the reader makes of it."""
    picture, form, ending, mode = KINDS[name]
    img = read(encoded(picture, form))
    assert shrinks(img, SIDE) and not shrinks(img, 48)
    stored_as, data = smaller(img, SIDE, 95)
    copy = read(data)
    assert (stored_as, copy.mode, copy.size) == (ending, mode, (42, SIDE))
    for channels in (1, 3, 4):
        settings = dict(in_chans=channels, pixel_range=[0, 1e6] if name == "integers" else ["unit"])
        if name == "16 bits":
            settings["pixel_range"] = None
        ours = np.asarray(to_channels(copy, **settings), float)
        whole = to_channels(img, **settings).split()
        theirs = np.stack([band.resize((42, SIDE), Image.Resampling.BICUBIC) for band in whole], axis=-1).squeeze()
        assert abs(ours - theirs).mean() < 4, channels


def test_values_of_many_bits_stay_in_their_range():
    """Overshoot would make an image unreadable, whose type allows 0 to 1 only; NaN is refused as the reader does it."""
    edges = np.kron([[0.0, 1.0], [1.0, 0.0]], np.ones((32, 32))).astype(np.float32)
    copy = np.asarray(read(smaller(Image.fromarray(edges), 17, 90)[1]))
    assert copy.min() == 0 and copy.max() == 1 and copy.dtype == np.float32
    edges[0, 0] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        smaller(Image.fromarray(edges), 17, 90)


def test_no_rotation_and_no_metadata():
    """The reader does not apply EXIF's rotation: a copy with or without it must show the same."""
    img = read(with_exif()).resize((64, 48))
    img.info["comment"] = b"a comment"
    copy = read(smaller(img, SIDE, 90)[1])
    assert copy.size == (42, SIDE) and not copy.getexif() and "comment" not in copy.info
    assert np.asarray(copy)[:8].mean() < 60 < 200 < np.asarray(copy)[-8:].mean()  # dark above, white below


def test_what_cannot_be_resized():
    """A strip whose result no JPEG can hold, and a value that means transparent among 16 bits, are stored unchanged."""
    strip = Image.new("L", (140_000, 18))
    assert not shrinks(strip, 17) and shrinks(strip, 8)
    keyed = Image.fromarray((WIDE * 65535).astype(np.uint16))
    assert shrinks(keyed, SIDE)
    keyed.info["transparency"] = 7
    assert not shrinks(keyed, SIDE)


# Mistakes and kills ---------------------------------------------------------------------------------------------------


def test_bad_flags(folder, tmp_path):
    for flags, message in (
        (["--quality", "90"], "--quality 90 has no effect without --resize"),
        (["--resize", "0"], "--resize 0 must be positive"),
        (["--resize", "32", "--quality", "101"], "--quality 101 must lie between 1 and 100"),
        (["--workers", "-1"], "--num_workers -1 must not be negative"),
    ):
        with pytest.raises(UserError, match=message):
            write(folder, tmp_path / "out", *flags)
        assert not (tmp_path / "out").exists()


def test_a_kill_leaves_whole_shards_only(folder, tmp_path, monkeypatch):
    """A shard has its name once it is complete, the index comes last, the workers end, and the rest is not mixed with a
    second start."""
    out = tmp_path / "out"
    monkeypatch.setattr(make_shards, "AT_ONCE", 2)
    item = make_shards.Content.__getitem__
    monkeypatch.setattr(make_shards.Content, "__getitem__", lambda self, i: time.sleep(0.05) or item(self, i))
    flags = ("--resize", SIDE, "--workers", "2")
    process = multiprocessing.get_context("fork").Process(target=write, args=(folder, out, *flags))
    process.start()
    wait(lambda: (out / "images-train-000000.tar").exists())
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.join()
    assert len(children) == 2
    whole = sorted(out.glob("*.tar"))
    assert whole and not (out / "_info.json").exists()
    for path in whole:
        assert len(members({path.name: path.read_bytes()})) >= 12
    wait(lambda: not any(map(is_alive, children)))
    with pytest.raises(UserError, match="is not empty"):
        write(folder, out)


def is_alive(pid: str) -> bool:
    """Whether a process runs; one that has ended may not have been waited for by its new parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
