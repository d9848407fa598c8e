"""Draw predictions of a dense task beside the labels: images, predicted classes and true ones.

python tools/visualize_dense.py output_dir/checkpoint-best.pth --dataset ade20k --data_path DIR --out pictures.pdf
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from evaluation import command_line
from evaluation.dense_pictures import segmentation_figure
from evaluation.segmenter import open_segmenter, predict_labels
from util.arguments import check_numbers
from util.data.dense.flags import add_dense_data_arguments
from util.data.dense.paired import PairedDataset
from util.data.dense.segmentation import read_segmentation
from util.data.pixel_range import settle_pixel_range
from util.errors import UserError, user_errors
from util.parallel.distributed import choose_device
from util.report.sheet import save_figure
from util.weights.file import read_file
from util.weights.load import Weights, read_weights


def get_args_parser():
    parser = command_line.data_parser("Draw predictions of a dense task beside the labels.")
    add_dense_data_arguments(parser.add_argument_group("masks"), "segmentation")
    command_line.add_checkpoint_flags(parser, what="a checkpoint of main_segment.py")
    command_line.add_out_flag(parser)
    parser.add_argument(
        "--count", type=int, default=8, help="number of images, taken at equal distances from the evaluation images"
    )
    command_line.add_model_flags(parser)
    command_line.add_device_flag(parser)
    return parser


@torch.no_grad()
def draw_segmentation(args, weights: Weights, state: dict):
    """Return a figure of `--count` images beside predicted and true classes, windows and flips as in the run."""
    trained = open_segmenter(args, weights, state)
    images = read_segmentation(args, False, trained.categories)
    settle_pixel_range(trained.images, images)
    options, device = trained.images, choose_device(args.device)
    data = PairedDataset(
        images, trained.resize, args.seed, options.in_chans, replace=False, pixel_range=options.pixel_range
    )
    model, shown = trained.model.to(device), []
    for index in torch.linspace(0, len(images) - 1, min(args.count, len(images))).long().tolist():
        sample = data[index]
        if not sample.bad:
            size, img = sample.target.shape, sample.image.to(device)
            predicted = predict_labels(model, img, size, trained.resize, trained.stride, trained.flip)
            shown.append((sample.image, predicted.cpu(), sample.target))
    if not shown:
        raise UserError("none of the chosen images could be read; their names are above")
    return segmentation_figure(shown, trained.resize, trained.categories, images.ignore_label)


# By what the names of the tensors of a head start with: the function that draws its predictions.
TASKS: dict[str, Callable] = {"decode_head.": draw_segmentation}


def main(args) -> None:
    """Draw `--count` images."""
    check_numbers(args)
    if args.count < 1:
        raise UserError(f"--count {args.count} must be positive")
    for name in ("crop_pct", "jpeg_draft"):
        if getattr(args, name):
            raise UserError(f"--{name} has no effect here: images are not cropped")
    out = command_line.check_picture(args)
    path = command_line.checkpoint_of(args, "of main_segment.py")
    weights = read_weights(path, args.checkpoint_key)
    state = read_file(path).get(args.checkpoint_key, {})
    draw = next((draw for head, draw in TASKS.items() if any(name.startswith(head) for name in state)), None)
    if draw is None:
        raise UserError(f"{path} has no head for a dense task: give a checkpoint of main_segment.py")
    save_figure(draw(args, weights, state), out)
    print(f"{out}: predictions of {path} beside the labels")


if __name__ == "__main__":
    with user_errors("visualize_dense.py"):
        main(get_args_parser().parse_args())
