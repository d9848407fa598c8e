"""Crops of JPEGs that are decoded at reduced scale: the box of the full path, nearly its pixels, and no effect where
nothing can be saved."""

import io

import numpy as np
import pytest
import torch
from helpers.crops import transform_of
from PIL import Image
from sklearn.datasets import load_sample_images

import main_linprobe
import main_pretrain
from util.data import transforms
from util.data.build import build_loader
from util.data.image_format import IMAGENET
from util.data.jpeg_draft import DraftedCrop, split_crop
from util.data.sample_rng import seeded
from util.data.samples import KeyedDataset
from util.data.sources import Files, Subset
from util.data.transforms import Converter
from util.errors import UserError

SIZE = (32, 32)


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(load_sample_images().images[0])  # 640 x 427, with edges and texture


def stored(img, form="JPEG", **options) -> Image.Image:
    """Return an image that is opened but not decoded."""
    file = io.BytesIO()
    img.save(file, form, **options)
    return Image.open(file)


def whole(crop, img, key):
    img = img.convert("RGB")
    with seeded(*key):
        return crop(img)


def drafted(crop, img, key):
    with seeded(*key):
        return DraftedCrop(crop)(img, Converter(3))


@pytest.mark.parametrize("name,mode", [("pretraining", "RGB"), ("probe", "L"), ("fine-tuning", "CMYK")])
def test_pixels_are_close(photograph, name, mode):
    """The mean difference from the full path is below 3 of 255 levels (measured 1.3 to 1.9, as between bilinear and
    bicubic); a crop shifted by one pixel differs ten times as much."""
    img, crop = photograph.convert(mode), transform_of(name, SIZE).transforms[0]
    differences, shifted, sizes = [], [], set()
    for index in range(30):
        small = stored(img, quality=95)
        a = np.asarray(whole(crop, stored(img, quality=95), (0, 0, index)), dtype=float)
        b = np.asarray(drafted(crop, small, (0, 0, index)), dtype=float)
        assert a.shape == b.shape == (32, 32, 3)
        differences.append(np.abs(a - b).mean())
        shifted.append(np.abs(a - np.roll(b, 1, axis=1)).mean())
        sizes.add(small.size)
    assert np.mean(differences) < 3 and np.mean(shifted) > 5 * np.mean(differences)
    assert {(640, 427)} != sizes <= {(640, 427), (320, 214), (160, 107), (80, 54)}  # decoded at reduced scale


class Recorded:
    """A crop that records its boxes and the size of the image for which it drew them."""

    def __init__(self, crop):
        self.crop, self.boxes = crop, []
        self.size, self.scale, self.ratio, self.interpolation = crop.size, crop.scale, crop.ratio, crop.interpolation

    def get_params(self, img, scale, ratio):
        self.boxes.append((img.size, *self.crop.get_params(img, scale, ratio)))
        return self.boxes[-1][1:]


@pytest.mark.parametrize("name", ["pretraining", "probe", "fine-tuning"])
def test_boxes_are_those_of_the_full_path(photograph, name):
    """Boxes are drawn for the full size; the scale is the smallest at which the box has at least the final size."""
    recorded = Recorded(transform_of(name, SIZE).transforms[0])
    for index in range(50):
        img = stored(photograph)
        drafted(recorded, img, (3, 1, index))
        size, top, left, h, w = recorded.boxes[-1]
        with seeded(3, 1, index):
            assert (top, left, h, w) == tuple(recorded.crop.get_params(photograph, recorded.scale, recorded.ratio))
        assert size == photograph.size
        scale = round(photograph.width / img.width)
        assert scale in (1, 2, 4, 8) and (scale == 1 or min(h, w) / scale >= 32)
        assert scale == 8 or min(h, w) / (2 * scale) < 32


@pytest.mark.parametrize("form,side", [("PNG", 427), ("BMP", 427), ("JPEG", 63), ("JPEG", 20)])
def test_no_effect_where_nothing_can_be_saved(photograph, form, side):
    """Other formats, and JPEGs whose crops are less than twice the final size, have exactly the pixels of the full
    path."""
    img, crop = photograph.resize((side, side)), transform_of("pretraining", SIZE).transforms[0]
    for index in range(10):
        small = drafted(crop, stored(img, form), (0, 0, index))
        assert small.tobytes() == whole(crop, stored(img, form), (0, 0, index)).tobytes()


def dataset(images, *argv):
    args = main_pretrain.get_args_parser().parse_args([*argv, "--num_workers", "0"])
    transform = transforms.pretrain_transform("mae", SIZE, *IMAGENET)
    return KeyedDataset(images, transform, args.seed, args.in_chans, args.jpeg_draft)


def test_through_the_loader(photograph, tmp_path, capfd):
    """The flag changes pixels little, and flips and boxes not at all; damaged JPEGs are named and replaced as usual."""
    for name in ("a", "b", "c"):
        photograph.save(tmp_path / f"{name}.jpg", quality=95)
    (tmp_path / "d.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:20000])
    photograph.save(tmp_path / "e.png")
    files = Files(
        [str(tmp_path / name) for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.png")], [0, 1, 2, 3, 4], None
    )
    files = Subset(files, [0, 1, 2, 3, 4])
    plain, small = dataset(files), dataset(files, "--jpeg_draft")
    for index in (0, 1, 2, 4):
        one, other = plain[(2, index)], small[(2, index)]
        # 3 of 255 levels as above, divided by a standard deviation of at least 0.22
        assert (one.image - other.image).abs().mean() < 3 / 255 / 0.22
        assert torch.equal(one.image, other.image) == (index == 4)
    broken = small[(0, 3)]
    assert broken.bad >= 1 and broken.target != 3 and "d.jpg" in capfd.readouterr().err


def test_evaluation_is_left_alone(photograph, tmp_path):
    photograph.save(tmp_path / "a.jpg")
    files = Files([str(tmp_path / "a.jpg")], [0], None)
    transform, results = transforms.eval_transform(SIZE, *IMAGENET), []
    for argv in ([], ["--jpeg_draft"]):
        args = main_pretrain.get_args_parser().parse_args([*argv, "--num_workers", "0"])
        results.append(next(iter(build_loader(files, transform, args, 1, train=False).begin(0))).image)
    assert torch.equal(*results)
    assert split_crop(transform) == (None, transform)


@pytest.mark.parametrize("flags", ["--aug crop", "--aug none", "--data_cache ram"])
def test_refused_where_it_has_no_effect(flags):
    with pytest.raises(UserError, match="--jpeg_draft has no effect here"):
        main_pretrain.check(main_pretrain.get_args_parser().parse_args(["--jpeg_draft", *flags.split()]))


def test_refused_by_the_probe(image_folder, tmp_path):
    flags = f"--data_path {image_folder} --jpeg_draft --cache_features --model vit_micro_patch4 --input_size 16"
    flags += f" --device cpu --output_dir {tmp_path}"
    with pytest.raises(UserError, match="--jpeg_draft has no effect here"):
        main_linprobe.main(main_linprobe.get_args_parser().parse_args(flags.split()))
