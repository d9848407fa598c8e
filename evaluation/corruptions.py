"""The 15 corruptions of Hendrycks and Dietterich 2019 (ImageNet-C, CIFAR-10-C; Section 3 and Appendix B) at 5
severities, with the parameters of the published sets. Reimplemented, because the existing libraries are unmaintained.

Three differences from the published images: frost is a synthetic texture unless photographs are given; random numbers
are a function of (seed, image, corruption, severity); values are rounded, not truncated. In this file an image is a
float array (H, W, C) with values in [0, 1] and C = 1 or 3.
"""

import io
import math
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage, signal

from util.errors import UserError

# Parameters at severity 1 to 5 for images of 32 pixels (CIFAR-10-C), 64 (Tiny-ImageNet-C), 224 (ImageNet-C). Not all
# rise with the severity: the affine part of elastic_transform and the blur of glass_blur shrink.
_TABLES = {
    "gaussian_noise": (  # standard deviation
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.04, 0.08, 0.12, 0.15, 0.18),
        (0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    "shot_noise": ((500, 250, 100, 75, 50), (250, 100, 50, 30, 15), (60, 25, 12, 5, 3)),  # photons of a white pixel
    "impulse_noise": (  # share of values that become 0 or 1
        (0.01, 0.02, 0.03, 0.05, 0.07),
        (0.01, 0.02, 0.05, 0.08, 0.14),
        (0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    "defocus_blur": (  # radius of the disk, standard deviation of the blur that smooths it
        ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    "glass_blur": (  # standard deviation of the blur before and after, farthest pixel, repetitions
        ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    ),
    "motion_blur": (  # radius, standard deviation
        ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    "zoom_blur": (  # factors from 1 to below the first number, in steps of the second
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    ),
    "snow": (  # mean, std and zoom of the flakes, threshold, radius and std of their blur, weight of the image
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    "frost": (  # weight of the image, of the frost
        ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        ((1, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
        ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    "fog": (  # strength, decay of the amplitude from a scale to the next finer one
        ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5), (0.1, 0.2, 0.3, 0.4, 0.5)),  # added
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), (0.4, 0.3, 0.2, 0.1, 0.05)),  # factor
    "elastic_transform": (  # over the side: displacement, std of its blur, jitter of three points
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
        ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
    ),
    "pixelate": (
        (0.95, 0.9, 0.85, 0.75, 0.65),
        (0.9, 0.8, 0.7, 0.6, 0.5),
        (0.6, 0.5, 0.4, 0.3, 0.25),
    ),  # factor of the side
    "jpeg_compression": ((80, 65, 58, 50, 40), (65, 58, 50, 40, 25), (25, 18, 15, 10, 7)),  # quality
}
NAMES = tuple(_TABLES)
SEVERITIES = (1, 2, 3, 4, 5)
_ELASTIC = 1.0, 1.0, 244 / 224  # side in the published elastic_transform, relative to that of the image
_FROST = 0.2, 0.3, 1.0  # scale of the photographs


def table_of(side: int) -> int:
    """Return the parameters for a shorter side in pixels: 0 CIFAR-10-C's, 1 Tiny-ImageNet-C's, 2 ImageNet-C's."""
    return 0 if side <= 48 else 1 if side <= 128 else 2


def corrupt(img: Image.Image, name: str, severity: int, seed: int, index: int, photographs=()) -> Image.Image:
    """Corrupt an image (mode L or RGB, 8 bits) by `name` of `NAMES` at `severity` 1 to 5, with the parameters for its
    size. The random numbers are those of (seed, index), both at least 0. `photographs` are those of `read_frost`."""
    table = table_of(min(img.size))
    rng = np.random.default_rng([seed, index, NAMES.index(name), severity])
    x = np.asarray(img, dtype=np.float32) / 255
    x = x[..., None] if x.ndim == 2 else x
    value = _TABLES[name][table][severity - 1]
    if name == "frost":
        out = _frost(x, rng, value, _FROST[table], photographs)
    elif name == "elastic_transform":
        out = _elastic(x, rng, value, _ELASTIC[table] * min(x.shape[:2]))
    else:
        out = _FUNCTIONS[name](x, rng, value)
    return _image(out)


def _image(x: np.ndarray) -> Image.Image:
    values = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _array(img: Image.Image) -> np.ndarray:
    x = np.asarray(img, dtype=np.float32) / 255
    return x[..., None] if x.ndim == 2 else x


# Noise ----------------------------------------------------------------------------------------------------------------


def _gaussian_noise(x, rng, deviation):
    return x + rng.normal(scale=deviation, size=x.shape)


def _shot_noise(x, rng, photons):
    return rng.poisson(x * photons) / photons


def _impulse_noise(x, rng, share):
    salt = rng.integers(2, size=x.shape)
    return np.where(rng.random(x.shape) < share, salt, x)


# Blur -----------------------------------------------------------------------------------------------------------------


def _blurred(x, deviation):
    return ndimage.gaussian_filter(x, (deviation, deviation, 0), mode="nearest")


def _defocus_blur(x, rng, value):
    radius, smoothing = value
    reach = max(8, radius)
    rows, columns = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (rows**2 + columns**2 <= radius**2).astype(float)
    # As published, the disk of radius 10 touches the border, and smoothing changes its sum by 0.6 %.
    disk = ndimage.gaussian_filter(disk / disk.sum(), smoothing, radius=1 if radius <= 8 else 2, mode="mirror")
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    return signal.fftconvolve(padded, disk[..., None], mode="valid", axes=(0, 1))


def _glass_blur(x, rng, value):
    """Blur by moving pixels. The published code copies a pixel over another instead of swapping them; so does this."""
    deviation, reach, times = value
    height, width = x.shape[:2]
    x = np.floor(_blurred(x, deviation) * 255) / 255
    rows, columns = range(height - reach, reach, -1), range(width - reach, reach, -1)
    source = list(range(height * width))
    for _ in range(times):
        steps = rng.integers(-reach, reach, size=(len(rows), len(columns), 2))
        moves = (steps[..., 0] * width + steps[..., 1]).tolist()
        for row, in_row in zip(rows, moves):
            for column, move in zip(columns, in_row):
                index = row * width + column
                source[index] = source[index + move]
    return _blurred(x.reshape(height * width, -1)[source].reshape(x.shape), deviation)


def _motion_blur(x, rng, value):
    radius, deviation = value
    return _moved(x, radius, deviation, rng.uniform(-45, 45))


def _moved(x, radius: int, deviation: float, degrees: float):
    """Average along a line that starts at each pixel, with the weights of half a Gaussian, as ImageMagick does."""
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * deviation**2))
    reach, (height, width) = len(weights), x.shape[:2]
    padded = np.pad(x, ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    out = np.zeros_like(x)
    for i, weight in enumerate(weights / weights.sum()):
        top = reach + round(i * math.sin(math.radians(degrees)))
        left = reach + round(i * math.cos(math.radians(degrees)))
        out += weight * padded[top : top + height, left : left + width]
    return out


def _zoomed(x, factor: float) -> np.ndarray:
    """Enlarge the centre of the image to its size."""
    height, width = x.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    x = np.asarray(ndimage.zoom(x[top : top + rows, left : left + columns], (factor, factor, 1), order=1))
    top, left = (x.shape[0] - height) // 2, (x.shape[1] - width) // 2
    return x[top : top + height, left : left + width]


def _zoom_blur(x, rng, value):
    factors = np.arange(1, *value)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


# Weather --------------------------------------------------------------------------------------------------------------


def _grey(x):
    return x if x.shape[2] == 1 else (x @ np.array([0.299, 0.587, 0.114], dtype=x.dtype))[..., None]


def _snow(x, rng, value):
    mean, deviation, zoom, threshold, radius, blur, share = value
    flakes = _zoomed(rng.normal(mean, deviation, (*x.shape[:2], 1)), zoom)
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1))
    flakes = _moved(flakes, radius, blur, rng.uniform(-135, -45))
    x = share * x + (1 - share) * np.maximum(x, _grey(x) * 1.5 + 0.5)
    return x + flakes + np.rot90(flakes, 2)


def plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> np.ndarray:
    """Return a fractal (height, width) with values in [0, 1] by the diamond-square algorithm (Fournier, Fussell and
    Carpenter 1982) on a torus; the noise of each finer scale is divided by decay squared."""
    side = 1 << (max(height, width, 2) - 1).bit_length()
    heights, step, amplitude = np.zeros((side, side)), side, 1.0
    while step >= 2:
        half, corners = step // 2, heights[::step, ::step]
        noise = rng.uniform(-amplitude, amplitude, (3, *corners.shape))
        rows = corners + np.roll(corners, -1, 0)
        centres = (rows + np.roll(rows, -1, 1)) / 4 + noise[0]
        heights[half::step, half::step] = centres
        across, down = corners + np.roll(corners, -1, 1), corners + np.roll(corners, -1, 0)
        heights[::step, half::step] = (centres + np.roll(centres, 1, 0) + across) / 4 + noise[1]
        heights[half::step, ::step] = (centres + np.roll(centres, 1, 1) + down) / 4 + noise[2]
        step, amplitude = half, amplitude / decay**2
    heights = heights - heights.min()
    return (heights / heights.max())[:height, :width]


def _fog(x, rng, value):
    strength, decay = value
    brightest = x.max()
    x = x + strength * plasma(*x.shape[:2], decay, rng)[..., None]
    return x * brightest / (brightest + strength)


def read_frost(folder: str) -> list[Image.Image]:
    """Read the photographs of frost in a folder. Raises UserError if it has none, or one smaller than 224 pixels."""
    endings = {".png", ".jpg", ".jpeg"}
    paths = sorted(path for path in Path(folder).expanduser().glob("*") if path.suffix.lower() in endings)
    if not paths:
        raise UserError(f"--frost {folder} holds no .png or .jpg photographs of frost")
    try:
        images = [Image.open(path).convert("RGB") for path in paths]
    except (OSError, SyntaxError) as error:
        raise UserError(f"--frost {folder}: a photograph cannot be read: {error}") from error
    small = next((path for path, img in zip(paths, images) if min(img.size) < 224), None)
    if small is not None:
        raise UserError(f"--frost {folder}: {small.name} is smaller than 224 pixels")
    return images


def _frost(x, rng, value, scale: float, photographs):
    height, width = x.shape[:2]
    if photographs:
        img = photographs[rng.integers(len(photographs))]
        scale = max(scale, (height + 1) / img.height, (width + 1) / img.width)
        img = img.resize((round(img.width * scale), round(img.height * scale)), Image.Resampling.BILINEAR)
        top, left = rng.integers(img.height - height + 1), rng.integers(img.width - width + 1)
        texture = _array(img)[top : top + height, left : left + width]
    else:
        texture = frost_texture(height, width, scale, rng)
    return value[0] * x + value[1] * (texture if x.shape[2] == 3 else texture.mean(2, keepdims=True))


def frost_texture(height: int, width: int, scale: float, rng: np.random.Generator) -> np.ndarray:
    """Return a texture like ice on a window (height, width, 3): needles in five directions, each direction weighted by
    its own cloud, over a cloud. Brightness, contrast and tint are drawn from the range of the benchmark's five
    photographs (means 0.48 to 0.81, standard deviations 0.07 to 0.17)."""
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    long, thin = 14 * scale, 1.2 * scale  # standard deviations of a needle along and across, in pixels
    needles, clouds = [], []
    for angle in rng.uniform(0, math.pi) + np.arange(5) * math.pi / 5:
        along, across = math.cos(angle) * fx + math.sin(angle) * fy, math.cos(angle) * fy - math.sin(angle) * fx
        spectrum = np.exp(-2 * math.pi**2 * ((along * long) ** 2 + (across * thin) ** 2))
        needles.append(_standardized(np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) * spectrum).real))
        clouds.append(plasma(height, width, 1.5, rng))
    share = np.exp(12 * np.array(clouds))
    field = _standardized((np.array(needles) * share / share.sum(0)).sum(0)) + _standardized(clouds[0])
    grey = rng.uniform(0.48, 0.81) + rng.uniform(0.07, 0.17) * _standardized(field)
    return (grey[..., None] + rng.uniform(0, 1.5) * np.array([-0.07, 0.0, 0.05])).clip(0, 1)


def _standardized(x):
    return (x - x.mean()) / max(x.std(), 1e-12)


# Digital --------------------------------------------------------------------------------------------------------------


def _brightness(x, rng, added):
    """Raise the value of HSV: all channels grow in proportion; black becomes grey."""
    value = x.max(2, keepdims=True)
    raised = (value + added).clip(0, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-12), raised)


