"""Masked autoencoder with a vision transformer (He et al. 2022, https://arxiv.org/abs/2111.06377), and with MAE's
decoder or CrossMAE's (Fu et al. 2024, https://arxiv.org/abs/2401.14391).

Shapes: N images, C channels, (H, W) pixels, L = (H / p) * (W / p) patches of p x p pixels, of which V = int(L * (1 -
mask ratio)) are visible and P predicted; D encoder width, d decoder width. In a mask, 1 means removed and 0 visible.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from torch import nn

from models_encoder import Block, PatchEncoder, gather_tokens, scatter_tokens
from util.architectures import DECODERS, DEFAULT_DECODER, ENCODERS, check_geometry, look_up
from util.pos_embed import get_2d_sincos_pos_embed


def visible_patches(length: int, mask_ratio: float) -> int:
    """Return V, the number of patches out of `length` that remain visible."""
    return int(length * (1 - mask_ratio))


def masked_mean(values, mask):
    """Return the mean of `values` (N, L) over the patches where `mask` (N, L) is 1: a scalar."""
    return (values * mask).sum() / mask.sum()


@dataclass
class MaskedOutput:
    """The tensors of one forward pass, from which pretraining methods compute their losses.

    `pred` and `decoded` contain the P predicted patches in the order of `ids_predicted`: all removed patches, or fewer
    with CrossMAE's `decoder_fraction`. With `all_patches` they contain all L patches in the order of the image, and
    losses are means over the removed ones. `select_predicted`, `mean_over_predicted` and `scatter_predicted` work in
    both cases.
    """

    latent: torch.Tensor  # (N, 1 + V, D), output of the encoder after its norm, [cls] first
    pred: torch.Tensor  # (N, P, F): F = p * p * C pixels, or the output width of `head`
    patches: torch.Tensor  # (N, L, p * p * C), the pixels
    ids_keep: torch.Tensor  # (N, V), indices of the visible patches, in the encoder's order
    ids_removed: torch.Tensor  # (N, L - V), indices of the removed patches, by ascending score
    ids_predicted: torch.Tensor  # (N, P), indices of the removed patches that are predicted
    scores: torch.Tensor  # (N, L); the patches with the highest scores are removed
    decoded: torch.Tensor  # (N, P, d), output of the decoder after its norm, before the prediction layer
    mask_ratio: float  # as requested; V is rounded down
    all_patches: bool = False
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)  # encoder block -> (N, 1 + V, D), before any norm
    head: str = ""  # name of the method whose head computed `pred`, "" for the pixel layer
    redraw: Callable[[], torch.Tensor] | None = None  # returns scores (N, L) of another mask of the same kind

    @property
    def ids_restore(self) -> torch.Tensor:
        """Indices (N, L) that gather visible patches followed by removed ones into the order of the image."""
        return torch.argsort(torch.cat([self.ids_keep, self.ids_removed], dim=1), dim=1)

    @cached_property
    def mask(self) -> torch.Tensor:
        """Mask (N, L): 1 for removed patches, 0 for visible ones."""
        return torch.ones_like(self.scores, dtype=torch.float32).scatter_(1, self.ids_keep, 0.0)

    def select_predicted(self, values: torch.Tensor) -> torch.Tensor:
        """Return the entries (N, P, ...) of `values` (N, L, ...) that belong to the predicted patches."""
        return values if self.all_patches else gather_tokens(values, self.ids_predicted)

    def mean_over_predicted(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of `values` (N, P) over the predicted patches; with `all_patches`, of `values` (N, L) over
        the removed ones: a scalar."""
        return masked_mean(values, self.mask) if self.all_patches else values.mean()

    def scatter_predicted(self, values: torch.Tensor) -> torch.Tensor:
        """Return `values` (N, P) in the order of the image (N, L), with 0 for patches that were not predicted. With
        `all_patches`, `values` (N, L) are returned unchanged."""
        return values if self.all_patches else scatter_tokens(values, self.ids_predicted, self.scores.shape[1])


