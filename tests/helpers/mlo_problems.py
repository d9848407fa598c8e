"""MLO-MAE on small problems, in float64 and with gradient descent in place of AdamW.

One step of each problem then equals the computation of the fixtures and of the unrolled graph.
"""

import re
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import main_pretrain
from methods import Pretrainer
from methods.mlo.inner_problems import trainable
from methods.mlo.labelled_task import Classification, StandardizedLinear
from methods.mlo.method import MLOMAE
from methods.mlo.segmentation_task import Segmentation
from models_mae import MaskedAutoencoderViT
from util.data.dense.patch_labels import patch_counts

EXACT = 1e-10  # float64: a chain of a few hundred operations, relative to the norm


class Batches(SimpleNamespace):
    """What `util.data.loader.Endless` does: `batch(number)`, on a device."""

    def on(self, device):
        return self


class Task:
    """A labelled task with given batches."""

    held_out, loss, score = [0], staticmethod(F.cross_entropy), staticmethod(Classification.score)
    logged = Classification.logged

    def __init__(self, features, head, train, val):
        self.features, self.made = features, head
        self.given = [Batches(batch=lambda i, b=b: b[i % len(b)]) for b in (train, val)]

    def head(self, width):
        return self.made

    def observe(self, head, features):
        """Let a head observe its features once; later calls have no effect."""

    def batches(self, every):
        return self.given


class Labelled(SimpleNamespace):
    def _replace(self, **changes):
        return Labelled(**vars(self) | changes)


def labelled(images, targets):
    return [Labelled(image=x, target=y, bad=torch.zeros(len(y))) for x, y in zip(images, targets)]


def the_method(model, task, flags="", inner_lr=0.1, head_lr=0.2, net=None, steps=1000):
    """Return an MLOMAE whose three problems use gradient descent, so the masking network moves by its gradient."""
    argv = f"--mlo_mae --mlo_labels same --amp_dtype fp32 --mlo_mask_lr 1 --mlo_precondition none {flags}".split()
    argv += (
        ["--mlo_head_lr", str(head_lr)]
        if not {"2", "solve"} & set(re.findall(r"--mlo_(?:levels|stage2) (\w+)", flags))
        else []
    )
    args = main_pretrain.get_args_parser().parse_args(argv)
    main_pretrain.check(args)
    method = MLOMAE(args, model)
    method.set_task(task)
    if net is not None:
        method.net.load_state_dict(net)
    method.to(next(model.parameters()).dtype)
    method.optimizer = torch.optim.SGD(method.net.parameters(), lr=1)
    if method.stage2.optimizer:
        method.stage2.optimizer = torch.optim.SGD(method.stage2.parameters(), lr=head_lr)
    pretrainer = Pretrainer(model, [method], steps)
    method.head_lr = head_lr
    pretrainer.attach(torch.optim.SGD(trainable(model).values(), lr=inner_lr))
    return pretrainer, method


def train_step(pretrainer, method, imgs, ratio):
    loss = sum(pretrainer(imgs, ratio).values())
    loss.backward()
    method.inner.step()
    method.inner.zero_grad()
    pretrainer.after_update(imgs, method.step, torch.ones(()))
    return loss.detach()


def move_of(pretrainer, method, batches, ratio) -> dict:
    """Return the hypergradient that moves the masking network after steps on `batches`."""
    result, original = [], method.hypergradient
    method.hypergradient = lambda *args: result.append(original(*args)) or result[-1]
    for imgs in batches:
        train_step(pretrainer, method, imgs, ratio)
    return {name: sum(part[name] for part in result) for name in result[0]}


def flat(gradients) -> torch.Tensor:
    return torch.cat([g.detach().flatten() for g in (gradients.values() if isinstance(gradients, dict) else gradients)])


def off(ours, theirs) -> float:
    """Return the relative error in norm."""
    ours, theirs = flat(ours), flat(theirs)
    return ((ours - theirs).norm() / theirs.norm()).item()