def _contrast(x, rng, kept):
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * kept + mean


def _elastic(x, rng, value, side: float):
    """Apply an affine map that moves three points at random, then a smooth random displacement of every pixel."""
    displacement, blur, jitter = (part * side for part in value)
    height, width = x.shape[:2]
    third, centre = min(height, width) // 3, np.array([height // 2, width // 2])
    points = centre + third * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = points + rng.uniform(-jitter, jitter, size=(3, 2))
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), points)  # source of a pixel of the result
    grid = np.mgrid[:height, :width].astype(float)
    x = _sampled(x, np.einsum("ij,ihw->jhw", back[:2], grid) + back[2][:, None, None], "mirror")
    noise = [ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), blur, truncate=3) for _ in range(2)]
    return _sampled(x, grid + displacement * np.array(noise), "reflect")


def _sampled(x, coordinates, border: str):
    """Sample an image (H, W, C) bilinearly at (row, column) coordinates (2, H, W)."""
    channels = [ndimage.map_coordinates(channel, coordinates, order=1, mode=border) for channel in np.moveaxis(x, 2, 0)]
    return np.stack(channels, axis=2)


def _pixelate(x, rng, kept):
    img = _image(x)
    size = max(1, int(img.width * kept)), max(1, int(img.height * kept))
    return _array(img.resize(size, Image.Resampling.BOX).resize(img.size, Image.Resampling.BOX))


def _jpeg_compression(x, rng, quality):
    with io.BytesIO() as file:
        _image(x).save(file, "JPEG", quality=quality)
        return _array(Image.open(file))


_FUNCTIONS = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
