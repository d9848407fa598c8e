"""Made-up photographs, for the tests of corruptions and robustness."""

import numpy as np
from PIL import Image

from evaluation import corruptions


def photograph(side: int, seed: int = 0) -> Image.Image:
    """Return clouds in three colours of medium brightness, with edges and smooth regions."""
    rng = np.random.default_rng(seed)
    colours = [corruptions.plasma(side, side, 1.6, rng) for _ in range(3)]
    return Image.fromarray((255 * (0.25 + 0.5 * np.stack(colours, axis=2))).round().astype(np.uint8))
