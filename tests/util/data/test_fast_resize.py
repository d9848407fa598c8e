"""Random resized crops by torch: the crops of pillow, with nearly its pixels."""

import numpy as np
import pytest
import torch
from helpers.crops import transform_of
from PIL import Image
from sklearn.datasets import load_sample_images

import main_finetune
import main_linprobe
import main_pretrain
from util.data import transforms
from util.data.build import build_loader
from util.data.draws import SampleRng
from util.data.fast_resize import crop_resized_by_torch, with_fast_resize
from util.data.image_format import IMAGENET
from util.data.random_steps import resized_crop
from util.data.readers import read_images
from util.errors import UserError

SIZE = (64, 48)
BOXES = [(0, 0, 427, 640), (100, 50, 64, 48), (30, 200, 333, 250), (5, 5, 20, 30), (0, 0, 1, 2)]


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(load_sample_images().images[0])  # 640 x 427


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("box", BOXES)
def test_pixels_are_nearly_those_of_pillow(photograph, mode, box):
    """Both round the same filter; torch's weights have 16 bits."""
    ours, theirs = (crop(photograph.convert(mode), box, SIZE) for crop in (crop_resized_by_torch, resized_crop))
    assert ours.mode == mode and ours.size == theirs.size
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 2 and (difference > 0).mean() < 0.02


@pytest.mark.parametrize("mode", ["RGBA", "LA", "F"])
def test_other_modes_are_left_to_pillow(photograph, mode):
    img = photograph.convert(mode if mode != "LA" else "L").convert(mode)
    ours, theirs = (crop(img, BOXES[2], SIZE) for crop in (crop_resized_by_torch, resized_crop))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize("name", ["pretraining", "probe", "finetuning"])
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_crops_are_the_same(photograph, name, version):
    """All steps draw what they draw with pillow, so only rounding differs, which RandAugment may enlarge."""
    transform = transform_of(name, SIZE)
    fast = with_fast_resize(transform)
    for index in range(5):
        made = []
        for each in (fast, transform):
            with SampleRng(0, version).sample(1, index):
                made.append(each(photograph))
        assert (made[0] - made[1]).abs().mean() < 0.02  # another crop differs by about 1
    assert transform.transforms[0].resized is resized_crop and fast.transforms[0].resized is crop_resized_by_torch


def batches(folder, *flags) -> list[torch.Tensor]:
    words = ["--data_path", str(folder), "--input_size", "16", "--num_workers", "0", *flags]
    args = main_pretrain.get_args_parser().parse_args(words)
    transform = transforms.pretrain_transform("mae", (16, 16), *IMAGENET)
    return [batch[0] for batch in build_loader(read_images(args, train=True), transform, args, 4, train=True).begin(0)]


def test_the_flag_reaches_the_loader(image_folder):
    plain, fast, again = batches(image_folder), *(batches(image_folder, "--fast_resize") for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(fast, again))
    differences = torch.stack([(a - b).abs().max() for a, b in zip(plain, fast)])
    assert 0 < differences.max() < 3 / 255 / min(IMAGENET[1])


@pytest.mark.parametrize(
    "main, flags, why",
    [
        (main_pretrain, "--aug crop", "no effect here"),
        (main_pretrain, "--data_cache device", "no effect here"),
        (main_pretrain, "--jpeg_draft", "exclude each other"),
        (main_finetune, "--aug crop", "no effect here"),
        (main_linprobe, "--cache_features", "no effect here"),
    ],
)
def test_where_it_is_refused(image_folder, main, flags, why):
    words = f"--data_path {image_folder} --fast_resize {flags}".split()
    words += ["--model", "vit_micro_patch4", "--input_size", "16"] if main is not main_pretrain else []
    args = main.get_args_parser().parse_args(words)
    with pytest.raises(UserError, match=f"--fast_resize.*{why}"):
        main.main(args) if main is not main_pretrain else main.check(args)
