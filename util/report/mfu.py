"""Model FLOPs utilisation (MFU): the FLOPs of training as a share of the device's rate of matrix products.

Source: Chowdhery et al. 2022 (PaLM, Appendix B); here the device's rate is measured, not taken from its data sheet.
"""

import contextlib
import itertools
import time
from collections.abc import Callable

import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

# Duration of the measurement of the rate, and the side of the square matrices.
SECONDS, SIDES = 0.5, {"cuda": 8192, "cpu": 2048}


def _attention(query, key, value, *_, **__) -> int:
    """Return the FLOPs of attention's two products: query with key, weights with value. Shapes
    (N, heads, tokens, width)."""
    n, heads, tokens, width = query
    return 2 * n * heads * tokens * key[2] * (width + value[3])


def _attention_backward(_gradient, query, key, value, *_, **__) -> int:
    """Return the FLOPs of the four products of the backward pass. The fifth, by which fused kernels compute the weights
    again, is not counted."""
    return 2 * _attention(query, key, value)


# torch 2.14 does not count the CPU's kernel, and counts the fifth product of the others.
_FORWARD = ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"]
FORMULAS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}"): formula
    for suffix, formula in (("", _attention), ("_backward", _attention_backward))
    for name in _FORWARD
    if hasattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}")
}


def flop_counter() -> FlopCounterMode:
    """Return a context that counts the FLOPs of matrix products inside it (`get_total_flops`)."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


class _Call(torch.nn.Module):
    """`function(model, imgs)` as a module."""

    def __init__(self, model: torch.nn.Module, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, imgs):
        return self.function(self.model, imgs)


@torch.no_grad()
def forward_flops(model: torch.nn.Module, forward: Callable, size: tuple[int, int, int]) -> int:
    """Return the FLOPs of matrix products of `forward(model, imgs)` with one image (C, H, W), without computing it."""
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    shapes = {f"model.{name}": torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in tensors}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    with flop_counter() as counter:
        functional_call(_Call(model, forward), shapes, torch.zeros(1, *size, device="meta"))
    for module, mode in modes.items():
        module.training = mode
    return counter.get_total_flops()


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS, clock=time.perf_counter) -> float:
    """Return the FLOPs per second of large square matrix products on this device, with the threads of this process."""
    side = SIDES.get(device.type, SIDES["cpu"])
    generator = torch.Generator(device).manual_seed(0)  # leaves the run's random numbers unchanged
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    torch.matmul(a, b)
    wait()
    began, count = clock(), 0
    while clock() - began < seconds:
        torch.matmul(a, b)
        wait()
        count += 1
    return 2 * side**3 * count / (clock() - began)


class FlopMeter:
    """Counts the FLOPs of the first micro-batch of an epoch, and computes the utilisation from the speed. Teachers'
    passes are counted, work after the optimizer step is not; what `--grad_checkpoint` computes twice counts twice."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.rate = matrix_rate(device, dtype)
        self.per_image, self.counted, self._flops = 0.0, False, 0

    def begin(self) -> None:
        """Start a new count: the teacher or the mask ratio may change with the epoch."""
        self.counted, self._flops = False, 0

    @contextlib.contextmanager
    def counting(self):
        """Count inside the context, first around the forward and then around the backward pass, until
        `counted_images`."""
        if self.counted:
            yield
            return
        # The counter does not see compiled code.
        with flop_counter() as counter, torch.compiler.set_stance("force_eager"):
            yield
        self._flops += counter.get_total_flops()

    def counted_images(self, images: int) -> None:
        """End the count: both passes over so many `images` were counted."""
        if not self.counted:
            self.per_image, self.counted = self._flops / images, True

    def utilisation(self, images_per_s: float) -> float:
        """Return the utilisation in percent at this speed of one process."""
        return 100 * self.per_image * images_per_s / self.rate
