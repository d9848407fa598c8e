"""Made-up data sets of bands, in the layout and with the types of EuroSAT: class folders, 13 bands of 16 bits."""

import numpy as np
import tifffile

BANDS = 13


def scene(seed: int, size=(20, 24), bands: int = BANDS, dtype=np.uint16) -> np.ndarray:
    """Return an array (H, W, bands): every band has its own mean; odd seeds have a dark stripe. uint16: reflectances of
    up to about 4000; floats: their 10,000th part."""
    rng = np.random.default_rng(seed)
    values = 1000 + 200 * np.arange(bands) + 300 * rng.random((*size, bands))
    if seed % 2:
        values[size[0] // 3 : size[0] // 2] /= 2
    if dtype == np.uint8:
        return (values / 16).astype(np.uint8)
    return values.astype(np.uint16) if dtype == np.uint16 else (values / 10_000).astype(dtype)


def write(path, values: np.ndarray) -> None:
    """Write an array (H, W, bands) as the ending says: .tif with the bands last, .npy with the bands first, .npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".tif":
        tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")
    elif path.suffix == ".npy":
        np.save(path, values.transpose(2, 0, 1))
    else:
        np.savez(path, image=values, month=np.array(7))


def class_folders(root, ending: str = ".tif", train: int = 4, evaluation: int = 2, **options):
    """Write train/ and val/ with the classes plain and stripe, and return the root."""
    for split, count, first in (("train", train, 0), ("val", evaluation, 100)):
        for number in range(2 * count):
            name = ("plain", "stripe")[number % 2]
            write(root / split / name / f"{number}{ending}", scene(first + number, **options))
    return root


def training_values(root, ending: str = ".tif") -> np.ndarray:
    """Return all training images (N, H, W, bands), as stored."""
    paths = sorted((root / "train").glob(f"*/*{ending}"))
    read = {
        ".tif": tifffile.imread,
        ".npy": lambda path: np.load(path).transpose(1, 2, 0),
        ".npz": lambda path: np.load(path)["image"],
    }[ending]
    return np.stack([read(path) for path in paths])


def stats(bands: int = BANDS, mean: float = 0.03, std: float = 0.01) -> str:
    """Return the flags --mean and --std."""
    return f"--mean {' '.join([str(mean)] * bands)} --std {' '.join([str(std)] * bands)}"
