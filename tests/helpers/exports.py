"""Small models with random weights, their checkpoints, and calls of tools/export.py: for the tests of exports."""

from pathlib import Path

import pytest
import torch
from torch import nn

import models_mae
import models_vit
from tools import export
from util.errors import UserError

FLAGS = {"model": "vit_micro_patch4", "input_size": 16, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}


def scrambled(model):
    """Randomise all values but fixed positions, so that a swapped or missing tensor shows."""
    for name, parameter in model.named_parameters():
        if not (name.endswith("pos_embed") and isinstance(model, models_mae.MaskedAutoencoderViT)):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def saved(path, network, **flags):
    torch.save({"model": network.state_dict(), "args": {**FLAGS, **flags}}, path)
    return path


def as_flag(size):
    return size if isinstance(size, int) else list(size)


def saved_classifier(path: Path, global_pool: bool, **config):
    """Write a checkpoint of a classifier of seven classes; return the model and the path."""
    config = {"img_size": 16, "num_classes": 7, **config}
    model = scrambled(models_vit.vit_micro_patch4(**config, global_pool=global_pool))
    return model, saved(path, model, input_size=as_flag(config["img_size"]))


def exported(checkpoint, to, out, *flags):
    options = [str(checkpoint), "--to", to, "--out", str(out), *map(str, flags)]
    assert export.main(export.get_args_parser().parse_args(options)) < 1e-5  # runs the tool's own check
    return out


def refused(*flags) -> str:
    """Return the sentence by which tools/export.py refuses these flags."""
    with pytest.raises(UserError) as caught:
        export.main(export.get_args_parser().parse_args([str(flag) for flag in flags]))
    assert "\n" not in str(caught.value)
    return str(caught.value)
