"""The transformer encoder of a masked autoencoder, and helpers that gather and scatter its tokens.

Shapes: N images, C channels, L patches of p x p pixels, V visible patches, M tokens, D encoder width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm import layers
from timm.models import vision_transformer
from torch import nn

from util.compute.kernels import GradCheckpointMixin
from util.compute.precision import widened


def encoder_features(model, imgs: torch.Tensor, pool: str) -> torch.Tensor:
    """Return features (N, D), at least float32, of images (N, C, H, W): the encoder sees every patch, and its norm is
    applied. `pool` is "cls", "avg" (the mean over patches), or "none" (all patches: N, L, D). Differentiable."""
    latent = widened(model.encode(model.embed(imgs))[0])
    if pool == "none":
        return latent[:, 1:]
    return latent[:, 0] if pool == "cls" else latent[:, 1:].mean(dim=1)


@torch.no_grad()
def mae_features(model, imgs: torch.Tensor, pool: str) -> torch.Tensor:
    """Compute `encoder_features` without gradients."""
    return encoder_features(model, imgs, pool)


def gather_tokens(values, ids):
    """Return the entries (N, M, ...) of `values` (N, L, ...) at `ids` (N, M)."""
    ids = ids.reshape(*ids.shape, *[1] * (values.dim() - 2))
    return torch.gather(values, 1, ids.expand(-1, -1, *values.shape[2:]))


def scatter_tokens(values, ids, length):
    """Return zeros (N, length) with `values` (N, M) written at the indices `ids` (N, M). Differentiable."""
    return values.new_zeros(len(values), length).scatter(1, ids, values)


class PatchEmbed(layers.PatchEmbed):
    """timm's patch embedding, with the types that its sizes have."""

    img_size: tuple[int, int]
    grid_size: tuple[int, int]
    patch_size: tuple[int, int]
    proj: nn.Conv2d


class Block(vision_transformer.Block):
    """timm's block, which can also compute only its last tokens."""

    attn: Any  # timm's Attention, or one of `models_grid`

    def forward(self, x, first: int = 0):
        """Tokens (N, M, D) -> outputs (N, M - first, D) of the tokens from `first` on; the tokens before `first` serve
        as keys and values only."""
        if not first:
            return super().forward(x)
        attention = self.attn
        queries, keys, values = attention.qkv(self.norm1(x)).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
        queries, keys, values = (tensor.transpose(1, 2) for tensor in (queries[:, first:], keys, values))
        if attention.fused_attn:
            attended = F.scaled_dot_product_attention(queries, keys, values)
        else:
            attended = (queries * attention.scale @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
        x = x[:, first:] + attention.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class PatchEncoder(GradCheckpointMixin, nn.Module):
    """The encoder of a masked autoencoder: patch embedding, [cls] token, fixed positions, blocks, norm."""

    compiled_parts: tuple[str, ...] = ("encode",)  # methods that `--compile` compiles whole
    patch_embed: PatchEmbed

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        mlp_ratio=4.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
    ):
        super().__init__()
        self._config: dict[str, Any] = dict(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            norm_layer=norm_layer,
        )
        self.in_chans = in_chans
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList([block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = norm_layer(embed_dim)

    def embed(self, imgs):
        """Return patch tokens (N, L, D) with their positions, without [cls], of images (N, C, H, W)."""
        return self.patch_embed(imgs) + self.pos_embed[:, 1:]

    def embed_patches(self, patches, ids):
        """Return the tokens (N, M, D) of `embed` for the patches at `ids` (N, M) only. `patches` (N, L, p * p * C) are
        the pixels from `patchify`."""
        kernel = self.patch_embed.proj
        weight = kernel.weight.permute(0, 2, 3, 1).flatten(1)  # channels last, as in `patchify`
        return F.linear(gather_tokens(patches, ids), weight, kernel.bias) + self.pos_embed[0, 1:][ids]

    def patchify(self, imgs):
        """Cut images (N, C, H, W) into patches (N, L, p * p * C); inside a patch the order is row, column, channel.

        Raises ValueError for images of another size or number of channels.
        """
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        expected = (self.in_chans, *self.patch_embed.img_size)
        if tuple(imgs.shape[1:]) != expected:  # the reshape below would accept as many pixels in another order
            raise ValueError(f"images are {tuple(imgs.shape[1:])}, channels first, and the model takes {expected}")
        x = imgs.reshape(imgs.shape[0], self.in_chans, rows, p, columns, q)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(imgs.shape[0], rows * columns, p * q * self.in_chans)

    def encode(self, tokens, return_blocks=()):
        """Prepend [cls] to tokens (N, M, D) and apply blocks and norm.

        Returns the latent (N, 1 + M, D) and, for each block of `return_blocks`, {block: its output before the norm}.
        """
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls_token, tokens], dim=1)
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = self.run_block(block, x)
            if index in return_blocks:
                outputs[index] = x
        return self.norm(x), outputs

    def encoder_copy(self, depth=None, img_size=None, pos_embed=None):
        """Return a separate encoder with the same weights, cut after `depth` blocks (None keeps all). `img_size` and
        `pos_embed` (1, 1 + L, D) replace the image size and the position table."""
        config = self._config | {"depth": len(self.blocks) if depth is None else depth}
        encoder = PatchEncoder(**config | ({} if img_size is None else {"img_size": img_size}))
        state = self.state_dict() | ({} if pos_embed is None else {"pos_embed": pos_embed})
        encoder.load_state_dict({name: state[name] for name in encoder.state_dict()})
        return encoder.to(self.cls_token)