def cosine(one, other) -> float:
    one, other = flat(one).double(), flat(other).double()
    return (one @ other / (one.norm() * other.norm())).item()  # torch's function clamps norms as small as these


def small_vit(flags, dtype=torch.float64, depth=2, inner_lr=0.1, head_lr=0.3):
    """Return an autoencoder with a synthetic task: three classes of noise images, or with `--mlo_task segmentation` of
    their pixels, of which some are ignored."""
    model = MaskedAutoencoderViT(16, 4, 3, 24, depth, 2, 16, 1, 2, mlp_ratio=2.0, norm_pix_loss=True).to(dtype)
    draw = partial(torch.randn, dtype=dtype)
    head = (StandardizedLinear if "head_norm" in flags else nn.Linear)(24, 3).to(dtype).requires_grad_(False)
    if "head_norm" in flags:
        head.observe(3 * draw(50, 24) + draw(24))
    if "segmentation" in flags:
        flags, task = f"{flags} --dataset scenes", pixel_task(head, draw)
    else:
        pool = 0 if "cls" in flags else slice(1, None)
        task = Task(
            lambda m, x: m.encode(m.embed(x))[0][:, pool].reshape(len(x), -1, 24).mean(dim=1),
            head,
            labelled(draw(2, 6, 3, 16, 16), torch.randint(3, (2, 6))),
            labelled(draw(2, 5, 3, 16, 16), torch.randint(3, (2, 5))),
        )
    pretrainer, method = the_method(model, task, f"--mlo_hidden 20 {flags}", inner_lr, head_lr)
    return pretrainer, method, draw(4, 24, 3, 16, 16)


IGNORED = 255


def pixel_task(head, draw) -> Task:
    """Return a task of noise images with noisy masks of three classes, a fifth of whose pixels is ignored."""
    batches = []
    for count in (6, 5):
        masks = torch.randint(3, (2, count, 16, 16)).masked_fill(torch.rand(2, count, 16, 16) < 0.2, IGNORED)
        counts = [torch.stack([patch_counts(mask, (4, 4), 3, IGNORED) for mask in batch]) for batch in masks]
        batches.append(labelled(draw(2, count, 3, 16, 16), counts))
        for batch, mask in zip(batches[-1], masks):
            batch.mask = mask
    task = Task(Segmentation.features, head, *batches)
    task.loss, task.logged = Segmentation.loss, partial(Segmentation.logged, task)
    return task


def pixel_loss(logits, masks):
    """Return the loss of a dense head, which predicts the logits of a patch at each of its pixels: the cross-entropy of
    the labelled pixels, divided by the number of all. Logits (N * L, C), masks (N, H, W), square grids."""
    side = int((len(logits) // len(masks)) ** 0.5)
    grid = logits.view(len(masks), side, side, -1).permute(0, 3, 1, 2)
    dense = F.interpolate(grid, size=masks.shape[1:], mode="nearest")
    return F.cross_entropy(dense, masks, ignore_index=IGNORED, reduction="sum") / masks.numel()


@contextmanager
def by_pixel(method):
    """Let the loss of a segmentation task be that of all pixels, for the computation to compare with. Nothing changes
    for another task."""
    task, given = method.stage2.task, method.batches
    if task.loss is not Segmentation.loss:
        yield
        return
    task.loss = pixel_loss
    method.batches = [Batches(batch=lambda i, g=g: g.batch(i)._replace(target=g.batch(i).mask)) for g in given]
    yield
    task.loss, method.batches = Segmentation.loss, given


def twice(make):
    """Return two results of `make` from the same seed."""
    state = torch.get_rng_state()
    first = make()
    torch.set_rng_state(state)
    return first, make()


def in_float(given):
    def batch(number):
        result = given.batch(number)
        return result._replace(image=result.image.float())

    return Batches(batch=batch)


def vars_of(batch):
    return batch.imgs, batch.ids_keep, batch.ids_removed
