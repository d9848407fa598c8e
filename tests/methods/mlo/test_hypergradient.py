"""MLO-MAE's hypergradient of small transformers against autograd through all steps and finite differences."""

import math
from functools import partial

import pytest
import torch
from helpers.mlo_problems import (
    EXACT,
    by_pixel,
    cosine,
    flat,
    in_float,
    move_of,
    off,
    small_vit,
    train_step,
    twice,
    vars_of,
)
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.unrolled import leaves, stage_one, task_loss, unrolled
from methods.mlo.hypergradient import PatchErrors, Tokens
from methods.mlo.inner_problems import adamw, trainable

PIXELS = "--mlo_task segmentation"


@pytest.mark.parametrize("dtype,tolerance", [(torch.float64, EXACT), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--no_mlo_head_path",
        "--mlo_feature cls",
        "--mlo_head_norm",
        PIXELS,
        f"{PIXELS} --no_mlo_head_path",
        f"{PIXELS} --mlo_head_norm",
    ],
)
@pytest.mark.parametrize("depth", [0, 2])
def test_jvp_is_exact(flags, dtype, tolerance, depth):
    """One unrolled step against autograd through all steps in float64, for a linear encoder and a transformer. The loss
    of segmentation is there the cross-entropy of all pixels."""
    make = partial(small_vit, f"--mlo_unroll 1 --mlo_hypergrad jvp {flags}", depth=depth)
    (pretrainer, method, xp), (double, its_method, _) = twice(make)
    with by_pixel(its_method):
        exact = unrolled(double, its_method, xp[:1], 0.75, head_path="no_mlo" not in flags)
    if dtype is torch.float32:
        pretrainer.float()
        method.batches = [in_float(given) for given in method.batches]
    assert off(move_of(pretrainer, method, [xp[0].to(dtype)], 0.75), exact) < tolerance


def in_float32(flags, seed=0):
    """The same problem in float32, with the exact hypergradient of float64."""
    torch.manual_seed(seed)
    (pretrainer, method, xp), (double, its_method, _) = twice(partial(small_vit, flags))
    with by_pixel(its_method):
        exact = unrolled(double, its_method, xp[: method.unroll], 0.75)
    pretrainer.float()
    method.batches = [in_float(given) for given in method.batches]
    return move_of(pretrainer, method, [x.float() for x in xp[: method.unroll]], 0.75), exact


@pytest.mark.parametrize("task", ["", PIXELS])
def test_fd_in_float32(task):
    """At the default displacement of 1e-3 the difference loses half the digits of float32, so the error is below
    1e-3."""
    errors = [off(*in_float32(f"--mlo_unroll 1 --mlo_hypergrad fd {task}", seed)) for seed in range(3)]
    print("fd, float32, alpha 1e-3:", errors)
    assert max(errors) < 1e-3


def test_fd_with_adam():
    """At the default displacement of 1e-2 for Adam, against forward mode on the same directions."""
    result = {}
    for mode in ("fd", "jvp"):
        torch.manual_seed(0)
        pretrainer, method, xp = small_vit(
            f"--mlo_unroll 2 --mlo_hypergrad {mode} --mlo_precondition adam", torch.float32
        )
        method.batches = [in_float(given) for given in method.batches]
        pretrainer.attach(torch.optim.AdamW(trainable(pretrainer.model).values(), lr=1e-3, betas=(0.9, 0.95)))
        method.optimizer = torch.optim.SGD(method.net.parameters(), lr=0)
        for imgs in xp[:2]:
            train_step(pretrainer, method, imgs.float(), 0.75)
        result[mode] = move_of(pretrainer, method, [imgs.float() for imgs in xp[2:]], 0.75)
    print("fd with adam, float32, alpha 1e-2:", off(result["fd"], result["jvp"]))
    assert off(result["fd"], result["jvp"]) < 2e-3


