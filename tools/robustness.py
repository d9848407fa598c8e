"""Robustness of a classifier: on class folders (ImageNet-A, -R, -Sketch, -V2, -C), under the 15 corruptions of
ImageNet-C applied to any evaluation set, and in detecting out-of-distribution images (ImageNet-O).

python tools/robustness.py output_dir/checkpoint-99.pth --folders imagenet-a imagenet-r imagenet-c --out out/robust.json
python tools/robustness.py output_dir/checkpoint-99.pth --dataset cifar10 --data_path DIR --corrupt --out out/c.json

Mean corruption error: Hendrycks and Dietterich 2019. Predictions are among the classes of a folder, as for ImageNet-A
and -O (Hendrycks et al. 2021, Natural Adversarial Examples) and -R (The Many Faces of Robustness).
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torchvision import transforms
from torchvision.transforms.functional import to_tensor

from evaluation import command_line, judging
from evaluation.corruptions import NAMES, SEVERITIES, read_frost
from evaluation.features import extract
from evaluation.robustness import (
    Classes,
    Corrupted,
    Evaluation,
    Shape,
    corruption_error,
    corruption_folders,
    detection_aupr,
    known_classes,
    only,
    open_folder,
    open_foreign,
)
from util.data.build import build_loader
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.sources import Subset
from util.errors import UserError, user_errors
from util.report.ledger import Record, describe_images
from util.report.pictures import rgb
from util.report.sheet import Row, draw_sheet


def get_args_parser():
    parser = judging.evaluation_parser("Robustness of a classifier.", features=False)
    parser.usual = "--folders DIR"
    add_set_flags(parser.add_argument_group("evaluation sets"))
    group = parser.add_argument_group("corruptions")
    group.add_argument(
        "--corrupt", action="store_true", help="corrupt the --folders, or the --dataset if there are none"
    )
    group.add_argument(
        "--corruptions", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME", help="some of the 15"
    )
    group.add_argument(
        "--frost", default="", metavar="DIR", help="photographs of frost, instead of a synthetic texture"
    )
    group.add_argument(
        "--picture", default="", help="picture to write, two images under every corruption: a .png, .pdf or .svg file"
    )
    command_line.add_tile_flag(group)
    parser.add_argument("--out", default="", help="JSON file for the result; the ledger is in its folder")
    return parser


def add_set_flags(group) -> None:
    """Add the flags of the evaluation sets and their classes."""
    group.add_argument(
        "--folders",
        nargs="+",
        default=[],
        metavar="DIR",
        help="evaluation sets: class folders with the names of the training classes, or numbers as in ImageNet-V2; or "
        "ImageNet-C (corruption/severity/class)",
    )
    group.add_argument(
        "--classes", default="", metavar="FILE", help="text file: names of the classes in the order of the outputs"
    )
    group.add_argument(
        "--train_classes",
        default="",
        metavar="DIR",
        help="training folder: its class folders are the names of the classes",
    )
    group.add_argument(
        "--all_classes", action="store_true", help="predict among all classes, not only those of the folder"
    )
    group.add_argument("--clean", default="", metavar="DIR", help="the clean images of ImageNet-C, for relative errors")
    # The ledgers of earlier versions have these two flags under their first names, which also still parse.
    group.add_argument(
        "--ood",
        "--foreign",
        dest="foreign",
        default="",
        metavar="DIR",
        help="out-of-distribution images, of no class: ImageNet-O, or other class folders",
    )
    group.add_argument(
        "--in_distribution",
        "--known",
        dest="known",
        default="",
        metavar="DIR",
        help="with --ood: images of the classes (val folder)",
    )
    group.add_argument("--images", type=int, help="images of each set, drawn at random; without it all")


def check(args) -> Path | None:
    """Return --out as a path. Raises UserError for bad values."""
    if not (args.folders or args.foreign or args.corrupt):
        raise UserError("nothing to judge: give --folders, --corrupt (with --dataset or --folders), or --ood")
    if bool(args.foreign) != bool(args.known):
        raise UserError(
            "--ood and --in_distribution go together: images of no class are detected among images of the classes"
        )
    if args.images is not None and args.images < 1:
        raise UserError(f"--images {args.images} must be positive")
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} must not be negative")
    if (args.frost or args.picture) and not args.corrupt:
        raise UserError(f"--{'frost' if args.frost else 'picture'} is for --corrupt")
    if args.tile_size and not args.picture:
        raise UserError("--tile_size is for --picture")
    command_line.check_tile(args)
    command_line.check_picture(args, "picture")
    return command_line.check_out(args, ".json")


@dataclass
class Bench:
    """The classifier, the names of its outputs, and the transforms of its input."""

    args: argparse.Namespace
    judged: judging.Judged
    classes: Classes
    photographs: list
    seen: int = 0  # images that went through the classifier

    def transforms(self, crop_pct: float | None = None):
        """Return the transforms of a PIL image to the size of the input, and from there to a normalised tensor."""
        steps = self.judged.images.transform(crop_pct).transforms
        return transforms.Compose(steps[:2]), transforms.Compose(steps[2:])

    def shape(self) -> Shape:
        """Return the shape of the classifier's input."""
        images = self.judged.images
        return Shape(self.transforms()[0], images.input_size, images.converter)

    def some(self, evaluation: Evaluation) -> Evaluation:
        """Draw `--images` of an evaluation set without repetition."""
        settle_pixel_range(self.judged.images, evaluation.images)  # by the first set that is opened
        count, total = self.args.images, len(evaluation.images)
        if count is None or count >= total:
            return evaluation
        chosen = np.sort(np.random.default_rng(self.args.seed).permutation(total)[:count])
        return Evaluation(evaluation.name, Subset(evaluation.images, chosen), evaluation.output_indices)

    @torch.no_grad()
    def predict(self, evaluation: Evaluation, images=None, crop_pct=None) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each readable image is classified correctly (M,), and the probability (M,) of the predicted
        class, among the classes of the set or, by `--all_classes`, all. `images` replaces the images of the set and has
        the shape of the input already."""
        args, judged, outputs = self.args, self.judged, evaluation.output_indices
        if args.all_classes:
            outputs = torch.arange(self.classes.count)

        def encode(imgs):
            return torch.stack(judged.model(imgs).float()[:, outputs].softmax(dim=1).max(dim=1), dim=1)

        to_size, to_tensor = self.transforms(crop_pct)
        steps = to_tensor if images is not None else transforms.Compose(to_size.transforms + to_tensor.transforms)
        images = evaluation.images if images is None else images
        loader = build_loader(images, steps, judged.images, args.batch_size, train=False)
        predictions, labels = extract(encode, loader, judged.device, judged.dtype, evaluation.name)
        judging.check_readable(args.max_bad_fraction, images, len(predictions), evaluation.name)
        if len(predictions) < len(images):
            print(f"{evaluation.name}: {len(images) - len(predictions)} unreadable images left out")
        self.seen += len(images)
        correct = outputs[predictions[:, 1].long()] == evaluation.output_indices[labels]
        return correct.numpy(), predictions[:, 0].numpy()

    def error(self, evaluation: Evaluation, images=None, crop_pct=None) -> float:
        """Return the error in percent."""
        return 100 * float(1 - self.predict(evaluation, images, crop_pct)[0].mean())


# Each set -------------------------------------------------------------------------------------------------------------


def print_heading() -> None:
    """Print the first line of a table of errors by corruption and severity."""
    print(f"{'error in percent, severity':<26}" + "".join(f"{severity:7d}" for severity in SEVERITIES) + "   mean")


def print_errors(name: str, errors: list[float]) -> None:
    """Print the line of one corruption."""
    print(f"{name:<26}" + "".join(f"{error:7.2f}" for error in errors) + f"{np.mean(errors):7.2f}", flush=True)


def corrupted_here(bench: Bench, evaluation: Evaluation) -> tuple[dict, dict]:
    """Evaluate a set under `--corruptions` -> metrics, and errors in percent by corruption and severity."""
    args, shape, errors = bench.args, bench.shape(), {}
    clean = bench.error(evaluation)
    print(f"{evaluation.name}, {len(evaluation.images)} images: clean error {clean:.2f} %")
    print_heading()
    for name in args.corruptions:
        variants = (
            Corrupted(evaluation.images, name, severity, shape, args.seed, bench.photographs) for severity in SEVERITIES
        )
        errors[name] = [bench.error(evaluation, images) for images in variants]
        print_errors(name + " (synthetic)" * (name == "frost" and not bench.photographs), errors[name])
    mean = float(np.mean(list(errors.values())))
    print(f"mean error under {len(errors)} corruptions {mean:.2f} %, {mean - clean:+.2f} points from clean")
    return {"clean_error": clean, "corrupted_error": mean, **means(errors)}, errors


def corrupted_folder(bench: Bench, path: str, folders: dict, record: Record) -> tuple[dict, dict]:
    """Evaluate a folder like ImageNet-C -> metrics, with the mean corruption error if it has all 15 corruptions, and
    errors in percent by corruption and severity."""
    errors = {}
    print(f"{path}, corruptions from the folder")
    print_heading()
    for name, severities in folders.items():
        errors[name] = []
        for folder in severities:
            evaluation = bench.some(open_folder(folder, bench.classes))
            record.data.setdefault(Path(path).name, describe_images(evaluation.images, path))
            errors[name].append(bench.error(evaluation, crop_pct=1.0))  # images were cropped before they were corrupted
        print_errors(name, errors[name])
    metrics = {"corrupted_error": float(np.mean(list(errors.values()))), **means(errors)}
    if len(errors) < len(NAMES):
        missing = [name for name in NAMES if name not in errors]
        print(f"no mean corruption error: {', '.join(missing)} missing from {path}")
        return metrics, errors
    metrics["mce"] = corruption_error(errors)
    print(f"mean corruption error, AlexNet = 100: {metrics['mce']:.2f}")
    if bench.args.clean:
        clean = bench.error(bench.some(open_folder(bench.args.clean, bench.classes)))
        metrics |= {"clean_error": clean, "relative_mce": corruption_error(errors, clean)}
        print(f"relative to the clean error of {clean:.2f} %: {metrics['relative_mce']:.2f}")
    return metrics, errors


def means(errors: dict[str, list[float]]) -> dict[str, float]:
    """Return the mean error of each corruption over its severities, by metric name."""
    return {f"{name}_error": float(np.mean(values)) for name, values in errors.items()}


def plain_folder(bench: Bench, evaluation: Evaluation) -> dict:
    """Evaluate a set as it is -> metrics."""
    accuracy = 100 - bench.error(evaluation)
    print(
        f"{evaluation.name}: top-1 {accuracy:.2f} % on {len(evaluation.images)} images of "
        f"{len(evaluation.output_indices)} classes"
    )
    return {"acc1": accuracy}


def foreign_images(bench: Bench, foreign: Evaluation, known: Evaluation) -> dict:
    """Detect the out-of-distribution images `foreign` among the images `known` of the same classes -> metrics."""
    (_, outside), (_, inside) = bench.predict(foreign), bench.predict(known)
    aupr = detection_aupr(inside, outside)
    chance = 100 * len(outside) / (len(inside) + len(outside))
    print(
        f"{foreign.name}: AUPR {aupr:.2f} % for {len(outside)} out-of-distribution among {len(inside)} in-distribution "
        f"images (chance {chance:.2f} %)"
    )
    return {"aupr": aupr}


def dataset_images(bench: Bench) -> Evaluation:
    """Open the validation images of `--dataset`. Raises UserError if they have no labels, or others than the
    classifier."""
    args = bench.args
    try:
        images = read_images(args, train=False)
    except UserError:
        if bench.classes.names is None:
            raise
        images = read_images(args, False, bench.classes.names)  # needs no training images
    judging.check_random_access(args.dataset, images)
    if images.classes is None:
        raise UserError(f"--dataset {args.dataset} has no labels, so the classifier cannot be evaluated on it")
    if bench.classes.names is None and len(images.classes) == bench.classes.count:
        return Evaluation(args.dataset, images, torch.arange(bench.classes.count))
    return Evaluation(args.dataset, images, bench.classes.output_indices(images.classes, f"--dataset {args.dataset}"))


# The picture ----------------------------------------------------------------------------------------------------------


def draw(bench: Bench, evaluation: Evaluation, path: Path, count: int = 2) -> None:
    """Draw a row for each corruption: `count` images clean, and at severity 1 to 5."""
    args, shape, rows = bench.args, bench.shape(), []
    indices = np.linspace(0, len(evaluation.images) - 1, count + 2).astype(int)[1:-1].tolist()
    for name in args.corruptions:
        variants = [Corrupted(evaluation.images, name, s, shape, args.seed, bench.photographs) for s in SEVERITIES]
        tiles = []
        for index in indices:
            tiles.append(to_tensor(shape.to_size(shape.convert(evaluation.images.load(index)))))
            tiles += [to_tensor(variant.load(index)) for variant in variants]
        synthetic = " (synthetic)" * (name == "frost" and not bench.photographs)
        rows.append(Row(rgb(torch.stack(tiles)), name.replace("_", " ") + synthetic))
    titles = ["clean", *(f"severity {severity}" for severity in SEVERITIES)]
    caption = (
        f"{count} images of {evaluation.name} under the corruptions of ImageNet-C, as the classifier receives them"
    )
    draw_sheet(rows, titles, caption, None, args.tile_size, per_row=count).save(path)


# The command ----------------------------------------------------------------------------------------------------------


def open_bench(args) -> Bench:
    """Open the classifier of the flags. Raises UserError if it does not fit them."""
    judged = judging.open_classifier(args)
    if args.corrupt and judged.images.in_chans not in (1, 3):
        raise UserError(f"--corrupt is for images of 1 or 3 channels: the classifier reads {judged.images.in_chans}")
    count = judged.model.num_classes
    classes = known_classes(
        judged.path, count, (judged.weights and judged.weights.classes) or None, args.classes, args.train_classes
    )
    return Bench(args, judged, classes, read_frost(args.frost) if args.frost else [])


def open_sets(bench: Bench) -> tuple[dict[str, Evaluation], dict[str, dict]]:
    """Open all evaluation sets, before the first is evaluated -> plain sets, and folders like ImageNet-C, by path."""
    args, plain, corrupted = bench.args, {}, {}
    for path in args.folders:
        folders = corruption_folders(path)
        if folders:
            corrupted[path] = folders
            open_folder(next(iter(folders.values()))[0], bench.classes)
        else:
            plain[path] = bench.some(open_folder(path, bench.classes))
    if args.clean:
        if not corrupted:
            raise UserError(f"--clean {args.clean} is for a folder like ImageNet-C among the --folders")
        open_folder(args.clean, bench.classes)
    if args.corrupt and corrupted:
        raise UserError(f"--corrupt: {next(iter(corrupted))} holds corrupted images already")
    if args.corrupt and not args.folders:
        plain[args.dataset] = bench.some(dataset_images(bench))
    names = [Path(path).name for path in args.folders]
    if len(set(names)) < len(names):
        raise UserError(f"--folders has two folders of the same name, {max(names, key=names.count)}: rename one")
    return plain, corrupted


def main(args) -> dict:
    """Return all metrics in percent, by name; with --folders each name begins with that of its folder."""
    out = check(args)
    bench = open_bench(args)
    plain, corrupted = open_sets(bench)
    foreign = []
    if args.foreign:
        outside, inside = open_foreign(args.foreign, bench.classes), open_folder(args.known, bench.classes)
        foreign = [bench.some(outside), bench.some(only(inside, outside.output_indices))]
    sets = {evaluation.name: evaluation.images for evaluation in plain.values()}
    sets |= {name: evaluation.images for name, evaluation in zip(("foreign", "known"), foreign)}
    record = bench.judged.record("robustness", **sets)
    if args.picture:
        draw(bench, next(iter(plain.values())), Path(args.picture))
    result, errors = {}, {}
    for path, evaluation in plain.items():
        if args.corrupt:
            metrics, errors[evaluation.name] = corrupted_here(bench, evaluation)
        else:
            metrics = plain_folder(bench, evaluation)
        result |= {f"{evaluation.name}_{name}" if path in args.folders else name: v for name, v in metrics.items()}
    for path, folders in corrupted.items():
        metrics, errors[Path(path).name] = corrupted_folder(bench, path, folders, record)
        result |= {f"{Path(path).name}_{name}": value for name, value in metrics.items()}
    if foreign:
        result |= {f"{foreign[0].name}_{name}": value for name, value in foreign_images(bench, *foreign).items()}
    bench.judged.publish(record, result, bench.seen, json=out, errors=errors)
    return result


if __name__ == "__main__":
    with user_errors("robustness.py"):
        main(get_args_parser().parse_args())
