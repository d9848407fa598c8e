"""Trained segmenters and detectors, opened from their checkpoints as their runs evaluated them."""

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

from evaluation.dense import load_whole
from evaluation.dense_pictures import Shown
from evaluation.encoder import set_norm_eps
from evaluation.image_options import image_options
from util.data.dense.annotated import Annotated
from util.data.samples import Sample
from util.errors import UserError
from util.weights.load import Weights
from util.weights.model_config import resolve_config


class Trained(ABC):
    """The model of a checkpoint, on the CPU and in eval mode.

    `categories` are the names of its classes, `stored` the flags of its run, `size` the (H, W) of its input, `options`
    how images are read for it. Subclasses have `resize`, the transform of their evaluation.
    """

    def __init__(self, args, weights: Weights, models: ModuleType):
        """Build the model of a file, one of the module `models`. Raises UserError for a file that lacks the names of
        the classes, and for tensors that do not fit the flags."""
        if not weights.classes:
            raise UserError(f"{weights.path} does not name its classes: give a checkpoint that a run has written")
        self.path, self.categories, self.stored = weights.path, weights.classes, weights.args
        config = resolve_config(weights, vars(args))
        sizes = config.encoder_arguments()
        head = {name: self.stored.get(name, default) for name, default in models.SETTINGS.items()}
        self.model = models.build_model(config.encoder_name, len(self.categories), **sizes, **head).eval()
        set_norm_eps(self.model, config.layer_norm_eps)
        load_whole(self.model, weights)
        self.size = config.input_size
        self.options = image_options(args, config.in_chans, self.size, self.stored)

    @abstractmethod
    def read(self, args) -> Any:
        """Return the evaluation images of the flags, which must have the classes of the model."""

    @abstractmethod
    def show(self, sample: Sample, index: int, images: Annotated) -> Shown:
        """Return the prediction for image `index` of `images`, which `resize` made the `sample`, beside the truth."""
