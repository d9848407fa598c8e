"""HPM: a second decoder predicts how hard each patch is to reconstruct, and the hardest ones are removed.

Source: Wang, Song, Fan and others, "Hard Patches Mining for Masked Image Modeling" (CVPR 2023, arXiv 2304.05919). The
loss predictor learns the order of the reconstruction losses of the removed patches. A teacher, the moving average of
encoder and predictor, sees the whole image; the patches with its highest predictions are removed, a few at first, more
later. docs/methods/hpm.md says what follows the paper and what is our choice.

Shapes: N images, L patches, V visible, R = L - V removed; D encoder width, d decoder width.
"""

from copy import deepcopy
from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.base import Method
from methods.mask_rules import ranked
from methods.options import Option
from models_encoder import Block, gather_tokens
from models_mae import MaskedAutoencoderViT, MaskedOutput, visible_patches
from util.compute.ema import Frozen, ema_update
from util.compute.precision import widened
from util.errors import UserError

# The mathematics ----------------------------------------------------------------------------------------------------


def order_loss(predicted: Tensor, errors: Tensor) -> Tensor:
    """Return the binary cross-entropy of the order of two patches of an image, a scalar.

    For patches i, j with a higher error at i it is -log sigmoid(predicted_i - predicted_j); the mean over the pairs of
    an image, then over images. `predicted` and `errors` are (N, R). Pairs with equal errors do not count.
    """
    harder = errors[:, :, None] > errors[:, None, :]  # (N, R, R)
    return _mean_over_pairs(F.softplus(predicted[:, None, :] - predicted[:, :, None]), harder)


@torch.no_grad()
def order_accuracy(predicted: Tensor, errors: Tensor) -> Tensor:
    """Return the share of pairs of patches of an image whose order is predicted correctly: a scalar, 0.5 by chance.
    `predicted` and `errors` are (N, R)."""
    harder = errors[:, :, None] > errors[:, None, :]
    return _mean_over_pairs((predicted[:, :, None] > predicted[:, None, :]).float(), harder)


def _mean_over_pairs(values: Tensor, pairs: Tensor) -> Tensor:
    """Return the mean of `values` (N, R, R) where `pairs` is true in each image, averaged over images."""
    return ((values * pairs).sum(dim=(1, 2)) / pairs.sum(dim=(1, 2)).clamp_min(1)).mean()


def share_at(epoch: int, epochs: float, start: float, end: float) -> float:
    """Return the share of the removed patches that are the hardest ones, in `epoch` (from 0) of `epochs`: linear from
    `start` towards `end`."""
    return start + (end - start) * min(1.0, epoch / epochs)


def hard_first(predicted: Tensor, noise: Tensor, removed: int, share: Tensor) -> Tensor:
    """Return scores (N, L): those of the `share` * `removed` patches with the highest `predicted` losses (N, L) are
    higher than all others, which have their `noise` (N, L). `share` is a scalar on the device."""
    hard = ranked(predicted, noise) >= noise.shape[1] - (share * removed).round()
    return noise + hard.to(noise.dtype)


def momentum_at(step: int, momentum: float) -> float:
    """Return the teacher's momentum after optimizer step `step` (from 0). It is lower in the first steps, so that the
    teacher does not keep its random weights for as long as 1 / (1 - momentum) steps."""
    return min(momentum, (1 + step) / (10 + step))


# The networks -------------------------------------------------------------------------------------------------------


