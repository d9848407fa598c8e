"""Model FLOPs utilisation: how much of what matrix products reach on this device the training makes use of.

Chowdhery et al. 2022 (PaLM, Appendix B), with the measured rate of the device in the place of the one on paper.
"""

import contextlib
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

# Seconds that the rate is measured for, and the side of the square matrices that measure it.
SECONDS, SIDES = 0.5, {"cuda": 8192, "cpu": 2048}


def _attention(query, key, value, *_, **__) -> int:
    """Two products, query with key and weights with value; shapes (N, heads, tokens, width)."""
    n, heads, tokens, width = query
    return 2 * n * heads * tokens * key[2] * (width + value[3])


def _attention_backward(_gradient, query, key, value, *_, **__) -> int:
    """Four products; a fifth, by which fused kernels compute the weights again, is no work of the model."""
    return 2 * _attention(query, key, value)


# torch 2.14 does not know the CPU's kernel, and counts the fifth product of the others.
_FORWARD = ["flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"]
FORMULAS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}"): formula
    for suffix, formula in (("", _attention), ("_backward", _attention_backward))
    for name in _FORWARD
    if hasattr(torch.ops.aten, f"_scaled_dot_product_{name}{suffix}")
}


def flop_counter() -> FlopCounterMode:
    """Context that counts the FLOPs of matrix products inside it (`get_total_flops`)."""
    return FlopCounterMode(display=False, custom_mapping=FORMULAS)


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = SECONDS, clock=time.perf_counter) -> float:
    """FLOPs per second of large square matrix products on this device, with the threads of this process."""
    side = SIDES[device.type]
    generator = torch.Generator(device).manual_seed(0)  # not the run's own numbers
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    a @ b
    wait()
    began, count = clock(), 0
    while clock() - began < seconds:
        a @ b
        wait()
        count += 1
    return 2 * side**3 * count / (clock() - began)


class FlopMeter:
    """Counts the FLOPs of the first micro-batch of an epoch (its passes and those of teachers; not what methods do
    after the step), and relates the speed to them. What `--grad_checkpoint` computes twice counts twice."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.rate = matrix_rate(device, dtype)
        self.per_image, self.counted, self._flops = 0.0, False, 0

    def begin(self) -> None:
        """Count anew: an epoch may bring a teacher, or another mask ratio."""
        self.counted, self._flops = False, 0

    @contextlib.contextmanager
    def counting(self):
        """Around the forward pass, and again around the backward pass, until `counted_images` closes the count."""
        if self.counted:
            yield
            return
        # Compiled code is not seen by the counter.
        with flop_counter() as counter, torch.compiler.set_stance("force_eager"):
            yield
        self._flops += counter.get_total_flops()

    def counted_images(self, images: int) -> None:
        """Both passes over so many `images` were counted."""
        if not self.counted:
            self.per_image, self.counted = self._flops / images, True

    def utilisation(self, images_per_s: float) -> float:
        """In percent, at this speed of one process."""
        return 100 * self.per_image * images_per_s / self.rate
