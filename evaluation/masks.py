"""The masks of a pretraining run, rebuilt from its checkpoint."""

import argparse
from collections.abc import Sequence

import torch

from methods import Method
from models_mae import MaskedAutoencoderViT
from util.errors import UserError
from util.weights.file import read_file
from util.weights.load import Weights


def mask_method(weights: Weights, known: Sequence[type[Method]]) -> type[Method] | None:
    """Return which of the `known` methods decided the masks of the run that wrote `weights`; None if they were random,
    or if the file does not store the run's flags."""
    return next((m for m in known if m.slot == "mask" and m.enabled(run_flags(weights, m))), None)


def run_flags(weights: Weights, method: type[Method]) -> argparse.Namespace:
    """Return the flags of the run; those of `method` that are not stored have their defaults."""
    defaults = {option.name: option.default for option in (method.switch, *method.options)}
    return argparse.Namespace(**{**defaults, **weights.args})


@torch.no_grad()
def method_scores(
    weights: Weights, method: type[Method], model: MaskedAutoencoderViT, imgs: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Return the scores (N, L) that `method`, with its state in the checkpoint, gives the patches of images
    (N, C, H, W). `model` is the autoencoder in eval mode, `noise` (N, L) what `Method.scores` draws from. Raises
    UserError if the file has not the method's state, or has that of another grid of patches."""
    prefix = f"{method.name}."
    stored = read_file(weights.path).get("methods") or {}
    state = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    try:
        rebuilt = method.from_checkpoint(weights.path, run_flags(weights, method), model, state).eval()
        scores = rebuilt.preview_scores(model, imgs, noise)
    except (UserError, AttributeError, KeyError, RuntimeError) as error:  # flags, tensors or sizes that do not fit
        raise UserError(
            f"the masks of {method.flag} cannot be drawn: {' '.join(str(error).split())}; or give --random_mask"
        ) from error
    return noise if scores is None else scores
