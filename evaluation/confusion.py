"""Confusion matrix of a classifier: counting it, over all ranks, and drawing it."""

import warnings
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from util.parallel.distributed import all_reduce_sum, gather_objects


class Confusion:
    """Counts of images by their class and the predicted one. After `read`, of all ranks: `images` (classes,) of each
    class, `correct` (classes,) among them, and `matrix` (classes, classes), rows being the true classes; None for more
    than `MOST_CLASSES`."""

    MOST_CLASSES = 2000  # 32 MB

    def __init__(self, device: torch.device):
        self.device, self.pairs, self.classes = device, [], 0
        self.images = self.correct = np.zeros(0, int)
        self.matrix: np.ndarray | None = None

    def add(self, targets: torch.Tensor, predicted: torch.Tensor, classes: int) -> None:
        """Add a batch of true and predicted classes (N,); images with a negative target are left out. Does not wait for
        the device."""
        self.classes = classes
        self.pairs.append(torch.stack([targets, predicted]))

    def read(self) -> None:
        """Count the images of all ranks."""
        classes = max(gather_objects(self.classes))
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *(pair.cpu() for pair in self.pairs)], dim=1).numpy()
        targets, predicted = pairs[:, pairs[0] >= 0]
        if classes <= self.MOST_CLASSES:
            counts = np.bincount(targets * classes + predicted, minlength=classes**2)
            self.matrix = self._reduced(counts).reshape(classes, classes)
            self.images, self.correct = self.matrix.sum(axis=1), self.matrix.diagonal()
        else:
            columns = targets, targets[targets == predicted]
            counts = self._reduced(np.concatenate([np.bincount(column, minlength=classes) for column in columns]))
            self.images, self.correct = np.split(counts, 2)

    def _reduced(self, counts: np.ndarray) -> np.ndarray:
        return all_reduce_sum(torch.from_numpy(counts).to(self.device)).cpu().numpy()

    def recalls(self) -> list[float | None]:
        """Return the percentage of each class's images that are correct, None for a class without images."""
        return [100 * correct / count if count else None for correct, count in zip(self.correct, self.images.tolist())]

    def balanced_accuracy(self) -> float:
        """Return the mean of the recalls in percent, 0 without images."""
        recalls = [value for value in self.recalls() if value is not None]
        return float(np.mean(recalls)) if recalls else 0.0


def draw(matrix: np.ndarray, names: list[str]) -> np.ndarray:
    """Draw a confusion matrix (classes, classes), each row divided by its sum -> RGB picture (H, W, 3) uint8. Up to 20
    classes have their percentages in the cells, up to 200 their names beside them."""
    count = len(matrix)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    inches = min(16.0, 3.5 + 0.4 * count)
    points = max(3.0, min(9.0, 45 * inches / count))  # of a letter: a cell is about 60 points * inches / classes
    figure = Figure(figsize=(inches, inches), layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="percentage of the images of the true class", shrink=0.8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if count <= 200:
        labels = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
        axes.set_xticks(range(count), labels, rotation=90, fontsize=points, parse_math=False)
        axes.set_yticks(range(count), labels, fontsize=points, parse_math=False)
    for row, column in np.ndindex(count, count) if count <= 20 else ():
        share = shares[row, column]
        colour = "white" if share > 0.5 else "black"
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=points, color=colour)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about letters that the font lacks
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_picture(picture: np.ndarray, path: Path) -> None:
    """Write an RGB picture (H, W, 3) uint8 as PNG. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path, format="PNG")
