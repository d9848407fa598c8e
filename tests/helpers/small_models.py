"""Autoencoders and classifiers of two small blocks, and their files: for the tests of weights."""

from functools import partial

import pytest
import torch
from torch import nn

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.errors import UserError
from util.weights.load import Weights

SIZES = dict(img_size=16, patch_size=4, in_chans=3, embed_dim=32, depth=2, num_heads=4)
DECODER = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=4)


def scrambled(model):
    """Randomise all values but the fixed positions, so that no two tensors (biases, norms) are equal."""
    for name, parameter in model.named_parameters():
        if not (name.endswith("pos_embed") and isinstance(model, MaskedAutoencoderViT)):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def mae(**overrides):
    return scrambled(MaskedAutoencoderViT(**{**SIZES, **DECODER, **overrides}))


def vit(num_classes=7, **overrides):
    return scrambled(VisionTransformer(num_classes=num_classes, **{**SIZES, **overrides}))


def saved(tmp_path, content, name="file.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def weights_of(source, **args):
    return Weights("file.pth", "test", {name: value.clone() for name, value in source.state_dict().items()}, args)


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def refusal(function, *args, **kwargs):
    """Return the message of the UserError, which must be one sentence on one line."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    return message


def reference_mae(meta, eps=1e-6, **more):
    """Return the autoencoder that a recorded fixture describes."""
    names = "img_size patch_size embed_dim depth num_heads decoder_embed_dim decoder_depth decoder_num_heads mlp_ratio"
    config = {name: meta[name] for name in names.split() if name in meta} | more
    return MaskedAutoencoderViT(**config, norm_layer=partial(nn.LayerNorm, eps=eps))
