"""Images of any number of bands: what is read of TIFF, .npy and .npz, and what the transforms make of it."""

import numpy as np
import pytest
import tifffile
import torch
from helpers.band_sets import BANDS, class_folders, scene, stats, training_values, write
from helpers.plain_images import flags
from PIL import Image

from tools import mean_std
from util.data import band_files
from util.data.bands import BandLayout, Bands
from util.data.build import build_loader
from util.data.image_format import mean_std as normalisation
from util.data.images import BROKEN_IMAGE
from util.data.leftovers import Skipped
from util.data.listing import list_images
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.samples import KeyedDataset
from util.data.sources import Files, Subset
from util.data.transforms import eval_transform, pretrain_transform, probe_transform
from util.errors import UserError

HALVES = (0.5,) * BANDS, (0.5,) * BANDS


def data_flags(root, *more):
    return flags("--data_path", root, "--in_chans", BANDS, "--num_workers", 0, *stats().split(), *more)


def read(path, count=BANDS, axis="auto"):
    with open(path, "rb") as file:
        return band_files.read_file(file, BandLayout(count, axis))


def samples(images, transform, in_chans=BANDS, pixel_range=None, seed=0):
    dataset = KeyedDataset(images, transform, seed, in_chans, replace=False, pixel_range=pixel_range)
    return [dataset[index] for index in range(len(images))]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".tif", ".npy", ".npz"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.int16])
def test_every_file_and_type_keeps_its_values(tmp_path, ending, dtype):
    """Each value is scaled by the range of its type: the full one of unsigned integers, 0..1 of floats, else the one
    that is given; to the precision of float32."""
    root = class_folders(tmp_path, ending, dtype=np.float64 if dtype == np.int16 else dtype)
    if dtype == np.int16:
        for path in root.glob(f"*/*/*{ending}"):
            write(path, scene(int(path.stem)).astype(np.int16) - 500)
    args = data_flags(root, *(["--pixel_range", -1000, 9000] if dtype == np.int16 else []))
    images = read_images(args, train=True)
    settle_pixel_range(args, images)
    transform = eval_transform((20, 24), *HALVES, 1.0)
    got = torch.stack([s.image for s in samples(images, transform, pixel_range=args.pixel_range)])
    stored = training_values(root, ending).astype(np.float64)
    low, high = {np.uint8: (0, 255), np.uint16: (0, 65535), np.int16: (-1000, 9000)}.get(dtype, (0, 1))
    expected = torch.from_numpy(((stored - low) / (high - low) - 0.5) / 0.5).permute(0, 3, 1, 2)
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)  # float32


@pytest.mark.parametrize("ending", [".tif", ".npy", ".npz"])
def test_workers_change_nothing(tmp_path, ending):
    args = data_flags(class_folders(tmp_path, ending))
    images = read_images(args, train=True)
    settle_pixel_range(args, images)
    transform = pretrain_transform("mae", (16, 16), *normalisation("", BANDS, args.mean, args.std))
    batches = []
    for workers in (0, 2):
        loader = build_loader(images, transform, args, 4, train=True, num_workers=workers)
        batches.append(torch.cat([batch.image for batch in loader.begin(0)]))
    assert batches[0].shape == (8, BANDS, 16, 16) and torch.equal(*batches)


@pytest.mark.parametrize(("dtype", "handed"), [(np.uint8, torch.uint8), (np.uint16, torch.float32)])
def test_workers_hand_over_bytes_where_files_have_them(tmp_path, dtype, handed):
    args = data_flags(class_folders(tmp_path, dtype=dtype))
    images = read_images(args, train=True)
    settle_pixel_range(args, images)
    loader = build_loader(images, pretrain_transform("mae", (16, 16), *HALVES), args, 4, train=True)
    assert loader.dataset[(0, 0)].image.dtype == handed
    assert args.pixel_range == (None if dtype == np.uint8 else ["16bit"])


def test_tiff_says_where_its_bands_are(tmp_path):
    values = scene(0, bands=5)
    write(tmp_path / "contig.tif", values)
    first = values.transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "planar.tif", first, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(tmp_path / "pages.tif", first, photometric="minisblack")
    tifffile.imwrite(tmp_path / "channels.tif", first, imagej=True, metadata={"axes": "CYX"})
    tifffile.imwrite(tmp_path / "big.tif", first.astype(">u2"), bigtiff=True, byteorder=">", photometric="minisblack")
    tifffile.imwrite(tmp_path / "deflate.tif", values, photometric="minisblack", planarconfig="contig",
                     compression="zlib")  # fmt: skip
    for path in sorted(tmp_path.glob("*.tif")):
        img = read(path, 5)
        assert isinstance(img, Bands) and np.array_equal(img.values, first), path
    square = scene(0, size=(5, 5), bands=5)  # any axis could have the bands, but the file says it
    write(tmp_path / "square.tif", square)
    assert np.array_equal(read(tmp_path / "square.tif", 5).values, square.transpose(2, 0, 1))


