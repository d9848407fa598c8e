"""AutoMAE, in a small form: a mask generator learns to remove the patches that the autoencoder reconstructs worst.

Source: Chen, Zhang, Wang and Yang, "Improving Masked Autoencoders by Learning Where to Mask" (PRCV 2023, arXiv
2303.06583). A network gives each patch a logit, Gumbel noise makes the mask a sample, and the softmax of both lets
gradients pass. Here the generator is small, is trained from scratch, and plays against the reconstruction alone: the
paper's prior, the attention of a pretrained ViT, is left out. docs/methods/automae.md lists the differences.

Shapes: N images, L patches, R of them removed, F pixel values of a patch, w width of the generator.
"""

import torch
from torch import Tensor, nn

from methods.base import Method
from methods.options import Option
from models_encoder import Block
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.precision import widened
from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed

BLOCKS, CHANNELS = 2, 16  # of the generator: transformer blocks, channels of an attention head

# The mathematics ----------------------------------------------------------------------------------------------------


def gumbel(noise: Tensor) -> Tensor:
    """Return standard Gumbel noise from uniform `noise` in [0, 1), of at most 24 bits: a monotonic function of it."""
    return -torch.log(-torch.log(noise.clamp_min(2.0**-25)))


def advantages(errors: Tensor, mask: Tensor) -> Tensor:
    """Return by how much each removed patch is harder than the removed patches of its image on average, relative to
    that average; 0 for visible patches, whose errors are unknown. All are (N, L); `mask` is 1 for removed patches."""
    errors = errors * mask
    mean = errors.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    return (errors / mean.clamp_min(1e-12) - 1) * mask


def gain(scores: Tensor, advantage: Tensor, temperature: float) -> Tensor:
    """Return the mean `advantage` (N, L) of a patch drawn by the Gumbel-softmax of `scores` (N, L), logits plus Gumbel
    noise, averaged over images: a scalar that the generator maximises."""
    return ((scores / temperature).softmax(dim=1) * advantage).sum(dim=1).mean()


class MaskGenerator(nn.Module):
    """Patches (N, L, F) -> logits (N, L) of being removed, between -`limit` and `limit`; all are 0 at the start."""

    def __init__(self, model: MaskedAutoencoderViT, width: int, limit: float):
        super().__init__()
        self.limit = limit
        self.embed = nn.Linear(model.decoder_pred.out_features, width)
        positions = get_2d_sincos_pos_embed(width, tuple(model.patch_embed.grid_size))
        self.register_buffer("positions", torch.from_numpy(positions).float()[None])  # (1, L, w)
        self.blocks = nn.ModuleList([Block(width, width // CHANNELS, qkv_bias=True) for _ in range(BLOCKS)])
        self.norm, self.logit = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.logit.weight)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches) + self.positions
        for block in self.blocks:
            x = block(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.limit * torch.tanh(self.logit(self.norm(widened(x))).squeeze(-1) / self.limit)


# The method ---------------------------------------------------------------------------------------------------------


class AutoMAE(Method):
    """Removes patches sampled by the generator's logits, and trains the generator to maximise the gain."""

    name, slot = "automae", "mask"
    switch = Option("automae", False, "turn this method on")
    excludes = ("mae_k", "ema_mae")  # the errors that the generator sees are those of pixels
    title = "AutoMAE (Chen et al. 2023), without its pretrained prior"
    summary = "A generator learns to remove what is hard to predict. Choose it as a label-free rival of MLO-MAE."
    options = (
        Option("automae_limit", 2.0, "largest logit; near 0: random masks", rare=True),
        Option("automae_temperature", 5.0, "temperature of the Gumbel-softmax; lower is noisier", rare=True),
        Option("automae_width", 64, f"width of the generator, a multiple of {CHANNELS}", rare=True),
    )

    @staticmethod
    def check(args) -> None:
        for name in ("automae_limit", "automae_temperature"):
            if getattr(args, name) <= 0:
                raise UserError(f"--{name} {getattr(args, name)} must be positive, for example 1")
        if args.automae_width < CHANNELS or args.automae_width % CHANNELS:
            raise UserError(f"--automae_width {args.automae_width} must be a multiple of {CHANNELS}, for example 64")

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.temperature = args.automae_temperature
        self.generator = MaskGenerator(model, args.automae_width, args.automae_limit)

    def scores(self, model: MaskedAutoencoderViT, imgs: Tensor, noise: Tensor) -> Tensor:
        """Return logits plus Gumbel noise (N, L). Its R highest are a sample without replacement, in which a patch is
        drawn next with a probability proportional to exp(logit)."""
        return self.generator(model.patchify(imgs)) + gumbel(noise)

    def terms(self, model: MaskedAutoencoderViT, imgs: Tensor, out: MaskedOutput) -> dict[str, Tensor]:
        """Return the generator's loss. Its gradient reaches the generator alone, through `out.scores`."""
        errors = out.scatter_predicted(widened(model.patch_errors(out)).detach())
        return {"generator": -gain(out.scores, advantages(errors, out.mask), self.temperature)}

    @torch.no_grad()
    def distributions(self, model: MaskedAutoencoderViT, imgs: Tensor) -> dict[str, Tensor]:
        return {"mask_logits": self.generator(model.patchify(imgs)).flatten()}