class MaskedAutoencoderViT(PatchEncoder):
    """Masked autoencoder: an encoder of the visible patches, a light decoder of all patches, and a loss on the removed
    patches.

    `img_size` is the side of a square image or (H, W). The tensor names are those of the released MAE checkpoints.
    """

    compiled_parts = ("encode", "_decode")

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        decoder_embed_dim=512,
        decoder_depth=8,
        decoder_num_heads=16,
        mlp_ratio=4.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        norm_pix_loss=False,
    ):
        super().__init__(img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, norm_layer)
        self.norm_pix_loss = norm_pix_loss
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        positions = self.patch_embed.num_patches + 1

        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, positions, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([block(decoder_embed_dim, decoder_num_heads) for _ in range(decoder_depth)])
        self.decoder_norm = norm_layer(decoder_embed_dim)
        patch_height, patch_width = self.patch_embed.patch_size
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_height * patch_width * in_chans)
        self.initialize_weights()

    def initialize_weights(self):
        """Set the fixed sine-cosine position embeddings. Initialise linear layers and the patch kernel (flattened to a
        matrix) with Xavier's uniform distribution, the biases of linear layers with zero, and the [cls] and mask tokens
        with a normal distribution (standard deviation 0.02)."""
        for table in (self.pos_embed, self.decoder_pos_embed):
            values = get_2d_sincos_pos_embed(table.shape[-1], tuple(self.patch_embed.grid_size), cls_token=True)
            table.data.copy_(torch.from_numpy(values)[None])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.flatten(1))
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def unpatchify(self, x):
        """Assemble patches (N, L, p * p * C) into images (N, C, H, W): the inverse of `patchify`."""
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = x.reshape(x.shape[0], rows, columns, p, q, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_chans, rows * p, columns * q)

    def choose_visible(self, scores, mask_ratio):
        """Remove the patches with the highest `scores` (N, L) of each image, and keep the other V -> ids_keep (N, V),
        mask (N, L), ids_restore (N, L)."""
        visible = visible_patches(scores.shape[1], mask_ratio)
        ids_shuffle = torch.argsort(scores, dim=1, stable=True)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = (ids_restore >= visible).to(torch.float32)
        return ids_shuffle[:, :visible], mask, ids_restore

    def random_masking(self, x, mask_ratio, noise=None):
        """Remove the patches of x (N, L, D) with the highest `noise` (N, L) (None: uniform noise), and keep the other V
        -> kept patches (N, V, D), mask (N, L), ids_restore (N, L)."""
        if noise is None:
            noise = torch.rand(x.shape[:2], device=x.device)
        ids_keep, mask, ids_restore = self.choose_visible(noise, mask_ratio)
        return gather_tokens(x, ids_keep), mask, ids_restore

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """Mask and encode images (N, C, H, W) -> latent (N, 1 + V, D), mask (N, L), ids_restore (N, L)."""
        tokens, mask, ids_restore = self.random_masking(self.embed(imgs), mask_ratio, noise)
        return self.encode(tokens)[0], mask, ids_restore

    def decode(self, latent, ids_restore):
        """Decode every patch, from latent (N, 1 + V, D), up to and including the decoder's norm -> (N, L, d), in the
        order of the image."""
        ids_shuffle = torch.argsort(ids_restore, dim=1)
        visible = latent.shape[1] - 1
        return gather_tokens(self._decode(latent, ids_shuffle[:, :visible], ids_shuffle[:, visible:]), ids_restore)

    def select_ids_to_predict(self, ids_removed):
        """Return those of the indices `ids_removed` (N, L - V) whose patches are predicted in training (N, P): all."""
        return ids_removed

    def decode_removed(self, latent, ids_keep, ids_removed):
        """Decode only the removed patches, up to and including the decoder's norm -> (N, L - V, d), in the order of
        `ids_removed` (N, L - V)."""
        return self._decode(latent, ids_keep, ids_removed, first=ids_keep.shape[1])

    def decoder_tokens(self, latent, ids_keep, ids_removed):
        """Return the decoder's input (N, 1 + L, d): [cls], visible patches, mask tokens, each with its position
        embedding."""
        x, positions = self.decoder_embed(latent), self.decoder_pos_embed[0, 1:]
        cls_token = x[:, :1] + self.decoder_pos_embed[:, :1]
        return torch.cat([cls_token, x[:, 1:] + positions[ids_keep], self.mask_token + positions[ids_removed]], dim=1)

    def _decode(self, latent, ids_keep, ids_removed, first=0):
        """Decode visible patches followed by removed ones, and return the patches from `first` on, after the norm, in
        this order.

        The tokens are not sorted into the order of the image. Positions are encoded by their embeddings, so the order
        does not matter, and sorting would cost a gather in the forward and a scatter in the backward pass. The last
        block computes only the returned patches.
        """
        x = self.decoder_tokens(latent, ids_keep, ids_removed)
        for index, block in enumerate(self.decoder_blocks, start=1):
            x = self.run_block(block, x, 1 + first if index == len(self.decoder_blocks) else 0)
        return self.decoder_norm(x if self.decoder_blocks else x[:, 1 + first :])

    def forward_decoder(self, latent, ids_restore):
        """Predict the target of every patch (pixels, or normalised pixels): (N, L, p * p * C)."""
        return self.decoder_pred(self.decode(latent, ids_restore))

    def patch_target(self, patches):
        """Return the prediction target for patches of pixels (N, M, p * p * C): the pixels or, with `norm_pix_loss`,
        the pixels normalised by the mean and unbiased variance of their patch."""
        if not self.norm_pix_loss:
            return patches
        mean, var = patches.mean(dim=-1, keepdim=True), patches.var(dim=-1, keepdim=True)
        return (patches - mean) / (var + 1.0e-6) ** 0.5

    def pixel_target(self, imgs):
        """Return the prediction targets (N, L, p * p * C) of all patches of images (N, C, H, W)."""
        return self.patch_target(self.patchify(imgs))

    def forward_loss(self, imgs, pred, mask):
        """Return the mean squared error of `pred` (N, L, p * p * C) over the patches removed by `mask` (N, L): a
        scalar."""
        return masked_mean(((pred - self.pixel_target(imgs)) ** 2).mean(dim=-1), mask)

    def patch_errors(self, out):
        """Return the mean squared error of every predicted patch of a `MaskedOutput`: (N, P)."""
        return ((out.pred - self.patch_target(out.select_predicted(out.patches))) ** 2).mean(dim=-1)

    def reconstruction_loss(self, out):
        """Compute the loss from a `MaskedOutput`: the mean of `patch_errors` over predicted patches, a scalar."""
        return out.mean_over_predicted(self.patch_errors(out))

    def forward_pretrain(
        self, imgs, mask_ratio=0.75, scores=None, return_blocks=(), head=None, all_patches=False
    ) -> MaskedOutput:
        """Run encoder and decoder once and return all intermediate tensors as a `MaskedOutput`.

        The patches with the highest `scores` (N, L) are removed (None: uniform noise). `return_blocks` are the indices
        of encoder blocks whose outputs are returned. `head` replaces the pixel prediction layer. With `all_patches`
        every patch is decoded, not only the removed ones.
        """
        patches = self.patchify(imgs)
        if scores is None:
            scores = torch.rand(patches.shape[:2], device=imgs.device)
        ids_shuffle = torch.argsort(scores, dim=1, stable=True)
        visible = visible_patches(scores.shape[1], mask_ratio)
        ids_keep, ids_removed = ids_shuffle[:, :visible], ids_shuffle[:, visible:]
        ids_predicted = self.select_ids_to_predict(ids_removed)
        latent, blocks = self.encode(self.embed_patches(patches, ids_keep), return_blocks)
        if all_patches:
            decoded = self.decode(latent, torch.argsort(ids_shuffle, dim=1))
        else:
            decoded = self.decode_removed(latent, ids_keep, ids_predicted)
        pred = (head or self.decoder_pred)(decoded)
        return MaskedOutput(
            latent,
            pred,
            patches,
            ids_keep,
            ids_removed,
            ids_predicted,
            scores,
            decoded,
            mask_ratio,
            all_patches,
            blocks,
        )

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        """Images (N, C, H, W) -> loss (scalar), pred (N, L, p * p * C), mask (N, L). The patches with the highest
        `noise` (N, L) are removed (None: uniform noise)."""
        out = self.forward_pretrain(imgs, mask_ratio, noise, all_patches=True)
        return self.forward_loss(imgs, out.pred, out.mask), out.pred, out.mask


