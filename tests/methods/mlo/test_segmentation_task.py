"""Segmentation as the task of MLO-MAE: its loss and scores, and masks that move to where the labels are. The
hypergradient is compared with that of all pixels in test_hypergradient.py and test_solved_head.py."""

import copy
import functools
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.mlo_problems import IGNORED, Task, labelled, pixel_loss, small_vit
from sklearn.metrics import accuracy_score, jaccard_score
from torch import nn

import main_pretrain
from methods import Pretrainer
from methods.mlo.inner_problems import trainable
from methods.mlo.method import MLOMAE
from methods.mlo.segmentation_task import Segmentation, confusion
from models_mae import MaskedAutoencoderViT
from util.data.dense.patch_labels import patch_counts


def tokens(dtype=torch.float64, ignored=0.3):
    """Return the logits (N·L, C) of three images of 4 x 4 patches, masks (N, 16, 16), and their counts."""
    masks = torch.randint(5, (3, 16, 16)).masked_fill(torch.rand(3, 16, 16) < ignored, IGNORED)
    counts = torch.stack([patch_counts(mask, (4, 4), 5, IGNORED) for mask in masks])
    return torch.randn(48, 5, dtype=dtype), masks, counts


@pytest.mark.parametrize("ignored", [0, 0.3, 1])
def test_the_loss_is_that_of_all_pixels(ignored):
    """Value, first and second derivative, to rounding in float64; zero where nothing is labelled."""
    logits, masks, counts = tokens(ignored=ignored)
    results = []
    for loss, target in ((Segmentation.loss, counts), (pixel_loss, masks)):
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), leaf)
        results.append((value, gradient, second))
    for ours, exact in zip(*results):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-15)
    assert (results[0][0] == 0) == (ignored == 1)


def test_the_loss_in_half_precision():
    """Under autocast it is computed in float32: counts of 257 and more are no numbers of bf16."""
    logits, _, counts = tokens(torch.float32)
    exact = Segmentation.loss(logits, 100 * counts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = Segmentation.loss(logits, 100 * counts)
        rounded = Segmentation.loss(logits.bfloat16(), 100 * counts)
    assert ours.dtype == rounded.dtype == torch.float32
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=0)  # eight bits of the logits


def test_the_scores_are_scikit_learns():
    """Pixel accuracy and the mean intersection over union of the labelled pixels."""
    logits, masks, counts = tokens()
    logits[:, 3] -= 100  # never predicted, but occurs
    logged = Segmentation.logged(None, torch.tensor(0.5), logits, counts)
    predicted = F.interpolate(logits.argmax(1).view(3, 1, 4, 4).float(), (16, 16)).squeeze(1)
    ours, truth = (values[masks != IGNORED].long().numpy() for values in (predicted, masks))
    assert logged["stage3_loss"] == 0.5
    assert logged["stage3_pixel_acc"].item() == pytest.approx(100 * accuracy_score(truth, ours), rel=1e-6)
    assert logged["stage3_mIoU"].item() == pytest.approx(100 * jaccard_score(truth, ours, average="macro"), rel=1e-6)
    assert confusion(logits, counts).sum() == (masks != IGNORED).sum()
    nothing = Segmentation.logged(None, torch.tensor(0.5), logits, tokens(ignored=1)[2])
    assert nothing["stage3_pixel_acc"] == nothing["stage3_mIoU"] == 0


def test_a_standardised_head_observes_all_tokens():
    """Its statistics are those of the patch tokens of all images of the batch, as of a batch norm on them."""
    pretrainer, method, _ = small_vit("--mlo_unroll 1 --mlo_task segmentation --mlo_head_norm")
    batch, stage2 = method.batches[0].batch(0), method.stage2
    stage2.head.observed.zero_()
    stage2.task.observe = lambda head, features: head.observe(features)
    stage2.update(pretrainer.model, batch)
    features = pretrainer.model.encode(pretrainer.model.embed(batch.image))[0][:, 1:].reshape(6 * 16, 24)
    torch.testing.assert_close(stage2.head.mean, features.mean(0))
    torch.testing.assert_close(stage2.head.square, features.square().mean(0))


# Known answer ---------------------------------------------------------------------------------------------------------


