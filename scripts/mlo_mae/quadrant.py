"""Learned masks on a task whose relevant patches are known: digits in one quadrant of a textured canvas.

python scripts/mlo_mae/quadrant.py OUT        three seeds: half an hour on one core; --seeds 0 for one

For every seed, a short plain MAE is continued by MLO-MAE with a small learning rate and a head that is solved at every
move (docs/mlo.md gives the reasons). Then the script computes the area under the ROC curve of the masking network's
probabilities, patches inside the quadrant against those outside (0.5: no difference; above: it removes the inside),
before and after learning. Last, the same MAE is continued with two frozen masks, the learned one and its opposite
(which removes the patches that the other keeps): the validation loss of the best head after one epoch and after all,
which the learned mask should lower, and a linear probe. Finished runs are skipped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from methods.mlo.masking_network import load_mask_net  # noqa: E402
from methods.mlo.solved_head import HeadFit, standardized  # noqa: E402
from models_encoder import mae_features  # noqa: E402
from models_mae import build_model  # noqa: E402
from util.data.image_format import IMAGENET  # noqa: E402
from util.data.readers import read_images  # noqa: E402
from util.data.samples import KeyedDataset  # noqa: E402
from util.data.transforms import eval_transform  # noqa: E402
from util.errors import UserError, user_errors  # noqa: E402

RECIPE = "--aug none --norm_pix_loss --vis_freq 100 --num_workers 0"
PLAIN = "--batch_size 64 --lr 1e-3 --warmup_epochs 2"
LEARNING = (
    "--batch_size 128 --lr 1e-4 --warmup_epochs 0 --mlo_labels same --mlo_batch_size 256 --mlo_unroll 1 "
    "--mlo_stage2 solve --mlo_mask_lr 0.1"
)
MODEL = "vit_micro_patch4"
RIDGE = 0.01


def python(*words: str) -> None:
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)


def pretrain(folder: Path, data: Path, seed: int, epochs: int, flags: str) -> Path:
    """Return the last checkpoint of a run, which is made if it does not exist."""
    last = folder / f"checkpoint-{epochs - 1}.pth"
    if not last.exists():
        where = ("--data_path", data, "--output_dir", folder, "--resume", "auto", "--amp_dtype", "fp32")
        python("main_pretrain.py", "--model", f"mae_{MODEL}", "--seed", seed, "--epochs", epochs, *where,
               *RECIPE.split(), *flags.split())  # fmt: skip
    return last


def probe(folder: Path, checkpoint: Path, data: Path, seed: int) -> float:
    """Return the top-1 accuracy of a linear probe on the validation images in percent."""
    if not (folder / "probe.json").exists():
        where = ("--data_path", data, "--output_dir", folder, "--overwrite", "--amp_dtype", "fp32")
        python("main_linprobe.py", "--model", MODEL, "--finetune", checkpoint, "--seed", seed, *where,
               "--cache_features", "--global_pool", "--num_workers", "0")  # fmt: skip
    return json.loads((folder / "probe.json").read_text())["result"]["eval/acc1"]


def images(data: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all images of a split, and their labels."""
    args = SimpleNamespace(dataset="imagefolder", data_path=str(data), seed=0, in_chans=3)
    transform = eval_transform((32, 32), *IMAGENET, None)
    dataset = KeyedDataset(read_images(args, train=train), transform, seed=0, in_chans=3)
    samples = [dataset[index] for index in range(len(dataset))]
    return torch.stack([s.image for s in samples]), torch.tensor([s.target for s in samples])


@torch.no_grad()
def separation(checkpoint: Path, data: Path) -> tuple[float, float, float]:
    """Return the area under the curve, and the mean probability inside and outside, over the validation images."""
    net, embedding = load_mask_net(str(checkpoint), build_model(f"mae_{MODEL}"))
    p = net(embedding.network(images(data, train=False)[0])).sigmoid()
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[:4, :4] = True  # upper left
    inside = inside.flatten()
    area = roc_auc_score(inside.expand(p.shape).flatten().numpy(), p.flatten().numpy())
    return area, p[:, inside].mean().item(), p[:, ~inside].mean().item()


