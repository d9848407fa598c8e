"""Vision transformer for fine-tuning and probing: the encoder of `models_mae`, applied to all patches, and a head."""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import trunc_normal_
from timm.models.vision_transformer import Block
from torch import nn

from models_encoder import PatchEmbed
from util.architectures import ENCODERS, check_geometry, look_up
from util.compute.kernels import GradCheckpointMixin
from util.errors import UserError


class AttentivePool(nn.Module):
    """Attentive pooling: one learned query cross-attends to all tokens (El-Nouby et al. 2024, AIM).

    V-JEPA's attentive probe (Bardes et al. 2024) has an additional MLP, which is left out here.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, dim))
        trunc_normal_(self.query, std=0.02)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)

    def forward(self, tokens):
        """Tokens (N, M, D) -> features (N, D)."""
        query = self.query.expand(len(tokens), -1, -1)
        return self.attention(query, tokens, tokens, need_weights=False)[0][:, 0]


class VisionTransformer(GradCheckpointMixin, nn.Module):
    """Vision transformer (Dosovitskiy et al. 2021) that classifies images, or computes their features.

    The feature is the [cls] token or, with `global_pool`, the mean of the patch tokens. With `global_pool`, the outputs
    of the last block are averaged first and `fc_norm` normalises the mean; otherwise `norm` normalises every token, as
    in the pretraining encoder. The drop-path rate grows linearly with depth, from 0 to `drop_path_rate` (Huang et al.
    2016). Position embeddings are trained. `num_classes=0` leaves out the head.
    """

    compiled_parts: tuple[str, ...] = ("forward_tokens",)  # methods that `--compile` compiles whole
    num_prefix_tokens = 1  # [cls], under timm's name
    has_cls = True

    def __init__(
        self,
        global_pool=False,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        embed_dim=768,
        depth=12,
        num_heads=12,
        mlp_ratio=4.0,
        qkv_bias=True,
        norm_layer: Callable[..., nn.Module] = nn.LayerNorm,
        drop_path_rate=0.0,
    ):
        super().__init__()
        self.global_pool = global_pool
        self.default_pool = "avg" if global_pool else "cls"  # the feature that the head reads
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches + 1, embed_dim))
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
        block = partial(Block, embed_dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, norm_layer=norm_layer)
        self.blocks = nn.ModuleList([block(drop_path=rate) for rate in rates])
        if global_pool:
            self.fc_norm = norm_layer(embed_dim)
        else:
            self.norm = norm_layer(embed_dim)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._frozen_blocks: tuple[nn.Module, ...] = ()
        self.initialize_weights()

    def initialize_weights(self):
        """Initialise position embeddings, [cls] token and linear layers from a truncated normal distribution (standard
        deviation 0.02), and the biases of linear layers with zero."""
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self):
        """Return the names of the parameters that are trained without weight decay."""
        return {"pos_embed", "cls_token"}

    def head_modules(self) -> list[nn.Module]:
        """Return the modules after the encoder, which are trained whatever is frozen."""
        return [self.head]

    def train_last_blocks(self, count: int) -> None:
        """Freeze all weights except those of the last `count` blocks, the final norm and the head; with `count` 0, all
        except those of the head (partial fine-tuning: He et al. 2022, Section 4.3 and Figure 9).

        Frozen blocks stay in eval mode, without drop path. Raises UserError for more blocks than there are.
        """
        if not 0 <= count <= len(self.blocks):
            raise UserError(f"--trainable_blocks {count} must be between 0 and the encoder's {len(self.blocks)} blocks")
        trained = self.head_modules()
        if count:
            trained += [*self.blocks[-count:], self.fc_norm if self.global_pool else self.norm]
        self.requires_grad_(False)
        for module in trained:
            module.requires_grad_(True)
        self._frozen_blocks = tuple(self.blocks[: len(self.blocks) - count])
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        for block in self._frozen_blocks:
            block.eval()
        return self

    def forward_tokens(self, x):
        """Images (N, C, H, W) -> outputs of the last block (N, 1 + L, D), before any norm, [cls] first."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = self.run_block(block, x)
        return x

    def forward_patches(self, x):
        """Images (N, C, H, W) -> patch tokens (N, L, D) after the final norm. Not available with `global_pool`, where
        only the mean is normalised."""
        return self.norm(self.forward_tokens(x))[:, 1:]

    def forward_features(self, x):
        """Images (N, C, H, W) -> features (N, D), the input of the head."""
        x = self.forward_tokens(x)
        return self.fc_norm(x[:, 1:].mean(dim=1)) if self.global_pool else self.norm(x)[:, 0]

    def feature(self, x, pool: str):
        """Images (N, C, H, W) -> features (N, D): [cls] (`pool` cls) or the mean of the patches (avg), after `norm`.
        With `global_pool`, the input of the head."""
        if self.global_pool:
            return self.forward_features(x)
        tokens = self.norm(self.forward_tokens(x))
        return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)

    def forward(self, x):
        """Images (N, C, H, W) -> logits (N, num_classes)."""
        return self.head(self.forward_features(x))


def _builder(name: str, config: dict):
    def build(**overrides) -> VisionTransformer:
        merged = {**config, **overrides}
        check_geometry(merged)
        return VisionTransformer(norm_layer=partial(nn.LayerNorm, eps=1e-6), **merged)

    build.__name__ = name
    build.config = config
    return build


# Every model is also a function of this module, as in the official repository: `models_vit.vit_base_patch16()`.
MODELS = {name: _builder(name, config) for name, config in ENCODERS.items()}
globals().update(MODELS)


def build_model(name: str, **overrides) -> VisionTransformer:
    """Build the vision transformer called `name`. `overrides` replace constructor arguments; None keeps the model's
    value.

    The name of an autoencoder, such as `mae_vit_base_patch16`, is accepted for its encoder. Raises UserError for an
    unknown name (listing the known ones) and for sizes that do not fit together.
    """
    name = name.removeprefix("mae_").removesuffix("_dec512d8b")
    return look_up(MODELS, name)(**{key: value for key, value in overrides.items() if value is not None})
