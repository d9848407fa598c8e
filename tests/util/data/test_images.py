"""Single images: every mode keeps its values; unreadable images are replaced or left out, and named."""

import builtins
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.launch import ROOT
from helpers.plain_images import PLAIN, flags, save
from PIL import Image
from torchvision import transforms as tvt

from util.data import transforms
from util.data.build import build_loader
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.samples import KeyedDataset, UnreadableData
from util.data.sources import Arrays, Files, Images
from util.errors import UserError
from util.parallel.distributed import setup_for_distributed

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
def test_every_mode_keeps_its_values(tmp_path, name):
    ending, picture, first, second = MODES[name]
    second = second or (round(40000 / 257),) * 3 + (255,)
    path = tmp_path / f"x.{ending}"
    picture.save(path)
    with Image.open(path) as stored:
        assert stored.mode == name.split()[0] and ("transparency" in stored.info) == ("transparent" in name)
    images, args = Files([str(path)], [0], None), flags()
    settle_pixel_range(args, images)
    for channels in (1, 2, 3, 4):
        sample = KeyedDataset(images, PLAIN, seed=0, in_chans=channels, pixel_range=args.pixel_range)[0]
        assert sample.bad == 0 and sample.image.shape == (channels, 1, 2)
        for got, (*colour, alpha) in zip((sample.image[:, 0, :].T * 255).round().int().tolist(), (first, second)):
            grey = grey_of(*colour)
            assert got == {1: [grey], 2: [grey, alpha], 3: colour, 4: [*colour, alpha]}[channels]


def test_channels_are_checked():
    for channels in (1, 2, 3, 4, 5, 224):
        transforms.check_channels(channels)
    for channels, bands in ((0, True), (0, False), (5, False)):
        with pytest.raises(UserError, match=f"--in_chans {channels}"):
            transforms.check_channels(channels, bands)


# Corrupt images ------------------------------------------------------------------------------------------------------

BROKEN = ("truncated.jpg", "empty.png", "text.jpg", "broken.png")


def corrupt_folder(root):
    """Write 20 good images of value 10 * i, followed by four unreadable ones."""
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
    """Return the image's value, and the first random number of the transform."""
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
        assert complaints == log.count("unreadable image")  # the named images are the counted ones
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
    """Ten unreadable images."""

    def __init__(self):
        self.targets = [0] * 10

    def load(self, index):
        raise OSError("gone")


@pytest.mark.parametrize("workers", [0, 1])
def test_twenty_unreadable_images_in_a_row_end_the_run(workers, capfd):
    loader = build_loader(Unreadable(), PLAIN, flags("--num_workers", workers), 1, train=True)
    batches = iter(loader.begin(0))
    with pytest.raises(UnreadableData, match="20 images in a row") as error:
        next(batches)
    if workers:
        loader.loader._iterator._shutdown_workers()
    named = [line for line in capfd.readouterr().err.splitlines() if line.startswith("unreadable image")]
    assert len(named[:20]) == 20
    if workers == 0:
        last = named[-1].removeprefix("unreadable image ").removesuffix(": gone")
        assert len(named) == 20 and str(error.value).endswith(f"the last one {last}")


ABANDONED = """
import sys
from types import SimpleNamespace
for name in ("util.data.readers", "util.data.transforms"):  # take seconds to import and are not needed
    sys.modules[name] = SimpleNamespace(Images=object, Converter=None, keeps_depth=None, uses_generators=None)
from torch.utils.data import Dataset
import torch
from util.data.loader import Loader
from util.data.samples import Sample
class Numbers(Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, key):
        return Sample(torch.zeros(1, 2, 2), 0, key[1], 0)
batches = iter(Loader(Numbers(), 2, shuffle=True, seed=0, num_workers=1))
next(batches)
print("reading", flush=True)
"""


def test_workers_end_with_a_process_that_still_holds_them():
    """Workers ignore the SIGTERM by which Python would end them."""
    process = subprocess.Popen([sys.executable, "-c", ABANDONED], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "reading\n"
    process.wait(timeout=15)
    assert process.returncode == 0


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("mistake", [ValueError, OSError])
def test_an_error_in_a_transform_is_no_unreadable_image(train, mistake, capfd):
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
    sample = KeyedDataset(Unreadable(), PLAIN, seed=0, in_chans=3, replace=False)[3]
    assert sample.bad == 1
    output = capfd.readouterr()
    assert "unreadable image image 3: gone" in output.err and "silenced" not in output.out + output.err