def validation_loss(checkpoint: Path, data: Path) -> float:
    """Return the loss on the validation images of the best head for the training images (--mlo_stage2 solve)."""
    model = build_model(f"mae_{MODEL}", norm_pix_loss=True)
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    losses = []
    for train in (True, False):
        imgs, targets = images(data, train)
        losses.append((torch.cat([mae_features(model, part, "avg") for part in imgs.split(256)]).double(), targets))
    (ours, targets), (theirs, labels) = losses
    fit = HeadFit(F.cross_entropy, torch.nn.Linear(ours.shape[1], 10), RIDGE)
    solution = fit.solve(torch.zeros(10 * ours.shape[1] + 10).double(), ours, targets, 1e-6)
    return F.cross_entropy(fit.logits(solution, standardized(theirs, ours)), labels).item()


def changed(checkpoint: Path, to: Path, sign: float) -> Path:
    """Write the checkpoint with the masking network's output multiplied by `sign`; -1 gives the opposite order."""
    content = torch.load(checkpoint, weights_only=True)
    for name in ("weight", "bias"):
        content["methods"][f"mlo_mae.net.layers.2.{name}"] *= sign
    torch.save(content, to)
    return to


def one_seed(out: Path, data: Path, seed: int, args) -> dict[str, float]:
    warm = f"--init_from {pretrain(out / f'mae-seed{seed}', data, seed, args.epochs, PLAIN)}"
    mlo = f"{warm} --mlo_mae {args.learning}"
    learned = pretrain(out / f"mlo-seed{seed}", data, seed, args.moves, mlo)
    # The masking network before learning: it never moves.
    before = pretrain(out / f"before-seed{seed}", data, seed, 1, f"{mlo} --mlo_update_every 1000")
    mirrored = changed(learned, out / f"mirrored-seed{seed}.pth", -1)
    row = {}
    for name, source in (("before", before), ("learned", learned), ("mirrored", mirrored)):
        area, inside, outside = separation(source, data)
        row[f"AUC {name}"] = area
        print(f"seed {seed}, {name}: AUC {area:.3f}, inside {inside:.3f}, outside {outside:.3f}", flush=True)
    for name, source in (("learned", learned), ("mirrored", mirrored)):
        frozen = f"{PLAIN} {warm} --mlo_mae --mlo_frozen --mlo_mask_net {source}"
        checkpoint = pretrain(out / f"frozen-{name}-seed{seed}", data, seed + 100, args.after, frozen)
        for epochs in (1, args.after):
            loss = validation_loss(checkpoint.with_name(f"checkpoint-{epochs - 1}.pth"), data)
            row[f"validation loss, {name}, after {epochs}"] = loss
        row[f"probe {name}"] = probe(out / f"probe-{name}-seed{seed}", checkpoint, data, seed)
    return row


def check_protocol(out: Path, protocol: str) -> None:
    """Raise UserError when `out` holds runs with other flags, which would count as finished runs of this call."""
    out.mkdir(parents=True, exist_ok=True)
    written = out / "protocol.txt"
    if any(out.iterdir()) and (not written.exists() or written.read_text() != protocol):
        raise UserError(f"{out} holds runs with other flags: give an empty folder")
    written.write_text(protocol)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=2, help="of plain MAE")
    parser.add_argument("--moves", type=int, default=2, help="epochs in which the masks move, 35 times in each")
    parser.add_argument("--after", type=int, default=6, help="epochs of encoders with frozen masks")
    parser.add_argument("--learning", default=LEARNING, help="flags of MLO-MAE")
    args = parser.parse_args()
    check_protocol(args.out, f"{RECIPE} {PLAIN} {args.epochs} {args.moves} {args.after} {args.learning}\n")
    data = args.out.resolve() / "data"
    if not data.exists():
        python("tools/quadrant_digits.py", data)
    rows = [one_seed(args.out.resolve(), data, seed, args) for seed in args.seeds]
    seeds = " | ".join(f"seed {seed}" for seed in args.seeds)
    print(f"| | {seeds} | mean | deviation |\n" + "|---" * (len(rows) + 3) + "|")
    for name in rows[0]:
        values = [row[name] for row in rows]
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        print(
            f"| {name} | " + " | ".join(f"{v:.2f}" for v in values) + f" | {statistics.mean(values):.2f} | {spread} |"
        )
    (args.out / "quadrant.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    with user_errors("quadrant.py"):
        main()