def test_fd_over_the_displacement():
    """The error falls with the square of the displacement until rounding dominates."""
    lengths = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
    errors = {alpha: off(*in_float32(f"--mlo_unroll 1 --mlo_fd_alpha {alpha}")) for alpha in lengths}
    print("fd, float32:", errors)
    assert errors[1e-2] < errors[1e-1] / 10
    assert errors[1e-5] > 10 * errors[1e-3]
    make = partial(small_vit, "--mlo_unroll 1 --mlo_hypergrad fd --mlo_fd_alpha 1e-4")
    (pretrainer, method, xp), (double, its_method, _) = twice(make)
    exact = unrolled(double, its_method, xp[:1], 0.75)
    assert off(move_of(pretrainer, method, xp[:1], 0.75), exact) < 1e-5  # float64 permits a short one


@pytest.mark.parametrize("unroll", [2, 5])
def test_unrolled_steps(unroll):
    """`sum` drops one factor I - xi H for each later step; `last` drops the earlier steps."""
    errors = {}
    for mode in ("sum", "last"):
        torch.manual_seed(3)
        make = partial(small_vit, f"--mlo_unroll {unroll} --mlo_hypergrad jvp --mlo_unroll_grad {mode}", inner_lr=0.01)
        (pretrainer, method, _), (double, its_method, _) = twice(make)
        imgs = torch.randn(unroll, 24, 3, 16, 16, dtype=torch.float64)
        errors[mode] = off(move_of(pretrainer, method, imgs, 0.75), unrolled(double, its_method, imgs, 0.75))
    print(f"{unroll} steps of a transformer:", errors)
    assert errors["sum"] < 0.5 * errors["last"]


@pytest.mark.parametrize("mode", ["fd", "jvp"])
def test_nothing_else_moves(mode):
    """The autoencoder, its mode and torch's settings stay the same bit for bit; a repetition gives the same result."""
    pretrainer, method, xp = small_vit(f"--mlo_unroll 1 --mlo_hypergrad {mode}", torch.float32)
    pretrainer.train()
    method.batches = [in_float(given) for given in method.batches]
    original, states = method._update_mask_net, []

    def move(model, imgs, paths):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        rng = torch.get_rng_state()
        first, second = (method.hypergradient(model, paths["direct"]) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert torch.equal(rng, torch.get_rng_state()) and model.training
        states.append(torch.get_float32_matmul_precision())
        original(model, imgs, paths)

    method._update_mask_net = move
    torch.set_float32_matmul_precision("high")
    try:
        train_step(pretrainer, method, xp[0].float(), 0.75)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert states == ["high"]
    assert all(p.grad is None for p in pretrainer.parameters())


@pytest.mark.parametrize("mode", ["fd", "jvp"])
def test_dropout_is_off_and_autocast_too(mode):
    """Independent dropout on both sides would hide the difference, as would eight bits of mantissa."""
    make = partial(small_vit, f"--mlo_unroll 1 --mlo_hypergrad {mode}", torch.float32)
    result = []
    for spoiled in (False, True):
        torch.manual_seed(5)
        pretrainer, method, xp = make()
        method.batches = [in_float(given) for given in method.batches]
        original = method.hypergradient

        def hypergradient(model, direction, original=original, spoiled=spoiled):
            for block in model.blocks:
                block.mlp.drop1.p = 0.5 if spoiled else 0.0
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=spoiled):
                return original(model.train(), direction)

        method.hypergradient = hypergradient
        result.append(move_of(pretrainer, method, [xp[0].float()], 0.75))
    assert all(torch.equal(one, other) for one, other in zip(*(g.values() for g in result)))


