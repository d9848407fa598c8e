"""One value range for a data set: by type, given, found over a sample, stored; the same in every reader."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.launch import SMALL
from helpers.plain_images import PLAIN, flags
from helpers.strange import GOOD, write_shard
from PIL import Image
from torchvision import transforms as tvt

import main_finetune
import main_pretrain
from tools import knn
from util.data import transforms
from util.data.build import build_loader
from util.data.cache import Decoder
from util.data.pixel_range import check_pixel_range, settle_pixel_range
from util.data.readers import read_images
from util.data.samples import KeyedDataset
from util.data.shards import Shards
from util.data.sources import Files
from util.errors import UserError

FLOAT, INT32, UINT16 = np.float32, np.int32, np.uint16


def write(path, values, dtype):
    """Write an image of one row; signed and float types need TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values]).astype(dtype)).save(path)
    return str(path)


def scene(folder, dtype, *maxima, ending="tif"):
    """Write one image of 16 grey levels from 0 to each of the maxima."""
    for i, top in enumerate(maxima):
        write(folder / f"{i}.{ending}", np.linspace(0, top, 16), dtype)
    return read_images(flags("--dataset", "folder", "--data_path", folder), True)


def settled(images, *argv, stored=None):
    args = flags(*argv)
    check_pixel_range(args.pixel_range)
    settle_pixel_range(args, images, lambda: stored or {})
    return args.pixel_range


def pixels(images, pixel_range, transform=PLAIN, channels=1):
    dataset = KeyedDataset(images, transform, 0, channels, replace=False, pixel_range=pixel_range)
    samples = [dataset[i] for i in range(len(images))]
    return [sample.image.flatten().mul(255) if not sample.bad else None for sample in samples]


@pytest.mark.parametrize("dtype", [INT32, FLOAT])
def test_images_of_one_scene_get_one_range(tmp_path, dtype):
    """A maximum of 200 was read as 0..255 and one of 400 as 0..65535, each image for itself."""
    images = scene(tmp_path, dtype, 200, 400)
    with pytest.raises(UserError, match=r"values of 0\.\.200 .*0\.tif.* and 0\.\.400 .*1\.tif.*--pixel_range LOW HIGH"):
        settled(images)
    found = settled(images, "--pixel_range", "auto")
    assert found == [0, 400]
    first, second = pixels(images, found)
    assert first.max().item() == 128 and second.max().item() == 255  # the second scene is twice as bright
    assert settled(images, "--pixel_range", "0", "800") == [0, 800]


def test_floats_and_integers_that_agree(tmp_path, capsys):
    for name, dtype, tops, expected in [
        ("a", FLOAT, (0.5, 1.0), "unit"),
        ("b", FLOAT, (200, 250), "8bit"),
        ("c", INT32, (1, 200), None),  # both fit 0..255: integers are not in 0..1
        ("d", INT32, (400, 60_000), "16bit"),
    ]:
        images = scene(tmp_path / name, dtype, *tops)
        assert settled(images) == [expected or "8bit"]
        assert f"--pixel_range {expected or '8bit'}" in capsys.readouterr().out


def test_an_image_outside_the_agreed_range_is_unreadable(tmp_path, capsys):
    """The sample decides the range; a later image that contradicts it is not scaled in silence."""
    images = scene(tmp_path, FLOAT, 0.5, 7.0)
    low, outside = pixels(images, ["unit"])
    assert low is not None and outside is None
    assert "0 to 7, outside 0..1: give --pixel_range LOW HIGH" in capsys.readouterr().err
    assert pixels(images, [0, 1])[1].max() == 255  # a window clips


def test_hounsfield_units(tmp_path):
    """Negative values were refused one by one, until the run ended."""
    write(tmp_path / "ct.tif", [-1024, -160, 40, 240, 3000], INT32)
    images = read_images(flags("--dataset", "folder", "--data_path", tmp_path), True)
    with pytest.raises(UserError, match=r"-1024\.\.3000 \(int32"):
        settled(images)
    (window,) = pixels(images, settled(images, "--pixel_range", "-160", "240"))
    assert window.tolist() == [0, 0, 128, 255, 255]


def test_twelve_bits_in_sixteen(tmp_path, capsys):
    """17 levels were left of 4096, without a word."""
    images = scene(tmp_path, UINT16, 4095, 3000, ending="png")
    assert settled(images) is None  # by type
    assert "about 17 of 256 grey levels of 0..65535: --pixel_range 0 4095 would use all" in capsys.readouterr().out
    first, second = pixels(images, settled(images, "--pixel_range", "auto"))
    assert first.max().item() == 255 and second.max().item() == round(3000 / 4095 * 255)


