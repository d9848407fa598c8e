"""Saliency of patches: the attention of [cls] to them, and Grad-CAM (Selvaraju et al. 2017, ICCV).

N images, L patches, D width, h heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from util.errors import UserError


def block_at(model, index: int) -> Any:
    """Return the block at `index`, counted from the end if negative. Raises UserError if there is none."""
    blocks = model.blocks
    depth = len(blocks)
    if not -depth <= index < depth:
        raise UserError(f"--block {index}: the encoder has {depth} blocks, from 0 to {depth - 1} (or -{depth} to -1)")
    return blocks[index]


@torch.no_grad()
def cls_attention(model, imgs: Tensor, block: int = -1) -> Tensor:
    """Return the attention weights of [cls] to [cls] and the patches in block `block`, for images (N, C, H, W):
    (N, h, 1 + L). Rows sum to one, or less with other tokens beside [cls], such as registers. Raises UserError as
    `block_at`, and for an encoder without [cls] or whose attention computes no such weights."""
    attention, weights = block_at(model, block).attn, []
    if not model.has_cls:
        raise UserError(
            f"{model.name} has no [cls] token, whose attention is drawn: leave attention out (--show gradcam)"
        )
    if not hasattr(attention, "attn_drop") or not hasattr(attention, "fused_attn"):
        raise UserError(f"the attention of {model.name} does not give its weights: leave it out (--show gradcam)")
    fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel does not return the weights
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: weights.append(inputs[0]))
    try:
        model.forward_tokens(imgs)
    finally:
        hook.remove()
        attention.fused_attn = fused
    of_cls = weights[0][:, :, 0]
    return torch.cat([of_cls[..., :1], of_cls[..., model.num_prefix_tokens :]], dim=-1)


def grad_cam(model, imgs: Tensor, score: Callable[[], Tensor], block: int = -1) -> Tensor:
    """Compute Grad-CAM maps (N, L), at least 0, at the first norm of `block`.

    `score()` runs the model on `imgs` (N, C, H, W) and returns one number per image (N,). With A (L, D) the patch
    tokens after the norm and w the mean over the patches of d score / d A, the map is relu(A w): Selvaraju et al.,
    equations 1 and 2, with patches in place of a convolution's pixels. Raises UserError as `block_at`.
    """
    tokens = []

    def keep(module, inputs, output):
        tokens.append(output.detach().requires_grad_(True))
        return tokens[0]

    hook = block_at(model, block).norm1.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = score()
            (gradient,) = torch.autograd.grad(scores.sum(), tokens[0])  # images do not interact
    finally:
        hook.remove()
    first = model.num_prefix_tokens
    weights = gradient[:, first:].mean(dim=1, keepdim=True)  # (N, 1, D)
    return (tokens[0].detach()[:, first:] * weights).sum(dim=-1).relu()


def attended_share(attention: Tensor) -> Tensor:
    """Return the effective share of the L patches that attention (N, h, 1 + L) covers: exp(entropy) / L of its
    distribution over patches, (N, h). 1 is uniform, 1 / L a single patch."""
    patches = attention[..., 1:] / attention[..., 1:].sum(dim=-1, keepdim=True)
    return torch.special.entr(patches).sum(dim=-1).exp() / patches.shape[-1]