def test_no_second_order_graph(monkeypatch):
    """Only the head, whose input is a leaf, is differentiated twice."""
    sizes, original = [], torch.autograd.grad

    def grad(outputs, inputs, *args, **kwargs):
        if kwargs.get("create_graph"):
            sizes.append(sum(leaf.numel() for leaf in inputs))
        return original(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", grad)
    pretrainer, method, xp = small_vit("--mlo_unroll 1")
    move_of(pretrainer, method, xp[:1], 0.75)
    assert sizes == [24 * 3 + 3]


@pytest.mark.parametrize("flags", ["--mlo_normalize", "--mlo_ste", "--mlo_normalize --mlo_ste"])
def test_variants_of_the_weights(flags):
    """The hypergradient is the gradient of the loss with its errors replaced by their rates of change, computed here
    from a difference."""
    pretrainer, method, xp = small_vit(f"--mlo_unroll 1 --mlo_hypergrad jvp {flags}")
    seen = []
    original = method._update_mask_net
    method._update_mask_net = lambda *args: seen.append((args[2], list(method.window))) or original(*args)
    ours = move_of(pretrainer, method, xp[:1], 0.75)
    paths, ((step),) = seen[0]
    method.load_state_dict(method.state_dict())
    direction = {f"model.{n}": sum(path[n] for path in paths.values()) for n in paths["direct"]}
    batch, errors = step.batches[0], PatchErrors(pretrainer.model)
    net = {name: p.detach() + ours[name] for name, p in method.net.named_parameters()}  # before its step of length 1
    leaves = {name: p.requires_grad_() for name, p in net.items()}
    tokens = functional_call(Tokens(pretrainer.model), step.weights, (batch.imgs,))
    p = functional_call(method.net, leaves, (tokens,)).sigmoid()
    values = []
    for sign in (1, -1):
        moved = {n: v + sign * 1e-4 * direction[n] if n in direction else v for n, v in step.weights.items()}
        e = functional_call(errors, moved, vars_of(batch))
        chosen = batch.mask + p - p.detach() if "ste" in flags else batch.mask
        total = (p * batch.mask).sum() if "normalize" in flags else batch.mask.sum()
        values.append((chosen * p * e).sum() / total)
    by_hand = torch.autograd.grad(-step.lr * (values[0] - values[1]) / 2e-4, list(leaves.values()))
    assert off(ours, by_hand) < 1e-6  # a difference with 1e-4 in float64


@pytest.mark.parametrize("task", ["", PIXELS])
def test_two_levels_are_exact(task):
    """BLO: theta and h take one step on L1 + lambda L2; compared with autograd through that step."""
    pretrainer, method, xp = small_vit(f"--mlo_unroll 1 --mlo_hypergrad jvp --mlo_levels 2 --blo_lambda 0.7 {task}")
    head = method.stage2.head.requires_grad_(True)
    method.inner.add_param_group({"params": list(head.parameters())})
    model, stage2 = pretrainer.model, method.stage2
    theta, weights, net = leaves(trainable(model), "model."), leaves(head), leaves(method.net)
    with sdpa_kernel(SDPBackend.MATH), by_pixel(method):
        train, val = (given.batch(0) for given in method.batches)
        here, loss = stage_one(pretrainer, method, theta, net, xp[0])
        its_head = {n: p * 1 for n, p in weights.items()}
        loss = loss + 0.7 * task_loss(model, stage2, here, its_head, train)
        gradient = torch.autograd.grad(loss, [*here.values(), *its_head.values()], create_graph=True)
        theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), gradient)}
        weights = {n: p - 0.1 * g for (n, p), g in zip(weights.items(), gradient[len(theta) :])}
        exact = torch.autograd.grad(task_loss(model, stage2, theta, weights, val), list(net.values()))
    assert off(move_of(pretrainer, method, xp[:1], 0.75), exact) < EXACT


