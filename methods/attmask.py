"""AttMask: remove the patches that an encoder attends to most, in place of random ones.

Source: Kakogeorgiou et al., "What to Hide from Your Students: Attention-Guided Masked Image Modeling" (ECCV 2022, arXiv
2203.12719). There iBOT's teacher gives the attention; here it is that of a moving average of the run's own encoder, of
a checkpoint, or of any ViT of timm's. Li et al., "SemMAE" (NeurIPS 2022), first learn parts of objects from the
attention, and mask by these; that step is not here.

Shapes: N images, L patches, M = 1 + L tokens, h heads, d width of a head, D = h * d.
"""

import torch
from torch import Tensor, nn

import models_mae
from methods.base import Method
from methods.dmae import warn_about_pixels
from methods.dmae_timm import pixel_conversion, resized
from methods.mask_rules import ranked
from methods.options import Option
from methods.rcmae import momentum_at
from models_encoder import PatchEncoder
from models_mae import MaskedAutoencoderViT
from models_timm import TimmEncoder
from util.compute.attention_maps import cls_attention
from util.compute.ema import Frozen, ema_update
from util.data.sample_rng import redrawn, seeded
from util.errors import UserError
from util.report.pictures import overlay, rgb, rows_of_images
from util.report.sheet import Bar, draw_sheet
from util.weights.geometry import geometry
from util.weights.load import load_into, read_weights
from util.weights.model_config import ENCODER, resolve_config
from util.weights.timm_models import TimmModel, state_sha256, timm_model

RULES = ("high", "hint", "low")
OWN = "ema"
HINT_POOL = 0.1  # hints are drawn from this share of the patches, the most attended ones

# The mathematics ----------------------------------------------------------------------------------------------------


def attention_ranks(attention: Tensor, noise: Tensor, rule: str, hint: float) -> Tensor:
    """Rank the patches by the attention to them, (N, L) with `noise` (N, L) -> (N, L); the highest ranks are removed.

    `high`: the most attended patches have the highest ranks; `low`: the least attended. `hint`: like high, but of the
    most attended tenth a share `hint`, drawn by `noise` and at least one patch, has the lowest ranks: these stay.
    """
    if rule == "low":
        return ranked(-attention, noise)
    ranks = ranked(attention, noise)
    if rule == "high":
        return ranks
    length = ranks.shape[1]
    pool = max(1, round(HINT_POOL * length))
    shown = max(1, round(hint * pool))
    drawn = redrawn(noise, 1) + (ranks < length - pool)  # below 1 in the pool, at least 1 elsewhere
    is_shown = ranked(drawn, noise) < shown
    return ranked(ranks - length * is_shown, noise)


class ClsAttention(nn.Module):
    """In the place of an encoder's last block: the attention weights of [cls] in that block, tokens (N, M, D) ->
    (N, h, M) float32. The names of its parameters are those of the block."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norm1, self.heads = block.norm1, block.attn.num_heads
        self.attn = nn.ModuleDict({"qkv": block.attn.qkv})

    def forward(self, tokens: Tensor) -> Tensor:
        queries, keys, _ = self.attn["qkv"](self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        scores = torch.einsum("nhd,nmhd->nhm", queries[:, 0], keys)
        return (scores.float() * queries.shape[-1] ** -0.5).softmax(dim=-1)


# Encoders -----------------------------------------------------------------------------------------------------------


class OwnAttention(Frozen):
    """The attention in the last block of an encoder of ours, which is changed."""

    def __init__(self, encoder: PatchEncoder):
        encoder.blocks[-1] = ClsAttention(encoder.blocks[-1])
        encoder.norm = nn.Identity()
        super().__init__(encoder)
        self.size = tuple(encoder.patch_embed.img_size)

    def forward(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> attention of [cls] to the patches, the mean of the heads: (N, L)."""
        encoder = self.network
        weights, _ = encoder.encode(encoder.embed(resized(imgs, self.size)))
        return weights[..., 1:].mean(dim=1)


