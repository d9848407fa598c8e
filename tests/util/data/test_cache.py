"""Images decoded once and augmented in batches: the same crops, colours and distributions as for single images."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint, log_rows, ranks, same_tensors
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as TF

import main_pretrain
import util.data.cache
from util.data import batch_aug, jpeg_decoder
from util.data.batch_aug import BatchTransform, by_matrices, crop_boxes, gaussian_blur, padded_crops, resized_crops
from util.data.cache import CachedBatches, Decoder, cache_images
from util.data.image_format import IMAGENET
from util.data.sources import Arrays, Files
from util.data.transforms import eval_transform, pretrain_transform
from util.errors import UserError

RNG = np.random.default_rng(0)
CPU = torch.device("cpu")
BASE = (
    "--model mae_vit_micro_patch4 --input_size 16 --norm_pix_loss --warmup_epochs 0 --epochs 2 --lr 1e-3 "
    "--vis_freq 0 --batch_size 16 --device cpu --amp_dtype fp32 --num_workers 1 --save_freq 1"
)


def noisy(count, height, width, channels=3):
    """Return uint8 images with structure at every scale and the full range."""
    rng = np.random.default_rng([count, height, width])  # independent of earlier tests
    coarse = rng.integers(0, 256, (count, channels, 4, 4)).astype(np.float32)
    smooth = torch.nn.functional.interpolate(torch.tensor(coarse), (height, width), mode="bicubic")
    noise = torch.tensor(rng.normal(0, 40, (count, channels, height, width)), dtype=torch.float32)
    return (smooth + noise).round().clamp(0, 255).to(torch.uint8)


def picture(pixels):
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def pixels(image):
    return torch.tensor(np.asarray(image)).permute(2, 0, 1).float()


# One operation after the other, against pillow and torchvision --------------------------------------------------------


@pytest.mark.parametrize("resized_crops", [resized_crops, by_matrices])
@pytest.mark.parametrize("size", [(16, 16), (32, 32), (48, 24)])
@pytest.mark.parametrize("source", [(32, 32), (64, 48), (100, 130)])
def test_resized_crops_are_pillows(source, size, resized_crops):
    """Enlarged and reduced crops agree within one level of 255 (pillow uses 8-bit weights), and are nearly always
    equal."""
    images = noisy(12, *source)
    boxes = crop_boxes(torch.rand(12, 40), source, scale=(0.08, 1.0))
    flip = torch.arange(12) % 2 == 0
    ours = resized_crops(images, boxes, size, flip)
    for image, box, mirrored, mine in zip(images, boxes.int().tolist(), flip, ours):
        theirs = TF.resized_crop(picture(image), *box, size, transforms.InterpolationMode.BICUBIC)
        difference = (mine - pixels(ImageOps.mirror(theirs) if mirrored else theirs)).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.02


def test_padded_crops_are_torchvisions():
    images = noisy(8, 32, 32)
    top, left, flip = torch.arange(8), torch.arange(8).flip(0), torch.arange(8) % 2 == 0
    ours = padded_crops(images, top, left, (4, 4), flip)
    for image, t, x, mirrored, mine in zip(images, top, left, flip, ours):
        theirs = TF.crop(TF.pad(image, 4), int(t), int(x), 32, 32)
        assert torch.equal(mine, TF.hflip(theirs) if mirrored else theirs)


@pytest.mark.parametrize("size", [(32, 32), (40, 120), (300, 20)])
def test_crop_boxes_are_drawn_as_torchvisions(size):
    """20,000 draws each: the Kolmogorov-Smirnov distance of area, aspect, top and left is below 1.95 sqrt(2 / n), which
    two samples of one distribution exceed once in a thousand times."""
    torch.manual_seed(0)
    count = 20_000
    ours = crop_boxes(torch.rand(count, 40), size)
    image = torch.empty(1, *size)
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    theirs = torch.tensor(theirs, dtype=torch.float64)
    assert (ours[:, 0] + ours[:, 2] <= size[0]).all() and (ours[:, 1] + ours[:, 3] <= size[1]).all()
    for value in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        one, other = value(ours).sort().values, value(theirs).sort().values
        points = torch.cat([one, other])
        ranks = [torch.searchsorted(x, points, right=True) / count for x in (one, other)]
        assert (ranks[0] - ranks[1]).abs().max() < 1.95 * (2 / count) ** 0.5


def test_colours_are_pillows():
    images = noisy(4, 24, 24)
    floats = images.float()
    assert (
        batch_aug.grey(floats) - torch.stack([pixels(picture(x).convert("L").convert("RGB")) for x in images])
    ).abs().max() <= 1
    for radius in (0.1, 0.3, 1.0, 2.0):  # pillow rounds after each of its six passes
        blurred = gaussian_blur(floats, torch.full((4,), radius))
        theirs = torch.stack([pixels(picture(x).filter(ImageFilter.GaussianBlur(radius))) for x in images])
        assert (blurred - theirs).abs().max() <= 3 and (blurred - theirs).abs().mean() < 1


@pytest.mark.parametrize("choice", [0, 1, 2])
@pytest.mark.parametrize("order", range(6))
def test_three_augment_is_pillows(choice, order):
    """Agreement to a few levels of 255: pillow rounds in all three operations, and contrast amplifies rounding."""
    images = noisy(2, 24, 24)
    strengths = torch.tensor([0.8, 0.3, 0.55])
    draws = torch.cat([torch.tensor([(choice + 0.5) / 3, 0.0]), strengths, torch.tensor([(order + 0.5) / 6])])
    ours = batch_aug.three_augment(images.float(), draws.expand(2, -1))
    kinds = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color]
    permutation = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]][order]
    for image, mine in zip(images, ours):
        theirs = [
            lambda x: x.convert("L").convert("RGB"),
            ImageOps.solarize,
            lambda x: x.filter(ImageFilter.GaussianBlur(0.1)),
        ][choice](picture(image))
        for operation in permutation:
            theirs = kinds[operation](theirs).enhance(0.7 + 0.6 * strengths[operation].item())
        assert (mine - pixels(theirs)).abs().max() <= 5 and (mine - pixels(theirs)).abs().mean() < 1


@pytest.mark.parametrize("size,crop_pct", [((32, 32), None), ((16, 16), None), ((16, 16), 0.75), ((16, 24), None)])
def test_without_augmentation_it_is_the_evaluation_transform(size, crop_pct):
    """Agreement to one level of 255, divided by a standard deviation of 0.225."""
    images = noisy(3, 32, 48 if size[0] != size[1] else 32)
    ours = BatchTransform("none", size, *IMAGENET, 0, crop_pct)(images, 0, torch.arange(3))
    plain = eval_transform(size, *IMAGENET, crop_pct)
    theirs = torch.stack([plain(picture(x)) for x in images])
    levels = (ours - theirs).abs() * 255 * 0.225
    assert levels.max() < 1.1


@pytest.mark.parametrize("aug", ["mae", "crop", "three"])
def test_distribution_is_that_of_image_by_image(aug):
    """Mean and standard deviation of each pixel over 600 draws of four images, batch against pillow. Pixels of one draw
    are correlated, so chi-square per pixel, 1 on average, varies a lot: below 3 for each image and 2 over all (two
    samples of pillow vary as much)."""
    images, count, chi_squares = noisy(4, 32, 32), 600, []
    batched, single = BatchTransform(aug, (32, 32), *IMAGENET, 0), pretrain_transform(aug, (32, 32), *IMAGENET)
    torch.manual_seed(0)
    np.random.seed(0)
    for image in images:
        ours = batched(image.expand(count, -1, -1, -1), 0, torch.arange(count))
        theirs = torch.stack([single(picture(image)) for _ in range(count)])
        noise = theirs.std(dim=0) * (2 / count) ** 0.5 + 1e-3
        chi_squares.append(((ours.mean(0) - theirs.mean(0)) / noise).square().mean().item())
        assert ours.std(dim=0).mean() == pytest.approx(theirs.std(dim=0).mean().item(), rel=0.06)
    assert max(chi_squares) < 3 and sum(chi_squares) / 4 < 2, chi_squares


# The cache ------------------------------------------------------------------------------------------------------------


def flags(**changes):
    common = dict(data_cache="ram", cache_size=None, in_chans=3, num_workers=2, dataset="imagefolder", seed=0)
    common["nvjpeg"] = False
    return SimpleNamespace(**common | changes)


def arrays(count=40, height=16, width=16):
    return Arrays(noisy(count, height, width).permute(0, 2, 3, 1).numpy(), range(count), ["a"])


def test_a_sample_does_not_depend_on_its_batch():
    cached = cache_images(arrays(), flags(), CPU)
    batches = CachedBatches(cached, BatchTransform("three", (16, 16), *IMAGENET, 3))
    whole = batches[[(2, index) for index in range(10)]]
    alone = [batches[[(2, index)]] for index in range(10)]
    assert torch.equal(whole.image, torch.cat([one.image for one in alone]))
    assert whole.target.tolist() == list(range(10)) == whole.index.tolist()
    other = batches[[(3, index) for index in range(10)]]
    assert all((one - two).abs().max() > 0.01 for one, two in zip(whole.image, other.image))  # another epoch


def test_cache_size_resizes_the_shorter_side(tmp_path):
    sizes = [(20, 30), (40, 25), (16, 16)]
    for i, (height, width) in enumerate(sizes):
        picture(noisy(1, height, width)[0]).save(tmp_path / f"{i}.png")
    images = Files([str(tmp_path / f"{i}.png") for i in range(3)], [0] * 3, ["a"])
    with pytest.raises(UserError, match=r"of one size, but .*1.png has 40x25 and the first has 20x30: give --cache"):
        cache_images(images, flags(), CPU)
    cached = cache_images(images, flags(cache_size=16), CPU)
    assert cached.pixels.shape == (3, 3, 16, 16)
    for i in range(3):
        expected = transforms.CenterCrop(16)(
            transforms.Resize(16, transforms.InterpolationMode.BICUBIC)(images.load(i))
        )
        assert (cached.pixels[i].float() - pixels(expected)).abs().max() <= 1 or i == 1  # torchvision rounds the middle
        assert np.array_equal(np.asarray(cached.load(i)), cached.pixels[i].permute(1, 2, 0).numpy())


def test_decoding_on_the_device_is_pillows(tmp_path):
    """torchvision's decoder (nvJPEG on a GPU, here on the CPU) gives the same pixels, after resizing within two levels
    (pillow rounds between its two passes). Pillow reads the rest: PNG, damaged files, and CMYK on a GPU."""
    smooth = TF.gaussian_blur(noisy(4, 50, 71), 7)
    for index, pixels in enumerate(smooth):
        image = picture(pixels)
        image = image.convert("CMYK") if index == 2 else image
        image.save(tmp_path / f"{index}.{'png' if index == 3 else 'jpg'}", **({} if index == 3 else {"quality": 90}))
    images = Files(sorted(map(str, tmp_path.iterdir())), [0] * 4, None)
    for size, levels in ((None, 0), (24, 2)):
        plain, device = (Decoder(images, 3, size, where) for where in (None, CPU))
        decoded = [device._decoded_on_device(index) is not None for index in range(4)]
        assert decoded[:2] == [True, True] and not decoded[3]
        for index in range(4):
            ours, theirs = (decoder._decoded(index).astype(int) for decoder in (device, plain))
            assert ours.shape == theirs.shape and abs(ours - theirs).max() <= levels
    (tmp_path / "0.jpg").write_bytes(b"\xff\xd8 no picture")
    assert Decoder(images, 3, None, CPU)._decoded(0) is None
    with pytest.raises(UserError, match="--nvjpeg decodes on a GPU, but this run uses the cpu: remove the flag"):
        cache_images(images, flags(nvjpeg=True), CPU)


class OnCPU(Decoder):
    """Decodes on the CPU what cache_images would decode on a GPU."""

    def __init__(self, images, in_chans, size, device=None, pixel_range=None):
        super().__init__(images, in_chans, size, CPU if device is not None else None, pixel_range)


@pytest.fixture
def gpu(monkeypatch):
    """A device of which cache_images believes that it is a GPU."""
    monkeypatch.setattr(util.data.cache, "Decoder", OnCPU)
    return SimpleNamespace(type="cuda")


def test_a_decoder_that_does_not_work_is_refused(tmp_path, gpu, monkeypatch):
    """It would be slower than without the flag, and nothing would say so."""

    def broken(content, mode, device):
        raise RuntimeError("nvjpegCreate failed: 6\nmore")

    def absent():
        raise ImportError("No module named 'torchcodec'")

    picture(noisy(1, 16, 16)[0]).save(tmp_path / "0.jpg")
    images = Files([str(tmp_path / "0.jpg")], [0], None)
    monkeypatch.setattr(jpeg_decoder, "LIBRARIES", {"torchcodec": absent, "torchvision": lambda: broken})
    with pytest.raises(
        UserError, match=r"--nvjpeg: no JPEG can be .*No module.*nvjpegCreate failed: 6\): remove the flag"
    ):
        cache_images(images, flags(nvjpeg=True), gpu)


def test_images_that_pillow_decodes_instead_are_counted(tmp_path, gpu, monkeypatch, capsys):
    for index, pixels in enumerate(noisy(4, 16, 16)):
        picture(pixels).save(tmp_path / f"{index}.{'png' if index == 3 else 'jpg'}")
    (tmp_path / "4.jpg").write_bytes(b"no image")
    library, decode = jpeg_decoder.choose_library("RGB", CPU)
    refused = (tmp_path / "1.jpg").read_bytes()

    def picky(content, mode, device):
        if bytes(content.numpy()) == refused:
            raise RuntimeError("Unsupported subsampling")
        return decode(content, mode, device)

    monkeypatch.setattr(jpeg_decoder, "LIBRARIES", {library: lambda: picky})
    images = Files(sorted(map(str, tmp_path.iterdir())), [0] * 5, None)
    cached = cache_images(images, flags(nvjpeg=True), gpu)
    assert cached.good.tolist() == [True] * 4 + [False]
    expected = f"--nvjpeg: 2 images decoded on cpu by {library}, 2 by pillow; JPEG files that it refused: 1, the first "
    assert expected + f"{tmp_path / '1.jpg'}: Unsupported subsampling" in capsys.readouterr().out


def test_torchcodec_decodes_if_it_is_installed(tmp_path, monkeypatch):
    """torchvision 0.29 deprecates its decoder. The interface is that of torchcodec 0.16: keyword arguments only."""
    calls = []

    def decode_jpeg(source, *, mode="RGB", output_dtype=torch.uint8, device="cpu"):
        calls.append((mode, str(device)))
        return torch.zeros(3, 16, 16, dtype=torch.uint8)

    decoders = ModuleType("torchcodec.decoders")
    decoders.decode_jpeg = decode_jpeg
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    assert jpeg_decoder.choose_library("RGB", CPU)[0] == "torchcodec" and calls == [("RGB", "cpu")]
    del decoders.decode_jpeg  # an older version
    assert jpeg_decoder.choose_library("RGB", CPU)[0] == "torchvision"


def test_unreadable_images_are_replaced_and_counted(tmp_path, capfd):
    for i in range(10):
        picture(noisy(1, 16, 16)[0]).save(tmp_path / f"{i}.png")
    for i in (2, 3):
        (tmp_path / f"{i}.png").write_bytes(b"no image")
    cached = cache_images(Files([str(tmp_path / f"{i}.png") for i in range(10)], list(range(10)), None), flags(), CPU)
    assert "unreadable image" in capfd.readouterr().err
    batch = CachedBatches(cached, BatchTransform("none", (16, 16), *IMAGENET, 0))[[(0, i) for i in range(10)]]
    assert [int(b > 0) for b in batch.bad] == [0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    assert all(target == i for i, target in enumerate(batch.target.tolist()) if i not in (2, 3))
    assert not {2, 3} & set(batch.target.tolist())
    with pytest.raises(OSError):
        cached.load(2)


def test_grey_images_and_too_little_memory(monkeypatch):
    grey = Arrays(RNG.integers(0, 255, (12, 16, 16), dtype=np.uint8), range(12), ["a"])
    assert cache_images(grey, flags(in_chans=1), CPU).pixels.shape == (12, 1, 16, 16)
    left = set(Path(util.data.cache._shared_folder()).glob("images-*"))
    monkeypatch.setattr(util.data.cache.os, "statvfs", lambda folder: SimpleNamespace(f_bavail=1, f_frsize=4096))
    with pytest.raises(
        UserError, match=r"--data_cache ram needs 0.0 GiB for 12 images of 16x16, but .* has 0.0 GiB free"
    ):
        cache_images(grey, flags(), CPU)
    assert set(Path(util.data.cache._shared_folder()).glob("images-*")) == left


def test_a_file_that_vanishes_is_named(tmp_path):
    """A file that vanishes while the cache is made counts as unreadable."""
    for i in range(25):
        picture(noisy(1, 16, 16)[0]).save(tmp_path / f"{i}.png")
    images = Files([str(tmp_path / f"{i}.png") for i in range(25)], [0] * 25, None)
    (tmp_path / "24.png").unlink()
    assert cache_images(images, flags(), CPU).good.tolist() == [True] * 24 + [False]


def pretrain(folder, extra):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(f"{BASE} {extra} --output_dir {folder}".split()))
    return checkpoint(folder, "checkpoint-1.pth")


@pytest.mark.parametrize("memory", ["ram", "device"])
def test_workers_and_resume_change_nothing(image_folder, tmp_path, memory):
    """`device` on a CPU is private memory of the process."""
    common = f"--data_path {image_folder} --data_cache {memory} --aug three"
    whole = pretrain(tmp_path / "a", f"{common} --num_workers 2")
    for name, workers in (("b", 0),):
        assert same_tensors(whole["model"], pretrain(tmp_path / name, f"{common} --num_workers {workers}")["model"])
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "checkpoint-0.pth").write_bytes((tmp_path / "a" / "checkpoint-0.pth").read_bytes())
    assert same_tensors(whole["model"], pretrain(tmp_path / "c", f"{common} --resume auto")["model"])


def test_two_processes_share_one_cache(image_folder, tmp_path):
    """Equal to one process up to the rounding of gradient sums; shared memory is empty afterwards."""
    before = set(Path(util.data.cache._shared_folder()).glob("images-*"))
    common = f"{BASE} --data_path {image_folder} --data_cache ram --aug crop"
    ranks("main_pretrain", f"{common} --batch_size 8 --output_dir {tmp_path}/two", 2)
    ranks("main_pretrain", f"{common} --output_dir {tmp_path}/one", 1)
    one, two = (checkpoint(tmp_path / name, "checkpoint-1.pth")["model"] for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max() for key in one) < 5e-4  # half a step of AdamW at 1e-3
    losses = [[row["train/loss"] for row in log_rows(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert set(Path(util.data.cache._shared_folder()).glob("images-*")) == before


def test_methods_that_split_the_images_cache_their_part(image_folder, tmp_path, capsys):
    pretrain(tmp_path, f"--data_path {image_folder} --data_cache ram --aug crop --mlo_mae --mlo_labels same")
    output = capsys.readouterr().out
    assert "77 images of 16x16 decoded" in output, output  # 96 less a fifth of every class of 24
    assert json.loads((tmp_path / "args.json").read_text())["data_cache"] == "ram"
