"""The checkpoints that the tools accept: a file, a timm model by name, or `random`; and whole autoencoders."""

import os
from collections.abc import Mapping
from typing import Any

import timm

import models_mae
from evaluation.encoder import set_norm_eps
from util.errors import UserError
from util.weights.load import Weights, load_into, models_that_fit, read_weights, recognise
from util.weights.model_config import AUTOENCODER, ModelConfig, resolve_config


def read_checkpoint(checkpoint: str, key: str) -> Weights | None:
    """Read a file or a timm model by name; None for a random encoder (`random`). Raises UserError for anything
    else, for weights that cannot be downloaded, and for a timm model that is no encoder of ours."""
    if checkpoint == "random":
        return None
    name = checkpoint.removeprefix("timm/")
    if not os.path.exists(checkpoint) and not timm.is_model(name) and not set("/.") & set(name):
        raise UserError(f"{checkpoint} is neither a file nor a model of timm's: a checkpoint is needed")
    if os.path.exists(checkpoint) or not timm.is_model(name):
        return read_weights(checkpoint, key)
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # of the network, or of timm: it has no weights of that name
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{checkpoint} is a model of timm's, but its weights could not be downloaded: {reason}"
        ) from error
    config = model.pretrained_cfg
    flags = {"input_size": config["input_size"][1], "mean": list(config["mean"]), "std": list(config["std"])}
    weights = recognise({"model": model.state_dict(), "args": flags}, checkpoint)
    fitting = models_that_fit(weights)
    if not fitting:
        raise UserError(f"{checkpoint} has the size of none of our encoders: a plain ViT of timm's is needed")
    weights.args |= {"model": fitting[0], "num_heads": model.blocks[0].attn.num_heads}
    return weights


def load_autoencoder(weights: Weights, given: Mapping[str, Any]) -> tuple[models_mae.MaskedAutoencoderViT, ModelConfig]:
    """Build the whole autoencoder in `weights`, in eval mode, and print what was loaded; `given` are the model flags
    that were given. Raises UserError for weights without a decoder, and if neither the file nor the flags determine the
    model."""
    if not weights.has_decoder:
        raise UserError(
            f"{weights.path} holds an encoder without a decoder ({weights.origin}), so there is nothing to reconstruct "
            "with: give a full pretraining checkpoint (checkpoint-*.pth, or the official mae_visualize_* files)"
        )
    config = resolve_config(weights, given, inferred=AUTOENCODER)
    model = models_mae.build_model(config.autoencoder_name, **config.autoencoder_arguments())
    set_norm_eps(model, config.layer_norm_eps)
    print(load_into(model, weights).shown(given.get("verbose", False)))
    return model.eval(), config
