"""Stage II of MLO-MAE solved exactly: the head is optimal for the encoder, and stage III differentiates through the
solution.

With h*(theta) = argmin_h L2(h, theta) + ridge/2 |h|^2, the implicit function theorem gives

    dL3/dtheta = d/dtheta [ L3(h, theta) - <dL2/dh (h, theta), q> ]   at h = h*,   (d2L2/dh2 + ridge) q = dL3/dh,

the limit of differentiating through ever more steps of the head. Changes of the features that a refitted head
compensates for cancel in this gradient; what remains is the value of the encoder itself (docs/mlo.md). Sources:
Bertinetto et al., "Meta-Learning with Differentiable Closed-Form Solvers", 2019; Lorraine et al., "Optimizing Millions
of Hyperparameters by Implicit Differentiation", 2020.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from methods.mlo.hypergradient import Tensors
from methods.mlo.inner_problems import gradient_of, mean_over_ranks, trainable
from util.parallel.distributed import get_rank, get_world_size

EPS = 1e-6
CG_CHECK = 16  # a solution takes about 40 iterations


def standardized(features: Tensor, reference: Tensor) -> Tensor:
    """Standardise features (N, D) by the per-channel mean and standard deviation of `reference` (N, D), both in the
    graph."""
    return (features - reference.mean(0)) / (reference.var(0, correction=0) + EPS).sqrt()


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, tolerance: float | Tensor) -> Tensor:
    """Return the solution of apply(x) = right for a symmetric positive definite operator, to `tolerance` relative to
    `right`.

    An iteration that starts with a residual below the goal (or NaN) changes nothing. So the host may look at the
    residual rarely: on a GPU every `CG_CHECK` iterations, because it has to wait for the device; on a CPU always.
    """
    every = 1 if right.device.type == "cpu" else CG_CHECK
    solution, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), residual @ residual
    goal = tolerance**2 * square
    for iteration in range(10 * len(right)):  # with rounding, more iterations than unknowns
        active = square > goal  # False for NaN
        if iteration % every == every - 1 and not active:
            break
        product = apply(direction)
        step = square / (direction @ product)
        solution = torch.where(active, solution + step * direction, solution)
        residual = torch.where(active, residual - step * product, residual)
        square, before = torch.where(active, residual @ residual, square), square
        direction = torch.where(active, residual + square / before * direction, direction)
    return solution


class HeadFit:
    """The problem min_h `loss`(h(x), y) + ridge/2 |h|^2 of a linear head on standardised features x (N, D), in float64;
    h is one vector. The features of stages II and III are both standardised by the statistics of stage II."""

    def __init__(self, loss, head: nn.Module, ridge: float):
        self.loss, self.head, self.ridge = loss, head, ridge

    def weights(self, vector: Tensor) -> Tensors:
        named = dict(self.head.named_parameters())
        parts = vector.split([p.numel() for p in named.values()])
        return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts)}

    def logits(self, vector: Tensor, inputs: Tensor) -> Tensor:
        return functional_call(self.head, self.weights(vector), (inputs,))

    def objective(self, vector: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.logits(vector, inputs), targets) + 0.5 * self.ridge * (vector @ vector)

    def value_and_gradient(self, vector: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the objective and its gradient, in a graph, at a vector that requires gradients."""
        value = self.objective(vector, inputs, targets)
        return value, torch.autograd.grad(value, vector, create_graph=True)[0]

    def solve(self, start: Tensor, features: Tensor, targets: Tensor, tolerance: float = 1e-9) -> Tensor:
        """Minimise by Newton's method with inexact steps, halved until they descend, until the gradient's norm is below
        `tolerance`."""
        inputs, vector = standardized(features, features), start.clone().requires_grad_()
        for _ in range(100):
            value, gradient = self.value_and_gradient(vector, inputs, targets)
            length = gradient.detach().norm()
            if not length > tolerance:  # also true for NaN
                break
            step = conjugate_gradients(
                hessian_product(vector, gradient), gradient.detach(), length.sqrt().clamp(max=0.1)
            )
            decrease, share = 1e-4 * (gradient.detach() @ step), 1.0
            while share > 1e-6:
                candidate = (vector - share * step).detach()
                if self.objective(candidate, inputs, targets) <= value - share * decrease:
                    break
                share /= 2
            else:
                break  # converged to rounding
            vector = candidate.requires_grad_()
        return vector.detach()

    def differentiate(self, solution: Tensor, batch: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]):
        """Return L3, its logits, and its total derivatives with respect to the features of stage II (through the
        solution and the statistics) and of stage III. Each batch is (features, targets)."""
        ours, theirs = (features.detach().requires_grad_() for features, _ in (batch, held_out))
        vector = solution.clone().requires_grad_()
        logits = self.logits(vector, standardized(theirs, ours))
        loss = self.loss(logits, held_out[1])
        (head_gradient,) = torch.autograd.grad(loss, vector, retain_graph=True)
        _, gradient = self.value_and_gradient(vector, standardized(ours, ours), batch[1])
        q = conjugate_gradients(hessian_product(vector, gradient), head_gradient, 1e-9)
        return loss.detach(), logits.detach(), *torch.autograd.grad(loss - gradient @ q, (ours, theirs))


def hessian_product(vector: Tensor, gradient: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that multiplies with the Hessian of the scalar whose `gradient` with respect to `vector` is
    given."""
    return lambda direction: torch.autograd.grad(gradient, vector, direction, retain_graph=True)[0]


def gather_batches(local: Tensor) -> Tensor:
    """Return the batches of all ranks, concatenated, without a graph."""
    if get_world_size() == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


class SolvedHead(nn.Module):
    """Stage II solved on one batch of all ranks, starting from the previous solution."""

    optimizer = None
    draws = (1, 0)

    def __init__(self, task, model, args):
        super().__init__()
        self.task, self.ridge, self.head_path = task, args.mlo_ridge, args.mlo_head_path
        self.head = task.head(model.cls_token.shape[-1]).requires_grad_(False)

    def paths(self, model, held_out, batch):
        theta = trainable(model)
        with torch.enable_grad():
            features = [self.task.features(model, part.image) for part in (batch, held_out)]
        with torch.autocast(features[0].device.type, enabled=False), torch.enable_grad():
            batches = [
                (gather_batches(f.detach()).double(), gather_batches(b.target))
                for f, b in zip(features, (batch, held_out))
            ]
            fitted, loss, logits, *gradients = self._solve(*batches)
        paths = {"direct": self._to_encoder(features[1], gradients[1], theta)}
        if self.head_path:
            paths["head"] = self._to_encoder(features[0], gradients[0], theta)
        return {"stage2_loss": fitted, **self.task.logged(loss, logits, batches[1][1])}, paths

    def _solve(self, batch, held_out):
        fit = HeadFit(self.task.loss, self.head, self.ridge)
        solution = fit.solve(torch.cat([p.flatten() for p in self.head.parameters()]).double(), *batch)
        for name, value in fit.weights(solution).items():
            self.head.get_parameter(name).copy_(value)
        fitted = fit.loss(fit.logits(solution, standardized(batch[0], batch[0])), batch[1])
        return fitted, *fit.differentiate(solution, batch, held_out)

    @staticmethod
    def _to_encoder(features: Tensor, gradient: Tensor, theta: Tensors) -> Tensors:
        """Back-propagate the gradient with respect to all ranks' features to the encoder; every rank takes its
        share."""
        local = gradient.chunk(get_world_size())[get_rank()] * get_world_size()
        with torch.enable_grad():
            product = (features * local.to(features.dtype)).sum()
        return mean_over_ranks(gradient_of(product, theta))
