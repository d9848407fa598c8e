"""The attention of [cls] to the patches, read from any block of an encoder of ours or of timm's.

N images, L patches, h heads.
"""

import torch
from torch import Tensor

from util.errors import UserError


def block_at(model, index: int) -> torch.nn.Module:
    """Return the block at `index`, counted from the end if negative. Raises UserError if there is none."""
    blocks = model.blocks
    depth = len(blocks)
    if not -depth <= index < depth:
        raise UserError(f"--block {index}: the encoder has {depth} blocks, from 0 to {depth - 1} (or -{depth} to -1)")
    return blocks[index]


@torch.no_grad()
def cls_attention(model, imgs: Tensor, block: int = -1, advice: str = "") -> Tensor:
    """Return the attention weights of [cls] to [cls] and the patches in block `block`, for images (N, C, H, W):
    (N, h, 1 + L). Rows sum to one, or less with other tokens beside [cls], such as registers. Raises UserError as
    `block_at`, and for an encoder without [cls] or whose attention computes no such weights; `advice` ends the
    message."""
    attention, weights = block_at(model, block).attn, []
    if not model.has_cls:
        raise UserError(f"{model.name} has no [cls] token, whose attention is needed{advice}")
    if not hasattr(attention, "attn_drop") or not hasattr(attention, "fused_attn"):
        raise UserError(f"the attention of {model.name} does not give its weights{advice}")
    fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel does not return the weights
    hook = attention.attn_drop.register_forward_hook(lambda module, inputs, output: weights.append(inputs[0]))
    try:
        model.forward_tokens(imgs)
    finally:
        hook.remove()
        attention.fused_attn = fused
    of_cls = weights[0][:, :, 0]
    return torch.cat([of_cls[..., :1], of_cls[..., model.num_prefix_tokens :]], dim=-1)