def test_pillow_keeps_what_it_reads(tmp_path):
    """RGB and RGBA TIFF files, and other images, are read as before; the fourth of four samples is not lost."""
    rgb = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "rgb.tif")
    Image.fromarray(np.dstack([rgb, rgb[..., :1]])).save(tmp_path / "rgba.tif")
    infrared = np.dstack([rgb, rgb[..., :1]]).astype(np.uint16) * 100
    tifffile.imwrite(tmp_path / "infrared.tif", infrared, photometric="rgb", extrasamples=["unspecified"])
    assert read(tmp_path / "rgb.tif", 3).mode == "RGB" and read(tmp_path / "rgba.tif", 4).mode == "RGBA"
    assert np.array_equal(read(tmp_path / "infrared.tif", 4).values, infrared.transpose(2, 0, 1))
    floats = rgb.astype(np.float32) / 255
    tifffile.imwrite(tmp_path / "floats.tif", floats, photometric="rgb")  # which pillow cannot read
    assert np.array_equal(read(tmp_path / "floats.tif", 3).values, floats.transpose(2, 0, 1))


def test_arrays_of_one_band_are_grey_images(tmp_path):
    for dtype, mode in ((np.uint8, "L"), (np.uint16, "I;16"), (np.int64, "I"), (np.float64, "F")):
        values = np.arange(12).reshape(3, 4).astype(dtype)
        for name, shaped in (("flat", values), ("first", values[None]), ("last", values[..., None])):
            np.save(tmp_path / f"{name}.npy", shaped)
            img = read(tmp_path / f"{name}.npy", 1)
            assert img.mode == mode and np.array_equal(np.asarray(img), values)
    assert read(tmp_path / "flat.npy", 3).mode == "F"  # repeated for RGB, as other grey images


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((5, 8, 5), np.uint8, r"5 x 8 x 5.*first or the last axis.*--band_axis first or last"),
        ((8, 9, 4), np.uint8, "8 x 9 x 4.*neither its first nor its last axis has the 5 bands of --in_chans"),
        ((2, 5, 8, 9), np.uint8, "2 x 5 x 8 x 9: two or three axes"),
        ((5,), np.uint8, "two or three axes"),
        ((5, 0, 9), np.uint8, "empty"),
        ((5, 8, 9), np.complex64, "complex64, which are no real numbers"),
        ((5, 8, 9), bool, "bool, which are no real numbers"),
        ((5, 8, 9), object, "Python objects"),
    ],
)
def test_unsuitable_arrays_are_refused_in_a_sentence(tmp_path, shape, dtype, words):
    np.save(tmp_path / "x.npy", np.zeros(shape, dtype), allow_pickle=True)
    with pytest.raises(BROKEN_IMAGE, match=words):
        read(tmp_path / "x.npy", 5)


