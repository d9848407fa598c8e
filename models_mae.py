"""Masked autoencoder on a vision transformer (He et al. 2022, https://arxiv.org/abs/2111.06377).

Shapes: N images, C channels, (H, W) pixels, patches of p x p, L = (H / p) * (W / p) patches, V = int(L * (1 - ratio))
visible ones, D encoder width, d decoder width. In a mask 1 means removed, 0 visible.
"""

from dataclasses import dataclass, field
from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

from util.architectures import DECODERS, DEFAULT_DECODER, ENCODERS, check_geometry, look_up
from util.pos_embed import get_2d_sincos_pos_embed


@dataclass
class MaskedOutput:
    """Everything one pass of the autoencoder computed, by name: what a pretraining method may build on."""

    latent: torch.Tensor  # (N, 1 + V, D), after the encoder's norm, [cls] first
    pred: torch.Tensor  # (N, L, p * p * C)
    mask: torch.Tensor  # (N, L)
    ids_keep: torch.Tensor  # (N, V), the visible patches in the order the encoder saw them
    ids_restore: torch.Tensor  # (N, L), undoes the shuffle
    scores: torch.Tensor  # (N, L), what decided the mask: the highest were removed
    decoded: torch.Tensor  # (N, L, d), the decoder after its norm, before the prediction layer
    mask_ratio: float  # what was asked for; V is what it comes to
    blocks: dict[int, torch.Tensor] = field(default_factory=dict)  # encoder block -> (N, 1 + V, D), before any norm
    # What the loss compares: `pred`, unless a method reconstructs something else (features) with a layer of its own.
    prediction: torch.Tensor | None = None  # (N, L, F)
    head: str = ""  # name of that method, "" for pixels

    def __post_init__(self):
        if self.prediction is None:
            self.prediction = self.pred


class PatchEncoder(nn.Module):
    """The encoder of a masked autoencoder: patch embedding, [cls], fixed positions, blocks, norm."""

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        embed_dim=1024,
        depth=24,
        num_heads=16,
        mlp_ratio=4.0,
        norm_layer=nn.LayerNorm,
    ):
        super().__init__()
        self._config = dict(
            img_size=img_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, num_heads=num_heads,
            mlp_ratio=mlp_ratio, norm_layer=norm_layer,
        )  # fmt: skip
        self.in_chans = in_chans
        block = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm_layer)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        positions = self.patch_embed.num_patches + 1
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList([block(embed_dim, num_heads) for _ in range(depth)])
        self.norm = norm_layer(embed_dim)

    def embed(self, imgs):
        """Patch tokens with their positions, without [cls]: (N, L, D)."""
        return self.patch_embed(imgs) + self.pos_embed[:, 1:]

    def encode(self, tokens, return_blocks=()):
        """[cls], blocks and norm over tokens (N, M, D) -> latent (N, 1 + M, D), {block: its output before the norm}."""
        cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(tokens.shape[0], -1, -1)
        x = torch.cat([cls_token, tokens], dim=1)
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in return_blocks:
                outputs[index] = x
        return self.norm(x), outputs

    def encoder_copy(self, depth=None, img_size=None, pos_embed=None):
        """An encoder of its own with the same weights, cut after `depth` blocks (None: all of them); for images of
        another size with the position table `pos_embed` (1, 1 + L, D) of their grid."""
        config = self._config | {"depth": len(self.blocks) if depth is None else depth}
        twin = PatchEncoder(**config | ({} if img_size is None else {"img_size": img_size}))
        state = self.state_dict() | ({} if pos_embed is None else {"pos_embed": pos_embed})
        twin.load_state_dict({name: state[name] for name in twin.state_dict()})
        return twin.to(self.cls_token)

    @staticmethod
    def gather(x, ids):
        """The tokens of x (N, L, D) at `ids` (N, V): (N, V, D)."""
        return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))


