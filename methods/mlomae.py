"""MLO-MAE: a network that learns which patches to remove, from how well the encoder then serves a labelled task.

Source: Guo, Ban and Xie, "Downstream Task Guided Masking Learning in Masked Autoencoders Using Multi-Level
Optimization". Three nested problems: (I) the autoencoder learns to reconstruct what the masking network T removes, each
patch weighted by its probability; (II) a head learns the task on the encoder's features; (III) T moves so that the loss
of both on held-out training images falls. The mathematics is in `hypergrad`, the task in `guide`; here they are put
together. docs/mlo.md has the derivation and what is exact.

Shapes: N images, L patches, D encoder width. theta is the autoencoder, h the head, T the masking network.
"""

import argparse
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from methods.base import Method, add_option
from methods.guide import Classification
from methods.hypergrad import (
    Tensors,
    dot,
    exact_arithmetic,
    head_gradient,
    mask_gradient,
    norm,
    patch_errors,
    rates_fd,
    rates_jvp,
    through_head,
    weighted_loss,
)
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.amp import autocast, choose_amp_dtype, guarded_step
from util.distributed import average
from util.ema import Frozen
from util.errors import UserError
from util.pos_embed import get_2d_sincos_pos_embed
from util.visual import mask_picture
from util.weights import read_file

# The networks and problems -------------------------------------------------------------------------------------------


class PatchTokens(nn.Module):
    """A patch embedding with its positions, of its own: what a masking network saw when it was trained."""

    def __init__(self, model):
        super().__init__()
        twin = model.encoder_copy(depth=0)
        self.patch_embed, self.pos_embed = twin.patch_embed, twin.pos_embed

    def forward(self, imgs):
        return self.patch_embed(imgs) + self.pos_embed[:, 1:]


class MaskingNetwork(nn.Module):
    """Position-added patch tokens (N, L, D) -> logits (N, L) of being removed (Section 4.1). Tied to one grid."""

    def __init__(self, patches: int, width: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(patches * width, hidden), nn.ReLU(), nn.Linear(hidden, patches))
        for layer in (self.layers[0], self.layers[2]):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens):
        return self.layers(tokens.flatten(1))

    def groups(self) -> list[dict]:
        """Parameter groups for AdamW, whose step has the same size in every weight: with tens of thousands of inputs
        that would throw a logit from one end to the other at once. So a layer's rate is divided by its inputs (as in
        Yang et al. 2021, Tensor Programs V, Table 3), and one rate serves every grid and width."""
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        return [{"params": [layer.weight], "lr_scale": 1 / layer.in_features} for layer in linear] + [
            {"params": [layer.bias for layer in linear]}
        ]


class _Tokens(nn.Module):
    """The tokens of an autoencoder, by the parameter names of `PatchErrors`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, imgs):
        return self.model.embed(imgs)


def trained(module: nn.Module) -> Tensors:
    """Its trainable parameters by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adamw(parameters, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Of an outer level. Hypergradients are tiny (they carry the inner learning rate), so `eps` must be tinier."""
    return torch.optim.AdamW(
        list(parameters), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, eps=1e-16, fused=True
    )


def step_along(optimizer, parameters: Tensors, direction: Tensors, kind: str) -> Tensors:
    """How a step of size one answers a change of its gradient along `direction`: by that change (`none`, as if it were
    gradient descent), or by Adam's share of it in the first moment over the second, a constant (`adam`)."""
    if kind == "none":
        return direction
    found = {}
    for name, vector in direction.items():
        state = optimizer.state.get(parameters[name])
        if not state:  # no step yet
            return {key: torch.zeros_like(value) for key, value in direction.items()}
        group = next(g for g in optimizer.param_groups if any(p is parameters[name] for p in g["params"]))
        beta1, beta2 = group["betas"]
        count = state["step"].clamp_min(1)  # 0 where every step so far was skipped
        root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
        found[name] = vector * (1 - beta1) / (1 - beta1**count) / root
    return found


def averaged(direction: Tensors) -> Tensors:
    """Its mean over ranks."""
    return dict(zip(direction, average(list(direction.values()))))


def gradient_of(value: torch.Tensor, parameters: Tensors) -> Tensors:
    """With respect to those of `parameters` that `value` depends on."""
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, gradients) if g is not None}


