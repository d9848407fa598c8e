"""LARS (You et al. 2017, https://arxiv.org/abs/1708.03888), the optimizer of linear probing."""

import torch


class LARS(torch.optim.Optimizer):
    """SGD with momentum, in which the step of a matrix p is scaled by trust_coefficient * |p| / |g + weight_decay * p|.

    Vectors (biases, norms) are neither scaled nor decayed; a zero parameter or zero gradient is not scaled. Norms stay
    on the device: `step` does not wait for it. A step is skipped if `found_inf` (a tensor, set from outside, as
    `torch.amp.GradScaler` does for fused optimizers) is 1.
    """

    _step_supports_amp_scaling = True  # GradScaler then leaves skipping to `step`, without reading `found_inf`

    def __init__(self, params, lr=0.0, weight_decay=0.0, momentum=0.9, trust_coefficient=0.001):
        defaults = dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust_coefficient=trust_coefficient)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        found_inf = getattr(self, "found_inf", None)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, p.grad, group, found_inf)

    def _update(self, p, grad, group, found_inf):
        if p.ndim > 1:
            grad = grad.add(p, alpha=group["weight_decay"])
            p_norm, g_norm = torch.linalg.vector_norm(p), torch.linalg.vector_norm(grad)
            ratio = group["trust_coefficient"] * p_norm / g_norm
            grad = grad * torch.where((p_norm > 0) & (g_norm > 0), ratio, torch.ones_like(ratio))
        state = self.state[p]
        if "mu" not in state:
            state["mu"] = torch.zeros_like(p)
        mu = state["mu"] * group["momentum"] + grad
        step = group["lr"] * mu
        if found_inf is not None:
            skip = found_inf > 0
            mu, step = torch.where(skip, state["mu"], mu), torch.where(skip, torch.zeros_like(step), step)
        state["mu"].copy_(mu)
        p.sub_(step)
