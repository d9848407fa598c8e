"""Saliency of patches: the attention of [cls] to them, and Grad-CAM (Selvaraju et al. 2017, ICCV).

N images, L patches, D width, h heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from util.compute.attention_maps import block_at


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
