"""MAE-K and EMA-MAE: the student reconstructs the features of a target encoder that is an earlier version of itself.

Source: Guanghe Li, "Bootstrap-MAE" (report), Sections 4 and 5. Both methods start on pixels. MAE-K copies the student
into the target every K epochs. EMA-MAE copies it once, after `--wse` epochs, and then updates the target as a slow
moving average of the student.

Shapes: N images, L patches, P predicted patches, D encoder width, d decoder width.
"""

import torch
from torch import nn

from methods.base import Method, zero_term
from methods.options import Option
from models_encoder import PatchEncoder
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.compute.ema import Frozen, copy_weights, ema_update
from util.compute.precision import widened, widest
from util.errors import UserError
from util.parallel.distributed import all_reduce_sum, average, get_world_size

# The mathematics ----------------------------------------------------------------------------------------------------


def target_features(encoder: PatchEncoder, imgs: torch.Tensor, layers: int = 1) -> torch.Tensor:
    """Return the target encoder's features (N, L, D) of unmasked images (N, C, H, W), without [cls].

    They are the output of the last block after the final norm or, with `layers` > 1, the mean of the last `layers`
    blocks' outputs, each after that norm.
    """
    depth = len(encoder.blocks)
    latent, blocks = encoder.encode(encoder.embed(imgs), range(depth - layers, depth - 1))
    for output in blocks.values():
        latent = latent + encoder.norm(output)
    return latent[:, 1:] / layers


def normalized(features: torch.Tensor) -> torch.Tensor:
    """Normalise each token (last axis) by its own mean and unbiased variance, as MAE normalises pixels."""
    mean, var = features.mean(dim=-1, keepdim=True), features.var(dim=-1, keepdim=True)
    return (features - mean) / (var + 1.0e-6) ** 0.5


