"""MLO-MAE with a solved head: its solution, and the derivative of stage III through it."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.card import CUDA, Card
from helpers.mlo_problems import by_pixel, small_vit
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.func import functional_call

from methods.mlo.inner_problems import trainable
from methods.mlo.solved_head import CG_CHECK, HeadFit, conjugate_gradients, standardized


def problem(ridge=0.1, count=40, width=6, classes=3):
    """Return two batches of features of mixed scales, with noisy labels that depend on them."""
    rule, scales = torch.randn(width, classes).double(), torch.logspace(-2, 2, width).double()
    batches = []
    for _ in range(2):
        features = torch.randn(count, width).double()
        targets = (features @ rule + torch.randn(count, classes)).argmax(1)
        batches.append((features * scales + 5, targets))
    head = nn.Linear(width, classes).double().requires_grad_(False)
    return HeadFit(F.cross_entropy, head, ridge), *batches


def test_conjugate_gradients():
    root = torch.randn(30, 30).double()
    matrix, right = root @ root.T + 0.1 * torch.eye(30), torch.randn(30).double()
    result = conjugate_gradients(lambda x: matrix @ x, right, 1e-12)
    # The tolerance is on the residual; the condition number, some thousands, relates it to the solution.
    torch.testing.assert_close(result, torch.linalg.solve(matrix, right), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_features_end_the_solver_at_once(value):
    """Conjugate gradients would run to their limit; the check of the run reports the fault."""
    asked = []
    conjugate_gradients(lambda x: asked.append(1) or value * x, torch.ones(50).double(), 1e-9)
    assert len(asked) < 3
    fit, (features, targets), _ = problem()
    features[3, 2] = value
    assert fit.solve(torch.zeros(21).double(), features, targets).isfinite().all()


def test_a_gpu_is_waited_for_in_few_iterations():
    """On a pretended GPU, the solution has the same bits as on the CPU, where every iteration looks at the residual."""
    root = torch.randn(60, 60).double()
    matrix, right = root @ root.T + 0.1 * torch.eye(60), torch.randn(60).double()
    asked = []
    ours = conjugate_gradients(lambda x: asked.append(1) or matrix @ x, right, 1e-12)
    assert len(asked) > 3 * CG_CHECK
    with Card() as card:
        matrix, right = matrix.to(CUDA), right.to(CUDA)
        card.watching = True
        theirs = conjugate_gradients(lambda x: matrix @ x, right, 1e-12)
    assert torch.equal(ours, theirs.host)
    assert len(card.waits) == len(asked) // CG_CHECK + 1


def test_a_solved_head_waits_rarely():
    """Newton's method waits for its step lengths, three times for each of six steps."""
    fit, (features, targets), _ = problem(count=12, width=3, classes=2)
    start = torch.zeros(8).double()
    ours = fit.solve(start, features, targets)
    with Card() as card:
        fit.head.to(CUDA)
        features, targets, start = features.to(CUDA), targets.to(CUDA), start.to(CUDA)
        card.watching = True
        theirs = fit.solve(start, features, targets)
    assert torch.equal(ours, theirs.host)
    assert len(card.waits) <= 25, card.waits


def test_the_solution_is_scikit_learns():
    """scikit-learn does not penalise its intercept, so ours is a feature that is always one."""
    fit, (features, targets), _ = problem()
    solution = fit.solve(torch.zeros(21).double(), features, targets)
    inputs = torch.cat([standardized(features, features), torch.ones(40, 1)], dim=1).numpy()
    theirs = LogisticRegression(C=1 / (40 * fit.ridge), fit_intercept=False, solver="newton-cg", tol=1e-10)
    theirs.fit(inputs, targets.numpy())
    ours = torch.cat([fit.weights(solution)["weight"], fit.weights(solution)["bias"][:, None]], dim=1)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.coef_), rtol=0, atol=1e-6)  # their tolerance


def test_the_solution_does_not_depend_on_the_start():
    fit, (features, targets), _ = problem()
    one, other = (
        fit.solve(start, features, targets) for start in (torch.zeros(21).double(), 5 * torch.randn(21).double())
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-7)  # a gradient of 1e-9 over the ridge of 0.1