@dataclass
class Batch:
    """What one micro-batch of stage I saw, so that its errors can be computed again."""

    imgs: torch.Tensor
    ids_keep: torch.Tensor
    ids_restore: torch.Tensor
    mask: torch.Tensor


@dataclass
class InnerStep:
    """One step of stage I as it was taken: where it began, on what, and how far it went."""

    weights: Tensors  # of the autoencoder before it
    batches: list[Batch] = field(default_factory=list)
    lr: float = 0.0
    applied: torch.Tensor | None = None  # 0 where the step was skipped


class LinearHead(nn.Module):
    """Stage II of the paper: the encoder stays as it is, the head takes a step (Eq. 7). Stage III is the loss of both,
    which depends on the encoder directly and through that step of the head (Eq. 9)."""

    def __init__(self, guide, model, args):
        super().__init__()
        self.guide, self.head_path, self.kind = guide, args.mlo_head_path, args.mlo_precondition
        self.head = guide.head(model.cls_token.shape[-1]).requires_grad_(False)
        self.optimizer = adamw(self.head.parameters(), args.mlo_head_lr, args.mlo_weight_decay)

    def update(self, model, batch) -> torch.Tensor:
        """A step of the head -> its loss before."""
        with torch.no_grad():
            features = self.guide.features(model, batch.image)
        weights = dict(self.head.named_parameters())
        self._before, self._batch = {name: value.clone() for name, value in weights.items()}, batch
        loss, gradient = head_gradient(self.guide.loss, self.head, weights, features, batch.target)
        descend(self.optimizer, weights, averaged(gradient))
        return loss

    def paths(self, model, batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, Tensors]]:
        """Loss and score of stage III, and the directions in theta by which it depends on the encoder."""
        theta, head = trained(model), {n: p.detach().requires_grad_() for n, p in self.head.named_parameters()}
        with torch.enable_grad():
            logits = functional_call(self.head, head, (self.guide.features(model, batch.image),))
            loss = self.guide.loss(logits, batch.target)
        found = gradient_of(loss, {**theta, **{f"head.{name}": leaf for name, leaf in head.items()}})
        of_head = averaged({name: found.pop(f"head.{name}") for name in head})
        paths = {"direct": averaged(found)}
        if self.head_path:
            paths["head"] = averaged(self._through_head(model, theta, of_head))
        return loss.detach(), self.guide.score(logits.detach(), batch.target), paths

    def _through_head(self, model, theta: Tensors, of_head: Tensors) -> Tensors:
        """-d/dtheta <dL2/dh, xi2 dL3/dh'>: one backward pass through the encoder."""
        parameters, lr = dict(self.head.named_parameters()), self.optimizer.param_groups[0]["lr"]
        step = {n: -lr * v for n, v in step_along(self.optimizer, parameters, of_head, self.kind).items()}
        with torch.enable_grad():
            features = self.guide.features(model, self._batch.image)
        sent = through_head(self.guide.loss, self.head, self._before, features, self._batch.target, step)
        return gradient_of((features * sent).sum(), theta)