def feature_loss(out: MaskedOutput, target: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error per patch between `out.pred` and `target`, both (N, P, D), averaged over the
    removed patches."""
    return out.mean_over_predicted(((widened(out.pred) - widened(target)) ** 2).mean(dim=-1))


def collapse(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return measures of collapse of the features (..., D): both fall when a bootstrap collapses.

    `target_std` is the standard deviation of a channel over tokens and images, averaged over channels. `target_rank` is
    the effective rank (Roy and Vetterli 2007), exp of the entropy of the normalised spectrum, from 1
    (all features on a line) to D. Both are NaN if a feature is not finite.

    The measures are of all ranks' features together, since the rank of few images is lower than that of many. All ranks
    must call this, with equally many features each.
    """
    x = features.reshape(-1, features.shape[-1])
    x = x.to(widest(x.device))
    x = x - average([x.mean(dim=0)])[0]
    with torch.autocast(x.device.type, enabled=False):  # rounding to bf16 alone adds a rank of about ten
        scatter = all_reduce_sum(x.T @ x)
        if not torch.isfinite(scatter).all():
            return {"target_std": x.new_tensor(torch.nan), "target_rank": x.new_tensor(torch.nan)}
        singular = torch.linalg.eigvalsh(scatter).clamp(min=0).sqrt()
    p = singular / singular.sum().clamp(min=1e-12)
    ranks = get_world_size()
    std = x.std(dim=0) if ranks == 1 else (scatter.diagonal() / (ranks * len(x) - 1)).sqrt()
    return {"target_std": std.mean(), "target_rank": torch.exp(torch.special.entr(p).sum())}


def copied_at(epoch: int, every: int, first_copy: bool) -> bool:
    """Return whether MAE-K copies the student into the target at the start of `epoch` (from 0): every `every` epochs,
    first in epoch `every`.

    `first_copy`: there is no target yet. A first copy that was missed (a run with a later --start_epoch) is then made
    at once.
    """
    return epoch >= every and (epoch % every == 0 or first_copy)


# The methods --------------------------------------------------------------------------------------------------------


class Bootstrap(Method):
    """The common part of MAE-K and EMA-MAE. `age` is the age of the target's weights in epochs (for a moving average,
    the mean age)."""

    slot = "target"
    options = (
        Option(
            "bootstrap_norm",
            "layernorm",
            "target features: each token normalised by its mean and variance, or unchanged",
            choices=("layernorm", "none"),
            rare=True,
        ),
        Option(
            "bootstrap_head",
            "linear",
            "layer from the decoder to features; none needs a decoder as wide as the encoder",
            choices=("linear", "none"),
            rare=True,
        ),
        Option("bootstrap_layers", 1, "the target is the mean over the last N blocks; more is smoother", metavar="N"),
    )

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.normalize, self.layers = args.bootstrap_norm == "layernorm", args.bootstrap_layers
        self.epochs, self.epoch_steps = args.epochs, 1.0
        self.ready, self.age = False, 0.0  # whether the target exists; stored in checkpoints
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

    @classmethod
    def schedule_in_epochs(cls, args) -> bool:
        return True

    # The loss: on pixels until the target exists, on features afterwards.

    @property
    def head_in_use(self) -> bool:
        return self.ready

    @property
    def loss_name(self) -> str:
        return "features" if self.ready else "pixels"

    def prediction_head(self) -> nn.Module:
        return self.head

    def patch_loss(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor:
        if not self.ready:
            return model.reconstruction_loss(out) + zero_term(self.head)
        with torch.no_grad():
            target = widened(out.select_predicted(target_features(self.target.network, imgs, self.layers)))
            target = normalized(target) if self.normalize else target
        return feature_loss(out, target) + zero_term(model.decoder_pred)

    def copy_student(self, model: MaskedAutoencoderViT, epoch: int) -> str | None:
        """Make the target a copy of the student; return what changes if it is the first one."""
        first = not self.ready
        copy_weights(self.target.network, model)
        self.ready, self.age = True, 0.0
        if not first:
            return None
        if not epoch:
            return "the target is features from the start: the pixel head is not trained, no reconstructions are drawn"
        return (
            f"after {epoch} epochs the target changes from pixels to features: train/features replaces train/pixels, "
            f"and train/loss jumps, because it is another loss from here on; the pixel head is no longer trained, and "
            f"reconstructions are no longer drawn"
        )

    def scheduled_numbers(self, step: int) -> dict[str, float]:
        self.age += 1 / self.epoch_steps
        return {}

    def graph_obstacle(self) -> str:
        return ""  # `before_epoch` changes weights in place, and the branch

    def graph_branch(self) -> bool:
        return self.ready

    # Setup, logs, checkpoints.

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
        """Weight decay would shrink the feature head, whose gradients are zero until the target exists. (The pixel head
        decays in the feature stage; it is not used again.)"""
        return {f"head.{name}" for name, _ in self.head.named_parameters()}

    def get_extra_state(self) -> dict:
        return {"ready": self.ready, "age": self.age}

    def set_extra_state(self, state: dict) -> None:
        self.ready, self.age = state["ready"], state["age"]


class MAEK(Bootstrap):
    """The target is a copy of the student, renewed at the start of every K-th epoch, first in epoch K."""

    name = "mae_k"
    switch = Option(
        "mae_k",
        None,
        "epochs between copies; turns this method on. In the report 10 is best fine-tuned, 20 best linear; 1 and 2 are "
        "unstable",
        type=int,
        metavar="K",
    )
    title = "MAE-K (Li, Bootstrap-MAE)"
    summary = (
        "After K epochs on pixels, reconstruct the features that a copy of the encoder computes from the whole image; "
        "the copy is renewed every K epochs. Choose it for fine-tuning small models on small data, where pixels are a "
        "weak target. Each step costs one more forward pass, on whole images."
    )

    @staticmethod
    def check(args) -> None:
        if args.mae_k < 1:
            raise UserError(f"--mae_k {args.mae_k} must be at least 1 epoch")
        if args.mae_k >= args.epochs:
            print(f"note: --mae_k {args.mae_k} is not below --epochs {args.epochs}: this is plain MAE, on pixels")
        elif args.mae_k > 1 and (args.epochs - 1) % args.mae_k == 0:
            print(f"note: the last copy of --mae_k {args.mae_k} is made before the last epoch and used only in it")

    def __init__(self, args, model):
        super().__init__(args, model)
        self.every = args.mae_k

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> str | None:
        if copied_at(epoch, self.every, first_copy=not self.ready):
            return self.copy_student(model, epoch)
        return None


class EMAMAE(Bootstrap):
    """The target is a copy of the student at epoch WSE, then a moving average of the student."""

    name, switch = "ema_mae", Option("ema_mae", False, "turn this method on")
    title = "EMA-MAE (Li, Bootstrap-MAE)"
    summary = (
        "Like MAE-K, but after WSE epochs on pixels the target is a slow moving average of the encoder. Choose it for "
        "frozen features (in the report its linear probes are better than those of MAE-K). Watch target_std and "
        "target_rank: a large tau can collapse. The --bootstrap_* flags apply, too."
    )
    options = (
        *Bootstrap.options,
        Option(
            "wse",
            20,
            "warm-up epochs on pixels; in the report 5 and 20 are best",
            metavar="N",
        ),
        Option(
            "tau",
            0.005,
            "share of the student in each update; in the report 0.005 is far better linear, 0.1 to 0.3 fine-tuned",
        ),
        Option(
            "ema_update",
            "epoch",
            "update the target once per epoch or after every step",
            choices=("epoch", "step"),
            rare=True,
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
            print(f"note: the only target is the copy made before the last epoch: --tau {args.tau} has no effect")

    def __init__(self, args, model):
        super().__init__(args, model)
        self.warmup, self.tau, self.per_step = args.wse, args.tau, args.ema_update == "step"

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> str | None:
        if not self.ready and epoch >= self.warmup:
            return self.copy_student(model, epoch)
        if self.ready and not self.per_step:
            ema_update(self.target.network, model, self.tau)
            self.age *= 1 - self.tau
        return None

    def scheduled_numbers(self, step: int) -> dict[str, float]:
        super().scheduled_numbers(step)
        if self.ready and self.per_step:
            self.age *= 1 - self.tau
        return {}

    def after_update(self, model, imgs, step, applied) -> None:
        if self.ready and self.per_step:
            ema_update(self.target.network, model, self.tau, applied)