def of_theta(pretrainer, method, weights) -> torch.Tensor:
    """Return L3 at other weights of the autoencoder, with the head solved for these weights."""
    stage = method.stage2
    fit = HeadFit(stage.task.loss, stage.head, stage.ridge)
    batches = [given.batch(0) for given in method.batches]
    model = Encoded(pretrainer.model, stage.task)
    weights = {f"model.{name}": value for name, value in weights.items()}
    ours, theirs = (functional_call(model, weights, (batch.image,)) for batch in batches)
    solution = fit.solve(torch.zeros(75).double(), ours, batches[0].target, 1e-12)
    return fit.loss(fit.logits(solution, standardized(theirs, ours)), batches[1].target).detach()


class Encoded(nn.Module):
    def __init__(self, model, task):
        super().__init__()
        self.model, self.task = model, task

    def forward(self, imgs):
        return self.task.features(self.model, imgs)


@pytest.mark.parametrize(
    "task,logs", [("", "stage3_top1"), ("--mlo_task segmentation", "stage3_pixel_acc stage3_mIoU")]
)
def test_the_total_derivative_is_exact(task, logs):
    """Against central differences of features, statistics, solution and loss together, for segmentation that of all
    pixels. In float64 a displacement of 1e-5 leaves errors of 1e-10 (curvature) and 1e-11 (rounding), for derivatives
    of about 1e-2."""
    pretrainer, method, _ = small_vit(f"--mlo_unroll 1 --mlo_stage2 solve --mlo_ridge 0.1 {task}")
    batches = [given.batch(0) for given in method.batches]
    logged, paths = method.stage2.paths(pretrainer.model, batches[1], batches[0])
    theta = {name: p.detach() for name, p in trainable(pretrainer.model).items()}
    assert set(logged) == {"stage2_loss", "stage3_loss", *logs.split()}

    def exact(weights):
        with by_pixel(method):
            return of_theta(pretrainer, method, weights)

    torch.testing.assert_close(logged["stage3_loss"], exact(theta), rtol=1e-9, atol=0)
    for _ in range(3):
        along = {name: torch.randn_like(vector) for name, vector in paths["direct"].items()}
        plus, minus = (exact(theta | {n: theta[n] + sign * 1e-5 * v for n, v in along.items()}) for sign in (1, -1))
        ours = sum((along[name] * path[name]).sum() for path in paths.values() for name in path)
        assert ours.item() == pytest.approx(((plus - minus) / 2e-5).item(), rel=1e-6, abs=1e-8)


def test_a_change_of_basis_has_no_effect_on_a_solved_head():
    """A change of basis of the features has no effect on a solved head, except through the ridge term; it has a large
    effect on a fixed head."""
    fit, batch, held_out = problem(ridge=1e-6, count=400)
    solution = fit.solve(torch.zeros(21).double(), *batch)
    _, _, of_ours, of_theirs = fit.differentiate(solution, batch, held_out)
    basis = torch.randn(6, 6).double()
    scale = batch[0].std(0)
    ours, theirs = (((features - batch[0].mean(0)) / scale @ basis) * scale for features, _ in (batch, held_out))
    direct, total = (of_theirs * theirs).sum(), (of_theirs * theirs).sum() + (of_ours * ours).sum()
    assert abs(total) < 1e-3 * abs(direct)


def test_the_loss_of_stage_two_is_that_of_the_solution():
    """The loss, with the penalty, is below that of every other head tried."""
    pretrainer, method, _ = small_vit("--mlo_unroll 1 --mlo_stage2 solve --mlo_ridge 0.1")
    batches = [given.batch(0) for given in method.batches]
    logged, _ = method.stage2.paths(pretrainer.model, batches[1], batches[0])
    features = method.stage2.task.features(pretrainer.model, batches[0].image).detach()
    inputs = standardized(features, features)
    head = torch.cat([p.detach().flatten() for p in method.stage2.head.parameters()])
    loss = F.cross_entropy(method.stage2.head(inputs), batches[0].target)
    torch.testing.assert_close(logged["stage2_loss"], loss.detach())
    fit = HeadFit(F.cross_entropy, method.stage2.head, 0.1)
    best = fit.objective(head, inputs, batches[0].target)
    for _ in range(20):
        assert fit.objective(head + 0.1 * torch.randn_like(head), inputs, batches[0].target) > best


def test_one_path_can_be_left_out():
    pretrainer, method, _ = small_vit("--mlo_unroll 1 --mlo_stage2 solve --no_mlo_head_path")
    batches = [given.batch(0) for given in method.batches]
    assert list(method.stage2.paths(pretrainer.model, batches[1], batches[0])[1]) == ["direct"]
