"""Teachers: frozen networks, and the moving average that some of them follow."""

from typing import Any

import torch
from torch import nn


class Frozen(nn.Module):
    """Holds a network that is not trained: without gradients, and in eval mode also after `train()`."""

    network: Any  # an nn.Module; its users know of which class

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)


@torch.no_grad()
def ema_update(
    teacher: nn.Module, student: nn.Module, rate: float | torch.Tensor, applied: torch.Tensor | float = 1.0
) -> None:
    """Update teacher <- (1 - rate) * teacher + rate * student, over the parameters of `teacher`, matched by name.

    `rate` is a number, or a float64 scalar on the device. `applied` is a scalar on the device: 0 leaves the teacher
    unchanged, bit for bit, without waiting for the device.
    """
    source = dict(student.named_parameters())
    pairs = [(parameter, source[name]) for name, parameter in teacher.named_parameters()]
    if not pairs:
        return
    ours, theirs = (list(tensors) for tensors in zip(*pairs))
    difference = torch._foreach_sub(theirs, ours)
    # A device scalar of the same type; with another type the multiplication leaves its fast path.
    weight = (torch.as_tensor(applied, device=ours[0].device).to(ours[0].dtype) * rate).to(ours[0].dtype)
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(ours, difference)


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy the parameters of `source` into those of `target` with the same name."""
    values = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(values[name])


__all__ = ["Frozen", "copy_weights", "ema_update"]
