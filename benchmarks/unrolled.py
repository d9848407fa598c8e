"""The hypergradient of MLO-MAE by a graph through every step that is differentiated twice. Tests compare the fast
computation with it, and benchmarks/mlo.py measures its cost."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from methods.mlo.hypergradient import PatchErrors, Tokens, weighted_loss
from methods.mlo.inner_problems import trainable


@sdpa_kernel(SDPBackend.MATH)  # fused attention has no second derivative
def unrolled(pretrainer, method, batches, ratio, attach=False, head_path=True) -> list[torch.Tensor]:
    """Return the hypergradient by autograd through every step with second derivatives: gradient descent on stage I for
    each batch, one step of the head, stage III. No term is dropped: later probabilities depend on earlier steps.

    `attach`: as in the public code, stage I's gradient reaches the embedding through the masking network's input.
    """
    model, stage2 = pretrainer.model, method.stage2
    theta, net, lr = leaves(trainable(model), "model."), leaves(method.net), method.inner.param_groups[0]["lr"]
    for imgs in batches:
        here, loss = stage_one(pretrainer, method, theta, net, imgs, ratio, attach)
        gradient = torch.autograd.grad(loss, list(here.values()), create_graph=True)
        theta = {name: value - lr * g for (name, value), g in zip(theta.items(), gradient)}
    head = leaves(stage2.head)
    train, val = (given.batch(0) for given in method.batches)
    gradient = torch.autograd.grad(task_loss(model, stage2, theta, head, train), list(head.values()), create_graph=True)
    gradient = gradient if head_path else [g.detach() for g in gradient]
    head_lr = stage2.optimizer.param_groups[0]["lr"]
    head = {name: value - head_lr * g for (name, value), g in zip(head.items(), gradient)}
    return list(torch.autograd.grad(task_loss(model, stage2, theta, head, val), list(net.values())))


def leaves(module, prefix=""):
    """Return copies of the parameters as leaves of a new graph."""
    parameters = module if isinstance(module, dict) else dict(module.named_parameters())
    return {f"{prefix}{name}": p.detach().clone().requires_grad_() for name, p in parameters.items()}


def stage_one(pretrainer, method, theta, net, imgs, ratio=0.75, attach=False):
    """Return the weighted loss of stage I, and the copy of theta to differentiate with respect to. Without `attach` it
    excludes the input of the masking network."""
    model, here = pretrainer.model, {name: value * 1 for name, value in theta.items()}
    tokens = functional_call(Tokens(model), here if attach else theta, (imgs,))
    logits = functional_call(method.net, net, (tokens,))
    ids_keep, mask, ids_restore = model.choose_visible(logits.detach(), ratio)
    ids_removed = torch.argsort(ids_restore, dim=1)[:, ids_keep.shape[1] :]
    errors = functional_call(PatchErrors(model), here, (imgs, ids_keep, ids_removed))
    return here, weighted_loss(errors, logits.sigmoid(), mask)


def task_loss(model, stage2, theta, head, batch):
    features = functional_call(Features(model, stage2.task), theta, (batch.image,))
    return stage2.task.loss(functional_call(stage2.head, head, (features,)), batch.target)


class Features(nn.Module):
    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, imgs):
        return self.task.features(self.model, imgs)