@pytest.mark.parametrize("task", ["", PIXELS])
def test_finetuned_stage_is_exact(task):
    """Stage II fine-tunes a copy of the encoder for one step with a proximal term towards theta': autograd through
    both."""
    flags = f"--mlo_unroll 1 --mlo_hypergrad jvp --mlo_stage2 finetune --mlo_prox 0.4 {task}"
    pretrainer, method, xp = small_vit(flags)
    model, stage2 = pretrainer.model, method.stage2
    theta, net = leaves(trainable(model), "model."), leaves(method.net)
    phi = {n: p for n, p in leaves(stage2).items() if "pos_embed" not in n}
    with sdpa_kernel(SDPBackend.MATH), by_pixel(method):
        train, val = (given.batch(0) for given in method.batches)
        its_loss = stage2.task.loss
        here, loss = stage_one(pretrainer, method, theta, net, xp[0])
        gradient = torch.autograd.grad(loss, list(here.values()), create_graph=True)
        theta = {n: p - 0.1 * g for (n, p), g in zip(theta.items(), gradient)}
        loss = its_loss(functional_call(stage2, phi, (train.image,)), train.target)
        pulled = {n: theta[n.replace("encoder.", "model.")] for n in phi if n.startswith("encoder.")}
        loss = loss + 0.4 * sum(((phi[n] - other) ** 2).sum() for n, other in pulled.items())
        gradient = torch.autograd.grad(loss, list(phi.values()), create_graph=True, materialize_grads=True)
        phi = {n: p - 0.3 * g for (n, p), g in zip(phi.items(), gradient)}
        loss = its_loss(functional_call(stage2, phi, (val.image,)), val.target)
        exact = torch.autograd.grad(loss, list(net.values()))
    assert off(move_of(pretrainer, method, xp[:1], 0.75), exact) < EXACT


def adamw_step(weights, gradient, state, lr, decay, eps, second_moment_too):
    """Return the weights after a differentiable step of AdamW, and update `state` for the next step."""
    after = {}
    for name, value in weights.items():
        own, g = state[name], gradient[name]
        own["step"] += 1
        own["exp_avg"] = 0.9 * own["exp_avg"] + 0.1 * g
        own["exp_avg_sq"] = 0.95 * own["exp_avg_sq"] + 0.05 * (g if second_moment_too else g.detach()) ** 2
        m, v = own["exp_avg"] / (1 - 0.9 ** own["step"]), own["exp_avg_sq"] / (1 - 0.95 ** own["step"])
        after[name] = value * (1 - lr * decay) - lr * m / (v.sqrt() + eps)
    return after