def test_integers_of_png_have_sixteen_bits(tmp_path):
    """Pillow reads 16-bit PGM as 32-bit integers; 200 of 65535 is dark."""
    image = Image.fromarray(np.array([[0, 200, 65535]], UINT16))
    image.save(tmp_path / "x.pgm")
    images = Files([str(tmp_path / "x.pgm")], [0], None)
    assert Image.open(tmp_path / "x.pgm").mode == "I"
    assert settled(images) is None
    assert pixels(images, None)[0].tolist() == [0, 1, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_more_than_eight_bits_reach_the_network(tmp_path, channels):
    """1,000 levels stay 1,000 through pretraining's and evaluation's transforms."""
    values = np.arange(32 * 32).reshape(32, 32) * 64
    Image.fromarray(values.astype(UINT16)).save(tmp_path / "x.png")
    images, norm = Files([str(tmp_path / "x.png")], [0], None), ((0.0,) * channels, (1.0,) * channels)
    evaluated = KeyedDataset(images, transforms.eval_transform((32, 32), *norm), 0, channels)[0].image
    assert evaluated.shape == (channels, 32, 32)
    assert torch.equal(evaluated[-1], evaluated[0])
    assert len(evaluated[0].unique()) == 1024
    torch.testing.assert_close(evaluated[0].double(), torch.from_numpy(values / 65535.0), atol=1e-7, rtol=0)  # float32
    trained = KeyedDataset(images, transforms.pretrain_transform("mae", (32, 32), *norm), 0, channels)[0].image
    assert len(trained.unique()) > 256 and trained.min() >= 0 and trained.max() <= 1


def test_photometric_steps_and_foreign_transforms_get_eight_bits(tmp_path):
    Image.fromarray((np.arange(1024).reshape(32, 32) * 64).astype(UINT16)).save(tmp_path / "x.png")
    images, norm = Files([str(tmp_path / "x.png")], [0], None), ((0.0,) * 3, (1.0,) * 3)
    for transform in (
        transforms.pretrain_transform("three", (32, 32), *norm),
        tvt.Compose([tvt.Resize((32, 32)), tvt.ToTensor()]),
    ):
        assert len(KeyedDataset(images, transform, 0, 3)[0].image.unique()) <= 256


def test_every_reader_scales_alike(tmp_path):
    """Files, list of a folder, shards and the cache give the pixels of one range."""
    images = scene(tmp_path / "data", FLOAT, 300, 700)
    stored = {f"{i}.tif": (tmp_path / "data" / f"{i}.tif").read_bytes() for i in range(2)}
    write_shard(tmp_path / "x.tar", stored)
    shards = Shards([str(tmp_path / "x.tar")], [2])
    args = flags("--pixel_range", "100", "500", "--in_chans", "1", "--num_workers", "0")
    expected = [[0, 128], [0, 255]]  # 300 and 700 of 100..500
    loaders = [build_loader(source, PLAIN, args, 2, train=False) for source in (images, shards)]
    for loader in loaders:
        (batch,) = list(loader.begin(0))
        assert [[round(255 * end.item()) for end in row.aminmax()] for row in batch.image] == expected
    decoder = Decoder(images, 1, None, None, args.pixel_range)
    assert [[decoder._decoded(i).min(), decoder._decoded(i).max()] for i in range(2)] == expected
    assert settled(shards, "--pixel_range", "auto") == settled(images, "--pixel_range", "auto") == [0, 700]


def test_the_range_of_the_checkpoint_is_used(tmp_path):
    """Also for other images than those of the training."""
    images = scene(tmp_path, FLOAT, 100, 120)
    assert settled(images, stored={"pixel_range": [0, 1000]}) == [0, 1000]
    assert settled(images, "--pixel_range", "auto", stored={"pixel_range": [0, 1000]}) == [0, 1000]
    assert settled(images, "--pixel_range", "0", "50", stored={"pixel_range": [0, 1000]}) == [0, 50]
    assert settled(images, stored={}) == ["8bit"]  # older checkpoints do not store it


def test_colour_of_sixteen_bits(tmp_path, capsys):
    """Pillow reads the upper 8 of 16 bits: said at the start, and a window is refused."""
    (tmp_path / "x.png").write_bytes(GOOD["16-bit PNG"])
    images = Files([str(tmp_path / "x.png")], [0], None)
    assert settled(images) is None
    out = capsys.readouterr().out
    assert "1 of the sampled images have 16 bits per channel in colour" in out and "21 of 256 levels" in out
    assert pixels(images, [0, 4095], channels=3) == [None]
    assert "16 bits per channel in colour" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["5 5", "7 3", "0 1 2", "auto 3", "4", "0 nan"])
def test_bad_ranges(words):
    with pytest.raises(UserError, match=r"--pixel_range .* must be two increasing numbers"):
        check_pixel_range(flags("--pixel_range", *words.split()).pixel_range)


def test_a_stream_cannot_be_sampled():
    with pytest.raises(UserError, match="not a stream"):
        settled(SimpleNamespace(), "--pixel_range", "auto")