class Quadrants:
    """Images of 4 x 4 patches of noise. In each quadrant, all patches have one of four templates added, drawn for the
    quadrant: what one patch shows of it tells what the others hide. The quadrants are alike, but only one has labels,
    the number of its template; the pixels of the others are ignored."""

    def __init__(self):
        self.templates = 0.5 * torch.randn(2, 2, 4, 3, 4, 4).repeat(1, 1, 1, 1, 2, 2)

    def draw(self, count):
        """Return images (N, 3, 16, 16), and their templates (N, 2, 2)."""
        chosen, imgs = torch.randint(4, (count, 2, 2)), torch.randn(count, 3, 16, 16)
        for row in range(2):
            for column in range(2):
                part = self.templates[row, column][chosen[:, row, column]]
                imgs[:, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] += part
        return imgs, chosen

    def labelled(self, row, column, count=128):
        """Return images, and the counts of labels (N, 16, 5)."""
        imgs, chosen = self.draw(count)
        counts = torch.zeros(count, 4, 4, 5, dtype=torch.int32)
        counts[..., -1] = 16
        inside = counts[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        inside[:] = 16 * F.one_hot(chosen[:, row, column], 5)[:, None, None]
        return imgs, counts.flatten(1, 2)


def by_quadrant(values):
    """Return the mean (..., 2, 2) of values (..., 16) of patches over each quadrant."""
    return values.unflatten(-1, (2, 2, 2, 2)).mean(dim=(-3, -1))


@functools.cache
def started():
    """Return images, an autoencoder after 40 steps on them, and its optimizer."""
    torch.manual_seed(0)
    data, model = Quadrants(), MaskedAutoencoderViT(16, 4, 3, 8, 0, 2, 16, 1, 2)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=3e-3, betas=(0.9, 0.95))
    for _ in range(40):
        model(data.draw(64)[0], mask_ratio=0.5)[0].backward()
        optimizer.step(), optimizer.zero_grad()
    return data, model, optimizer


def learn(quadrant, flags, updates, random_masks):
    """Continue with MLO-MAE on images with labels in one quadrant. Returns the gradients (updates, 2, 2) that raise the
    probabilities, and the probabilities (2, 2) at the end."""
    data, model, optimizer = copy.deepcopy(started())
    torch.manual_seed(1)
    sets = [labelled(*zip(*(data.labelled(*quadrant) for _ in range(10)))) for _ in range(2)]
    task = Task(Segmentation.features, nn.Linear(8, 4).requires_grad_(False), *sets)
    task.loss, task.logged = Segmentation.loss, partial(Segmentation.logged, task)
    flags = f"--mlo_mae --mlo_task segmentation --dataset scenes --mlo_labels same --mlo_hidden 32 {flags}"
    args = main_pretrain.get_args_parser().parse_args(f"{flags} --mlo_unroll 1 --mlo_mask_lr 0.1".split())
    main_pretrain.check(args)
    method = MLOMAE(args, model)
    method.set_task(task)
    pretrainer, moves = Pretrainer(model, [method], updates), []
    pretrainer.attach(optimizer)
    hypergradient, scores = method.hypergradient, method.scores
    method.hypergradient = lambda *args: moves.append(hypergradient(*args)) or moves[-1]
    if random_masks:  # a patch that is never removed has no gradient
        method.scores = lambda model, imgs, noise: 0 * scores(model, imgs, noise) + noise
    for step in range(updates):
        imgs = data.draw(64)[0]
        sum(pretrainer(imgs, 0.5).values()).backward()
        optimizer.step(), optimizer.zero_grad()
        pretrainer.after_update(imgs, step, torch.ones(()))
    probabilities = method.logits(model, data.draw(256)[0]).sigmoid().mean(dim=0)
    # The gradient with respect to the last bias is the sum over images of that with respect to the logits.
    return by_quadrant(torch.stack([-move["layers.2.bias"] for move in moves])), by_quadrant(probabilities)


HEADS = ["--mlo_stage2 solve", "--mlo_head_lr 0.1"]
QUADRANTS = [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize("quadrant", QUADRANTS[2:])
@pytest.mark.parametrize("flags", HEADS)
def test_the_gradient_points_to_the_labels(flags, quadrant):
    """With random masks, the patches of the quadrant with labels are those to be removed and reconstructed: the mean
    over updates is many standard errors above zero there (4 to 10 in trials), and less than half as many elsewhere."""
    gradients, _ = learn(quadrant, flags, 40, random_masks=True)
    t = gradients.mean(dim=0) / gradients.std(dim=0) * len(gradients) ** 0.5
    print(f"{flags}, labels in {quadrant}: t {t.tolist()}")
    assert t[quadrant] > 4 and (t > t[quadrant] / 2).sum() == 1


def test_the_probabilities_move_to_the_labels():
    """Four runs that differ in the quadrant with labels: it is removed with a higher probability than in the other
    runs, on average over the quadrants."""
    runs = torch.stack([learn(quadrant, HEADS[1], 60, random_masks=False)[1].flatten() for quadrant in QUADRANTS])
    own, others = runs.diagonal(), (runs.sum(dim=0) - runs.diagonal()) / 3
    print(f"probability of removal with labels {own.tolist()}, without {others.tolist()}")
    assert (own > others).all() and (own - others).mean() > 0.1