class LossPredictor(nn.Module):
    """A decoder like that of the autoencoder `model`, with one output for a patch: its predicted loss. Only the order
    of the predictions has a meaning. Its heads have about 32 channels, as those of MAE's decoder."""

    def __init__(self, model: MaskedAutoencoderViT, depth: int | None = None):
        super().__init__()
        if depth is None:  # as deep as the decoder, which has blocks of one of two types
            depth = len([*model.decoder_blocks, *getattr(model, "decoder_cross_blocks", ())]) or 1
        width = model.mask_token.shape[-1]
        self.embed = nn.Linear(model.cls_token.shape[-1], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", model.decoder_pos_embed.detach().clone())  # (1, 1 + L, d), fixed
        heads = gcd(width, max(1, width // 32))
        self.blocks = nn.ModuleList([Block(width, heads, qkv_bias=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.loss = nn.Linear(width, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, ids_keep: Tensor, ids: Tensor) -> Tensor:
        """Predict the losses (N, M) of the patches `ids` (N, M) from the latent (N, 1 + V, D) of the visible patches
        `ids_keep` (N, V). Both may be all patches: each is predicted from a mask token of its own."""
        x, table = self.embed(latent), self.positions[0, 1:]
        cls_token = x[:, :1] + self.positions[:, :1]
        x = torch.cat([cls_token, x[:, 1:] + table[ids_keep], self.mask_token + table[ids]], dim=1)
        for block in self.blocks[:-1]:
            x = block(x)
        x = self.blocks[-1](x, first=latent.shape[1])  # the others serve as keys and values only
        with torch.autocast(x.device.type, enabled=False):  # rounded predictions would be equal, and have no order
            return self.loss(self.norm(widened(x))).squeeze(-1)


# The method ---------------------------------------------------------------------------------------------------------


class HPM(Method):
    """Adds `hpm_weight` times the order loss, and removes the patches that the teacher predicts to be the hardest."""

    name, slot = "hpm", "mask"
    switch = Option("hpm", False, "turn this method on")
    excludes = ("mae_k", "ema_mae")  # the losses that are predicted are those of pixels
    title = "HPM (Wang et al., CVPR 2023)"
    summary = (
        "Predict which patches are hard, and remove more and more of them. Choose it as a label-free rival of MLO-MAE."
    )
    options = (
        Option("hpm_end", 0.5, "final share of the hardest patches", rare=True),
        Option("hpm_start", 0.0, "share of the hardest among the removed patches in the first epoch", rare=True),
        Option("hpm_weight", 1.0, "weight of the loss predictor's loss, which also trains the encoder", rare=True),
        Option("hpm_momentum", 0.999, "momentum of the teacher; less in the first steps", rare=True),
        Option(
            "hpm_depth",
            None,
            "blocks of the loss predictor; without it as many as the decoder has",
            type=int,
            metavar="N",
            rare=True,
        ),
    )

    @staticmethod
    def check(args) -> None:
        for name in ("hpm_start", "hpm_end"):
            if not 0 <= getattr(args, name) <= 1:
                raise UserError(f"--{name} {getattr(args, name)} must lie between 0 (random masks) and 1")
        if args.hpm_weight <= 0:
            raise UserError(f"--hpm_weight {args.hpm_weight} must be positive, for example 1")
        if not 0 <= args.hpm_momentum < 1:
            raise UserError(f"--hpm_momentum {args.hpm_momentum} must lie in [0, 1), for example 0.999")
        if args.hpm_depth is not None and args.hpm_depth < 1:
            raise UserError(f"--hpm_depth {args.hpm_depth} must be at least 1 block")

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.args, self.weight, self.base = args, args.hpm_weight, args.hpm_momentum
        self.shares, self.ratio = (args.hpm_start, args.hpm_end), args.mask_ratio
        self.predictor = LossPredictor(model, args.hpm_depth)
        # The teacher's decoder would predict pixels, which nobody reads.
        self.teacher_encoder = Frozen(model.encoder_copy())
        self.teacher_predictor = Frozen(deepcopy(self.predictor))
        # On the device, where a recorded step reads the share.
        self.register_buffer("share", torch.tensor(args.hpm_start))
        self.register_buffer("accuracy", torch.zeros(()), persistent=False)

    # The mask.

    @torch.no_grad()
    def predicted_losses(self, imgs: Tensor) -> Tensor:
        """Return the teacher's predictions (N, L) for whole images (N, C, H, W)."""
        encoder = self.teacher_encoder.network
        latent, _ = encoder.encode(encoder.embed(imgs))
        ids = torch.arange(latent.shape[1] - 1, device=imgs.device).expand(len(imgs), -1)
        return self.teacher_predictor.network(latent, ids, ids)

    def scores(self, model: MaskedAutoencoderViT, imgs: Tensor, noise: Tensor) -> Tensor | None:
        if not any(self.shares):
            return None  # random masks; only the loss of the predictor is added
        removed = noise.shape[1] - visible_patches(noise.shape[1], self.ratio)
        return hard_first(self.predicted_losses(imgs), noise, removed, self.share)

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> None:
        self.share.fill_(share_at(epoch, self.args.epochs, *self.shares))

    # The loss predictor.

    def terms(self, model: MaskedAutoencoderViT, imgs: Tensor, out: MaskedOutput) -> dict[str, Tensor]:
        self.ratio = out.mask_ratio  # with --mask_ratio_end the next step's hardly differs
        errors = out.scatter_predicted(widened(model.patch_errors(out)).detach())  # (N, L)
        errors = gather_tokens(errors, out.ids_removed)
        predicted = self.predictor(out.latent, out.ids_keep, out.ids_removed)
        self.accuracy.copy_(order_accuracy(predicted, errors))
        return {"order": self.weight * order_loss(predicted, errors)}

    # The teacher.

    def scheduled_numbers(self, step: int) -> dict[str, float]:
        return {"rate": 1 - momentum_at(step, self.base)}

    def after_update(self, model: MaskedAutoencoderViT, imgs: Tensor, step: int, applied: Tensor) -> None:
        rate = self.scheduled["rate"]
        ema_update(self.teacher_encoder.network, model, rate, applied)
        ema_update(self.teacher_predictor.network, self.predictor, rate, applied)

    def graph_obstacle(self) -> str:
        return ""  # `before_epoch` changes the share in place, and the momentum is a scheduled number

    # Logs, checkpoints.

    def metrics(self) -> dict[str, Tensor]:
        return {"order_accuracy": self.accuracy.clone(), "hard_share": self.share.clone()}

    def get_extra_state(self) -> dict:
        return {"ratio": self.ratio}

    def set_extra_state(self, state: dict) -> None:
        self.ratio = state["ratio"]
