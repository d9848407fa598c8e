"""MAE-K and EMA-MAE: the student reconstructs the features of a target encoder that is an earlier version of itself.

Source: Guanghe Li, "Bootstrap-MAE" (report), Sections 4 and 5. Both begin with pixels. MAE-K copies the student into
the target every K epochs; EMA-MAE copies it once, after `--wse` epochs, and then lets the target follow slowly.

Shapes: N images, L patches, D encoder width, d decoder width.
"""

import torch
from torch import nn

from methods.base import Method
from methods.options import Option
from models_encoder import PatchEncoder
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.ema import Frozen, copy_weights, ema_update
from util.compute.precision import widened
from util.errors import UserError
from util.parallel.distributed import all_reduce_sum, average, get_world_size

# The mathematics ----------------------------------------------------------------------------------------------------


def target_features(encoder: PatchEncoder, imgs: torch.Tensor, layers: int = 1) -> torch.Tensor:
    """What the target encoder makes of the whole, unmasked images, [cls] dropped: (N, C, H, W) -> (N, L, D).

    The final norm of the last block's output or, with `layers` > 1, of each of the last blocks' outputs, averaged.
    """
    depth = len(encoder.blocks)
    latent, blocks = encoder.encode(encoder.embed(imgs), range(depth - layers, depth - 1))
    for output in blocks.values():
        latent = latent + encoder.norm(output)
    return latent[:, 1:] / layers


def normalized(features: torch.Tensor) -> torch.Tensor:
    """Each token (last axis) by its own mean and unbiased variance, as MAE normalises pixels."""
    mean, var = features.mean(dim=-1, keepdim=True), features.var(dim=-1, keepdim=True)
    return (features - mean) / (var + 1.0e-6) ** 0.5