class TimmAttention(Frozen):
    """The attention in the last block of a ViT of timm's, for the student's grid. Raises UserError for another
    architecture, for one without [cls], and for one whose grid differs."""

    def __init__(self, args, source: TimmModel, grid: tuple[int, int]):
        name = f"--attmask_encoder {source.name}:"
        with seeded(args.seed):
            network = source.create(None, args.in_chans)
        patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
        if source.takes_any_size or not patch:
            raise UserError(f"{name} {source.architecture} is no ViT, whose attention could be taken")
        self.size = tuple(side * pixels for side, pixels in zip(grid, patch))
        with seeded(args.seed):
            network = source.create(self.size, args.in_chans)
        super().__init__(TimmEncoder(network, name, self.size, args.in_chans))
        for key, values in zip(("scale", "shift"), pixel_conversion(args, network)):
            self.register_buffer(key, values)
        with torch.no_grad():
            found = self(torch.zeros(1, args.in_chans, *self.size)).shape[1]
        if found != grid[0] * grid[1]:
            raise UserError(f"{name} its attention covers {found} tokens, not the {grid[0]}x{grid[1]} patches")

    def forward(self, imgs: Tensor) -> Tensor:
        """Normalised images of the student (N, C, H, W) -> attention of [cls] to the patches, the mean of the heads:
        (N, L)."""
        imgs = resized(imgs * self.scale + self.shift, self.size)
        return cls_attention(self.network, imgs)[..., 1:].float().mean(dim=1)


def read_encoder(args, grid: tuple[int, int]) -> OwnAttention:
    """Read the checkpoint of --attmask_encoder for the student's grid; its positions are resampled if its own grid
    differs. Raises UserError for a file that is no encoder for such images."""
    weights = read_weights(args.attmask_encoder)
    channels, flag = geometry(weights.state).channels, "--attmask_model"
    if channels != args.in_chans:
        raise UserError(f"--attmask_encoder {weights.path} takes {channels} channels, the student {args.in_chans}")
    config = resolve_config(weights, {"model": args.attmask_model}, inferred=ENCODER, model_flag=flag)
    size = tuple(side * config.patch_size for side in grid)
    arguments = config.encoder_arguments() | {"img_size": size}
    with seeded(args.seed):
        encoder = models_mae.build_model(config.autoencoder_name, **arguments).encoder_copy()
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm) and config.layer_norm_eps is not None:
            module.eps = config.layer_norm_eps
    report = load_into(encoder, weights, ignore_head=True, model_flag=flag)
    print(f"encoder of --attmask {config.encoder_name}: {report.shown(getattr(args, 'verbose', False))}")
    warn_about_pixels(args, weights)
    return OwnAttention(encoder)


# The method ---------------------------------------------------------------------------------------------------------