class TunedEncoder(nn.Module):
    """Stage II with a copy phi of the encoder, which is fine-tuned and pulled towards theta by prox |phi - theta|^2
    (Appendix of the paper). One step phi' = phi - xi2 (dL2 + 2 prox (phi - theta)) depends on theta by 2 xi2 prox."""

    def __init__(self, guide, model, args):
        super().__init__()
        self.guide, self.prox, self.kind = guide, args.mlo_prox, args.mlo_precondition
        self.encoder = model.encoder_copy().requires_grad_(False)
        self.head = guide.head(model.cls_token.shape[-1]).requires_grad_(False)
        self.optimizer = adamw(self.parameters(), args.mlo_head_lr, args.mlo_weight_decay)

    def _loss(self, batch) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        leaves = {n: p.detach().requires_grad_(n != "encoder.pos_embed") for n, p in self.named_parameters()}
        with torch.enable_grad():
            logits = functional_call(self, leaves, (batch.image,))
            return logits, self.guide.loss(logits, batch.target), {n: p for n, p in leaves.items() if p.requires_grad}

    def forward(self, imgs):
        return self.head(self.guide.features(self.encoder, imgs))

    def update(self, model, batch) -> torch.Tensor:
        _, loss, leaves = self._loss(batch)
        gradient = averaged(gradient_of(loss, leaves))
        for name, theta in trained(model).items():
            if f"encoder.{name}" in gradient:
                gradient[f"encoder.{name}"] += 2 * self.prox * (leaves[f"encoder.{name}"].detach() - theta.detach())
        descend(self.optimizer, dict(self.named_parameters()), gradient)
        return loss.detach()

    def paths(self, model, batch):
        logits, loss, leaves = self._loss(batch)
        found = {n: g for n, g in gradient_of(loss, leaves).items() if n.startswith("encoder.")}
        scaled = step_along(self.optimizer, dict(self.named_parameters()), averaged(found), self.kind)
        factor = 2 * self.prox * self.optimizer.param_groups[0]["lr"]
        direction = {name.removeprefix("encoder."): factor * vector for name, vector in scaled.items()}
        return loss.detach(), self.guide.score(logits.detach(), batch.target), {"direct": direction}


class JointHead(nn.Module):
    """Two levels (BLO-MAE, Eq. 5): the head and the encoder learn L1 + lambda L2 together, in the autoencoder's own
    optimizer. T enters L1 alone, so the head's step does not depend on it."""

    optimizer = None

    def __init__(self, guide, model, args):
        super().__init__()
        self.guide, self.weight = guide, args.blo_lambda
        self.head = guide.head(model.cls_token.shape[-1])

    def term(self, model, batch) -> torch.Tensor:
        """lambda L2, in the graph of the autoencoder's own loss."""
        return self.weight * self.guide.loss(self.head(self.guide.features(model, batch.image)), batch.target)

    def paths(self, model, batch):
        theta = trained(model)
        with torch.enable_grad():
            logits = self.head(self.guide.features(model, batch.image))
            loss = self.guide.loss(logits, batch.target)
        return (
            loss.detach(),
            self.guide.score(logits.detach(), batch.target),
            {"direct": averaged(gradient_of(loss, theta))},
        )


def descend(optimizer, parameters: Tensors, gradient: Tensors, applied: float | torch.Tensor = 1.0) -> torch.Tensor:
    """One step along `gradient`, unless it is not finite or `applied` is 0 -> 1 where it was skipped, else 0."""
    for name, parameter in parameters.items():
        parameter.grad = gradient.get(name)
    broken = 1 - torch.isfinite(norm(gradient)).float() * applied
    guarded_step(optimizer, broken)
    optimizer.zero_grad(set_to_none=True)
    return broken