def test_commands_store_and_use_it(tmp_path, capsys):
    """Pretraining finds the range; fine-tuning, --eval and kNN use the stored one."""
    rng = np.random.RandomState(0)
    for split, top in (("train", 4000), ("val", 1000)):
        for label in ("a", "b"):
            for i in range(4):
                values = rng.uniform(0, top, (16, 16)).astype(FLOAT)
                values[0, :2] = 0, top
                file = tmp_path / "data" / split / label / f"{i}.tif"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(file)

    def call(module, *words):
        words = [*words, "--data_path", tmp_path / "data", "--num_workers", 0, "--batch_size", 4, "--device", "cpu"]
        module.main(module.get_args_parser().parse_args([str(word) for word in words]))
        return capsys.readouterr().out

    once = ["--epochs", 1, "--warmup_epochs", 0]
    out = call(main_pretrain, *SMALL.split(), *once, "--vis_freq", 0, "--pixel_range", "auto", "--output_dir", tmp_path)
    assert "--pixel_range auto: 0 to 4000" in out
    weights, tuned = tmp_path / "checkpoint-0.pth", tmp_path / "tuned"
    assert torch.load(weights, weights_only=True)["args"]["pixel_range"] == [0, 4000]
    call(main_finetune, "--finetune", weights, *once, "--output_dir", tuned)
    call(main_finetune, "--eval", "--finetune", tuned / "checkpoint-0.pth", "--output_dir", tmp_path / "eval")
    call(knn, weights, "--k", 1, "--out", tmp_path / "knn" / "knn.json")
    for file in (tmp_path / "eval" / "eval.json", tmp_path / "knn" / "knn.json"):
        assert json.loads(file.read_text())["pixel_range"] == [0, 4000]


def test_a_resumed_fine_tuning_keeps_its_range(tmp_path, capsys):
    """Also when it was started without --finetune, or from a checkpoint of another range."""
    for split in ("train", "val"):
        for label in ("a", "b"):
            for i in range(4):
                write(tmp_path / "data" / split / label / f"{i}.tif", [0, 100, 199] * 6, INT32)
    words = ["--data_path", tmp_path / "data", "--num_workers", 0, "--batch_size", 4, "--device", "cpu"]
    words += ["--model", "vit_micro_patch4", "--input_size", 16, "--warmup_epochs", 0, "--output_dir", tmp_path]

    def call(*more):
        args = main_finetune.get_args_parser().parse_args([str(word) for word in (*words, *more)])
        main_finetune.main(args)
        return capsys.readouterr().out

    call("--epochs", 1, "--pixel_range", -100, 400)
    assert "--pixel_range -100 400, from the checkpoint" in call("--epochs", 2, "--resume", "auto")
    assert torch.load(tmp_path / "checkpoint-1.pth", weights_only=True)["args"]["pixel_range"] == [-100, 400]


def test_what_is_said_of_a_range_that_does_not_fit(tmp_path, capsys):
    images = scene(tmp_path / "a", UINT16, 200, 250, ending="png")
    with pytest.raises(UserError, match=r"8bit does not apply to 16-bit images.*--pixel_range 0 255"):
        settled(images, "--pixel_range", "8bit")
    assert settled(images, stored={"pixel_range": ["unit"]}) == ["unit"]  # of floats; 16 bits keep their own range
    assert "about 2 of 256 grey levels of 0..65535" in capsys.readouterr().out
    bright = scene(tmp_path / "b", UINT16, 60_000, ending="png")
    assert settled(bright, "--pixel_range", "auto", stored={"pixel_range": [-100, 400]}) == [-100, 400]
    out = capsys.readouterr().out
    assert "--pixel_range -100 400, from the checkpoint; auto has no effect" in out and "most of it outside" in out
    with pytest.raises(UserError, match=r"--pixel_range unit is 0\.\.1, but .* has values of 0\.\.200"):
        settled(scene(tmp_path / "c", FLOAT, 200), stored={"pixel_range": ["unit"]})
    (tmp_path / "d.png").write_bytes(GOOD["16-bit PNG"])
    with pytest.raises(
        UserError, match="cannot be applied: 1 of the sampled images have 16 bits per channel in colour"
    ):
        settled(Files([str(tmp_path / "d.png")], [0], None), "--pixel_range", "0", "4095")


def test_a_blank_tile_does_not_vote(tmp_path):
    images = scene(tmp_path, FLOAT, 0, 200, 180)
    assert settled(images) == ["8bit"]
    assert settled(scene(tmp_path / "blank", FLOAT, 0)) == ["unit"]


def test_nan_is_named(tmp_path, capsys):
    path = write(tmp_path / "x.tif", [0, np.nan], FLOAT)
    assert pixels(Files([path], [0], None), [0, 1]) == [None]
    assert "NaN or infinite" in capsys.readouterr().err


def test_a_damaged_first_shard_is_passed_over(tmp_path):
    images = scene(tmp_path / "data", INT32, 200)
    write_shard(tmp_path / "1.tar", {"0.tif": (tmp_path / "data" / "0.tif").read_bytes()})
    (tmp_path / "0.tar").write_bytes(b"no archive")
    shards = Shards([str(tmp_path / f"{i}.tar") for i in (0, 1)], [1, 1])
    assert settled(shards) == settled(images) == ["8bit"]


def test_images_of_eight_bits_are_not_decoded(tmp_path, monkeypatch):
    """64 photographs took ten seconds at every start."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.jpg")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    assert settled(Files([str(tmp_path / "x.jpg")], [0], None)) is None
