"""Direction and noise of the hypergradient on the quadrant task: the expected result of quadrant.py.

python scripts/mlo_mae/quadrant_gradient.py OUT        OUT: the folder of quadrant.py; two minutes a seed on one core

For the plain MAE of every seed and many pairs of labelled batches (stages II and III), the head is solved on the first
batch, and the held-out loss of the second is differentiated with a fixed head (the direct path) and through the
solution of the head (the whole derivative). Along each direction, scaled as Adam scales steps, the script computes the
rate of change of the removed patches' errors on other images under random masks. Minus the learning rate times this
rate is the effect of a patch's weight on the held-out loss in the next step, so a weight should rise where the rate is
positive. The table has its means inside and outside the quadrant, and their difference in one pair of batches in
standard deviations.
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


def newest(folder: Path) -> Path:
    return list_checkpoints(folder)[0]


def load(checkpoint: Path):
    """Return the autoencoder and its optimizer."""
    content = torch.load(checkpoint, weights_only=True)
    model = build_model(f"mae_{MODEL}", norm_pix_loss=True)
    model.load_state_dict(content["model"])
    whole = Pretrainer(model)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(whole, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True)
    optimizer.load_state_dict(content["optimizer"])
    return model.eval(), optimizer


class Problem:
    """The autoencoder of one seed, its optimizer, and training and held-out images."""

    def __init__(self, folder: Path, split, ridge: float):
        torch.manual_seed(0)
        self.model, self.optimizer = load(newest(folder))
        self.images, self.targets = split
        self.cut = len(self.images) * 4 // 5
        self.fit = HeadFit(F.cross_entropy, torch.nn.Linear(self.model.cls_token.shape[-1], 10), ridge)

    def draw(self, size: int, held_out: bool = False) -> torch.Tensor:
        count = len(self.images) - self.cut if held_out else self.cut
        return torch.randperm(count)[:size] + self.cut * held_out

    def directions(self, size: int):
        """Return (direct path, path through the head) of one pair of batches, and the held-out top-1 in percent."""
        parts = self.draw(size), self.draw(size, held_out=True)
        features = [encoder_features(self.model, self.images[part], "avg") for part in parts]
        batches = [(f.detach().double(), self.targets[part]) for f, part in zip(features, parts)]
        unknowns = sum(p.numel() for p in self.fit.head.parameters())
        solution = self.fit.solve(torch.zeros(unknowns).double(), *batches[0])
        _, logits, *sent = self.fit.differentiate(solution, *batches)
        head, direct = (gradient_of((f * s.float()).sum(), trainable(self.model)) for f, s in zip(features, sent))
        return direct, head, 100 * (logits.argmax(1) == batches[1][1]).double().mean().item()

    def rates(self, direction, imgs, ids_keep, ids_removed) -> torch.Tensor:
        """Return the mean rate of the removed patches inside and outside the quadrant."""
        scaled = precondition(self.optimizer, trainable(self.model), direction, "adam")
        scaled = {f"model.{name}": value for name, value in scaled.items()}
        weights = {f"model.{name}": p.detach() for name, p in trainable(self.model).items()}
        with exact_arithmetic(self.model):
            result = directional_derivative_fd(
                Residuals(self.model, False), weights, scaled, (imgs, ids_keep, ids_removed), 1e-2
            )
        inside = (ids_removed // 8 < 4) & (ids_removed % 8 < 4)  # upper left
        return torch.stack([result[inside].mean(), result[~inside].mean()])

    def pair(self, size: int) -> tuple[torch.Tensor, float, float]:
        """Return the rates (direct, whole) x (inside, outside) of one pair of batches, the cosine of the paths, and
        top-1."""
        direct, head, top1 = self.directions(size)
        imgs = self.images[self.draw(128)]
        out = self.model.forward_pretrain(imgs, 0.75, torch.rand(128, 64))
        whole = {name: direct[name] + head[name] for name in direct}
        rates = [self.rates(direction, imgs, out.ids_keep, out.ids_removed) for direction in (direct, whole)]
        return torch.stack(rates), (dot(direct, head) / (norm(direct) * norm(head))).item(), top1


def line(seed: int, name: str, rates: torch.Tensor, cosine: float, top1: float) -> str:
    """Return a row of the table; `rates` (pairs, 2) are inside and outside."""
    errors = rates.mean(0) / rates.std(0) * len(rates) ** 0.5
    difference = rates[:, 0] - rates[:, 1]
    return (
        f"| {seed} | {top1:.0f} | {cosine:+.3f} | {name} | {errors[0]:+.1f} | {errors[1]:+.1f} | "
        f"{int((difference > 0).sum())} of {len(rates)} | {difference.mean() / difference.std():+.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pairs", type=int, default=12, help="of batches")
    parser.add_argument("--batch_size", type=int, default=256, help="labelled images in each of the two")
    parser.add_argument("--ridge", type=float, default=RIDGE, help="as --mlo_ridge")
    args = parser.parse_args()
    imgs, targets = images(args.out / "data", train=True)
    order = torch.randperm(len(imgs), generator=torch.Generator().manual_seed(0))
    print(
        "| seed | held-out top-1 | cosine of the paths | derivative | inside, standard errors | outside | inside > "
        "outside in | difference in one pair, deviations |\n|---|---|---|---|---|---|---|---|"
    )
    for seed in args.seeds:
        problem = Problem(args.out / f"mae-seed{seed}", (imgs[order], targets[order]), args.ridge)
        pairs = [problem.pair(args.batch_size) for _ in range(args.pairs)]
        rates = torch.stack([rates for rates, _, _ in pairs])
        cosine, top1 = (sum(pair[index] for pair in pairs) / len(pairs) for index in (1, 2))
        for index, name in enumerate(("direct path", "whole")):
            print(line(seed, name, rates[:, index], cosine, top1), flush=True)


if __name__ == "__main__":
    with user_errors("quadrant_gradient.py"):
        main()
