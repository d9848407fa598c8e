"""Stage II of MLO-MAE solved, not followed: the head is the best one for the encoder, and stage III knows that it is.

With h*(theta) = argmin_h L2(h, theta) + ridge/2 |h|^2, the implicit function theorem gives

    dL3/dtheta = d/dtheta [ L3(h, theta) - <dL2/dh (h, theta), q> ]   at h = h*,   (d2L2/dh2 + ridge) q = dL3/dh,

what the chain through more and more steps of the head tends to. Most of what a head would have features do, it can do
itself when it is fitted again; here that is taken off, and what is left is what the encoder is worth (docs/mlo.md).
Sources: Bertinetto et al., "Meta-Learning with Differentiable Closed-Form Solvers", 2019; Lorraine et al., "Optimizing
Millions of Hyperparameters by Implicit Differentiation", 2020.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call

from methods.mlo.hypergradient import Tensors
from methods.mlo.inner_problems import averaged, gradient_of, trained
from util.parallel.distributed import get_rank, get_world_size

EPS = 1e-6


def standardized(features: Tensor, reference: Tensor) -> Tensor:
    """By mean and deviation of `reference`, a batch (N, D), which both depend on the encoder, too."""
    return (features - reference.mean(0)) / (reference.var(0, correction=0) + EPS).sqrt()


def conjugate_gradients(apply: Callable[[Tensor], Tensor], right: Tensor, tolerance: float) -> Tensor:
    """The solution of apply(x) = right for a symmetric positive operator, to `tolerance` relative to `right`."""
    solution, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), residual @ residual
    goal = tolerance**2 * square
    for _ in range(10 * len(right)):  # rounding makes it need more than the number of unknowns
        if not square > goal:  # also where it is not a number
            break
        image = apply(direction)
        step = square / (direction @ image)
        solution, residual = solution + step * direction, residual - step * image
        square, before = residual @ residual, square
        direction = residual + square / before * direction
    return solution


class Fit:
    """min_h `loss`(h(x), y) + ridge/2 |h|^2 of a linear head on standardised features x (N, D), in float64; h is one
    vector. Features of stage II are standardised by themselves, those of stage III by them, too."""

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

    def slope(self, vector: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(objective, its gradient, in a graph) at a vector that requires one."""
        value = self.objective(vector, inputs, targets)
        return value, torch.autograd.grad(value, vector, create_graph=True)[0]

    def solve(self, start: Tensor, features: Tensor, targets: Tensor, tolerance: float = 1e-9) -> Tensor:
        """Newton's method with inexact steps, halved while they do not descend, until the gradient is that short."""
        inputs, vector = standardized(features, features), start.clone().requires_grad_()
        for _ in range(100):
            value, gradient = self.slope(vector, inputs, targets)
            length = gradient.detach().norm()
            if not length > tolerance:  # also where it is not a number
                break
            step = conjugate_gradients(curvature(vector, gradient), gradient.detach(), min(0.1, length.sqrt()))
            least, share = 1e-4 * (gradient.detach() @ step), 1.0
            while share > 1e-6:
                tried = (vector - share * step).detach()
                if self.objective(tried, inputs, targets) <= value - share * least:
                    break
                share /= 2
            else:
                break  # rounding allows no better
            vector = tried.requires_grad_()
        return vector.detach()

    def through(self, solution: Tensor, batch: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]):
        """L3, its logits, and its total derivatives with respect to the features of stage II, through the solution and
        the statistics, and of stage III; each batch is (features, targets)."""
        ours, theirs = (features.detach().requires_grad_() for features, _ in (batch, held_out))
        vector = solution.clone().requires_grad_()
        logits = self.logits(vector, standardized(theirs, ours))
        loss = self.loss(logits, held_out[1])
        (of_head,) = torch.autograd.grad(loss, vector, retain_graph=True)
        _, gradient = self.slope(vector, standardized(ours, ours), batch[1])
        q = conjugate_gradients(curvature(vector, gradient), of_head, 1e-9)
        return loss.detach(), logits.detach(), *torch.autograd.grad(loss - gradient @ q, (ours, theirs))


def curvature(vector: Tensor, gradient: Tensor) -> Callable[[Tensor], Tensor]:
    """Products with the matrix of second derivatives, of what has this `gradient` with respect to `vector`."""
    return lambda direction: torch.autograd.grad(gradient, vector, direction, retain_graph=True)[0]


def gathered(local: Tensor) -> Tensor:
    """The batches of all ranks, one behind the other, without a graph."""
    if get_world_size() == 1:
        return local
    everyone = [torch.empty_like(local) for _ in range(get_world_size())]
    dist.all_gather(everyone, local.contiguous())
    return torch.cat(everyone)


class SolvedHead(nn.Module):
    """Stage II is solved on one batch of all ranks, from where the last solution was."""

    optimizer = None
    draws = (1, 0)

    def __init__(self, guide, model, args):
        super().__init__()
        self.guide, self.ridge, self.head_path = guide, args.mlo_ridge, args.mlo_head_path
        self.head = guide.head(model.cls_token.shape[-1]).requires_grad_(False)

    def paths(self, model, held_out, batch):
        theta = trained(model)
        with torch.enable_grad():
            features = [self.guide.features(model, part.image) for part in (batch, held_out)]
        with torch.autocast(features[0].device.type, enabled=False), torch.enable_grad():
            everyone = [
                (gathered(f.detach()).double(), gathered(b.target)) for f, b in zip(features, (batch, held_out))
            ]
            fitted, loss, logits, *sent = self._solve(*everyone)
        paths = {"direct": self._back(features[1], sent[1], theta)}
        if self.head_path:
            paths["head"] = self._back(features[0], sent[0], theta)
        return {"stage2_loss": fitted, **self.guide.logged(loss, logits, everyone[1][1])}, paths

    def _solve(self, batch, held_out):
        fit = Fit(self.guide.loss, self.head, self.ridge)
        solution = fit.solve(torch.cat([p.flatten() for p in self.head.parameters()]).double(), *batch)
        for name, value in fit.weights(solution).items():
            self.head.get_parameter(name).copy_(value)
        fitted = fit.loss(fit.logits(solution, standardized(batch[0], batch[0])), batch[1])
        return fitted, *fit.through(solution, batch, held_out)

    @staticmethod
    def _back(features: Tensor, sent: Tensor, theta: Tensors) -> Tensors:
        """From the features of all ranks to the encoder; every rank takes its own share of them."""
        mine = sent.chunk(get_world_size())[get_rank()] * get_world_size()
        with torch.enable_grad():
            sent = (features * mine.to(features.dtype)).sum()
        return averaged(gradient_of(sent, theta))
