"""Stages II and III of MLO-MAE: three inner problems that train a head on the labelled task, and the gradient of the
validation loss L3 with respect to the autoencoder theta. (`solved_head.py` has a fourth.)

Each class has `paths(model, *batches)`. It returns the values of stage III to log, and the gradient of L3 with respect
to theta, one entry per path (direct, through the head); it gets one batch of each stage in `draws` (0: stage II, 1:
stage III). Classes with an `optimizer` also have `update(model, batch)`, a step of stage II. `JointHead` instead has
`term`, which adds the task's loss to stage I. h is the head.
"""

import math

import torch
from torch import nn
from torch.func import functional_call

from methods.mlo.hypergradient import Tensors, head_gradient, mixed_derivative, norm
from util.compute.precision import guarded_step
from util.parallel.distributed import average

# Steps ---------------------------------------------------------------------------------------------------------------


def trainable(module: nn.Module) -> Tensors:
    """Return the trainable parameters of `module` by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def adamw(parameters, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """Return AdamW for an outer level. Hypergradients are tiny (they contain the inner learning rate), so `eps` must be
    smaller."""
    return torch.optim.AdamW(
        list(parameters), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, eps=1e-16, fused=True
    )


def precondition(optimizer, parameters: Tensors, direction: Tensors, method: str) -> Tensors:
    """Return the change of an optimizer step of learning rate 1 if its gradient changes along `direction`.

    `method` "none" takes the step for gradient descent and returns `direction`. "adam" scales it by Adam's factor: the
    gradient's share of the first moment over the root of the second moment, which is held constant. Zero before the
    first step.
    """
    if method == "none":
        return direction
    scaled = {}
    for name, vector in direction.items():
        state = optimizer.state.get(parameters[name])
        if not state:  # no step yet
            return {key: torch.zeros_like(value) for key, value in direction.items()}
        group = next(g for g in optimizer.param_groups if any(p is parameters[name] for p in g["params"]))
        beta1, beta2 = group["betas"]
        count = state["step"].clamp_min(1)  # 0 where every step so far was skipped
        root = (state["exp_avg_sq"] / (1 - beta2**count)).sqrt() + group["eps"]
        scaled[name] = vector * (1 - beta1) / (1 - beta1**count) / root
    return scaled


def mean_over_ranks(direction: Tensors) -> Tensors:
    """Return the mean of `direction` over ranks."""
    return dict(zip(direction, average(list(direction.values()))))


def gradient_of(value: torch.Tensor, parameters: Tensors) -> Tensors:
    """Return the gradient of `value` with respect to those `parameters` that it depends on."""
    gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, gradients) if g is not None}


def gradient_step(
    optimizer, parameters: Tensors, gradient: Tensors, applied: float | torch.Tensor = 1.0
) -> torch.Tensor:
    """Take one optimizer step with `gradient`, unless it is not finite or `applied` is 0. Return 1 if the step was
    skipped, else 0 (a scalar on the device)."""
    for name, parameter in parameters.items():
        parameter.grad = gradient.get(name)
    skipped = 1 - torch.isfinite(norm(gradient)).float() * applied
    guarded_step(optimizer, skipped)
    optimizer.zero_grad(set_to_none=True)
    return skipped


def cosine(update: int, updates: int) -> float:
    """Return the factor of the learning rate in update `update` (from 0) of `updates`: half a cosine from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(update, updates) / max(1, updates)))