def test_unsuitable_archives_and_sizes(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((5, 8, 9)), b=np.zeros(3))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "two.npz").read_bytes()[:100])
    (tmp_path / "cut.tif").write_bytes(b"II*\0" + b"\xff" * 50)
    with open(tmp_path / "huge.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (5, 10**6, 10**6)})
    for name, words in {
        "two.npz": r"which of its arrays is the image is not clear \(a, b\)",
        "cut.npz": "zip archive that cannot be read",
        "cut.tif": "a TIFF that tifffile cannot read",
        "huge.npy": "5 x 1000000 x 1000000 values, more than",
    }.items():
        with pytest.raises(BROKEN_IMAGE, match=words):
            read(tmp_path / name, 5)


def test_order_is_given(tmp_path):
    values = np.arange(5 * 8 * 5).reshape(5, 8, 5)
    np.save(tmp_path / "x.npy", values)
    assert np.array_equal(read(tmp_path / "x.npy", 5, "first").values, values)
    assert np.array_equal(read(tmp_path / "x.npy", 5, "last").values, values.transpose(2, 0, 1))
    images = read_images(flags("--dataset", "folder", "--data_path", tmp_path, "--band_axis", "last"), True)
    images = Subset(images, [0])
    images.expect_bands(5)  # as a loader does
    assert np.array_equal(images.load(0).values, values.transpose(2, 0, 1))


def test_missing_tifffile(tmp_path, monkeypatch):
    args = data_flags(class_folders(tmp_path))
    monkeypatch.setattr(band_files, "tifffile", None)
    with pytest.raises(UserError, match="need the package tifffile: pip install tifffile"):
        settle_pixel_range(args, read_images(args, train=True))


# Data sets ------------------------------------------------------------------------------------------------------------


def test_arrays_beside_images_are_left_out(tmp_path):
    for name in ("a/0.png", "a/1.npy", "b/2.NPZ", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    skipped = Skipped()
    paths, counts = list_images(tmp_path, ["a", "b"], skipped)
    assert list(paths) == [f"{tmp_path}/a/0.png", f"{tmp_path}/b/3.png"] and counts.tolist() == [1, 1]
    assert skipped.endings == {".npy": 1, ".npz": 1}
    for path in paths:
        (tmp_path / path).unlink()
    paths, counts = list_images(tmp_path, ["a", "b"], Skipped())
    assert list(paths) == [f"{tmp_path}/a/1.npy", f"{tmp_path}/b/2.NPZ"] and counts.tolist() == [1, 1]


def test_lists_name_arrays(tmp_path):
    class_folders(tmp_path / "set", ".npy")
    names = [f"train/plain/{i}\tplain" for i in (0, 2)] + [f"train/stripe/{i}\tstripe" for i in (1, 3)]
    for ending in ("", ".npy"):
        (tmp_path / "list.txt").write_text("\n".join(name.replace("\t", f"{ending}\t") for name in names))
        args = data_flags(tmp_path / "set", "--dataset", "filelist", "--train_list", tmp_path / "list.txt")
        images = read_images(args, True)
        assert [images.load(i).values.shape for i in range(4)] == [(BANDS, 20, 24)] * 4


def test_other_numbers_of_bands(tmp_path, capsys):
    """A file that differs is unreadable, with its reason; a data set that differs is refused at the start."""
    root = class_folders(tmp_path)
    write(root / "train/plain/0.tif", scene(0, bands=12))
    args = data_flags(root)
    images = read_images(args, train=True)
    settle_pixel_range(args, images)
    got = samples(images, eval_transform((20, 24), *HALVES), pixel_range=args.pixel_range)
    assert [sample.bad for sample in got] == [1] + [0] * 7 and got[0].image.shape == (BANDS, 20, 24)
    assert "unreadable image" in (text := capsys.readouterr().err) and "12 bands, but --in_chans is 13" in text
    (root / "train/plain/0.tif").unlink()
    for channels in (12, 3):
        words = f"none of the sampled.*it has 13 bands, but --in_chans is {channels}"
        with pytest.raises(UserError, match=words):
            settle_pixel_range(flags("--in_chans", channels), read_images(data_flags(root), train=True))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"--in_chans 13: .*x\.png has 3 channels"):
        settle_pixel_range(flags("--in_chans", 13), Files([str(tmp_path / "x.png")], [0], None))


def test_the_order_is_said_and_must_agree(tmp_path, capsys):
    args = data_flags(class_folders(tmp_path / "set", ".npy"))
    settle_pixel_range(args, read_images(args, train=True))
    assert "bands are the first axis of the arrays: " in capsys.readouterr().out
    np.save(tmp_path / "set/train/plain/9.npy", scene(0))
    with pytest.raises(UserError, match=r"first axis, those of .*9\.npy its last: .*--band_axis first or last"):
        settle_pixel_range(args, read_images(args, train=True))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_no_numbers_make_an_image_unreadable(tmp_path, capsys, value):
    root = class_folders(tmp_path, ".npy", dtype=np.float32)
    broken = scene(0, dtype=np.float32)
    broken[3, 4, 5] = value
    write(root / "train/plain/0.npy", broken)
    args = data_flags(root)
    images = read_images(args, train=True)
    settle_pixel_range(args, images)
    got = samples(images, eval_transform((20, 24), *HALVES), pixel_range=args.pixel_range)
    assert [sample.bad for sample in got] == [1] + [0] * 7
    assert "0.npy: it has values that are NaN or infinite" in capsys.readouterr().err
    replaced = KeyedDataset(images, eval_transform((20, 24), *HALVES), 0, BANDS, pixel_range=args.pixel_range)[0]
    assert replaced.bad == 1 and torch.isfinite(replaced.image).all() and replaced.image.std() > 0


def test_values_outside_a_range_are_never_clipped_in_silence(tmp_path, capsys):
    write(tmp_path / "0.npy", scene(0, dtype=np.float32) + 0.8)
    args = flags("--in_chans", BANDS, "--dataset", "folder", "--data_path", tmp_path)
    images = read_images(args, True)
    assert settle_pixel_range(args, images) is None and args.pixel_range == ["8bit"]  # they do not fit 0..1
    (sample,) = samples(images, eval_transform((20, 24), *HALVES), pixel_range=["unit"])
    assert sample.bad and "outside 0..1: give --pixel_range LOW HIGH" in capsys.readouterr().err


@pytest.mark.parametrize("ending", [".tif", ".npy"])
def test_mean_std_equals_numpy(tmp_path, capsys, ending):
    root = class_folders(tmp_path, ending)
    mean_std.main(mean_std.get_args_parser().parse_args(["--data_path", str(root), "--in_chans", str(BANDS)]))
    printed = capsys.readouterr().out.split("--mean ")[1].split(" --std ")
    values = training_values(root, ending).reshape(-1, BANDS) / 65535
    for text, expected in zip(printed, (values.mean(axis=0), values.std(axis=0))):
        np.testing.assert_allclose([float(word) for word in text.split()], expected, rtol=2e-5)  # five digits


def test_means_are_needed():
    with pytest.raises(UserError, match=r"--in_chans 13 needs --mean and --std, 13 numbers each: tools/mean_std\.py"):
        normalisation("imagefolder", 13)
    with pytest.raises(UserError, match="--in_chans is 13"):
        normalisation("imagefolder", 13, [0.5] * 12, [0.5] * 12)


# Transforms -----------------------------------------------------------------------------------------------------------

PARTS = {
    "mae": lambda *stats: pretrain_transform("mae", (16, 16), *stats),
    "crop": lambda *stats: pretrain_transform("crop", (32, 32), *stats),
    "evaluation": lambda *stats: eval_transform((16, 16), *stats, 0.875),
    "rectangle": lambda *stats: eval_transform((12, 20), *stats),
    "probe": lambda *stats: probe_transform("rrc", (16, 16), *stats),
    "strip": lambda *stats: eval_transform((700, 700), *stats),
}


@pytest.mark.parametrize("rng", ["v1", "v2"])
@pytest.mark.parametrize("name", PARTS)
def test_an_rgb_image_in_an_array_gives_the_same_input(tmp_path, name, rng):
    """Bytes give the same bits: the same crop, flip and filter. Floats differ by pillow's rounding of bytes after each
    of its two passes: half a level, which the second one enlarges to 1.25 times at most, and another half. (The values
    stay so far from 0 and 255 that bytes are not clipped between the passes.)"""
    size = (3, 30_000, 3) if name == "strip" else (33, 47, 3)  # a strip is resized to its centre only
    rgb = np.random.default_rng(0).integers(60, 196, size, np.uint8)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", rgb if name == "strip" else rgb.transpose(2, 0, 1))
    np.save(tmp_path / "c.npy", rgb.astype(np.float32) / 255)
    stats = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    axis = "last" if name == "strip" else "auto"
    got = []
    for file in ("a.png", "b.npy", "c.npy"):
        images = Files([str(tmp_path / file)], [0], None)
        images.expect_bands(3, axis)
        options = dict(pixel_range=["unit"], sample_rng=rng, replace=False)
        dataset = KeyedDataset(images, PARTS[name](*stats), 3, 3, **options)
        got.append(torch.stack([dataset[(epoch, 0)].image for epoch in range(1 if name == "strip" else 6)]))
        assert not dataset[(0, 0)].bad
    assert torch.equal(got[0], got[1])
    levels = (got[0] - got[2]).abs() * torch.tensor(stats[1])[:, None, None] * 255
    assert levels.max() < 1.15


def test_flips_and_crops_move_whole_bands():
    values = scene(0, bands=5).transpose(2, 0, 1)
    img = Bands(values)
    assert np.array_equal(img.transpose(Image.Transpose.FLIP_LEFT_RIGHT).values, values[:, :, ::-1])
    assert np.array_equal(img.crop((2, 3, 10, 9)).values, values[:, 3:9, 2:10])
    with pytest.raises(NotImplementedError, match="mirrored only"):
        img.transpose(Image.Transpose.ROTATE_90)
    reference = Image.fromarray(values[0])
    for box in ((-4, -5, 60, 10), (10, 5, 70, 80), (-10, -10, -5, -5), (60, 3, 70, 10)):
        assert np.array_equal(img.crop(box).values[0], np.asarray(reference.crop(box)))


def test_colours_are_refused():
    with pytest.raises(UserError, match="--aug three needs 1 or 3 channels, not --in_chans 13"):
        pretrain_transform("three", (16, 16), *HALVES)
