"""Where an encoder looks: the attention of [cls] to the patches, and Grad-CAM (Selvaraju et al. 2017, ICCV).

N images, L patches, D width, h heads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from util.errors import UserError


def block_at(model, index: int) -> torch.nn.Module:
    """The block at `index`, counted from the end where negative; UserError when there is none."""
    depth = len(model.blocks)
    if not -depth <= index < depth:
        raise UserError(f"--block {index}: the encoder has {depth} blocks, from 0 to {depth - 1} (or -{depth} to -1)")
    return model.blocks[index]


@torch.no_grad()
def cls_attention(model, imgs: Tensor, block: int = -1) -> Tensor:
    """imgs (N, C, H, W) -> (N, h, 1 + L): how block `block` weighs [cls] and the patches when it renews [cls]; each row
    sums to one."""
    attention, found = block_at(model, block).attn, []
    fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel never has the weights
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    try:
        model.forward_tokens(imgs)
    finally:
        hook.remove()
        attention.fused_attn = fused
    return found[0][:, :, 0]


def grad_cam(model, imgs: Tensor, score: Callable[[], Tensor], block: int = -1) -> Tensor:
    """(N, L), at least 0: the patches whose features at the first norm of `block` raise the scores.

    `score()` runs the model on `imgs` and returns one number per image (N,). With A (L, D) the patch tokens behind the
    norm and w the mean over the patches of d score / d A, the map is relu(A w): Selvaraju et al., equations 1 and 2,
    with patches in the place of a convolution's pixels.
    """
    found = []

    def keep(module, inputs, output):
        found.append(output.detach().requires_grad_(True))
        return found[0]

    hook = block_at(model, block).norm1.register_forward_hook(keep)
    try:
        with torch.enable_grad():
            scores = score()
            (gradient,) = torch.autograd.grad(scores.sum(), found[0])  # images do not see each other
    finally:
        hook.remove()
    weights = gradient[:, 1:].mean(dim=1, keepdim=True)  # (N, 1, D)
    return (found[0].detach()[:, 1:] * weights).sum(dim=-1).relu()


def attended_share(attention: Tensor) -> Tensor:
    """(N, h, 1 + L) -> (N, h): to how many of the L patches the attention goes, as a share: exp(entropy) / L of its
    distribution over patches. 1 is uniform, 1 / L a single patch."""
    patches = attention[..., 1:] / attention[..., 1:].sum(dim=-1, keepdim=True)
    return torch.special.entr(patches).sum(dim=-1).exp() / patches.shape[-1]
