"""Weights for RGB images in models of other channels: what timm does with its pretrained weights (`adapt_input_conv`),
and the same for the decoder's prediction."""

import torch
from torch import Tensor

RGB = 3
KERNEL, PREDICTION = "patch_embed.proj.weight", "decoder_pred."


def for_channels(state: dict[str, Tensor], channels: int) -> tuple[dict[str, Tensor], str]:
    """Return the `state` of an encoder or autoencoder for RGB images, for images of another number of channels, and a
    note on what was done.

    The patch kernel (D, 3, p, q) is repeated, red, green, blue, red, ..., and scaled by 3 / channels, so that channels
    that repeat RGB give the same tokens; for one channel it is summed, so that a grey image gives the tokens of its RGB
    copy. Each channel is predicted as the colour of its kernel, one channel as the mean of the colours.
    """
    colours = torch.arange(channels) % RGB
    kernel, decoder = state[KERNEL], [name for name in state if name.startswith(PREDICTION)]
    changed = {KERNEL: kernel.sum(1, keepdim=True) if channels == 1 else kernel[:, colours] * (RGB / channels)}
    for name in decoder:
        values = state[name].unflatten(0, (-1, RGB))  # (pixels of a patch, colours, ...)
        values = values.mean(1, keepdim=True) if channels == 1 else values[:, colours]
        changed[name] = values.flatten(0, 1)
    how = "summed over the colours" if channels == 1 else f"repeated and scaled by {RGB}/{channels}"
    note = f"its patch kernel for {RGB} channels was {how} for --in_chans {channels}"
    if decoder:
        note += f", its prediction of pixels {'averaged' if channels == 1 else 'repeated'}"
    return {**state, **changed}, note
