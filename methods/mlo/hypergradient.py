"""Hypergradients through one training step: the gradient of a loss after the step with respect to the weights of the
patches in the loss before it.

The chain (MLO-MAE, Sections 3.2 and A.1; derivation and exactness in docs/mlo.md): the autoencoder theta takes a step
on the weighted patch errors L1 = sum_i p_i e_i(theta) / #removed; the head h takes a step on L2(h, theta'); L3 is the
loss of both on other images. With the removed patches held fixed, L1 depends on the masking network T only through p:

    v      = dL3/dtheta'  -  d/dtheta' <dL2/dh, xi2 dL3/dh'>       (direct path + path through the head)
    dL3/dT = -xi1 d/dT sum_i p_i(T) <de_i/dtheta, v> / #removed

The inner products are directional derivatives of the patch errors along v: one forward-mode pass (`jvp`, exact), or two
ordinary forward passes (`fd`, finite differences). Second derivatives are needed only of the head.

Shapes: N images, L patches, P predicted patches. Parameters and directions are dicts of tensors by name.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from models_encoder import gather_tokens
from util.compute.precision import full_precision

Tensors = dict[str, torch.Tensor]


def weighted_loss(errors, weights, mask, normalize: bool = False, straight_through: bool = False) -> torch.Tensor:
    """Return the weighted error of the removed patches: sum(w e) over sum(mask), or over sum(w) with `normalize`;
    errors, weights and mask are (N, L).

    `straight_through` applies the straight-through estimator to the sort: the gradient treats the mask as if it were
    the weights, so visible patches count, too. The loss is linear in `errors`, on which hypergradients rely.
    """
    chosen = mask + (weights - weights.detach()) if straight_through else mask
    total = (weights * mask).sum() if normalize else mask.sum()
    return (chosen * weights * errors).sum() / total


class Residuals(nn.Module):
    """Differences (N, P, F) between the autoencoder's predictions and their targets, for given visible patches; P are
    the removed patches or, with `all_patches`, all of them."""

    def __init__(self, model, all_patches: bool = True):
        super().__init__()
        self.model, self.all_patches = model, all_patches

    def forward(self, imgs, ids_keep, ids_removed):
        model, patches = self.model, self.model.patchify(imgs)
        latent, _ = model.encode(model.embed_patches(patches, ids_keep))
        if self.all_patches:
            decoded = model.decode(latent, torch.argsort(torch.cat([ids_keep, ids_removed], dim=1), dim=1))
        else:
            decoded, patches = model.decode_removed(latent, ids_keep, ids_removed), gather_tokens(patches, ids_removed)
        return model.decoder_pred(decoded) - model.patch_target(patches)


class Tokens(nn.Module):
    """The autoencoder's patch tokens with their positions, as a module with the same parameter names as `Residuals`."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, imgs):
        return self.model.embed(imgs)


class PatchErrors(Residuals):
    """The mean square of the residuals of every patch: (N, P)."""

    def forward(self, *inputs):
        return (super().forward(*inputs) ** 2).mean(dim=-1)


def norm(direction: Tensors) -> torch.Tensor:
    """Return the Euclidean norm over all tensors."""
    return torch.nn.utils.get_total_norm(list(direction.values()))


def dot(one: Tensors, other: Tensors) -> torch.Tensor:
    """Return the inner product over all tensors of two directions with the same names."""
    return sum((one[name] * other[name]).sum() for name in one)


@contextmanager
def exact_arithmetic(module: nn.Module):
    """Compute in full float32 (no autocast, no TF32) and in eval mode. In a finite difference both terms must be the
    same function, and rounding errors are divided by a small number."""
    training, device = module.training, next(module.parameters()).device.type
    module.eval()
    try:
        plain = torch.compiler.set_stance("force_eager")
        with plain, full_precision(), torch.autocast(device, enabled=False), torch.no_grad():
            yield
    finally:
        module.train(training)


def directional_derivative_fd(
    residuals: Residuals, weights: Tensors, direction: Tensors, inputs: tuple, alpha: float
) -> torch.Tensor:
    """Return the derivative of the patch errors (N, P) along `direction` at `weights` by a central difference.

    The errors are the mean squares of `residuals` for `inputs` (images, ids); the displacement has the length `alpha`.
    The module's own parameters are not changed. Zero if the direction is zero.
    """
    length = norm(direction)
    step = alpha / length.clamp_min(torch.finfo(length.dtype).tiny)
    plus, minus = (
        functional_call(residuals, weights | {n: weights[n] + sign * step * v for n, v in direction.items()}, inputs)
        for sign in (1, -1)
    )
    # a^2 - b^2 as (a - b)(a + b): the difference of rounded squares would be inaccurate.
    return torch.where(length > 0, ((plus - minus) * (plus + minus)).mean(dim=-1) / (2 * step), 0.0)


def directional_derivative_jvp(
    residuals: Residuals, weights: Tensors, direction: Tensors, inputs: tuple
) -> torch.Tensor:
    """Return the same derivative exactly, by one forward-mode pass."""
    errors = PatchErrors(residuals.model, residuals.all_patches)
    point = {name: weights[name] for name in direction}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention kernels have no forward mode
        return torch.func.jvp(lambda w: functional_call(errors, weights | w, inputs), (point,), (direction,))[1]


def head_gradient(loss, head: nn.Module, weights: Tensors, features, targets) -> tuple[torch.Tensor, Tensors]:
    """Return `loss(head(features), targets)` at the head's `weights`, and its gradient with respect to them."""
    leaves = _leaves(weights)
    with torch.enable_grad():
        value = loss(functional_call(head, leaves, (features.detach(),)), targets)
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))


def mixed_derivative(loss, head: nn.Module, weights: Tensors, features, targets, direction: Tensors) -> torch.Tensor:
    """Return d/dfeatures <dL/dh, direction> at the head's `weights`, with the shape of `features`: the gradient that a
    step of the head passes on to the features. The only second derivative, and only of the head."""
    leaves, inputs = _leaves(weights), features.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(functional_call(head, leaves, (inputs,)), targets)
        gradient = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        product = sum((g * direction[name]).sum() for name, g in zip(leaves, gradient))
    return torch.autograd.grad(product, inputs)[0]


def mask_gradient(net: nn.Module, tokens: torch.Tensor, loss_of_weights) -> tuple[torch.Tensor, ...]:
    """Return the gradient of `loss_of_weights(p)` with respect to the masking network's parameters, where p =
    sigmoid(net(tokens))."""
    leaves = _leaves(dict(net.named_parameters()))
    with torch.enable_grad():
        value = loss_of_weights(functional_call(net, leaves, (tokens,)).sigmoid())
    return torch.autograd.grad(value, list(leaves.values()))


def _leaves(parameters: Tensors) -> Tensors:
    """Return detached copies that require gradients, leaves of a new graph."""
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}
