"""The corruptions: published constants and formulas, properties that every severity keeps, and reproducible draws."""

import colorsys
import itertools

import numpy as np
import pytest
from helpers.photographs import photograph
from PIL import Image

from evaluation import corruptions
from evaluation.corruptions import NAMES, SEVERITIES, corrupt
from util.errors import UserError


def distance(img, name: str, severity: int, index: int, **more) -> float:
    out = np.asarray(corrupt(img, name, severity, 0, index, **more), dtype=float)
    assert out.shape == np.asarray(img).shape
    return float(np.sqrt(((out - np.asarray(img, dtype=float)) ** 2).mean()))


@pytest.mark.parametrize("side", [32, 64, 224])
@pytest.mark.parametrize("name", NAMES)
def test_severity_is_distance(name, side):
    """The mean distance from the clean image rises with severity where the published parameters imply it. They do not
    for elastic_transform, whose affine part shrinks; for glass_blur and the finer scales of fog, which go up and down;
    for frost, which is as bright as the image; and for motion_blur 3 and 4 at 32 pixels, which cut the same
    Gaussian."""
    images = [photograph(side, seed) for seed in range(3 if side == 224 else 24)]
    severities = SEVERITIES if side < 224 else (1, 5)
    distances = [np.mean([distance(img, name, s, i) for i, img in enumerate(images)]) for s in severities]
    assert distances[0] > 0.3  # levels of 255: the weakest is defocus_blur at 32 pixels
    if name == "elastic_transform":
        return
    if name in ("glass_blur", "frost", "fog", "motion_blur"):
        assert distances[-1] > distances[0]
    else:
        assert all(later > earlier for earlier, later in itertools.pairwise(distances)), distances


@pytest.mark.parametrize(("side", "table"), [(32, 0), (64, 1), (224, 2)])
def test_noise_has_the_published_size(side, table):
    """On grey 128, where little is clipped, within 5 standard deviations of the sampling error, plus rounding."""
    img = Image.new("RGB", (side, side), (128, 128, 128))
    clean, n = 128 / 255, side * side * 3
    for severity in (1, 2):
        deviation = corruptions._TABLES["gaussian_noise"][table][severity - 1]
        values = np.asarray(corrupt(img, "gaussian_noise", severity, 0, 0)) / 255 - clean
        assert values.std() == pytest.approx(deviation, rel=5 / np.sqrt(2 * n) + 1e-3)
        photons = corruptions._TABLES["shot_noise"][table][severity - 1]
        values = np.asarray(corrupt(img, "shot_noise", severity, 0, 0)) / 255
        # Poisson: variance clean * photons / photons²; its kurtosis slightly widens the error of the deviation.
        assert values.std() == pytest.approx(np.sqrt(clean / photons), rel=6 / np.sqrt(2 * n) + 2e-3)
    for severity in SEVERITIES:
        share = corruptions._TABLES["impulse_noise"][table][severity - 1]
        values = np.asarray(corrupt(img, "impulse_noise", severity, 0, 0))
        for level in (0, 255):  # each level has half of the changed values
            assert (values == level).mean() == pytest.approx(share / 2, abs=5 * np.sqrt(share / 2 / n))
        assert np.isin(values, (0, 128, 255)).all()


def test_digital_corruptions_against_their_formulas():
    img = photograph(64)
    x = np.asarray(img) / 255
    for severity, kept, added in zip(SEVERITIES, (0.4, 0.3, 0.2, 0.1, 0.05), (0.1, 0.2, 0.3, 0.4, 0.5)):
        expected = (x - x.mean((0, 1))) * kept + x.mean((0, 1))
        found = np.asarray(corrupt(img, "contrast", severity, 0, 0)) / 255
        assert np.abs(found - expected).max() <= 0.51 / 255  # rounding
        found = np.asarray(corrupt(img, "brightness", severity, 0, 0)) / 255
        for row, column in ((0, 0), (10, 50), (63, 63)):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[row, column])
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + added, 1))
            assert np.abs(found[row, column] - expected).max() <= 0.51 / 255
    black = np.asarray(corrupt(Image.new("RGB", (64, 64)), "brightness", 3, 0, 0))
    assert (black == round(0.3 * 255)).all()
    small = np.asarray(corrupt(img, "pixelate", 5, 0, 0))  # half the side: squares of 2x2 pixels
    assert (small == small[::2, ::2].repeat(2, 0).repeat(2, 1)).all()


@pytest.mark.parametrize("name", ["defocus_blur", "motion_blur", "zoom_blur", "glass_blur", "elastic_transform"])
def test_blurs_keep_what_is_flat(name):
    """Weights sum to one (defocus_blur's to 0.994) and borders are extended, so a constant image does not change."""
    for side in (32, 64, 224):
        assert distance(Image.new("RGB", (side, side), (200, 100, 30)), name, 5, 0) <= (
            1.3 if name == "defocus_blur" else 0.6
        )


def test_frost_by_photographs(tmp_path):
    """A constant photograph gives the published weighted sum, up to the rounding of its levels."""
    Image.new("RGB", (300, 240), (100, 150, 200)).save(tmp_path / "a.png")
    photographs = corruptions.read_frost(str(tmp_path))
    img = photograph(224)
    found = np.asarray(corrupt(img, "frost", 3, 0, 0, photographs), dtype=float)
    expected = np.clip(0.7 * np.asarray(img) + 0.7 * np.array([100, 150, 200]), 0, 255)
    assert np.abs(found - expected).max() <= 0.51
    Image.new("RGB", (300, 100)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b.png is smaller than 224"):
        corruptions.read_frost(str(tmp_path))
    with pytest.raises(UserError, match="holds no"):
        corruptions.read_frost(str(tmp_path / "none"))


def test_frost_texture_is_as_bright_as_the_photographs():
    textures = [corruptions.frost_texture(96, 96, 0.3, np.random.default_rng(seed)) for seed in range(40)]
    # The benchmark's five photographs: means 0.48 to 0.81 (average 0.64), standard deviations 0.07 to 0.17, bluish.
    # 40 draws of standard deviation 0.1: 3 times 0.016.
    assert np.mean([t.mean() for t in textures]) == pytest.approx(0.64, abs=0.05)
    assert all(0.04 < t.mean(2).std() < 0.18 for t in textures)
    assert np.mean([t[..., 2].mean() - t[..., 0].mean() for t in textures]) > 0.05


def test_same_image_same_corruption():
    """A corruption depends on (seed, index, name, severity) alone, and not on the state of numpy's generator."""
    img = photograph(32)
    for name in NAMES:
        first = corrupt(img, name, 4, 1, 7)
        np.random.seed(0)
        assert first.tobytes() == corrupt(img, name, 4, 1, 7).tobytes()
        others = [corrupt(img, name, 4, 2, 7), corrupt(img, name, 4, 1, 8)]
        is_random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
        assert all((first.tobytes() != other.tobytes()) == is_random for other in others)


@pytest.mark.parametrize("size", [(8, 8), (50, 33), (20, 90), (64, 150)])
def test_any_size_and_grey(size):
    for mode in ("L", "RGB"):
        img = photograph(150).convert(mode).crop((0, 0, *size))
        for name in NAMES:
            for severity in (1, 5):
                out = corrupt(img, name, severity, 0, 0)
                assert out.size == size and out.mode == mode
