"""Draw predictions of segmenters or detectors beside the ground truth: classes of pixels, or boxes and masks.

python tools/visualize_dense.py output_dir/checkpoint-best.pth --out pictures.pdf
python tools/visualize_dense.py a/checkpoint-best.pth b/checkpoint-best.pth --dataset coco --data_path DIR --out a.png

The images are those that the run evaluated, unless --dataset names others; several checkpoints are rows.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

import models_detect
import models_segment
from evaluation import command_line
from evaluation.dense_pictures import SURE, TILE, Shown, detection_sheet, segmentation_sheet
from evaluation.dense_trained import Trained
from evaluation.detector import TrainedDetector
from evaluation.segmenter import TrainedSegmenter
from models_grid import RELATIVE
from util.arguments import check_numbers
from util.data.dense.detection import DETECTION
from util.data.dense.flags import add_dense_data_arguments
from util.data.dense.paired import PairedDataset
from util.data.dense.segmentation import SEGMENTATION
from util.data.pixel_range import settle_pixel_range
from util.errors import UserError, user_errors
from util.parallel.distributed import choose_device
from util.report.sheet import Sheet
from util.weights.load import read_weights

DATASETS = sorted({*SEGMENTATION, *DETECTION})
# Flags of the images, which are those of the run if --dataset is not given; so is --data_path.
IMAGES = "voc_year val_split class_names ignore_label zero_is_ignored color_table".split()
IMAGES += [f"scene_{name}" for name in ("digits", "count", "size", "sides", "most", "seed")]
TASKS: dict[str, type[Trained]] = {
    models_segment.DENSE_MODEL: TrainedSegmenter,
    models_detect.DENSE_MODEL: TrainedDetector,
}
NEEDED = "of main_segment.py or main_detect.py"


def get_args_parser():
    description = "Draw predictions of segmenters or detectors beside the ground truth."
    parser = command_line.data_parser(description, "", DATASETS)
    add_dense_data_arguments(parser.add_argument_group("annotations"), "")
    command_line.add_checkpoint_flags(parser, several=True, what=f"checkpoints {NEEDED}, which are rows of the picture")
    command_line.add_out_flag(parser)
    command_line.add_tile_flag(parser, TILE, f"its own size, at most {TILE}")
    parser.add_argument(
        "--count", type=int, default=8, help="number of images, taken at equal distances from the evaluation images"
    )
    parser.add_argument(
        "--score_thresh", type=float, metavar="SCORE",
        help=f"detections with a lower score are not drawn; without it {SURE}",
    )  # fmt: skip
    command_line.add_model_flags(parser)
    command_line.add_device_flag(parser)
    parser.set_defaults(dataset="")
    return parser


def check(args) -> Path:
    """Return --out as a path. Raises UserError for flags that are out of range or have no effect."""
    check_numbers(args)
    if args.count < 1:
        raise UserError(f"--count {args.count} must be positive")
    if args.score_thresh is not None and not 0 <= args.score_thresh <= 1:
        raise UserError(f"--score_thresh {args.score_thresh:g} must lie in [0, 1]")
    for name in ("crop_pct", "jpeg_draft", "fast_resize"):
        if getattr(args, name):
            raise UserError(f"--{name} has no effect here: images are not cropped")
    defaults = get_args_parser()
    given = [name for name in IMAGES if getattr(args, name) != defaults.get_default(name)]
    if given and not args.dataset:
        raise UserError(f"--{given[0]} has no effect without --dataset: the images are those of the run")
    command_line.check_tile(args)
    return command_line.needed_picture(args)


def open_dense(args, path: str) -> Trained:
    """Open the segmenter or the detector of a checkpoint. Without --dataset, `args` gets the flags of the images from
    its run. Raises UserError for a file of neither."""
    weights = read_weights(path, args.checkpoint_key, RELATIVE)
    trained: Any = TASKS.get(weights.dense_model)  # a subclass of Trained
    if trained is None:
        raise UserError(f"{path} has no head for a dense task: give a checkpoint {NEEDED}")
    if not args.dataset:
        names = ["dataset", *IMAGES, *(["data_path"] if not args.data_path else [])]
        vars(args).update({name: weights.args[name] for name in names if name in weights.args})
    if args.score_thresh is not None and trained is not TrainedDetector:
        raise UserError(f"--score_thresh has no effect for {path}, which detects no objects")
    return trained(args, weights)


@torch.no_grad()
def predictions(args, trained: Trained) -> tuple[list[Shown], int | None]:
    """Return what is drawn of `--count` images, and the label that is not evaluated (None for detection)."""
    images, options = trained.read(args), trained.options
    settle_pixel_range(options, images)
    data = PairedDataset(
        images, trained.resize, args.seed, options.in_chans, replace=False, pixel_range=options.pixel_range
    )
    trained.model.to(choose_device(args.device))
    indices = torch.linspace(0, len(images) - 1, min(args.count, len(images))).long().tolist()
    samples = ((index, data[index]) for index in indices)
    shown = [trained.show(sample, index, images) for index, sample in samples if not sample.bad]
    if not shown:
        raise UserError("none of the chosen images could be read; their names are above")
    return shown, getattr(images, "ignore_label", None)


def draw(args, opened: list[Trained]) -> Sheet:
    """Draw the predictions of checkpoints of one task on the same images."""
    titles = command_line.titles_of([trained.path for trained in opened]) if len(opened) > 1 else [""]
    rows = {}
    for title, trained in zip(titles, opened):
        rows[title], ignore = predictions(args, trained)
    if isinstance(opened[0], TrainedDetector):
        threshold = SURE if args.score_thresh is None else args.score_thresh
        return detection_sheet(rows, opened[0].categories, threshold, args.tile_size)
    return segmentation_sheet(rows, opened[0].categories, ignore, args.tile_size)


def open_all(args) -> list[Trained]:
    """Open the checkpoints of the flags. Raises UserError if their pictures do not fit together."""
    opened = []
    for path in command_line.checkpoints_of(args, NEEDED):
        opened.append(open_dense(args, path))  # the first one decides about the images
        first, last = opened[0], opened[-1]
        if type(first) is not type(last):
            raise UserError(f"{first.path} and {last.path} are of different tasks: draw each by itself")
        if first.categories != last.categories:
            raise UserError(f"{first.path} and {last.path} have different classes: draw each by itself")
    return opened


def main(args: argparse.Namespace) -> None:
    """Draw `--count` images."""
    out = check(args)
    opened = open_all(args)
    draw(args, opened).save(out)
    print(f"{out}: predictions of {', '.join(trained.path for trained in opened)} beside the annotations")


if __name__ == "__main__":
    with user_errors("visualize_dense.py"):
        main(get_args_parser().parse_args())