def cosine(update: int, updates: int) -> float:
    """Factor of the learning rate of update number `update` (from 0): half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(update, updates) / max(1, updates)))


# The method ---------------------------------------------------------------------------------------------------------


class MLOMAE(Method):
    """Removes the patches of highest probability, weights the loss by it, and moves T in `after_update`."""

    name, flag, slot = "mlo_mae", "--mlo_mae", "mask"
    excludes = ("mae_k", "ema_mae", "rc_mae", "dmae")
    title = "MLO-MAE (Guo et al.)"
    summary = (
        "Learn what to remove from a labelled task: a masking network moves so that the loss of a linear head on "
        "held-out training images falls. Choose it when the labels of the task are at hand during pretraining; costs "
        "three times MAE's time (1.6 times with --mlo_update_every 5)."
    )
    options = {  # noqa: RUF012
        "mlo_labels": None, "mlo_val_fraction": 0.2, "mlo_unroll": 2, "mlo_update_every": 1, "mlo_hypergrad": "fd",
        "mlo_fd_alpha": None, "mlo_unroll_grad": "sum", "mlo_head_path": True, "mlo_precondition": "adam",
        "mlo_ste": False, "mlo_normalize": False, "mlo_head_lr": None, "mlo_mask_lr": 1e-2, "mlo_weight_decay": 0.01,
        "mlo_hidden": 512, "mlo_batch_size": None, "mlo_feature": "avg", "mlo_stage2": "linear", "mlo_prox": None,
        "mlo_levels": 3, "blo_lambda": None, "mlo_mask_net": None, "mlo_frozen": False,
    }  # fmt: skip
    # Masking-network updates between two in which the two paths of the hypergradient are computed separately.
    PATHS_EVERY = 20

    @staticmethod
    def add_arguments(group):
        group.add_argument("--mlo_mae", action="store_true", help="turn it on")

        def option(name, text, **kwargs):
            add_option(group, MLOMAE.options, name, help=text, **kwargs)

        option("mlo_labels", "the labelled task: `same` (the pretraining images) or a folder with train/<class>/")
        option("mlo_val_fraction", "share of every class of the labelled images held out for stage III", type=float)
        option("mlo_unroll", "steps of the autoencoder to one of the head", type=int)
        option("mlo_update_every", "the masking network moves with every so many-th step of the head", type=int)
        option("mlo_hypergrad", "derivatives by two forward passes, or exactly by forward mode", choices=["fd", "jvp"])
        option("mlo_fd_alpha", "length of fd's displacement in weight space (1e-2 with adam, else 1e-3)", type=float)
        option("mlo_unroll_grad", "count all unrolled steps, or the last alone", choices=["sum", "last"])
        option("mlo_head_path", "count what reaches the encoder through the step of the head", action="store_true")
        group.add_argument(
            "--no_mlo_head_path", dest="mlo_head_path", action="store_false", default=argparse.SUPPRESS,
            help="leave that out (one pass cheaper)",
        )  # fmt: skip
        option("mlo_precondition", "steps as Adam scales them, or as of gradient descent", choices=["adam", "none"])
        option("mlo_ste", "let kept patches count in the hypergradient: sorting is passed over", action="store_true")
        option("mlo_normalize", "divide the loss by the sum of probabilities, not their number", action="store_true")
        option("mlo_head_lr", "learning rate of stage II (1e-2), cosine to 0 over its own updates", type=float)
        option("mlo_mask_lr", "learning rate of the masking network, likewise", type=float)
        option("mlo_weight_decay", "of both", type=float)
        option("mlo_hidden", "width of the masking network", type=int)
        option("mlo_batch_size", "labelled images in a batch of stages II and III (as --batch_size)", type=int)
        option("mlo_feature", "what the head sees", choices=["cls", "avg"])
        option("mlo_stage2", "train the head alone, or with a copy of the encoder", choices=["linear", "finetune"])
        option("mlo_prox", "weight of the pull of that copy towards the encoder (with finetune)", type=float)
        option("mlo_levels", "3, or 2: the encoder learns both losses at once (BLO-MAE)", type=int, choices=[3, 2])
        option("blo_lambda", "weight of the task's loss with --mlo_levels 2 (1.0)", type=float)
        option("mlo_mask_net", "take the masking network of this checkpoint, with the embedding that it saw")
        option("mlo_frozen", "and leave it as it is: no labels, no outer levels", action="store_true")

    @staticmethod
    def enabled(args) -> bool:
        return args.mlo_mae

    @staticmethod
    def check(args) -> None:
        if args.mlo_frozen:
            return _check_frozen(args)
        if not args.mlo_labels:
            raise UserError("--mlo_mae needs --mlo_labels: `same`, or a folder with train/<class>/ of labelled images")
        if not 0 < args.mlo_val_fraction < 1:
            raise UserError(f"--mlo_val_fraction {args.mlo_val_fraction} must lie between 0 and 1, for example 0.2")
        for name in ("mlo_unroll", "mlo_update_every", "mlo_hidden", "mlo_batch_size"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise UserError(f"--{name} {getattr(args, name)} must be positive")
        _check_pairs(args)
        for name in ("mlo_fd_alpha", "mlo_head_lr", "mlo_mask_lr", "mlo_prox", "blo_lambda"):
            value = getattr(args, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"--{name} {value} must be a positive number")
        if not 0 <= args.mlo_weight_decay < math.inf:
            raise UserError(f"--mlo_weight_decay {args.mlo_weight_decay} must not be negative")

    def __init__(self, args, model: MaskedAutoencoderViT):
        super().__init__()
        self.args, self.frozen = args, args.mlo_frozen
        self.normalize, self.straight = args.mlo_normalize, args.mlo_ste
        self.unroll, self.every = args.mlo_unroll, args.mlo_update_every
        self.embedding = None
        patches, width = model.patch_embed.num_patches, model.cls_token.shape[-1]
        if args.mlo_mask_net:
            self.net, self.embedding = load_mask_net(args.mlo_mask_net, model)
        else:
            self.net = MaskingNetwork(patches, width, args.mlo_hidden)
        self.net.requires_grad_(False)  # neither the autoencoder's optimizer nor DDP is to see it
        self.optimizer = adamw(self.net.groups(), args.mlo_mask_lr, args.mlo_weight_decay)
        self.step = self.updates = 0
        self.ratio = args.mask_ratio
        self.drawn = [0, 0]  # batches of stages II and III
        self.window: list[InnerStep] = []
        self._logged: dict[str, torch.Tensor] = {}
        self._model = [model]  # in a list: not a part of this module

    def divide(self, images):
        if self.frozen:
            return None
        guide = Classification(self.args, images)
        self.use(guide)
        return guide.pretrain_images, guide.val_images

    def use(self, guide) -> None:
        """Make stages II and III for the task."""
        every = self.unroll if self.args.mlo_levels == 3 else 1, self.unroll * self.every
        self.batches = guide.batches(every)
        kind = (
            JointHead
            if self.args.mlo_levels == 2
            else {"linear": LinearHead, "finetune": TunedEncoder}[self.args.mlo_stage2]
        )
        self.stage2 = kind(guide, self._model[0], self.args)
        self.register_buffer("held_out", torch.tensor(guide.held_out))
        self.register_load_state_dict_pre_hook(_same_split)

    def begin(self, model, methods, steps: int) -> None:
        self.head_updates, self.mask_updates = steps // self.unroll, steps // (self.unroll * self.every)

    def attach(self, optimizer) -> None:
        self.inner = optimizer

    # Stage I ----------------------------------------------------------------------------------------------------------

    def tokens(self, model, imgs) -> torch.Tensor:
        """What the masking network sees, without a graph: the encoder must not learn to please it."""
        return (self.embedding.network if self.embedding else model.embed)(imgs).detach()

    @torch.no_grad()
    def logits(self, model, imgs) -> torch.Tensor:
        """(N, L) in float32 whatever autocast is on: half precision would make ties, and ties an order."""
        with torch.autocast(imgs.device.type, enabled=False):
            return self.net(self.tokens(model, imgs))

    def scores(self, model, imgs):
        if self._recording() and (not self.window or self.window[-1].applied is not None):
            weights = {f"model.{name}": p.detach().clone() for name, p in trained(model).items()}
            self.window.append(InnerStep(weights))
        return self.logits(model, imgs)

    def _recording(self) -> bool:
        """Whether the coming step belongs to those that the next move of the masking network looks back on."""
        if self.frozen or (self.step // self.unroll + 1) % self.every:
            return False
        return self.args.mlo_unroll_grad == "sum" or (self.step + 1) % self.unroll == 0

    def patch_loss(self, model, imgs, out: MaskedOutput):
        weights, self.ratio = out.scores.sigmoid(), out.mask_ratio
        if self._recording():
            self.window[-1].batches.append(Batch(imgs, out.ids_keep, out.ids_restore, out.mask))
        # Weights can shrink the loss without anybody reconstructing better: this shows it.
        self._logged["mask_weight"] = (weights * out.mask).sum() / out.mask.sum()
        return weighted_loss(patch_errors(model, imgs, out.pred), weights, out.mask, self.normalize)

    def terms(self, model, imgs, out):
        if self.frozen or self.args.mlo_levels == 3:
            return {}
        return {"guide": self.stage2.term(model, self._draw(0))}

    # Stages II and III ------------------------------------------------------------------------------------------------

    def _draw(self, stage: int):
        """The next labelled batch of stage II (0) or III (1), on the device."""
        batch = self.batches[stage].batch(self.drawn[stage])
        self.drawn[stage] += 1
        if batch.bad.any():
            self._logged["bad_labelled_images"] = float(batch.bad.sum())
        device = self.net.layers[0].weight.device
        return batch._replace(
            image=batch.image.to(device, non_blocking=True), target=batch.target.to(device, non_blocking=True)
        )

    def after_update(self, model, imgs, step: int, applied: torch.Tensor) -> None:
        if self.window and self.window[-1].applied is None:
            self.window[-1].lr, self.window[-1].applied = self.inner.param_groups[0]["lr"], applied.clone()
        if self.step != step:  # resumed with other batch flags: what was recorded belongs to other steps
            self.window.clear()
        self.step = step + 1
        if self.frozen or self.step % self.unroll:
            return
        dtype = choose_amp_dtype(self.args.amp_dtype, imgs.device)
        # These gradients are not scaled, so half precision (not bfloat16) would lose them. One context a call: torch
        # 2.11 hands casts that were made without a graph on to calls that want one.
        dtype = torch.float32 if dtype is torch.float16 else dtype
        if self.stage2.optimizer:
            _set_rate(self.stage2.optimizer, self.args.mlo_head_lr, self.step // self.unroll - 1, self.head_updates)
            with autocast(imgs.device, dtype):
                self._logged["stage2_loss"] = self.stage2.update(model, self._draw(0))
        if (self.step // self.unroll) % self.every or not self.window:
            return
        batch = self._draw(1)
        with autocast(imgs.device, dtype):
            loss, score, paths = self.stage2.paths(model, batch)
        self._logged |= {"stage3_loss": loss, "stage3_top1": score}
        self._move(model, batch.image, paths)
        self.window.clear()

    def _move(self, model, imgs, paths: dict[str, Tensors]) -> None:
        """A step of the masking network."""
        if not (len(paths) > 1 and self.updates % self.PATHS_EVERY == 0):  # the sum is one direction
            paths = {"all": {name: sum(path[name] for path in paths.values()) for name in paths["direct"]}}
        gradients = {path: self.hypergradient(model, direction) for path, direction in paths.items()}
        total = {name: sum(g[name] for g in gradients.values()) for name in next(iter(gradients.values()))}
        before = self.logits(model, imgs)
        _set_rate(self.optimizer, self.args.mlo_mask_lr, self.updates, self.mask_updates)
        taken = torch.stack([step.applied for step in self.window]).amax()
        skipped = descend(self.optimizer, dict(self.net.named_parameters()), total, taken)
        self.updates += 1
        self._logged |= {"hypergrad_norm": norm(total), "mask_skipped": skipped}
        self._logged |= _about_masks(model, before, self.logits(model, imgs), self.ratio)
        if len(gradients) > 1:
            direct, head = gradients["direct"], gradients["head"]
            self._logged |= {f"hypergrad_{path}": norm(g) for path, g in gradients.items()}
            self._logged["hypergrad_cosine"] = dot(direct, head) / (norm(direct) * norm(head)).clamp_min(1e-30)

    def hypergradient(self, model, direction: Tensors) -> Tensors:
        """dL3/dT through the steps of the window, for dL3/dtheta' = `direction`; the mean over ranks."""
        scaled = step_along(self.inner, trained(model), direction, self.args.mlo_precondition)
        scaled = {f"model.{name}": vector for name, vector in scaled.items()}
        total = {name: torch.zeros_like(p) for name, p in self.net.named_parameters()}
        # Adam carries a gradient on into the steps after its own; gradient descent does not.
        adam = self.args.mlo_precondition == "adam"
        beta = self.inner.param_groups[0]["betas"][0] if adam else 0.0
        reach = torch.zeros_like(
            next(iter(total.values()))[:1, 0]
        )  # how far the coming steps carry this one's gradient
        for step in reversed(self.window):
            applied = step.applied.to(reach.dtype)
            reach = torch.where(applied > 0, step.lr + beta * reach, reach)
            for batch in step.batches:  # none after a resume on another number of processes
                factor = -applied * reach / len(step.batches)
                for sum_, gradient in zip(total.values(), self._mask_gradient(model, step.weights, batch, scaled)):
                    sum_ += factor * gradient
        return averaged(total)

    def _mask_gradient(self, model, weights: Tensors, batch: Batch, direction: Tensors):
        """d/dT of the loss whose patch errors are replaced by their rates of change along `direction`."""
        inputs = batch.imgs, batch.ids_keep, batch.ids_restore
        with exact_arithmetic(model):
            if self.args.mlo_hypergrad == "fd":
                rates = rates_fd(model, weights, direction, inputs, self.args.mlo_fd_alpha)
            else:
                rates = rates_jvp(model, weights, direction, inputs)
            if self.embedding:
                tokens = self.embedding.network(batch.imgs)
            else:
                tokens = functional_call(_Tokens(model), weights, (batch.imgs,))
            return mask_gradient(
                self.net, tokens, lambda p: weighted_loss(rates, p, batch.mask, self.normalize, self.straight)
            )

    # Looking and saving -----------------------------------------------------------------------------------------------

    def metrics(self):
        logged, self._logged = self._logged, {}
        return logged

    @torch.no_grad()
    def pictures(self, model, imgs, shown):
        return {"masks": mask_picture(shown, self.logits(model, imgs), self.ratio, model)}

    @torch.no_grad()
    def distributions(self, model, imgs):
        return {"mask_probability": self.logits(model, imgs).sigmoid().flatten()}

    def _optimizers(self) -> list:
        inner = None if self.frozen else self.stage2.optimizer
        return [optimizer for optimizer in (self.optimizer, inner) if optimizer]

    def get_extra_state(self):
        return {
            "step": self.step,
            "rhythm": [self.unroll, self.every],
            "updates": self.updates,
            "drawn": list(self.drawn),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers()],
            "window": [{"weights": s.weights, "lr": s.lr, "applied": s.applied} for s in self.window],
        }

    def set_extra_state(self, state):
        self.step, self.updates, self.drawn = state["step"], state["updates"], list(state["drawn"])
        device = self.net.layers[0].weight.device
        for optimizer, saved in zip(self._optimizers(), state["optimizers"]):
            optimizer.load_state_dict(saved)
        self.window = [
            InnerStep({n: w.to(device) for n, w in s["weights"].items()}, [], s["lr"], s["applied"].to(device))
            for s in (state["window"] if state["rhythm"] == [self.unroll, self.every] else [])
        ]

    def rank_state(self):
        if not self.window:
            return None
        return [[{name: value.cpu() for name, value in vars(b).items()} for b in step.batches] for step in self.window]

    def load_rank_state(self, state):
        device = self.net.layers[0].weight.device
        for step, batches in zip(self.window, state):
            step.batches = [Batch(**{name: value.to(device) for name, value in b.items()}) for b in batches]


