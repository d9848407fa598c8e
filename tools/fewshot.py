"""Few-shot accuracy of a frozen encoder: logistic regression on the features of a few images of each class.

python tools/fewshot.py output_dir/checkpoint-399.pth --data_path DIR --out output_dir/fewshot.json

Logistic regression on frozen features is the low-shot evaluation of Assran et al. 2022 (Masked Siamese Networks); the
repeated draws and their confidence interval are additions. The labelled images are drawn from the training split,
accuracy is measured on the whole test split. The images of k shots are among those of more shots, and one seed draws
the same images for every encoder.
"""

import math
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from scipy import stats
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler, normalize
from tqdm import tqdm

from evaluation import command_line, judging
from util.arguments import add_leak_argument
from util.data.sources import Subset
from util.errors import UserError, user_errors

NORMALIZE = ("standard", "l2", "none")
STATISTICS = 10_000  # largest number of training images whose mean and standard deviation standardise features


def get_args_parser():
    parser = judging.evaluation_parser("Few-shot accuracy of a frozen encoder.")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 5, 10], help="labelled images of each class")
    parser.add_argument(
        "--draws", type=int, default=10, help="draws of labelled images; mean and confidence interval are over them"
    )
    parser.add_argument(
        "--C",
        type=float,
        default=0.1,
        help="inverse strength of the L2 penalty, as in scikit-learn; lower regularises more",
    )
    parser.add_argument(
        "--normalize",
        choices=NORMALIZE,
        default="standard",
        help="standard: features standardised by 10,000 training images without labels (as the BatchNorm of MAE's "
        "linear probe does by its batches); l2: features of unit length",
    )
    add_leak_argument(parser)
    parser.add_argument("--out", default="", help="JSON file for the result; the ledger is in its folder")
    return parser


def check(args) -> Path | None:
    """Return --out as a path. Raises UserError for bad values."""
    if min(args.shots) < 1 or len(set(args.shots)) < len(args.shots):
        raise UserError(f"--shots {' '.join(map(str, args.shots))} must be positive numbers, each once")
    if args.draws < 2:
        raise UserError(f"--draws {args.draws} must be at least 2: one draw has no confidence interval")
    if not 0 < args.C < math.inf:
        raise UserError(f"--C {args.C} must be positive and finite")
    return command_line.check_out(args, ".json")


def draw(labels: np.ndarray, most: int, seed: int, number: int) -> np.ndarray:
    """Return draw `number`: indices (classes, most) of different images of each class; the first k columns are its draw
    of k images. Raises UserError if a class has fewer than `most` images."""
    rng = np.random.default_rng([seed, number])
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < most:
            raise UserError(f"--shots {most}: class {label} has only {len(members)} training images")
        chosen.append(rng.permutation(members)[:most])
    return np.stack(chosen)


def normalized(train: np.ndarray, test: np.ndarray, how: str, of=slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Normalise the features (M, D) of both splits by `--normalize`, with the statistics of the training images `of`. A
    constant dimension is only centred."""
    if how == "standard":
        scaler = StandardScaler().fit(train[of])
        return scaler.transform(train), scaler.transform(test)
    return (normalize(train), normalize(test)) if how == "l2" else (train, test)


def fewshot_accuracies(train, labels, test, test_labels, shots, draws, C: float) -> dict[int, list[float]]:
    """Return {k: top-1 accuracy in percent of each draw}. Features (M, D) and labels (M,) are numpy arrays; `draws` are
    those of `draw`, as indices into `train`."""
    accuracies = {k: [] for k in shots}
    for chosen in tqdm(draws, desc="logistic regression", unit=" draws", disable=None, leave=False):
        for k in shots:
            few = chosen[:, :k].ravel()
            model = _fit(train[few], labels[few], C)
            accuracies[k].append(100 * float((model.predict(test) == test_labels).mean()))
    return accuracies


def _fit(features, labels, C: float) -> LogisticRegression:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            return LogisticRegression(C=C, max_iter=5000).fit(features, labels)
    except ConvergenceWarning as warning:
        raise UserError(f"--C {C}: the logistic regression does not converge in 5000 steps; lower it") from warning


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Return the mean and half the width of its confidence interval by Student's t: t(level, n - 1) · s / √n."""
    n = len(values)
    half = stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def needed_images(images, args) -> tuple[Subset, list[np.ndarray], np.ndarray]:
    """Return the training images to encode, the draws as indices into them, and the mask (M,) of those that give the
    statistics of `normalized`. Raises UserError for a stream."""
    judging.check_random_access(args.dataset, images)
    labels = np.array(images.targets)
    draws = [draw(labels, max(args.shots), args.seed, number) for number in range(args.draws)]
    count = STATISTICS if args.normalize == "standard" else 0
    some = np.random.default_rng(args.seed).permutation(len(labels))[:count]
    indices = np.unique(np.concatenate([some, *(chosen.ravel() for chosen in draws)]))
    return Subset(images, indices), [np.searchsorted(indices, chosen) for chosen in draws], np.isin(indices, some)


def main(args) -> dict:
    """Return the mean accuracy in percent and half its 95 % confidence interval, for each number of shots."""
    out = check(args)
    judged = judging.open_encoder(args, command_line.checkpoint_of(args))
    images, held_out = judging.labelled_splits(args)
    part, draws, of = needed_images(images, args)
    record = judged.record("fewshot", train=images, test=held_out)
    splits = ((part, "training images"), (held_out, "test images"))
    (train, labels), (test, test_labels) = ([x.numpy() for x in judged.features(*split)] for split in splits)
    if len(train) < len(part):
        raise UserError(
            f"{len(part) - len(train)} of the drawn images are unreadable (named above): repair or remove them"
        )
    train, test = normalized(train.astype(np.float64), test.astype(np.float64), args.normalize, of)
    accuracies = fewshot_accuracies(train, labels, test, test_labels, args.shots, draws, args.C)
    result = {}
    for k, values in accuracies.items():
        mean, half = interval(values)
        result |= {f"fewshot{k}_acc1": mean, f"fewshot{k}_interval95": half}
        print(f"{k:3d} per class: {mean:.2f} ± {half:.2f} %  (95 % confidence interval over {args.draws} draws)")
    judged.publish(record, result, len(part) + len(held_out), json=out, draws_acc1=accuracies)
    return result


if __name__ == "__main__":
    with user_errors("fewshot.py"):
        main(get_args_parser().parse_args())