def feature_loss(out: MaskedOutput, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error per patch, averaged over the removed patches, of `out.pred` and `target`, both (N, P, D)."""
    return out.mean_over_predicted(((widened(out.pred) - widened(target)) ** 2).mean(dim=-1))


def collapse(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """How much the features (..., D) still say: the deviation of a channel over tokens and images, averaged over the
    channels, and the effective rank, exp of the entropy of the normalised spectrum (Roy and Vetterli 2007), from 1
    (everything on a line) to D. Both fall when a bootstrap collapses. NaN for features that are not finite.

    Of the features of all ranks together, of which each has equally many: the rank of a few images is lower than that
    of many. All ranks must call it."""
    x = features.reshape(-1, features.shape[-1]).double()
    x = x - average([x.mean(dim=0)])[0]
    with torch.autocast(x.device.type, enabled=False):  # in bf16 the rounding alone has a rank of ten
        scatter = all_reduce_sum(x.T @ x)
        if not torch.isfinite(scatter).all():
            return {"target_std": x.new_tensor(torch.nan), "target_rank": x.new_tensor(torch.nan)}
        singular = torch.linalg.eigvalsh(scatter).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-12)
    ranks = get_world_size()
    std = x.std(dim=0) if ranks == 1 else (scatter.diagonal() / (ranks * len(x) - 1)).sqrt()
    return {"target_std": std.mean(), "target_rank": torch.exp(torch.special.entr(p).sum())}


def copied_at(epoch: int, every: int, first_copy: bool) -> bool:
    """MAE-K: whether the target is copied at the start of `epoch` (from 0). Pixels until the first copy, at `every`.

    `first_copy`: there is none yet, so one that was missed (a run that began later, with --start_epoch) is made up for.
    """
    return epoch >= every and (epoch % every == 0 or first_copy)


# The methods --------------------------------------------------------------------------------------------------------


class Bootstrap(Method):
    """What MAE-K and EMA-MAE share. `age` is that of the target's weights in epochs (of an average, their mean)."""

    slot = "target"
    options = (
        Option(
            "bootstrap_norm",
            "layernorm",
            "target features, token by token: without their mean and scale, or as they are",
            choices=("layernorm", "none"),
            rare=True,
        ),
        Option(
            "bootstrap_head",
            "linear",
            "layer from the decoder to features; none needs both of one width",
            choices=("linear", "none"),
            rare=True,
        ),
        Option(
            "bootstrap_layers", 1, "the target is the average over the last N blocks; more is smoother", metavar="N"
        ),
    )

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.normalize, self.layers = args.bootstrap_norm == "layernorm", args.bootstrap_layers
        self.epochs, self.epoch_steps = args.epochs, 1.0
        self.ready, self.age = False, 0.0  # whether there is a target; kept in checkpoints
        self.target = Frozen(model.encoder_copy())
        width, decoder_width = model.norm.normalized_shape[0], model.decoder_norm.normalized_shape[0]
        if not 1 <= self.layers <= len(model.blocks):
            raise UserError(f"--bootstrap_layers {self.layers} must be between 1 and the encoder's {len(model.blocks)}")
        if args.bootstrap_head == "none" and width != decoder_width:
            raise UserError(
                f"--bootstrap_head none needs a decoder as wide as the encoder: --decoder_embed_dim {width}, "
                f"not {decoder_width} (or --bootstrap_head linear)"
            )
        self.head = nn.Identity() if args.bootstrap_head == "none" else nn.Linear(decoder_width, width)
        for weight in self.head.parameters():
            nn.init.xavier_uniform_(weight) if weight.ndim > 1 else nn.init.zeros_(weight)

    # The target: pixels before there is one, features after.

    @property
    def head_in_use(self) -> bool:
        return self.ready

    @property
    def loss_name(self) -> str:
        return "features" if self.ready else "reconstruction"

    def prediction_head(self) -> nn.Module:
        return self.head

    def patch_loss(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor:
        if not self.ready:
            return model.reconstruction_loss(out) + _idle(self.head)
        with torch.no_grad():
            target = widened(out.select_predicted(target_features(self.target.network, imgs, self.layers)))
            target = normalized(target) if self.normalize else target
        return feature_loss(out, target) + _idle(model.decoder_pred)

    def copy_student(self, model: MaskedAutoencoderViT, epoch: int) -> None:
        if not self.ready:
            print(f"epoch {epoch}: from here on the target is features; the pixel head trains no further, pictures end")
        copy_weights(self.target.network, model)
        self.ready, self.age = True, 0.0

    def after_update(self, model, imgs, step, applied) -> None:
        self.age += 1 / self.epoch_steps

    # Plumbing.

    def begin(self, model, methods, steps: int) -> None:
        self.epoch_steps = steps / self.epochs
        self.diagnostics_every = max(1, round(self.epoch_steps))

    def metrics(self) -> dict[str, float]:
        return {"feature_stage": float(self.ready), "target_age_epochs": self.age if self.ready else 0.0}

    def diagnostics(self, pretrainer, imgs, step) -> dict[str, torch.Tensor]:
        if not self.ready:
            return {}
        with torch.no_grad():
            return collapse(target_features(self.target.network, imgs, self.layers))

    def no_weight_decay(self) -> set[str]:
        """The head waits for its stage with gradients of zero; decay would wear it down before it is used. (The pixel
        head decays in the feature stage; nothing reads it again.)"""
        return {f"head.{name}" for name, _ in self.head.named_parameters()}

    def get_extra_state(self) -> dict:
        return {"ready": self.ready, "age": self.age}

    def set_extra_state(self, state: dict) -> None:
        self.ready, self.age = state["ready"], state["age"]


def _idle(head: nn.Module) -> torch.Tensor | float:
    """Zero, with gradients of zero for a head that the loss does not use now: DDP waits for every parameter's."""
    return sum(0.0 * parameter.sum() for parameter in head.parameters())


class MAEK(Bootstrap):
    """The target is a copy of the student, made at the start of every K-th epoch from K on."""

    name = "mae_k"
    switch = Option(
        "mae_k",
        None,
        "epochs between copies; turns this method on. The report: 10 best fine-tuned, 20 best linear, 1 and 2 unstable",
        type=int,
        metavar="K",
    )
    title = "MAE-K (Li, Bootstrap-MAE)"
    summary = (
        "After K epochs on pixels, reconstruct the features that a copy of the encoder computes from the whole image; "
        "the copy is renewed every K epochs. Choose it for small models and data that are fine-tuned, where pixels "
        "teach too little; each step also costs a forward pass of whole images."
    )

    @staticmethod
    def check(args) -> None:
        if args.mae_k < 1:
            raise UserError(f"--mae_k {args.mae_k} must be at least 1 epoch")
        if args.mae_k >= args.epochs:
            print(f"note: --mae_k {args.mae_k} is not below --epochs {args.epochs}: this is plain MAE, on pixels")
        elif args.mae_k > 1 and (args.epochs - 1) % args.mae_k == 0:
            print(f"note: the last copy of --mae_k {args.mae_k} is made before the last epoch and serves only that one")

    def __init__(self, args, model):
        super().__init__(args, model)
        self.every = args.mae_k

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> None:
        if copied_at(epoch, self.every, first_copy=not self.ready):
            self.copy_student(model, epoch)


class EMAMAE(Bootstrap):
    """The target is a copy of the student at epoch WSE, then their moving average."""

    name, switch = "ema_mae", Option("ema_mae", False, "turn this method on")
    title = "EMA-MAE (Li, Bootstrap-MAE)"
    summary = (
        "As MAE-K, but after WSE epochs on pixels the target follows the encoder as a slow moving average instead of "
        "jumping. Choose it where features are used frozen (the report: better linear probes than MAE-K); watch "
        "target_std and target_rank, a large tau can collapse. Takes --bootstrap_* too."
    )
    options = (
        *Bootstrap.options,
        Option(
            "wse",
            20,
            "warm-up epochs on pixels; 0 bootstraps from a random encoder; the report: 5 and 20 best",
            metavar="N",
        ),
        Option(
            "tau",
            0.005,
            "share of the student in each update; the report: 0.005 far better linear, 0.1 to 0.3 fine-tuned",
        ),
        Option(
            "ema_update", "epoch", "update the target once per epoch or after every step", choices=("epoch", "step")
        ),
    )

    @staticmethod
    def check(args) -> None:
        if args.wse < 0:
            raise UserError(f"--wse {args.wse} must not be negative")
        if not 0 <= args.tau <= 1:
            raise UserError(f"--tau {args.tau} must lie between 0 (the target never moves) and 1 (it is the student)")
        if args.wse >= args.epochs:
            print(f"note: --wse {args.wse} is not below --epochs {args.epochs}: this is plain MAE, on pixels")
        elif args.wse == args.epochs - 1 and args.ema_update == "epoch":
            print(f"note: the only target is the copy made before the last epoch: --tau {args.tau} has nothing to do")

    def __init__(self, args, model):
        super().__init__(args, model)
        self.warmup, self.tau, self.per_step = args.wse, args.tau, args.ema_update == "step"

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> None:
        if not self.ready and epoch >= self.warmup:
            self.copy_student(model, epoch)
        elif self.ready and not self.per_step:
            self._follow(model, 1.0)

    def after_update(self, model, imgs, step, applied) -> None:
        super().after_update(model, imgs, step, applied)
        if self.ready and self.per_step:
            self._follow(model, applied)

    def _follow(self, model, applied) -> None:
        ema_update(self.target.network, model, self.tau, applied)
        self.age *= 1 - self.tau
