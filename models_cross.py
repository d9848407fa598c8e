"""A masked autoencoder whose decoder only looks at the encoder: mask tokens ask visible patches, and nothing else.

Source: Fu et al., "Rethinking Patch Dependence for Masked Autoencoders" (CrossMAE, 2024). Another model than MAE, with
tensor names of its own in the decoder. The paper's decoder blocks may also read earlier encoder blocks ("inter-block
attention"); here all of them read the last one.

Shapes: N images, V visible patches, P predicted ones, L patches, D encoder width, d decoder width.
"""

from math import ceil

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import nn

from models_mae import MaskedAutoencoderViT, pick


class CrossAttention(nn.Module):
    """Multi-head attention of queries (N, P, d) over a memory (N, M, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale, self.fused_attn = heads, (width // heads) ** -0.5, True
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, memory):
        queries = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            found = F.scaled_dot_product_attention(queries, keys, values)
        else:
            found = (queries * self.scale @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
        return self.proj(found.transpose(1, 2).flatten(2))


class CrossBlock(vision_transformer.Block):
    """Cross-attention and a perceptron, each after a norm: (N, P, d), memory (N, M, d) -> (N, P, d). No query sees
    another one."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_layer):
        super().__init__(width, heads, mlp_ratio, norm_layer=norm_layer)
        self.attn = CrossAttention(width, heads)

    def forward(self, x, memory):
        x = x + self.attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


class CrossMaskedAutoencoderViT(MaskedAutoencoderViT):
    """Each predicted patch is decoded from the visible ones, independently of the others: so `decoder_fraction` of the
    removed patches may be predicted and compared, for that fraction of the decoder's work (their prediction ratio is
    `decoder_fraction` * mask ratio)."""

    def __init__(self, *, decoder_depth=8, decoder_fraction=1.0, mlp_ratio=4.0, norm_layer=nn.LayerNorm, **config):
        super().__init__(decoder_depth=0, mlp_ratio=mlp_ratio, norm_layer=norm_layer, **config)
        self.decoder_fraction = decoder_fraction
        width, heads = self.mask_token.shape[-1], config.get("decoder_num_heads", 16)
        self.decoder_cross_blocks = nn.ModuleList(
            [CrossBlock(width, heads, mlp_ratio, norm_layer) for _ in range(decoder_depth)]
        )
        self.initialize_weights()

    def to_predict(self, ids_removed):
        """They are in the order of their scores: where those are noise, the first ones are chosen by chance."""
        return ids_removed[:, : ceil(ids_removed.shape[1] * self.decoder_fraction)]

    def decode_removed(self, latent, ids_keep, ids_removed):
        """(N, P, d), in the order of `ids_removed`, whichever (N, P) those are."""
        x = self.mask_token + self.decoder_pos_embed[0, 1:][ids_removed]
        memory = self.decoder_embed(latent)
        for block in self.decoder_cross_blocks:
            x = self.run_block(block, x, memory)
        return self.decoder_norm(x)

    def decode(self, latent, ids_restore):
        """(N, L, d): visible patches are asked for as if they had been removed."""
        ids = torch.argsort(ids_restore, dim=1)
        visible = latent.shape[1] - 1
        return pick(self.decode_removed(latent, ids[:, :visible], ids), ids_restore)
