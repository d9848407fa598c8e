"""Few-shot accuracy of a frozen encoder: logistic regression on the features of a few images of each class.

python tools/fewshot.py output_dir/checkpoint-399.pth --data_path DIR --out output_dir/fewshot.json

Logistic regression on frozen features is the low-shot evaluation of Assran et al. 2022 (Masked Siamese Networks); more
draws and an interval are ours. The labelled images are drawn from the training split, the accuracy is that of the whole
test split. A draw of more images contains those of fewer, and one seed draws the same images for every encoder.
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

from evaluation import command_line, judging
from util.arguments import add_leak_argument
from util.data.sources import Subset
from util.errors import UserError, user_errors
from util.report.ledger import Record, write_json

NORMALIZE = ("standard", "l2", "none")
STATISTICS = 10_000  # training images, at most, whose mean and deviation standardise: so that not all need be encoded


def get_args_parser():
    parser = judging.parser("Few-shot accuracy of a frozen encoder.")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 5, 10], help="labelled images of each class")
    parser.add_argument(
        "--draws", type=int, default=10, help="draws of labelled images, whose mean and interval are shown"
    )
    parser.add_argument(
        "--C", type=float, default=0.1, help="inverse strength of the L2 penalty, as in scikit-learn: lower is smoother"
    )
    parser.add_argument(
        "--normalize",
        choices=NORMALIZE,
        default="standard",
        help="features: standardised by 10,000 training images without labels (as the BatchNorm of MAE's linear "
        "probe does by its batches), of unit length, or as they are",
    )
    add_leak_argument(parser)
    parser.add_argument("--out", default="", help="JSON file for the result; its folder gets the line of the ledger")
    return parser


def check(args) -> None:
    if min(args.shots) < 1 or len(set(args.shots)) < len(args.shots):
        raise UserError(f"--shots {' '.join(map(str, args.shots))} must be positive numbers, each once")
    if args.draws < 2:
        raise UserError(f"--draws {args.draws} must be at least 2: an interval needs a deviation")
    if not 0 < args.C < math.inf:
        raise UserError(f"--C {args.C} must be positive and finite")
    command_line.check_out(args, ".json")


def draw(labels: np.ndarray, most: int, seed: int, number: int) -> np.ndarray:
    """Draw `number`: indices (classes, most) of different images of every class; the first k columns are its draw of k.

    UserError when a class has fewer images.
    """
    rng = np.random.default_rng([seed, number])
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < most:
            raise UserError(f"--shots {most}: class {label} has only {len(members)} training images")
        chosen.append(rng.permutation(members)[:most])
    return np.stack(chosen)


def normalized(train: np.ndarray, test: np.ndarray, how: str, of=slice(None)) -> tuple[np.ndarray, np.ndarray]:
    """Features (M, D) of both splits, by `--normalize`, with the statistics `of` these training images. A dimension
    that never changes is only centred."""
    if how == "standard":
        scaler = StandardScaler().fit(train[of])
        return scaler.transform(train), scaler.transform(test)
    return (normalize(train), normalize(test)) if how == "l2" else (train, test)


def fewshot_accuracies(train, labels, test, test_labels, shots, draws, C: float) -> dict[int, list[float]]:
    """{k: top-1 in percent of every draw}. Features (M, D), labels (M,), numpy; `draws` as of `draw`, in `train`."""
    found = {k: [] for k in shots}
    for chosen in draws:
        for k in shots:
            few = chosen[:, :k].ravel()
            model = _fit(train[few], labels[few], C)
            found[k].append(100 * float((model.predict(test) == test_labels).mean()))
    return found


def _fit(features, labels, C: float) -> LogisticRegression:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", ConvergenceWarning)
            return LogisticRegression(C=C, max_iter=5000).fit(features, labels)
    except ConvergenceWarning as warning:
        raise UserError(f"--C {C}: the logistic regression does not converge in 5000 steps; lower it") from warning


def interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half the width of its confidence interval by Student's t: t(level, n - 1) · s / √n."""
    n = len(values)
    half = stats.t.ppf((1 + level) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n)
    return float(np.mean(values)), float(half)


def needed_images(images, args) -> tuple[Subset, list[np.ndarray], np.ndarray]:
    """The training images that are looked at, the draws as places among them, and which of them give the statistics."""
    if not hasattr(images, "load"):
        raise UserError(f"--dataset {args.dataset} is a stream, of which no images can be drawn")
    labels = np.array(images.targets)
    draws = [draw(labels, max(args.shots), args.seed, number) for number in range(args.draws)]
    some = np.random.default_rng(args.seed).permutation(len(labels))[
        : STATISTICS if args.normalize == "standard" else 0
    ]
    places = np.unique(np.concatenate([some, *(chosen.ravel() for chosen in draws)]))
    return Subset(images, places), [np.searchsorted(places, chosen) for chosen in draws], np.isin(places, some)


def main(args) -> dict:
    """Mean accuracy in percent and half its 95 % interval, for every number of shots."""
    check(args)
    judged = judging.open_encoder(args, command_line.named(args))
    images, held_out = judging.labelled_splits(judged.args)
    part, draws, of = needed_images(images, args)
    record = Record("fewshot", judged.args, judged.weights, train=images, test=held_out)
    (train, labels), (test, test_labels) = ([x.numpy() for x in judged.features(split)] for split in (part, held_out))
    if len(train) < len(part):
        raise UserError(
            f"{len(part) - len(train)} of the drawn images are unreadable (named above): mend or remove them"
        )
    train, test = normalized(train.astype(np.float64), test.astype(np.float64), args.normalize, of)
    found = fewshot_accuracies(train, labels, test, test_labels, args.shots, draws, args.C)
    result = {}
    for k, values in found.items():
        mean, half = interval(values)
        result |= {f"fewshot{k}_acc1": mean, f"fewshot{k}_interval95": half}
        print(f"{k:3d} per class: {mean:.2f} ± {half:.2f} %  (95 % interval of the mean over {args.draws} draws)")
    if args.out:
        write_json(args.out, judged.args, result=result, draws_acc1=found)
    judging.publish(judged, record, result, len(part) + len(held_out))
    return result


if __name__ == "__main__":
    with user_errors("fewshot.py"):
        main(get_args_parser().parse_args())