# CrossMAE: a cross-attention decoder ----------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Multi-head cross-attention from queries (N, P, d) to a memory (N, M, d)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale, self.fused_attn = heads, (width // heads) ** -0.5, True
        self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x, memory):
        queries = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        keys, values = self.kv(memory).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.fused_attn:
            attended = F.scaled_dot_product_attention(queries, keys, values)
        else:
            attended = (queries * self.scale @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
        return self.proj(attended.transpose(1, 2).flatten(2))


class CrossBlock(vision_transformer.Block):
    """Block of CrossMAE's decoder: cross-attention and an MLP, each with a norm before it and a residual connection:
    queries (N, P, d), memory (N, M, d) -> (N, P, d).

    The queries do not attend to each other, and the memory is not normalised.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_layer):
        super().__init__(width, heads, mlp_ratio, norm_layer=norm_layer)
        self.attn = CrossAttention(width, heads)

    def forward(self, x, memory):
        x = x + self.attn(self.norm1(x), memory)
        return x + self.mlp(self.norm2(x))


class CrossMaskedAutoencoderViT(MaskedAutoencoderViT):
    """Masked autoencoder with CrossMAE's decoder: mask tokens cross-attend to visible tokens, and not to each other.

    Predictions are therefore independent of each other, and training can be limited to `decoder_fraction` of the
    removed patches. This reduces the cost of queries and MLPs to that fraction, but not the cost of the visible tokens'
    keys and values. The paper's prediction ratio is `decoder_fraction` * mask ratio.
    """

    compiled_parts = ("encode", "decode_removed")

    def __init__(
        self,
        *,
        decoder_depth=8,
        decoder_fraction=1.0,
        mlp_ratio=4.0,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        **config,
    ):
        super().__init__(decoder_depth=0, mlp_ratio=mlp_ratio, norm_layer=norm_layer, **config)
        self.decoder_fraction = decoder_fraction
        width, heads = self.mask_token.shape[-1], config.get("decoder_num_heads", 16)
        self.decoder_cross_blocks = nn.ModuleList(
            [CrossBlock(width, heads, mlp_ratio, norm_layer) for _ in range(decoder_depth)]
        )
        self.initialize_weights()

    def select_ids_to_predict(self, ids_removed):
        """Return the first `decoder_fraction` of the indices `ids_removed` (N, L - V), rounded up. They are in
        ascending order of their scores; if the scores are noise, the first ones are a random subset."""
        return ids_removed[:, : ceil(ids_removed.shape[1] * self.decoder_fraction)]

    def decode_removed(self, latent, ids_keep, ids_removed):
        """Decode the patches `ids_removed` (N, P), any subset of all patches, up to and including the decoder's norm ->
        (N, P, d)."""
        x = self.mask_token + self.decoder_pos_embed[0, 1:][ids_removed]
        memory = self.decoder_embed(latent)
        for block in self.decoder_cross_blocks:
            x = self.run_block(block, x, memory)
        return self.decoder_norm(x)

    def decode(self, latent, ids_restore):
        """Decode every patch, from latent (N, 1 + V, D), up to and including the decoder's norm -> (N, L, d), in the
        order of the image. Visible patches are also predicted from mask tokens."""
        ids = torch.argsort(ids_restore, dim=1)
        visible = latent.shape[1] - 1
        return gather_tokens(self.decode_removed(latent, ids[:, :visible], ids), ids_restore)


# Models by name -------------------------------------------------------------------------------------------------------


def _builder(name: str, config: dict):
    def build(decoder: str = "self", **overrides) -> MaskedAutoencoderViT:
        merged = {**config, **overrides}
        check_geometry(merged)
        model_class = CrossMaskedAutoencoderViT if decoder == "cross" else MaskedAutoencoderViT
        return model_class(norm_layer=partial(nn.LayerNorm, eps=1e-6), **merged)

    build.__name__ = name
    build.config = config
    return build


# Every model is also a function of this module, as in the official repository: `models_mae.mae_vit_base_patch16()`.
MODELS = {
    f"mae_{name}": _builder(f"mae_{name}", {**config, **DECODERS.get(name, DEFAULT_DECODER)})
    for name, config in ENCODERS.items()
}
MODELS |= {
    f"mae_{name}_dec512d8b": _builder(f"mae_{name}_dec512d8b", {**config, **DEFAULT_DECODER})
    for name, config in ENCODERS.items()
    if name not in DECODERS
}
globals().update(MODELS)


def build_model(name: str, **overrides) -> MaskedAutoencoderViT:
    """Build the autoencoder called `name`. `overrides` replace constructor arguments; None keeps the model's value.
    `decoder` is "self" (MAE's) or "cross" (CrossMAE's).

    Raises UserError for an unknown name (listing the known ones) and for sizes that do not fit together.
    """
    return look_up(MODELS, name)(**{key: value for key, value in overrides.items() if value is not None})
