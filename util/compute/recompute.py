"""`--recompute cheap`: the outputs of norms and GELUs are computed again in the backward pass instead of being kept.

Autograd keeps the output of a norm or a GELU for one purpose, the weight gradient of the linear layer behind it; the
norm and the GELU themselves keep their input. So the linear layer keeps that input, which costs nothing, and computes
its own input again. That is a third of a block's activations for two elementwise passes. (Checkpointing of whole
blocks, `--grad_checkpoint`, repeats the matrix products, too.)
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _Linear(torch.autograd.Function):
    """`F.linear` that keeps (sources), not y = function(sources). Gradients have the bits of autograd's own: the
    products are the same. `y` (..., inputs) has the type of the weight."""

    @staticmethod
    def forward(ctx, y: Tensor, weight: Tensor, bias: Tensor, function: Callable[..., Tensor], *sources: Tensor):
        ctx.function, ctx.shape, ctx.dtype = function, y.shape, y.dtype
        ctx.save_for_backward(weight, *sources)
        return F.linear(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        weight, *sources = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_y = of_weight = of_bias = None
        with torch.autocast(gradient.device.type, enabled=False):
            if ctx.needs_input_grad[1]:
                y = ctx.function(*sources).to(ctx.dtype).reshape(-1, ctx.shape[-1])
                of_weight = flat.t().mm(y)
                del y  # before the gradient of the same size is made
            if ctx.needs_input_grad[2]:
                of_bias = flat.sum(0)
            if ctx.needs_input_grad[0]:
                of_y = flat.mm(weight).view(ctx.shape)
        return of_y, of_weight, of_bias, None, *(None for _ in sources)


class RecomputingLinear(nn.Linear):
    """A linear layer that does not keep an input which can be computed again."""

    def forward(self, y: Tensor) -> Tensor:
        again = getattr(y, "again", None)
        if again is None or not torch.is_grad_enabled():
            return super().forward(y)
        function, sources = again
        y, weight, bias = (_autocasted(tensor) for tensor in (y, self.weight, self.bias))
        return _Linear.apply(y, weight, bias, function, *sources)


def _autocasted(tensor: Tensor) -> Tensor:
    """Return `tensor` in the type in which autocast computes matrix products."""
    device = tensor.device.type
    if not torch.is_autocast_enabled(device) or tensor.dtype is torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


class RecomputedNorm(nn.LayerNorm):
    """A layer norm whose output says how it is computed again."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if torch.is_grad_enabled():
            y.again = partial(_norm, shape=self.normalized_shape, eps=self.eps), (x, self.weight, self.bias)
        return y


def _norm(x: Tensor, weight: Tensor, bias: Tensor, shape: tuple[int, ...], eps: float) -> Tensor:
    return F.layer_norm(x, shape, weight, bias, eps)


class RecomputedGELU(nn.GELU):
    """A GELU whose output says how it is computed again."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if torch.is_grad_enabled():
            y.again = partial(F.gelu, approximate=self.approximate), (x,)
        return y


_CLASSES = {nn.LayerNorm: RecomputedNorm, nn.GELU: RecomputedGELU, nn.Linear: RecomputingLinear}


def recompute_cheap(*models: nn.Module) -> None:
    """Let every transformer block of `models` compute the outputs of its norms and GELUs again in the backward pass.
    Parameters, their names and all numbers stay the same, bit for bit. Copies of the models do likewise."""
    for model in models:
        for block in model.modules():
            if isinstance(block, Block):
                for layer in block.modules():
                    layer.__class__ = _CLASSES.get(type(layer), type(layer))