class AttMask(Method):
    """Removes patches by attention. The moving average is stored in checkpoints; of another encoder its name and its
    hash are."""

    name, slot = "attmask", "mask"
    switch = Option(
        "attmask",
        None,
        "remove the most attended patches, all of them but a few, or the least attended ones",
        choices=RULES,
    )
    title = "AttMask (Kakogeorgiou et al., ECCV 2022)"
    summary = "Hide the patches that an encoder attends to. Choose it for a harder task. Costs a pass of that encoder."
    options = (
        Option(
            "attmask_encoder",
            OWN,
            "a moving average of the run's own encoder (ema), a checkpoint, or timm:NAME",
            metavar="PATH",
        ),
        Option("attmask_hint", 0.5, "--attmask hint: share of the most attended tenth that stays", rare=True),
        Option("attmask_momentum", 0.996, "initial momentum of ema; it rises to 1 on a cosine", rare=True),
        Option(
            "attmask_model",
            None,
            "the encoder's model if its file does not name it, e.g. mae_vit_base_patch16",
            metavar="NAME",
            rare=True,
        ),
    )

    @staticmethod
    def check(args) -> None:
        default = {option.name: option.default for option in AttMask.options}
        if not args.attmask_encoder:
            raise UserError(f"--attmask_encoder must be {OWN}, a checkpoint, or timm:NAME")
        if not 0 < args.attmask_hint <= 1:
            raise UserError(f"--attmask_hint {args.attmask_hint} must lie in (0, 1], for example 0.5")
        if not 0 <= args.attmask_momentum <= 1:
            raise UserError(f"--attmask_momentum {args.attmask_momentum} must lie between 0 and 1, for example 0.996")
        own = args.attmask_encoder == OWN
        unused = {"attmask_hint": args.attmask != "hint", "attmask_momentum": not own, "attmask_model": own}
        for name, off in unused.items():
            if off and getattr(args, name) != default[name]:
                condition = f"--attmask {args.attmask}" if name == "attmask_hint" else "this --attmask_encoder"
                raise UserError(f"--{name} has no effect with {condition}: leave it out")
        if getattr(args, "rc_mask", None) == "different" and args.attmask != "hint":
            raise UserError(
                f"--rc_mask different has no effect with --attmask {args.attmask}: the same attention gives the same "
                "mask; give --attmask hint, or leave it out"
            )

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.rule, self.hint, self.base = args.attmask, args.attmask_hint, args.attmask_momentum
        self.path, self.hash, self.momentum, self.steps = args.attmask_encoder, "", args.attmask_momentum, 1
        self.average, self._frozen = None, ()
        grid = tuple(model.patch_embed.grid_size)
        if self.path == OWN:
            self.average = OwnAttention(model.encoder_copy())
            return
        source = timm_model(self.path)
        # In a tuple, so that it is not registered as a submodule: it is not trained and not in checkpoints.
        self._frozen = (read_encoder(args, grid) if source is None else TimmAttention(args, source, grid),)
        self.hash = state_sha256(self._frozen[0].network)

    def begin(self, model, methods, steps: int) -> None:
        self.steps = steps

    @torch.no_grad()
    def attention(self, imgs: Tensor) -> Tensor:
        """Return the attention (N, L) to the patches of images (N, C, H, W)."""
        return (self.average or self._frozen[0])(imgs)

    def scores(self, model: MaskedAutoencoderViT, imgs: Tensor, noise: Tensor) -> Tensor:
        return attention_ranks(self.attention(imgs), noise, self.rule, self.hint)

    # The moving average.

    def scheduled_numbers(self, step: int) -> dict[str, float]:
        if self.average is None:
            return {}
        self.momentum = momentum_at(step, self.steps, self.base)
        return {"rate": 1 - self.momentum}

    def after_update(self, model, imgs, step: int, applied: Tensor) -> None:
        if self.average is not None:
            ema_update(self.average.network, model, self.scheduled["rate"], applied)

    def graph_obstacle(self) -> str:
        return ""  # the momentum is a scheduled number

    def metrics(self) -> dict[str, float]:
        return {} if self.average is None else {"attention_momentum": self.momentum}

    @torch.no_grad()
    def pictures(self, model: MaskedAutoencoderViT, imgs: Tensor, shown: Tensor) -> dict[str, Tensor]:
        maps = self.attention(imgs).view(-1, *model.patch_embed.grid_size).cpu()
        colours = rgb(shown).cpu()
        rows = rows_of_images([torch.stack([colours, overlay(colours, maps)], dim=1)])
        bar = Bar("lowest", "highest of the image", "attention of [cls], the mean of the heads of the last block")
        sheet = draw_sheet(rows, ["image", "attention"], "", bar, None, 2 if len(shown) > 1 else 1)
        return {"attention": sheet.tensor()}

    # Device, checkpoints.

    def external_networks(self) -> list[nn.Module]:
        """An encoder of timm's is left out: a hook reads its attention, which compiled code would not call."""
        return [frozen for frozen in self._frozen if isinstance(frozen, OwnAttention)]

    def _apply(self, fn, *args, **kwargs):
        """Move the encoder, which is not a submodule, to the same device and type."""
        for frozen in self._frozen:
            frozen._apply(fn, *args, **kwargs)
        return super()._apply(fn, *args, **kwargs)

    def get_extra_state(self) -> dict:
        return {"encoder": self.path, "sha256": self.hash}

    def set_extra_state(self, state: dict) -> None:
        if state["sha256"] != self.hash:
            raise UserError(
                f"--attmask_encoder {self.path} is not the encoder this run began with ({state['encoder']}, sha256 "
                f"{state['sha256'][:12]}...): give that one"
            )
