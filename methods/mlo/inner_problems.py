"""Stages II and III of MLO-MAE: three ways of learning the task, and what each lets the validation loss ask of theta (a
fourth is in `mlo_solved`).

Each has `paths(model, *batches)`: what to log of stage III, and the directions in theta by which its loss depends on
the autoencoder, from a batch of each of the stages in `draws`. Those with an `optimizer` of their own also have
`update(model, batch)`, a step of stage II; `JointHead` has a `term` of stage I's loss instead. theta is the
autoencoder, h the head.
"""

import math

import torch
from torch import nn
from torch.func import functional_call

from methods.mlo.hypergradient import Tensors, head_gradient, norm, through_head
from util.compute.precision import guarded_step
from util.parallel.distributed import average

# Steps ---------------------------------------------------------------------------------------------------------------


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


def set_rate(optimizer, lr: float, update: int, updates: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * cosine(update, updates) * group.get("lr_scale", 1.0)


# Stages --------------------------------------------------------------------------------------------------------------


class LinearHead(nn.Module):
    """Stage II of the paper: the encoder stays as it is, the head takes a step (Eq. 7). Stage III is the loss of both,
    which depends on the encoder directly and through that step of the head (Eq. 9)."""

    draws = (1,)

    def __init__(self, guide, model, args):
        super().__init__()
        self.guide, self.head_path, self.kind = guide, args.mlo_head_path, args.mlo_precondition
        self.head = guide.head(model.cls_token.shape[-1]).requires_grad_(False)
        self.optimizer = adamw(self.head.parameters(), args.mlo_head_lr, args.mlo_weight_decay)

    def update(self, model, batch) -> torch.Tensor:
        """A step of the head -> its loss before."""
        with torch.no_grad():
            features = self.guide.features(model, batch.image)
        self.guide.observe(self.head, features)
        weights = dict(self.head.named_parameters())
        self._before, self._batch = {name: value.clone() for name, value in weights.items()}, batch
        loss, gradient = head_gradient(self.guide.loss, self.head, weights, features, batch.target)
        descend(self.optimizer, weights, averaged(gradient))
        return loss

    def paths(self, model, batch) -> tuple[dict[str, torch.Tensor], dict[str, Tensors]]:
        """What is logged, and the directions in theta by which the loss of stage III depends on the encoder."""
        theta, head = trained(model), {n: p.detach().requires_grad_() for n, p in self.head.named_parameters()}
        with torch.enable_grad():
            logits = functional_call(self.head, head, (self.guide.features(model, batch.image),))
            loss = self.guide.loss(logits, batch.target)
        found = gradient_of(loss, {**theta, **{f"head.{name}": leaf for name, leaf in head.items()}})
        of_head = averaged({name: found.pop(f"head.{name}") for name in head})
        paths = {"direct": averaged(found)}
        if self.head_path:
            paths["head"] = averaged(self._through_head(model, theta, of_head))
        return self.guide.logged(loss, logits, batch.target), paths

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

    draws = (1,)

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
        return self.guide.logged(loss, logits, batch.target), {"direct": direction}


class JointHead(nn.Module):
    """Two levels (BLO-MAE, Eq. 5): the head and the encoder learn L1 + lambda L2 together, in the autoencoder's own
    optimizer. T enters L1 alone, so the head's step does not depend on it."""

    optimizer = None
    draws = (1,)

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
        return self.guide.logged(loss, logits, batch.target), {"direct": averaged(gradient_of(loss, theta))}
