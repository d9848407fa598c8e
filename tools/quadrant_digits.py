"""Images whose class is decided by one quadrant: scikit-learn's digits on a canvas of random texture.

A synthetic data set for which the mask that a masking network should learn is known. Written as an image folder
(train/<digit>/ and val/<digit>/), which depends only on the seed.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from util.data.readers import read_images
from util.errors import UserError, user_errors
from util.parser import Parser

QUADRANTS = {"upper-left": (0, 0), "upper-right": (0, 1), "lower-left": (1, 0), "lower-right": (1, 1)}


def texture(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return noise (size, size, 3) uint8, blurred by a random radius and stretched to the full range: blobs of all
    sizes."""
    noise = Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8))
    pixels = np.asarray(noise.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 2.5)))).astype(np.float64)
    low, high = pixels.min(), pixels.max()
    return ((pixels - low) / (high - low) * 255).round().astype(np.uint8)


def canvas(digit: Image.Image, quadrant: str, rng: np.random.Generator, size: int) -> Image.Image:
    """Draw the digit into its quadrant, in a random colour on a darkened texture; the rest is texture."""
    half = size // 2
    picture = texture(rng, size)
    row, column = (half * offset for offset in QUADRANTS[quadrant])
    ink = np.asarray(digit.convert("L").resize((half, half), Image.Resampling.BICUBIC))[..., None] / 255
    part = picture[row : row + half, column : column + half]
    colour = rng.uniform(150, 255, 3)
    picture[row : row + half, column : column + half] = (0.5 * part * (1 - ink) + colour * ink).round()
    return Image.fromarray(picture)


def write(folder: Path, quadrant: str, copies: int, size: int, seed: int) -> int:
    """Write every digit `copies` times, each on its own texture -> the number of images."""
    count = 0
    for split in ("train", "val"):
        rng = np.random.default_rng([seed, split == "val"])
        images = read_images(SimpleNamespace(dataset="digits"), train=split == "train")
        for index, target in enumerate(tqdm(images.targets, desc=split, unit=" images", disable=None)):
            class_folder = folder / split / images.classes[target]
            class_folder.mkdir(parents=True, exist_ok=True)
            for copy in range(copies if split == "train" else 1):
                canvas(images.load(index), quadrant, rng, size).save(class_folder / f"{index:04d}_{copy}.png")
                count += 1
    return count


def get_args_parser() -> Parser:
    parser = Parser((__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder for train/ and val/")
    parser.add_argument(
        "--quadrant",
        default="upper-left",
        choices=QUADRANTS,
        metavar="NAME",
        help=f"the quadrant with the digit: {', '.join(QUADRANTS)}",
    )
    parser.add_argument("--copies", default=4, type=int, help="copies of every training digit, each on its own texture")
    parser.add_argument("--size", default=32, type=int, help="side of the canvas in pixels")
    parser.add_argument("--seed", default=0, type=int, help="seed of the textures")
    return parser


def main(args=None) -> None:
    """Write the data set. Raises UserError for bad flags and for a folder that is not empty."""
    args = args or get_args_parser().parse_args()
    if os.path.lexists(args.folder) and not (args.folder.is_dir() and not os.listdir(args.folder)):
        raise UserError(f"{args.folder} exists and is not an empty folder: give another one")
    if args.copies < 1 or args.size < 16 or args.size % 2 or args.seed < 0:
        raise UserError("--copies must be positive, --size even and at least 16, --seed not negative")
    print(f"{write(args.folder, args.quadrant, args.copies, args.size, args.seed)} images in {args.folder}")


if __name__ == "__main__":
    with user_errors("quadrant_digits.py"):
        main()
