"""Direction and noise of the hypergradient on the quadrant task: the expected result of quadrant.py.

python scripts/mlo_mae/quadrant_gradient.py OUT        OUT: the folder of quadrant.py; two minutes a seed on one core

For the plain MAE of every seed and several pairs of labelled batches, the head is solved on the first batch (stage II),
and the loss of the second batch (held out, stage III) is differentiated with respect to the encoder: with a fixed head
(the direct path), and through the solution of the head (the whole derivative). The script computes the rate of change
of the removed patches' reconstruction errors along each of these directions, after Adam's scaling. The errors are those
of training images with random masks; these images are drawn independently, and some may also be in the first batch.
Minus the learning rate times this rate is the effect of a patch's weight on the held-out loss after the next step. A
weight should therefore rise where the rate is positive.

The table has t-statistics: the mean rate over all pairs in units of its standard error, for patches inside and outside
the quadrant. Its last columns have the number of pairs in which the rate is larger inside than outside, and the mean of
this difference in units of its standard deviation over pairs.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from quadrant import MODEL, RIDGE, ROOT, images
from timm.optim import param_groups_weight_decay

sys.path.insert(0, str(ROOT))

from methods import Pretrainer
from methods.mlo.hypergradient import Residuals, directional_derivative_fd, dot, exact_arithmetic, norm
from methods.mlo.inner_problems import gradient_of, precondition, trainable
from methods.mlo.solved_head import HeadFit
from models_encoder import encoder_features
from models_mae import build_model
from util.checkpoint.files import list_checkpoints
from util.errors import user_errors


def load(checkpoint: Path):
    """Load the autoencoder, in eval mode, and its optimizer."""
    content = torch.load(checkpoint, weights_only=True)
    model = build_model(f"mae_{MODEL}", norm_pix_loss=True)
    model.load_state_dict(content["model"])
    groups = param_groups_weight_decay(Pretrainer(model), 0.05)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
    optimizer.load_state_dict(content["optimizer"])
    return model.eval(), optimizer


class Problem:
    """The autoencoder of one seed, its optimizer, and labelled images: four fifths for training, the rest held out.

    `folder` is a run of the plain MAE, `labelled` are images (N, C, H, W) and targets (N).
    """

    def __init__(self, folder: Path, labelled: tuple[torch.Tensor, torch.Tensor], ridge: float):
        torch.manual_seed(0)
        self.model, self.optimizer = load(list_checkpoints(folder)[0])  # the newest one
        self.images, self.targets = labelled
        self.train_count = len(self.images) * 4 // 5
        self.fit = HeadFit(F.cross_entropy, torch.nn.Linear(self.model.cls_token.shape[-1], 10), ridge)

    def draw(self, size: int, held_out: bool = False) -> torch.Tensor:
        """Return the indices (size) of random training or held-out images."""
        count = len(self.images) - self.train_count if held_out else self.train_count
        return torch.randperm(count)[:size] + self.train_count * held_out

    def directions(self, size: int):
        """Return the gradients of the held-out loss for one pair of batches of `size` images, along the direct path and
        along the path through the head, and the held-out top-1 in percent."""
        indices = self.draw(size), self.draw(size, held_out=True)
        features = [encoder_features(self.model, self.images[ids], "avg") for ids in indices]
        batches = [(f.detach().double(), self.targets[ids]) for f, ids in zip(features, indices)]
        unknowns = sum(p.numel() for p in self.fit.head.parameters())
        solution = self.fit.solve(torch.zeros(unknowns).double(), *batches[0])
        _, logits, *gradients = self.fit.differentiate(solution, *batches)
        head, direct = (gradient_of((f * g.float()).sum(), trainable(self.model)) for f, g in zip(features, gradients))
        return direct, head, 100 * (logits.argmax(1) == batches[1][1]).double().mean().item()

    def rates(self, direction, imgs, ids_keep, ids_removed) -> torch.Tensor:
        """Return the mean rate of change (2) of the removed patches' errors along `direction`, after Adam's scaling,
        inside and outside the quadrant."""
        scaled = precondition(self.optimizer, trainable(self.model), direction, "adam")
        scaled = {f"model.{name}": value for name, value in scaled.items()}
        weights = {f"model.{name}": p.detach() for name, p in trainable(self.model).items()}
        with exact_arithmetic(self.model):
            rate = directional_derivative_fd(
                Residuals(self.model, False), weights, scaled, (imgs, ids_keep, ids_removed), 1e-2
            )
        inside = (ids_removed // 8 < 4) & (ids_removed % 8 < 4)  # upper left
        return torch.stack([rate[inside].mean(), rate[~inside].mean()])

    def pair(self, size: int) -> tuple[torch.Tensor, float, float]:
        """Return the rates (2, 2) of one pair of batches, (direct path, whole derivative) x (inside, outside), the
        cosine between the two paths, and the held-out top-1 in percent."""
        direct, head, top1 = self.directions(size)
        imgs = self.images[self.draw(128)]
        out = self.model.forward_pretrain(imgs, 0.75, torch.rand(128, 64))
        whole = {name: direct[name] + head[name] for name in direct}
        rates = [self.rates(direction, imgs, out.ids_keep, out.ids_removed) for direction in (direct, whole)]
        return torch.stack(rates), (dot(direct, head) / (norm(direct) * norm(head))).item(), top1


def table_row(seed: int, name: str, rates: torch.Tensor, cosine: float, top1: float) -> str:
    """Return a row of the table for the rates (pairs, 2) inside and outside the quadrant."""
    t = rates.mean(0) / rates.std(0) * len(rates) ** 0.5
    difference = rates[:, 0] - rates[:, 1]
    return (
        f"| {seed} | {top1:.0f} | {cosine:+.3f} | {name} | {t[0]:+.1f} | {t[1]:+.1f} | "
        f"{int((difference > 0).sum())} of {len(rates)} | {difference.mean() / difference.std():+.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=12, help="pairs of labelled batches per seed")
    parser.add_argument("--batch_size", type=int, default=256, help="labelled images in each batch of a pair")
    parser.add_argument("--ridge", type=float, default=RIDGE, help="ridge of the head, as --mlo_ridge")
    args = parser.parse_args()
    imgs, targets = images(args.out / "data", train=True)
    order = torch.randperm(len(imgs), generator=torch.Generator().manual_seed(0))
    print(
        "| seed | held-out top-1 | cosine of the paths | derivative | inside, t | outside, t | inside > outside in | "
        "difference / its standard deviation |\n|---|---|---|---|---|---|---|---|"
    )
    for seed in args.seeds:
        problem = Problem(args.out / f"mae-seed{seed}", (imgs[order], targets[order]), args.ridge)
        pairs = [problem.pair(args.batch_size) for _ in range(args.pairs)]
        rates = torch.stack([rates for rates, _, _ in pairs])
        cosine, top1 = (sum(pair[index] for pair in pairs) / len(pairs) for index in (1, 2))
        for index, name in enumerate(("direct path", "whole")):
            print(table_row(seed, name, rates[:, index], cosine, top1), flush=True)


if __name__ == "__main__":
    with user_errors("quadrant_gradient.py"):
        main()
