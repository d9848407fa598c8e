"""Which way does the hypergradient point on the quadrant task, on average? What quadrant.py should find, and how noisy.

python scripts/mlo_mae/quadrant_gradient.py OUT        OUT: the folder of quadrant.py; three minutes a seed on one core

For the plain MAE of every seed, a linear head is trained on the features of four fifths of the training images: to its
optimum (logistic regression), or for `--head_steps` of AdamW, as a head would be in a run. Then, for many pairs of
batches (held-out images for the direction, others for the errors), the rate of change of the removed patches' errors
along the direction that raises the held-out loss, scaled as Adam scales steps: minus the learning rate times that is
what the weight of a patch does to the held-out loss in the next step, so where it is positive a weight should rise.
Masks are those of the masking network as it was drawn. Mean inside the quadrant and outside over the batches, in
standard errors; and the difference in one batch, in deviations.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from quadrant import MODEL, ROOT
from sklearn.linear_model import LogisticRegression
from timm.optim import param_groups_weight_decay

sys.path.insert(0, str(ROOT))

from methods import Pretrainer
from methods.hypergrad import Residuals, exact_arithmetic, rates_fd
from methods.mask_net import load_mask_net
from methods.mlo_stages import gradient_of, step_along, trained
from models_mae import build_model
from util.checkpoint import list_checkpoints
from util.datasets import IMAGENET, read_images
from util.errors import user_errors
from util.features import encoder_features, mae_features
from util.loading import KeyedDataset
from util.transforms import eval_transform


def newest(folder: Path) -> Path:
    return list_checkpoints(folder)[0]


def load(checkpoint: Path):
    """The autoencoder and its optimizer."""
    content = torch.load(checkpoint, weights_only=True)
    model = build_model(f"mae_{MODEL}", norm_pix_loss=True)
    model.load_state_dict(content["model"])
    whole = Pretrainer(model)
    optimizer = torch.optim.AdamW(param_groups_weight_decay(whole, 0.05), lr=1e-3, betas=(0.9, 0.95), fused=True)
    optimizer.load_state_dict(content["optimizer"])
    return model.eval(), optimizer


def all_images(data: Path):
    args = SimpleNamespace(dataset="imagefolder", data_path=str(data), seed=0, in_chans=3)
    dataset = KeyedDataset(read_images(args, train=True), eval_transform((32, 32), *IMAGENET, None), args)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [dataset[place] for place in order]
    return torch.stack([s.image for s in samples]), torch.tensor([s.target for s in samples])


def best_head(features, targets) -> torch.nn.Linear:
    """The one optimum of the penalised cross-entropy on standardised features."""
    mean, spread = features.mean(0), features.std(0)
    standard = ((features - mean) / spread).double().numpy()
    fitted = LogisticRegression(C=0.01, max_iter=3000, tol=1e-6).fit(standard, targets.numpy())
    head = torch.nn.Linear(features.shape[1], 10).requires_grad_(False)
    head.weight.copy_(torch.from_numpy(fitted.coef_).float() / spread)
    head.bias.copy_(torch.from_numpy(fitted.intercept_).float() - head.weight @ mean)
    return head


def trained_head(features, targets, steps: int) -> torch.nn.Linear:
    """After some steps of AdamW on the features as they are."""
    head = torch.nn.Linear(features.shape[1], 10)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = torch.randint(len(features), (256,))
        F.cross_entropy(head(features[batch]), targets[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return head.requires_grad_(False)


def rates(model, optimizer, head, net, train, held_out, size: int) -> tuple[float, float]:
    """Mean rate of the removed patches inside the quadrant and outside, from one pair of batches."""
    batch = torch.randperm(len(held_out[0]))[:size]
    loss = F.cross_entropy(head(encoder_features(model, held_out[0][batch], "avg")), held_out[1][batch])
    direction = step_along(optimizer, trained(model), gradient_of(loss, trained(model)), "adam")
    direction = {f"model.{name}": value for name, value in direction.items()}
    imgs = train[0][torch.randperm(len(train[0]))[:size]]
    out = model.forward_pretrain(imgs, 0.75, net[0](net[1].network(imgs)).detach())
    weights = {f"model.{name}": p.detach() for name, p in trained(model).items()}
    with exact_arithmetic(model):
        found = rates_fd(Residuals(model, False), weights, direction, (imgs, out.ids_keep, out.ids_removed), 1e-2)
    rows, columns = out.ids_removed // 8, out.ids_removed % 8
    inside = (rows < 4) & (columns < 4)  # upper left
    return found[inside].mean().item(), found[~inside].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--head_steps", type=int, default=0, help="0: to its optimum")
    parser.add_argument("--masks", default="before", choices=["before", "mlo"], help="as drawn, or as learned")
    args = parser.parse_args()
    imgs, targets = all_images(args.out / "data")
    cut = len(imgs) * 4 // 5
    train, held_out = (imgs[:cut], targets[:cut]), (imgs[cut:], targets[cut:])
    print("| seed | head, held-out top-1 | inside, standard errors | outside | inside > outside in | difference in one "
          "batch, deviations |\n|---|---|---|---|---|---|")  # fmt: skip
    for seed in args.seeds:
        torch.manual_seed(seed)
        last = newest(args.out / f"mae-seed{seed}")
        model, optimizer = load(last)
        source = newest(args.out / f"{args.masks}-seed{seed}")
        net = load_mask_net(str(source), model)
        features = torch.cat([mae_features(model, part, "avg") for part in train[0].split(256)])
        steps = args.head_steps
        head = trained_head(features, train[1], steps) if steps else best_head(features, train[1])
        top1 = (head(mae_features(model, held_out[0], "avg")).argmax(1) == held_out[1]).float().mean().item()
        found = torch.tensor([rates(model, optimizer, head, net, train, held_out, args.batch_size)
                              for _ in range(args.batches)])  # fmt: skip
        errors = found.mean(0) / found.std(0) * len(found) ** 0.5
        difference = found[:, 0] - found[:, 1]
        print(f"| {seed} | {100 * top1:.1f} | {errors[0]:+.1f} | {errors[1]:+.1f} | {int((difference > 0).sum())} of "
              f"{len(found)} | {difference.mean() / difference.std():+.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    with user_errors("quadrant_gradient.py"):
        main()
