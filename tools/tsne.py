"""t-SNE of the test features of one or several checkpoints, side by side, and the ratio of the mean cosine similarity
within classes to that between classes.

python tools/tsne.py OUT/mae/checkpoint-399.pth OUT/mlo/checkpoint-399.pth random --data_path DIR --out tsne.png

Picture and ratio are Figure 7 and Table 14 of "Downstream Task Guided Masking Learning in Masked Autoencoders Using
Multi-Level Optimization" (MLO-MAE, Appendix C.3).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from evaluation import command_line, judging
from evaluation.encoder import count_classes
from evaluation.publish import write_comparison
from util.data.readers import read_images
from util.data.sources import Subset
from util.errors import UserError, user_errors
from util.report.curves import style
from util.report.sheet import save_figure

CAPTION = (
    "one point for each test image; t-SNE's axes have no unit\n"
    "intra / inter: mean cosine similarity of the features of two images of one class,\n"
    "divided by that of two images of different classes"
)
MOST_NAMED = 60  # classes with a colour, a marker and a line in the legend
PCA_DIMENSIONS = 50  # to which features are reduced first, as van der Maaten and Hinton 2008 do (Section 4.2)


def get_args_parser():
    parser = judging.evaluation_parser(
        "t-SNE of test features, and the ratio of similarity within to between classes.", several=True
    )
    parser.add_argument(
        "--images", type=int, default=2000, help="images of the test split, the same for all checkpoints; 0: all"
    )
    parser.add_argument("--perplexity", type=float, default=30.0, help="effective number of neighbours of a point")
    parser.add_argument(
        "--titles", nargs="+", default=[], help="titles of the plots; without it the names of the checkpoints"
    )
    command_line.add_out_flag(parser, "; the numbers are written beside it (.json) and into the ledger of its folder")
    return parser


def check(args) -> Path:
    """Return --out as a path. Raises UserError for bad values."""
    names = command_line.checkpoints_of(args)
    if args.titles and len(args.titles) != len(names):
        raise UserError(f"--titles has {len(args.titles)} for {len(names)} checkpoints: give one each, or none")
    if args.images < 0:
        raise UserError(f"--images {args.images} must not be negative; 0 takes all")
    if not 1 < args.perplexity < float("inf"):
        raise UserError(f"--perplexity {args.perplexity} must be a number above 1")
    return command_line.needed_picture(args)


def class_similarity(features: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Return the mean cosine similarity over all pairs of different images of one class (`intra`), over all pairs of
    images of two classes (`inter`), and `ratio`, intra / inter (MLO-MAE, Table 14). Features (M, D), labels (M,).

    Exact without an (M, M) matrix: the sum over the pairs of a set is the squared length of its sum of unit vectors,
    less the pairs of an image with itself. Raises UserError if there are no such pairs.
    """
    unit = F.normalize(features.double(), dim=1)
    sums = torch.zeros(int(labels.max()) + 1, unit.shape[1], dtype=torch.float64).index_add_(0, labels, unit)
    counts = torch.bincount(labels).double()
    of_themselves = unit.square().sum()  # M, but for features of length zero
    within, everything = sums.square().sum(), sums.sum(dim=0).square().sum()
    pairs, total = (counts * (counts - 1)).sum(), float(len(labels) ** 2)
    if pairs < 1 or counts.max() == len(labels):
        raise UserError("the test images must be of at least two classes, one of them with two images: raise --images")
    intra = ((within - of_themselves) / pairs).item()
    inter = ((everything - within) / (total - counts.square().sum())).item()
    return {"intra": intra, "inter": inter, "ratio": intra / inter if inter else float("nan")}


def chosen_images(args):
    """Draw `--images` of the test split by `--seed`: the same for every checkpoint. Raises UserError for a stream."""
    images = read_images(args, train=False)
    count_classes(args, images)
    judging.check_random_access(args.dataset, images)
    if 0 < args.images < len(images):
        generator = torch.Generator().manual_seed(args.seed)
        images = Subset(images, torch.randperm(len(images), generator=generator)[: args.images].sort().values.tolist())
    return images


def check_perplexity(perplexity: float, images: int) -> None:
    if perplexity >= images:
        raise UserError(f"--perplexity {perplexity:g} must be below the number of images, {images}")


def embed(features: torch.Tensor, perplexity: float, seed: int):
    """Embed features (M, D) into the plane: numpy points (M, 2). Raises UserError for more neighbours than points."""
    check_perplexity(perplexity, len(features))
    values = features.double().numpy()
    if min(values.shape) > PCA_DIMENSIONS:
        values = PCA(PCA_DIMENSIONS, random_state=seed).fit_transform(values)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(values)


def draw(points: list, labels: list, titles: list[str], classes: list[str], path: Path) -> None:
    """Draw a square of points (M, 2) for each title. Up to `MOST_NAMED` classes have a colour and a marker each, and a
    legend beside the squares; of more, the colour is the number of the class."""
    columns = -(-len(classes) // 20)
    named = len(classes) <= MOST_NAMED
    size = 4 * len(points) + (1.6 * columns if named else 1), 5.1
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    for axis, embedded, label, title in zip(axes, points, labels, titles):
        axis.set(title=title, xticks=[], yticks=[])
        for number in range(len(classes)) if named else ():
            chosen = embedded[label == number]
            axis.scatter(*chosen.T, s=14, linewidths=0, alpha=0.8, label=classes[number], **style(number))
        if not named:
            shown = axis.scatter(*embedded.T, c=label, cmap="cividis", vmin=0, vmax=len(classes) - 1, s=8, linewidths=0)
    if named:
        handles = axes[0].get_legend_handles_labels()
        options = dict(fontsize="small", frameon=False, ncols=columns, markerscale=1.5)
        figure.legend(*handles, loc="outside right center", title="class", **options)
    else:
        figure.colorbar(shown, ax=axes, label=f"number of the class, of {len(classes)}")
    figure.supxlabel(CAPTION, fontsize="small")
    save_figure(figure, path)


def judge(args, judged: judging.Judged, number: int) -> tuple:
    """Publish the similarities of one checkpoint -> the similarities, points (M, 2), labels (M,) and images."""
    images = chosen_images(args)
    record = judged.record("tsne", test=images)
    check_perplexity(args.perplexity, len(images))
    features, labels = judged.features(images, f"images by {command_line.titles_of([judged.path])[0]}")
    result = class_similarity(features, labels)
    points = embed(features, args.perplexity, args.seed)
    judged.publish(record, result, len(images), name=f"tsne-{number}")
    return result, points, labels.numpy(), images


def main(args) -> list[dict]:
    """Return the similarities of every checkpoint. A random encoder is of the first one's model, unless --model is
    given."""
    out = check(args)
    opened = judging.open_each(args, judging.open_encoder)
    names = [judged.path for judged in opened]
    judgements = [judge(args, judged, i) for i, judged in enumerate(opened)]
    results = []
    for name, title, (similarity, *_) in zip(names, args.titles or command_line.titles_of(names), judgements):
        results.append({"checkpoint": name, "title": title, **similarity})
        print(f"{title}: " + "  ".join(f"{key} {value:.4f}" for key, value in similarity.items()))
    titles = [f"{result['title']}\nintra / inter {result['ratio']:.3f}" for result in results]
    _, points, labels, images = zip(*judgements)
    draw(points, labels, titles, images[0].classes, out)
    write_comparison(out, args, results)
    return results


if __name__ == "__main__":
    with user_errors("tsne.py"):
        main(get_args_parser().parse_args())