# Flags and files ----------------------------------------------------------------------------------------------------


def _check_frozen(args) -> None:
    if not args.mlo_mask_net:
        raise UserError("--mlo_frozen needs --mlo_mask_net, the checkpoint of the masking network to keep")
    kept = ("mlo_mask_net", "mlo_frozen", "mlo_normalize")
    for name, default in MLOMAE.options.items():
        if name not in kept and getattr(args, name) != default:
            raise UserError(f"--{name} has no effect with --mlo_frozen: the masking network does not learn")


def _check_pairs(args) -> None:
    """Flags that mean something only beside others; then the defaults of those that were not given."""
    joint, tuned = args.mlo_levels == 2, args.mlo_stage2 == "finetune"
    without_effect = [
        ("mlo_fd_alpha", args.mlo_fd_alpha is not None and args.mlo_hypergrad != "fd", "without --mlo_hypergrad fd"),
        ("mlo_unroll_grad last", args.mlo_unroll_grad == "last" and args.mlo_unroll == 1, "with --mlo_unroll 1"),
        ("mlo_stage2 finetune", tuned and joint, "with --mlo_levels 2: there is no stage II"),
        ("mlo_head_lr", args.mlo_head_lr is not None and joint, "with --mlo_levels 2: the head learns with --lr"),
        ("no_mlo_head_path", not args.mlo_head_path and joint, "with --mlo_levels 2: there is no such path"),
        ("no_mlo_head_path", not args.mlo_head_path and tuned, "with --mlo_stage2 finetune: there is no such path"),
        ("mlo_prox", args.mlo_prox is not None and not tuned, "without --mlo_stage2 finetune"),
        ("blo_lambda", args.blo_lambda is not None and not joint, "without --mlo_levels 2"),
        ("mlo_hidden", args.mlo_mask_net and args.mlo_hidden != 512, "with --mlo_mask_net: the file decides"),
    ]
    for name, useless, why in without_effect:
        if useless:
            raise UserError(f"--{name} has no effect {why}")
    if tuned and args.mlo_prox is None:
        raise UserError("--mlo_stage2 finetune needs --mlo_prox, for example 0.1: without a pull nothing reaches theta")
    defaults = (
        # Adam's scaling puts much of a direction's length into weights that hardly matter.
        ("mlo_fd_alpha", 1e-2 if args.mlo_precondition == "adam" else 1e-3, args.mlo_hypergrad == "fd"),
        ("mlo_head_lr", 1e-2, not joint),
        ("blo_lambda", 1.0, joint),
    )
    for name, default, applies in defaults:
        if applies and getattr(args, name) is None:
            setattr(args, name, default)


