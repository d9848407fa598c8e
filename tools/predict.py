"""Predictions of a classifier, or features of an encoder, for any images without labels.

python tools/predict.py output_dir/checkpoint-best.pth --data DIR --out predictions.csv
python tools/predict.py output_dir/checkpoint-best.pth --data list.txt --probabilities all --out predictions.csv
python tools/predict.py output_dir/checkpoint-399.pth --data DIR --features --out features.npz

Rows are in the order of the sorted paths (of a list: of its lines) and are written as they are computed.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from evaluation import command_line, judging
from evaluation.encoder import token_feature
from evaluation.predictions import (
    Columns,
    Rows,
    columns_of,
    is_regression,
    predict,
    relative_names,
    write_csv,
    write_npz,
    write_parquet,
)
from evaluation.robustness import known_classes
from util.arguments import check_crop_flags
from util.checkpoint.atomic import write_atomically
from util.compute.precision import choose_amp_dtype
from util.data.bands import ARRAY_ENDINGS
from util.data.image_folders import unlabelled_folder
from util.data.list_files import read_list
from util.data.pixel_range import settle_pixel_range
from util.data.readers import read_images
from util.data.shards import Shards
from util.data.sources import Files, Images
from util.errors import MissingSplit, RunFailed, UserError, user_errors

TOPK = 5  # the default of --topk


def get_args_parser():
    parser = judging.evaluation_parser(
        "Predictions of a classifier, or features of an encoder, for images without labels.", features=False
    )
    parser.usual = "--data DIR"
    group = parser.add_argument_group("images")
    group.add_argument(
        "--data",
        default="",
        metavar="PATH",
        help="a folder with images at any depth; a text file with a path in each line, relative to its folder or "
        "absolute; or an image; instead of --dataset/--data_path",
    )
    group.add_argument(
        "--split",
        choices=["train", "val"],
        help="images of --dataset to read; without it val, or train if there is no val",
    )
    group = parser.add_argument_group("predictions")
    group.add_argument("--topk", type=int, help=f"number of classes in a row; without it {TOPK}, or all if fewer")
    group.add_argument(
        "--probabilities",
        choices=["topk", "all"],
        default="topk",
        help="all: one column for each class, in the order of the outputs",
    )
    group.add_argument(
        "--classes", default="", metavar="FILE", help="text file with the class names, if the checkpoint has none"
    )
    group = parser.add_argument_group("features")
    group.add_argument("--features", action="store_true", help="write features, which need no classifier")
    command_line.add_feature_flags(parser)
    parser.add_argument("--out", required=True, help=".csv; with --features .npz, or .parquet, which needs pyarrow")
    parser.set_defaults(max_bad_fraction=1.0)  # unreadable images have a row, with the reason
    return parser


def check(args) -> Path:
    """Return --out as a path. Raises UserError for flags that are out of range, contradict each other or have no
    effect."""
    if not args.data and not args.data_path and args.dataset == "imagefolder":
        raise UserError("give --data, a folder or a list of images, or --dataset and --data_path")
    if args.data and (args.data_path or args.split or args.dataset != "imagefolder"):
        other = "data_path" if args.data_path else "split" if args.split else "dataset"
        raise UserError(f"--data {args.data} and --{other} {getattr(args, other)} exclude each other: give one of them")
    unused = "eval_path val_fraction train_list val_list group_column allow_outside shard_samples download".split()
    given = [name for name in unused if getattr(args, name)]
    if args.data and given:
        raise UserError(f"--{given[0]} has no effect with --data")
    if args.topk is not None and args.topk < 1:
        raise UserError(f"--topk {args.topk} must be positive")
    if args.topk is not None and args.probabilities == "all":
        raise UserError(f"--topk {args.topk} has no effect with --probabilities all: give one of them")
    if args.features:
        given = [name for name in ("topk", "classes") if getattr(args, name)]
        given += ["probabilities"] * (args.probabilities == "all")
        if given:
            raise UserError(f"--{given[0]} has no effect with --features, which writes no predictions")
    elif args.pool:
        raise UserError(f"--pool {args.pool} is for --features: a classifier has a feature of its own")
    check_crop_flags(args, crops=False)
    out = command_line.needed_out(args, *((".npz", ".parquet") if args.features else (".csv",)))
    if out.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
        raise UserError(f"--out {out} needs the package pyarrow, which is not installed: install it, or write an .npz")
    return out


# Images ---------------------------------------------------------------------------------------------------------------


def open_images(args, classes: list[str] | None) -> tuple[Images | Shards, Path]:
    """Open the images of the flags -> the images, and the folder that their names are relative to. Raises UserError if
    there are none, and for a stream, whose images have no names. `classes` are those of the checkpoint."""
    if args.data:
        return open_data(Path(args.data).expanduser(), args.image_column)
    if args.split:
        images = read_images(args, train=args.split == "train")
    else:
        try:
            images = read_images(args, False, classes)
        except MissingSplit:
            images = read_images(args, train=True)
            print(f"--dataset {args.dataset} has no validation images; its training images are read")
    if not isinstance(images, (Images, Shards)):
        raise UserError(f"--dataset {args.dataset} is a stream, whose images have no names: give --data, or shards")
    return images, Path(args.data_path).expanduser()


def open_data(path: Path, image_column: str = "") -> tuple[Files, Path]:
    """Open `--data`, as `open_images`."""
    if path.is_dir():
        return unlabelled_folder(path, "--data"), path
    if not path.is_file():
        raise UserError(f"--data {path} does not exist: a folder of images, a list or an image is needed")
    paths = [str(path)]
    if path.suffix.lower() not in (*IMG_EXTENSIONS, *ARRAY_ENDINGS):
        paths = read_list(str(path), path.parent, True, image_column, needs_labels=False).paths
    return Files(paths, [-1] * len(paths), None), path.parent


# Models ---------------------------------------------------------------------------------------------------------------


def open_classifier(args) -> tuple[judging.Judged, Columns]:
    """Open the classifier of the flags, and describe its predictions. Raises UserError if there is none."""
    judged = judging.open_classifier(args, numbers=True)
    stored, count = judged.weights.args if judged.weights else {}, judged.model.num_classes
    if is_regression(stored) and (args.topk or args.probabilities == "all"):
        flag = f"--topk {args.topk}" if args.topk else "--probabilities all"
        raise UserError(f"{flag} has no effect: {judged.path} predicts values, not classes")
    names = known_classes(judged.path, count, (judged.weights and judged.weights.classes) or None, args.classes).names
    topk = None if args.probabilities == "all" else args.topk or TOPK
    return judged, columns_of(stored, names, count, topk)


def open_encoder(args) -> judging.Judged:
    """Open the encoder of the flags, without a classifier."""
    path = command_line.checkpoint_of(args, "whose features are written")
    judged = judging.open_trained(args, path, head=False)
    return replace(judged, dtype=choose_amp_dtype(args.amp_dtype, judged.device))


def feature_of(judged: judging.Judged, args):
    """Return the function from images (N, C, H, W) to the features (N, D) of `--pool`."""
    model, pool = judged.model, command_line.settle_pool(args, judged.model, judged.path)
    return lambda imgs: token_feature(model, imgs, pool)


# The command ----------------------------------------------------------------------------------------------------------


class Tally:
    """The number of images whose rows went through `count`, and of the unreadable ones among them. `source` are the
    flags that name the images."""

    def __init__(self, total: int, source: str):
        self.total, self.source, self.images, self.unreadable = total, source, 0, 0

    def count(self, rows: Iterable[Rows]) -> Iterator[Rows]:
        """Yield the rows, with a progress bar. Raises UserError at the end if no image could be read."""
        first = ""
        with tqdm(total=self.total, desc="predicting", unit=" images", disable=None) as progress:
            for part in rows:
                self.images += len(part.names)
                self.unreadable += sum(map(bool, part.errors))
                first = first or next((error for error in part.errors if error), "")
                yield part
                progress.update(len(part.names))
        if self.unreadable == self.images:
            raise UserError(f"none of the {self.images} images of {self.source} could be read; the first: {first}")

    def check(self, max_bad_fraction: float) -> None:
        """Raise UserError if a larger share of the images is unreadable."""
        if self.unreadable > max_bad_fraction * self.images:
            raise UserError(
                f"{self.unreadable} of the {self.images} images of {self.source} are unreadable, more than "
                f"--max_bad_fraction {max_bad_fraction:g} allows; --out has the reason for each"
            )


def write(out: Path, rows: Iterable[Rows], columns: Columns | None, count: int) -> None:
    """Write predictions (`columns`) or features completely or not at all. Raises RunFailed if writing fails, as on a
    full disk."""
    write_rows = partial(write_parquet, rows=rows)
    if columns is not None:
        write_rows = partial(write_csv, rows=rows, columns=columns)
    elif out.suffix.lower() == ".npz":
        write_rows = partial(write_npz, rows=rows, count=count)
    try:
        write_atomically(out, write_rows)
    except OSError as error:
        raise RunFailed(f"--out {out} cannot be written: {error.strerror or error}") from error


def main(args: argparse.Namespace) -> Tally:
    """Write the predictions or the features, and return the number of images."""
    out, columns = check(args), None
    if args.features:
        judged = open_encoder(args)
        encode = feature_of(judged, args)
    else:
        judged, columns = open_classifier(args)
        encode = judged.model
    stored = judged.weights.args if judged.weights else {}
    options = replace(judged.images, dataset=stored.get("dataset") or args.dataset)  # pixels as in its training
    images, folder = open_images(args, (judged.weights.classes or None) if judged.weights else None)
    if isinstance(images, Images):
        images.expect_bands(options.in_chans, args.band_axis)
    settle_pixel_range(options, images)
    tally = Tally(len(images), f"--data {args.data}" if args.data else f"--dataset {args.dataset}")
    rows = predict(encode, images, options, args.batch_size, judged.device, judged.dtype)
    write(out, tally.count(relative_names(rows, folder)), columns, len(images))
    bad = f", {tally.unreadable} unreadable (column error)" if tally.unreadable else ""
    print(f"{out}: {'features' if args.features else 'predictions'} of {tally.images} images{bad}")
    tally.check(args.max_bad_fraction)
    return tally


if __name__ == "__main__":
    with user_errors("predict.py"):
        main(get_args_parser().parse_args())
