"""Hypergradients through one step of training: how a loss after the step depends on the weights in the loss before it.

The chain (MLO-MAE, Sections 3.2 and A.1; derivation and exactness in docs/mlo.md): an autoencoder theta takes a step on
the weighted errors of its patches, L1 = sum_i p_i e_i(theta) / #removed; a head h takes a step on L2(h, theta'); L3 is
the loss of both on other images. With the removed patches held fixed, L1 knows the masking network T only through p:

    v    = dL3/dtheta'  -  d/dtheta' <dL2/dh, xi2 dL3/dh'>         (direct path + path through the head)
    dL3/dT = -xi1 d/dT sum_i p_i(T) <de_i/dtheta, v> / #removed

The inner products are directional derivatives of the errors: one forward-mode pass (`jvp`, exact), or two ordinary
passes without gradients (`fd`). Nothing is differentiated twice but the head.

Shapes: N images, L patches. Parameters and directions are dicts by name.
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
    """Errors of the removed patches, weighted: sum(w e) over sum(mask), or over sum(w) with `normalize`; all (N, L).

    `straight_through` lets the choice of the patches, too, follow the weights, as if sorting were the identity: in the
    gradient a patch that was kept counts with its weight. Linear in `errors`, which is what hypergradients build on.
    """
    chosen = mask + (weights - weights.detach()) if straight_through else mask
    total = (weights * mask).sum() if normalize else mask.sum()
    return (chosen * weights * errors).sum() / total


class Residuals(nn.Module):
    """What an autoencoder's pixels are away from the target, for chosen visible patches: (N, P, F), P the removed
    patches, or all of them."""

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
    """The position-added patch tokens of an autoencoder, by the same parameter names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, imgs):
        return self.model.embed(imgs)


class PatchErrors(Residuals):
    """Their mean square in every patch: (N, P)."""

    def forward(self, *inputs):
        return (super().forward(*inputs) ** 2).mean(dim=-1)


def norm(direction: Tensors) -> torch.Tensor:
    """Euclidean norm over all of it."""
    return torch.nn.utils.get_total_norm(list(direction.values()))


def dot(one: Tensors, other: Tensors) -> torch.Tensor:
    """Inner product over all of it, of directions with the same names."""
    return sum((one[name] * other[name]).sum() for name in one)


@contextmanager
def exact_arithmetic(module: nn.Module):
    """Full float32 (no autocast, no TF32) and eval mode: both sides of a difference must be the same function, and
    rounding is divided by a small number."""
    training, device = module.training, next(module.parameters()).device.type
    module.eval()
    try:
        plain = torch.compiler.set_stance("force_eager")
        with plain, full_precision(), torch.autocast(device, enabled=False), torch.no_grad():
            yield
    finally:
        module.train(training)


def rates_fd(residuals: Residuals, weights: Tensors, direction: Tensors, inputs: tuple, alpha: float) -> torch.Tensor:
    """Central difference of the patch errors (N, P), the mean squares of `residuals`, for `inputs` (images, ids) at
    `weights` along `direction`, with a displacement of length `alpha`. The model's own parameters are not touched.
    Zero where the direction vanishes."""
    length = norm(direction)
    step = alpha / length.clamp_min(torch.finfo(length.dtype).tiny)
    plus, minus = (
        functional_call(residuals, weights | {n: weights[n] + sign * step * v for n, v in direction.items()}, inputs)
        for sign in (1, -1)
    )
    # a^2 - b^2 as (a - b)(a + b): the squares would round away what is left of the difference.
    return torch.where(length > 0, ((plus - minus) * (plus + minus)).mean(dim=-1) / (2 * step), 0.0)


def rates_jvp(residuals: Residuals, weights: Tensors, direction: Tensors, inputs: tuple) -> torch.Tensor:
    """The same derivative, exactly, in one forward-mode pass."""
    errors = PatchErrors(residuals.model, residuals.all_patches)
    at = {name: weights[name] for name in direction}
    with sdpa_kernel(SDPBackend.MATH):  # the fused kernels of attention have no forward mode
        return torch.func.jvp(lambda w: functional_call(errors, weights | w, inputs), (at,), (direction,))[1]


def head_gradient(loss, head: nn.Module, weights: Tensors, features, targets) -> tuple[torch.Tensor, Tensors]:
    """`loss(head(features), targets)` at the head's `weights`, and its gradient with respect to them."""
    leaves = _leaves(weights)
    with torch.enable_grad():
        value = loss(functional_call(head, leaves, (features.detach(),)), targets)
    return value.detach(), dict(zip(leaves, torch.autograd.grad(value, list(leaves.values()))))


def through_head(loss, head: nn.Module, weights: Tensors, features, targets, direction: Tensors) -> torch.Tensor:
    """d/dfeatures <dL/dh, direction>: what a step of the head sends back to the features, with their shape. The only
    place where something is differentiated twice, and it is the head alone, at `weights`."""
    leaves, inputs = _leaves(weights), features.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(functional_call(head, leaves, (inputs,)), targets)
        gradient = torch.autograd.grad(value, list(leaves.values()), create_graph=True)
        product = sum((g * direction[name]).sum() for name, g in zip(leaves, gradient))
    return torch.autograd.grad(product, inputs)[0]


def mask_gradient(net: nn.Module, tokens: torch.Tensor, loss_of_weights) -> tuple[torch.Tensor, ...]:
    """Gradient of `loss_of_weights(p)` with respect to the masking network's parameters, p = sigmoid(net(tokens))."""
    leaves = _leaves(dict(net.named_parameters()))
    with torch.enable_grad():
        value = loss_of_weights(functional_call(net, leaves, (tokens,)).sigmoid())
    return torch.autograd.grad(value, list(leaves.values()))


def _leaves(parameters: Tensors) -> Tensors:
    """The same numbers as leaves of a graph of their own, whether or not they are trained by others."""
    return {name: value.detach().requires_grad_() for name, value in parameters.items()}