def _same_split(module, state, prefix, *_) -> None:
    """A resumed run must not see, in stage I or II, what was held out before."""
    before = state.get(f"{prefix}held_out")
    if before is not None and not torch.equal(before.cpu(), module.held_out.cpu()):
        raise ValueError("the labelled images, --mlo_val_fraction or --seed differ, so others would be held out")


def load_mask_net(path: str, model) -> tuple[MaskingNetwork, Frozen]:
    """The masking network of a checkpoint and the patch embedding that it saw. UserError when it is of another grid."""
    content = read_file(path)
    prefix = f"{MLOMAE.name}.net."
    state = {k.removeprefix(prefix): v for k, v in content.get("methods", {}).items() if k.startswith(prefix)}
    if not state:
        raise UserError(f"{path} holds no masking network: give a checkpoint of a run with --mlo_mae")
    hidden, inputs = state["layers.0.weight"].shape
    patches = state["layers.2.weight"].shape[0]
    own = f"{MLOMAE.name}.embedding.network."
    embedding = {k.removeprefix(own): v for k, v in content["methods"].items() if k.startswith(own)} or {
        k: v for k, v in content["model"].items() if k.startswith("patch_embed.") or k == "pos_embed"
    }
    kernel, needed = embedding["patch_embed.proj.weight"], model.patch_embed.proj.weight
    grid = tuple(model.patch_embed.grid_size)
    same = patches == model.patch_embed.num_patches and kernel.shape[1:] == needed.shape[1:]
    if same:  # 8 x 8 patches are not 4 x 16: the table of positions tells
        table = get_2d_sincos_pos_embed(kernel.shape[0], grid, cls_token=True)
        same = torch.allclose(embedding["pos_embed"][0], torch.from_numpy(table).float(), atol=1e-4)
    if not same:
        raise UserError(
            f"the masking network of {path} is for {patches} patches of {kernel.shape[-1]} pixels in {kernel.shape[1]} "
            f"channels, this run has {grid[0]}x{grid[1]} of {needed.shape[-1]} in {needed.shape[1]}: give the same "
            f"--input_size, --patch_size and --in_chans"
        )
    net = MaskingNetwork(patches, inputs // patches, hidden)
    net.load_state_dict(state)
    tokens = PatchTokens(model)
    tokens.patch_embed.proj = nn.Conv2d(*kernel.shape[1::-1], kernel.shape[-2:], kernel.shape[-2:])
    tokens.pos_embed = nn.Parameter(torch.empty_like(embedding["pos_embed"]))
    tokens.load_state_dict(embedding)
    return net, Frozen(tokens)


def _set_rate(optimizer, lr: float, update: int, updates: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * cosine(update, updates) * group.get("lr_scale", 1.0)


def _about_masks(model, before, after, ratio: float) -> Tensors:
    """Of logits (N, L) before and after a step: the entropy of the probabilities, and how much of the masks changed."""
    old, new = (model.choose_visible(logits, ratio)[1] for logits in (before, after))
    changed = ((old - new).abs().sum() / 2) / old.sum()  # a patch that comes in is a patch that goes out
    return {"mask_entropy": F.binary_cross_entropy_with_logits(after, after.sigmoid()), "mask_changed": changed}
