"""Teachers: networks that are only looked at, and the moving average that some of them follow."""

import torch
from torch import nn


class Frozen(nn.Module):
    """Holds a network without gradients that stays in eval mode for good: `model.train()` does not wake it up."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, rate: float, applied: torch.Tensor | float = 1.0) -> None:
    """teacher <- (1 - rate) * teacher + rate * student, over the parameters of `teacher`, by name.

    `applied` (a device scalar) gates it: 0 leaves the teacher as it is, bit for bit, without the host waiting.
    """
    theirs = dict(student.named_parameters())
    pairs = [(parameter, theirs[name]) for name, parameter in teacher.named_parameters()]
    if not pairs:
        return
    ours, others = (list(tensors) for tensors in zip(*pairs))
    difference = torch._foreach_sub(others, ours)
    # A scalar on the device, of their type: others leave the fast path of the multiplication.
    weight = torch.as_tensor(applied, device=ours[0].device).to(ours[0].dtype) * rate
    torch._foreach_mul_(difference, weight)
    torch._foreach_add_(ours, difference)


@torch.no_grad()
def copy_weights(target: nn.Module, source: nn.Module) -> None:
    """The parameters of `target` become those of the same name in `source`."""
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        parameter.copy_(theirs[name])


__all__ = ["Frozen", "copy_weights", "ema_update"]