def set_learning_rate(optimizer, lr: float, update: int, updates: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * cosine(update, updates) * group.get("lr_scale", 1.0)


# Stages --------------------------------------------------------------------------------------------------------------


class LinearHead(nn.Module):
    """Stage II of the paper: the encoder is fixed and the head takes a step (Eq. 7). The loss of stage III depends on
    the encoder directly and through that step of the head (Eq. 9)."""

    draws = (1,)

    def __init__(self, task, model, args):
        super().__init__()
        self.task, self.head_path, self.precondition = task, args.mlo_head_path, args.mlo_precondition
        self.head = task.head(model.cls_token.shape[-1]).requires_grad_(False)
        self.optimizer = adamw(self.head.parameters(), args.mlo_head_lr, args.mlo_weight_decay)

    def update(self, model, batch) -> torch.Tensor:
        """Take a step of the head; return the loss before it."""
        with torch.no_grad():
            features = self.task.features(model, batch.image)
        self.task.observe(self.head, features)
        weights = dict(self.head.named_parameters())
        self._before, self._batch = {name: value.clone() for name, value in weights.items()}, batch
        loss, gradient = head_gradient(self.task.loss, self.head, weights, features, batch.target)
        gradient_step(self.optimizer, weights, mean_over_ranks(gradient))
        return loss

    def paths(self, model, batch) -> tuple[dict[str, torch.Tensor], dict[str, Tensors]]:
        """Return the values to log, and the gradient of L3 with respect to theta by path."""
        theta, head = trainable(model), {n: p.detach().requires_grad_() for n, p in self.head.named_parameters()}
        with torch.enable_grad():
            logits = functional_call(self.head, head, (self.task.features(model, batch.image),))
            loss = self.task.loss(logits, batch.target)
        gradient = gradient_of(loss, {**theta, **{f"head.{name}": leaf for name, leaf in head.items()}})
        validation_gradient = mean_over_ranks({name: gradient.pop(f"head.{name}") for name in head})
        paths = {"direct": mean_over_ranks(gradient)}
        if self.head_path:
            paths["head"] = mean_over_ranks(self._path_through_head(model, theta, validation_gradient))
        return self.task.logged(loss, logits, batch.target), paths

    def _path_through_head(self, model, theta: Tensors, validation_gradient: Tensors) -> Tensors:
        """Return -d/dtheta <dL2/dh, xi2 dL3/dh'>, by one backward pass through the encoder. `validation_gradient` is
        dL3/dh'."""
        parameters, lr = dict(self.head.named_parameters()), self.optimizer.param_groups[0]["lr"]
        step = precondition(self.optimizer, parameters, validation_gradient, self.precondition)
        step = {name: -lr * vector for name, vector in step.items()}
        with torch.enable_grad():
            features = self.task.features(model, self._batch.image)
        feature_gradient = mixed_derivative(self.task.loss, self.head, self._before, features, self._batch.target, step)
        return gradient_of((features * feature_gradient).sum(), theta)


class TunedEncoder(nn.Module):
    """Stage II on a copy phi of the encoder, which is fine-tuned with the proximal term prox |phi - theta|^2
    (Appendix of the paper). One step phi' = phi - xi2 (dL2 + 2 prox (phi - theta)) depends on theta through 2 xi2 prox
    theta."""

    draws = (1,)

    def __init__(self, task, model, args):
        super().__init__()
        self.task, self.prox, self.precondition = task, args.mlo_prox, args.mlo_precondition
        self.encoder = model.encoder_copy().requires_grad_(False)
        self.head = task.head(model.cls_token.shape[-1]).requires_grad_(False)
        self.optimizer = adamw(self.parameters(), args.mlo_head_lr, args.mlo_weight_decay)

    def _loss(self, batch) -> tuple[torch.Tensor, torch.Tensor, Tensors]:
        leaves = {n: p.detach().requires_grad_(n != "encoder.pos_embed") for n, p in self.named_parameters()}
        with torch.enable_grad():
            logits = functional_call(self, leaves, (batch.image,))
            return logits, self.task.loss(logits, batch.target), {n: p for n, p in leaves.items() if p.requires_grad}

    def forward(self, imgs):
        return self.head(self.task.features(self.encoder, imgs))

    def update(self, model, batch) -> torch.Tensor:
        _, loss, leaves = self._loss(batch)
        gradient = mean_over_ranks(gradient_of(loss, leaves))
        for name, theta in trainable(model).items():
            if f"encoder.{name}" in gradient:
                gradient[f"encoder.{name}"] += 2 * self.prox * (leaves[f"encoder.{name}"].detach() - theta.detach())
        gradient_step(self.optimizer, dict(self.named_parameters()), gradient)
        return loss.detach()

    def paths(self, model, batch):
        logits, loss, leaves = self._loss(batch)
        gradient = {n: g for n, g in gradient_of(loss, leaves).items() if n.startswith("encoder.")}
        scaled = precondition(
            self.optimizer, dict(self.named_parameters()), mean_over_ranks(gradient), self.precondition
        )
        factor = 2 * self.prox * self.optimizer.param_groups[0]["lr"]
        direction = {name.removeprefix("encoder."): factor * vector for name, vector in scaled.items()}
        return self.task.logged(loss, logits, batch.target), {"direct": direction}


class JointHead(nn.Module):
    """Two levels (BLO-MAE, Eq. 5): head and encoder are trained together on L1 + lambda L2, by the autoencoder's
    optimizer. T affects only L1, so the head's step does not depend on T."""

    optimizer = None
    draws = (1,)

    def __init__(self, task, model, args):
        super().__init__()
        self.task, self.weight = task, args.blo_lambda
        self.head = task.head(model.cls_token.shape[-1])

    def term(self, model, batch) -> torch.Tensor:
        """Return lambda L2, a term of stage I's loss."""
        return self.weight * self.task.loss(self.head(self.task.features(model, batch.image)), batch.target)

    def paths(self, model, batch):
        theta = trainable(model)
        with torch.enable_grad():
            logits = self.head(self.task.features(model, batch.image))
            loss = self.task.loss(logits, batch.target)
        return self.task.logged(loss, logits, batch.target), {"direct": mean_over_ranks(gradient_of(loss, theta))}
