"""Sizes of the encoders and decoders by name, shared by `models_mae` (`mae_<name>`) and `models_vit` (`<name>`)."""

from util.errors import UserError
from util.parser import closest, did_you_mean

# ViT-B/L/H: Dosovitskiy et al. 2021 (Table 1). ViT-Ti/S: Touvron et al. 2021 (Table 1). `micro` is for laptops.
_WIDTHS = {
    "micro": dict(embed_dim=128, depth=4, num_heads=4),
    "tiny": dict(embed_dim=192, depth=12, num_heads=3),
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "huge": dict(embed_dim=1280, depth=32, num_heads=16),
    # Width, depth and heads of DINOv2's ViT-g (Oquab et al. 2024).
    "1b": dict(embed_dim=1536, depth=40, num_heads=24),
    # Singh et al. 2023, "The effectiveness of MAE pre-pretraining for billion-scale pretraining".
    "2b": dict(embed_dim=2560, depth=24, num_heads=32),
    "6.5b": dict(embed_dim=4096, depth=32, num_heads=32),
}


def _encoder(size: str, patch_size: int, img_size: int = 224) -> dict:
    return dict(img_size=img_size, patch_size=patch_size, **_WIDTHS[size])


ENCODERS: dict[str, dict] = {
    "vit_tiny_patch16": _encoder("tiny", 16),
    "vit_small_patch16": _encoder("small", 16),
    "vit_base_patch16": _encoder("base", 16),
    "vit_large_patch16": _encoder("large", 16),
    "vit_huge_patch14": _encoder("huge", 14),
    "vit_1b_patch14": _encoder("1b", 14),
    "vit_2b_patch14": _encoder("2b", 14),
    "vit_6.5b_patch14": _encoder("6.5b", 14),
    "vit_base_patch8": _encoder("base", 8, 64),  # Tiny ImageNet
    "vit_base_patch2": _encoder("base", 2, 32),  # CIFAR, as in MLO-MAE
    "deit_tiny_patch4": _encoder("tiny", 4, 32),  # CIFAR, as in MAE-K / EMA-MAE
    "vit_small_patch4": _encoder("small", 4, 32),
    "vit_micro_patch4": _encoder("micro", 4, 32),
}

# The decoder of He et al. 2022 (Section 4.1) is the default; two small models have smaller decoders.
DEFAULT_DECODER = dict(decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16)
DECODERS: dict[str, dict] = {
    "deit_tiny_patch4": dict(decoder_embed_dim=192, decoder_depth=8, decoder_num_heads=3),
    "vit_micro_patch4": dict(decoder_embed_dim=96, decoder_depth=2, decoder_num_heads=4),
}


def own_config(name: str | None) -> dict:
    """Return the default sizes of encoder and decoder of the model `name`, which may lack the prefix `mae_`; {} for an
    unknown name."""
    name = str(name).removeprefix("mae_")
    encoder = name.removesuffix("_dec512d8b")
    decoder = DEFAULT_DECODER if encoder != name else DECODERS.get(name, DEFAULT_DECODER)
    return {**ENCODERS[encoder], **decoder} if encoder in ENCODERS else {}


def look_up(models: dict, name: str, flag: str = "--model"):
    """Return `models[name]`. Raises UserError for an unknown name; the message lists the known ones."""
    if name not in models:
        close = did_you_mean(closest(name, models))
        raise UserError(f"{flag} {name!r} is not known; the known names are: {', '.join(models)}{close}")
    return models[name]


def check_geometry(config: dict) -> None:
    """Raise UserError for sizes that do not fit together. `config` holds constructor arguments by name; checks of
    missing ones are skipped, except image and patch size, which are required."""
    img_size, patch = config["img_size"], config["patch_size"]
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    if patch < 1 or height < patch or width < patch or height % patch or width % patch:
        raise UserError(f"--input_size {height} {width} must be a multiple of the patch size {patch} (--patch_size)")
    for prefix in ("", "decoder_"):
        dim, heads = config.get(f"{prefix}embed_dim"), config.get(f"{prefix}num_heads")
        if dim is None:
            continue
        if dim < 1 or heads < 1 or dim % heads or dim % 4:
            raise UserError(
                f"--{prefix}embed_dim {dim} must be a multiple of 4 (sine-cosine positions) "
                f"and of --{prefix}num_heads {heads}"
            )