def through_adamw(pretrainer, method, batches, number, second_moment_too=False):
    """Differentiate through AdamW's steps on both levels; `number` labelled batches came before."""
    model, stage2 = pretrainer.model, method.stage2
    theta, net, head = leaves(trainable(model), "model."), leaves(method.net), leaves(stage2.head)

    def states(optimizer, parameters, prefix=""):
        copied = {f"{prefix}{n}": {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in parameters.items()}
        for state in copied.values():
            state["step"] = int(state["step"])
        return copied

    of_theta = states(method.inner, trainable(model), "model.")
    of_head = states(stage2.optimizer, dict(stage2.head.named_parameters()))
    train, val = (given.batch(number) for given in method.batches)
    with sdpa_kernel(SDPBackend.MATH):
        for imgs in batches:
            here, loss = stage_one(pretrainer, method, theta, net, imgs)
            gradient = dict(zip(here, torch.autograd.grad(loss, list(here.values()), create_graph=True)))
            theta = adamw_step(theta, gradient, of_theta, 0.01, 0.01, 1e-8, second_moment_too)
        loss = task_loss(model, stage2, theta, head, train)
        gradient = dict(zip(head, torch.autograd.grad(loss, list(head.values()), create_graph=True)))
        head = adamw_step(head, gradient, of_head, stage2.lr, 0.0, 1e-16, second_moment_too)
        return torch.autograd.grad(task_loss(model, stage2, theta, head, val), list(net.values()))


@pytest.mark.parametrize("unroll,tolerance", [(1, 1e-5), (2, 0.2)])
def test_adam_preconditioning(unroll, tolerance):
    """The default, against autograd through AdamW's steps of autoencoder and head with constant second moments. One
    step is exact up to Adam's bias correction in float32. Of two steps, the factor I - xi H is dropped, but the part
    that Adam's first moment carries from one step to the next is kept."""
    pretrainer, method, xp = small_vit(f"--mlo_unroll {unroll} --mlo_hypergrad jvp --mlo_precondition adam")
    pretrainer.attach(torch.optim.AdamW(trainable(pretrainer.model).values(), lr=0.01, betas=(0.9, 0.95)))
    method.stage2.optimizer = adamw(method.stage2.head.parameters(), 0.3, 0.0)
    method.optimizer = torch.optim.SGD(method.net.parameters(), lr=0)  # does not move
    batches = [*xp, *torch.randn_like(xp)]
    for imgs in batches[: 2 * unroll]:  # moments of a later step than the first
        train_step(pretrainer, method, imgs, 0.75)
    method.stage2.lr = 0.3 * 0.5 * (1 + math.cos(math.pi * 2 / method.head_updates))
    coming = batches[2 * unroll : 3 * unroll]
    exact = through_adamw(pretrainer, method, coming, 2)
    in_full = through_adamw(pretrainer, method, coming, 2, second_moment_too=True)
    ours = move_of(pretrainer, method, coming, 0.75)
    print(f"through {unroll} steps of AdamW: error {off(ours, exact)}, second moment too: {cosine(ours, in_full)}")
    assert off(ours, exact) < tolerance
    assert cosine(ours, in_full) > 0.98


def test_accumulated_window():
    """A step on four micro-batches counts as one: their mean, at the weights before the step."""
    pretrainer, method, xp = small_vit("--mlo_unroll 1 --mlo_hypergrad jvp")
    (one, its, _), _ = twice(partial(small_vit, "--mlo_unroll 1 --mlo_hypergrad jvp"))
    one.load_state_dict(pretrainer.state_dict()), one.attach(torch.optim.SGD(trainable(one.model).values(), lr=0.1))
    its.batches = method.batches
    halves = xp[0].split(2)
    for imgs in halves:
        (sum(pretrainer(imgs, 0.75).values()) / len(halves)).backward()
    method.inner.step(), method.inner.zero_grad()
    result, original = [], method.hypergradient
    method.hypergradient = lambda *args: result.append(original(*args)) or result[-1]
    pretrainer.after_update(halves[-1], 0, torch.ones(()))
    whole = move_of(one, its, [xp[0]], 0.75)
    assert off({n: sum(part[n] for part in result) for n in result[0]}, whole) < EXACT


def test_a_skipped_step_moves_nothing():
    """When the scaler skips the autoencoder's steps (`applied` 0), the masks have no effect, so the masking network
    does not move, not even by its momentum; a window with one applied step moves it."""
    pretrainer, method, xp = small_vit("--mlo_unroll 2")
    method.optimizer = adamw(method.net.parameters(), 0.1, 0.1)

    def moved(*applied) -> bool:
        before = [p.clone() for p in method.net.parameters()]
        for one in applied:
            pretrainer(xp[0], 0.75)
            pretrainer.after_update(xp[0], method.step, torch.tensor(one))
        return not all(torch.equal(one, other) for one, other in zip(before, method.net.parameters()))

    assert moved(1.0, 1.0) and not moved(0.0, 0.0) and moved(0.0, 1.0)


def test_half_precision_covers_the_whole_encoder():
    """Under autocast the direction covers the same parameters as in float32, with almost the same direction."""
    pretrainer, method, xp = small_vit("--mlo_unroll 1", torch.float32)
    method.batches = [in_float(given) for given in method.batches]
    train_step(pretrainer, method, xp[0].float(), 0.75)
    result = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            result.append(method.stage2.paths(pretrainer.model, method.batches[1].batch(0))[1])
    for path in ("direct", "head"):
        assert result[0][path].keys() == result[1][path].keys()
        assert cosine(result[0][path], result[1][path]) > 0.99


def test_windows_of_other_processes_are_dropped():
    """After a resume on another number of processes a window has its weights but not its images."""
    pretrainer, method, xp = small_vit("--mlo_unroll 2")
    pretrainer(xp[0], 0.75)
    pretrainer.after_update(xp[0], 0, torch.ones(()))
    method.set_extra_state(method.get_extra_state())
    assert method.window and not method.window[0].batches
    gradient = move_of(pretrainer, method, [xp[1]], 0.75)
    assert flat(gradient).norm() > 0