class MaskedAutoencoderViT(PatchEncoder):
    """Encoder on visible patches, light decoder on all of them, loss on the removed ones.

    `img_size` is the side of a square or (H, W). The tensor names are those of the released MAE checkpoints.
    """

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
        norm_layer=nn.LayerNorm,
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
        """Fixed sine-cosine positions; Xavier-uniform linear layers, the patch kernel among them, seen as a matrix."""
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

    def patchify(self, imgs):
        """(N, C, H, W) -> (N, L, p * p * C); inside a patch the order is row, column, channel."""
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = imgs.reshape(imgs.shape[0], self.in_chans, rows, p, columns, q)
        return x.permute(0, 2, 4, 3, 5, 1).reshape(imgs.shape[0], rows * columns, p * q * self.in_chans)

    def unpatchify(self, x):
        """(N, L, p * p * C) -> (N, C, H, W), the inverse of `patchify`."""
        (rows, columns), (p, q) = self.patch_embed.grid_size, self.patch_embed.patch_size
        x = x.reshape(x.shape[0], rows, columns, p, q, self.in_chans)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(x.shape[0], self.in_chans, rows * p, columns * q)

    def choose_visible(self, scores, mask_ratio):
        """Keep the V lowest of `scores` (N, L) per sample -> ids_keep (N, V), mask (N, L), ids_restore (N, L)."""
        length = scores.shape[1]
        visible = int(length * (1 - mask_ratio))
        ids_shuffle = torch.argsort(scores, dim=1, stable=True)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        mask = (ids_restore >= visible).to(torch.float32)
        return ids_shuffle[:, :visible], mask, ids_restore

    def random_masking(self, x, mask_ratio, noise=None):
        """Drop patches of x (N, L, D) by sorting `noise` (N, L); -> kept (N, V, D), mask, ids_restore."""
        if noise is None:
            noise = torch.rand(x.shape[:2], device=x.device)
        ids_keep, mask, ids_restore = self.choose_visible(noise, mask_ratio)
        return self.gather(x, ids_keep), mask, ids_restore

    def forward_encoder(self, imgs, mask_ratio, noise=None):
        """-> latent (N, 1 + V, D), mask (N, L), ids_restore (N, L)."""
        tokens, mask, ids_restore = self.random_masking(self.embed(imgs), mask_ratio, noise)
        return self.encode(tokens)[0], mask, ids_restore

    def decode(self, latent, ids_restore):
        """Mask tokens put back in order, then the decoder up to its norm: (N, L, d)."""
        x = self.decoder_embed(latent)
        removed = ids_restore.shape[1] + 1 - x.shape[1]
        mask_tokens = self.mask_token.to(x.dtype).expand(x.shape[0], removed, -1)
        patches = self.gather(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def forward_decoder(self, latent, ids_restore):
        """-> pixels of every patch, (N, L, p * p * C)."""
        return self.decoder_pred(self.decode(latent, ids_restore))

    def pixel_target(self, imgs):
        """What `pred` is compared with: patches, with `norm_pix_loss` each by its own mean and unbiased variance."""
        target = self.patchify(imgs)
        if self.norm_pix_loss:
            mean, var = target.mean(dim=-1, keepdim=True), target.var(dim=-1, keepdim=True)
            target = (target - mean) / (var + 1.0e-6) ** 0.5
        return target

    def forward_loss(self, imgs, pred, mask):
        """Mean squared error per patch, averaged over the removed patches: a scalar."""
        return masked_mean(((pred - self.pixel_target(imgs)) ** 2).mean(dim=-1), mask)

    def forward_pretrain(self, imgs, mask_ratio=0.75, scores=None, return_blocks=()):
        """One pass with every intermediate by name. `scores` (N, L) decide the mask (uniform noise when None)."""
        tokens = self.embed(imgs)
        if scores is None:
            scores = torch.rand(tokens.shape[:2], device=tokens.device)
        ids_keep, mask, ids_restore = self.choose_visible(scores, mask_ratio)
        latent, blocks = self.encode(self.gather(tokens, ids_keep), return_blocks)
        decoded = self.decode(latent, ids_restore)
        pred = self.decoder_pred(decoded)
        return MaskedOutput(latent, pred, mask, ids_keep, ids_restore, scores, decoded, mask_ratio, blocks)

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        """(N, C, H, W) -> loss (scalar), pred (N, L, p * p * C), mask (N, L). `noise` (N, L) fixes the mask."""
        out = self.forward_pretrain(imgs, mask_ratio, noise)
        return self.forward_loss(imgs, out.pred, out.mask), out.pred, out.mask


def masked_mean(values, mask):
    """Mean of `values` (N, L) over the places where `mask` (N, L) is 1."""
    return (values * mask).sum() / mask.sum()


def _builder(name: str, config: dict):
    def build(**overrides) -> MaskedAutoencoderViT:
        merged = {**config, **overrides}
        check_geometry(merged)
        return MaskedAutoencoderViT(norm_layer=partial(nn.LayerNorm, eps=1e-6), **merged)

    build.__name__ = name
    build.config = config
    return build


# Every name is also an attribute of this module, as in the official repository: `models_mae.mae_vit_base_patch16()`.
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
    """The named autoencoder with some constructor arguments replaced (None leaves the model's own).

    Raises UserError for an unknown name (listing the known ones) and for sizes that do not fit together.
    """
    return look_up(MODELS, name)(**{key: value for key, value in overrides.items() if value is not None})
