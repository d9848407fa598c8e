"""Draw reconstructions of an autoencoder: original, masked, and reconstruction with the visible patches pasted in.

python tools/visualize.py output_dir/checkpoint-399.pth --data DIR --out pictures.png
python tools/visualize.py mae_visualize_vit_base.pth --model mae_vit_base_patch16 --data a.jpg --out a.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from evaluation import command_line, judging
from evaluation.image_options import sample_images
from evaluation.masks import mask_method, method_scores
from methods import METHODS
from util.errors import user_errors
from util.report.pictures import CAPTION, captioned, fixed_noise, grid, reconstruct
from util.weights.file import read_file
from util.weights.load import read_weights


def get_args_parser():
    parser = command_line.data_parser("Draw reconstructions of an autoencoder.")
    command_line.add_checkpoint_flags(
        parser, what="a file with a decoder: of this project, the official MAE or Hugging Face"
    )
    command_line.add_picture_flags(parser)
    parser.add_argument(
        "--norm_pix_loss",
        action=argparse.BooleanOptionalAction,
        help="the loss of the training, if the file does not store it",
    )
    parser.add_argument(
        "--random_mask",
        action="store_true",
        help="random masks, also for a run whose method decides the mask; without it the masks of that method",
    )
    command_line.add_model_flags(parser)
    return parser


def main(args) -> None:
    """Draw `--count` images."""
    path = command_line.checkpoint_of(args, "of an autoencoder")
    weights = read_weights(path, args.checkpoint_key)
    ratio = command_line.check_picture_flags(args, weights.args.get("mask_ratio", 0.75))
    judged = judging.open_autoencoder(args, weights)
    model = judged.model
    if args.norm_pix_loss is not None:
        model.norm_pix_loss = args.norm_pix_loss
    sample = sample_images(args, judged.images, model, ratio)
    imgs = sample.imgs
    noise = fixed_noise(model, len(imgs), args.seed, imgs.device)
    method = mask_method(weights, METHODS)
    drawn = method and not args.random_mask
    scores = method_scores(weights, method, model, imgs, noise) if drawn else noise
    pictures = reconstruct(model, imgs, ratio, scores, sample.mean, sample.std)
    norm = "; patches de-normalised with the original's mean and standard deviation" if model.norm_pix_loss else ""
    run = read_file(path).get("data")
    if isinstance(run, dict) and not run.get("shows_pixels", True):
        norm += "; the run has since predicted features, and its pixel head is no longer trained"
    masks = f"by the mask of {method.flag}" if drawn else "at random"
    masks += f", not by the mask of {method.flag}" if method and not drawn else ""
    caption = f"{Path(path).name}, {ratio:.0%} removed {masks}; {CAPTION}{norm}"
    picture: Image.Image = captioned(to_pil_image(grid(pictures, per_row=2 if len(imgs) > 1 else 1)), caption)
    picture.save(args.out)
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    with user_errors("visualize.py"):
        main(get_args_parser().parse_args())
