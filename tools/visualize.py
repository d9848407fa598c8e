"""Draw reconstructions of an autoencoder: original, masked, and reconstruction with the visible patches pasted in.

python tools/visualize.py output_dir/checkpoint-399.pth --data DIR --out pictures.png
python tools/visualize.py mae_visualize_vit_base.pth --model mae_vit_base_patch16 --data a.jpg --out a.pdf
python tools/visualize.py mae/checkpoint-399.pth rc_mae/checkpoint-399.pth --data DIR --out both.png
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from evaluation import command_line, judging
from evaluation.image_options import sample_images
from evaluation.masks import mask_method, method_scores
from methods import METHODS
from util.errors import user_errors
from util.report.pictures import CAPTION, NORM_PIX, fixed_noise, reconstruct, reconstruction_sheet
from util.weights.file import read_file


def get_args_parser():
    parser = command_line.data_parser("Draw reconstructions of an autoencoder.")
    what = "a file with a decoder: of this project, the official MAE or Hugging Face; several are rows of the picture"
    command_line.add_checkpoint_flags(parser, several=True, what=what)
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


def masks_of(args, judged: judging.Judged, imgs, noise) -> tuple[torch.Tensor, str]:
    """Return the scores (N, L) whose highest are removed, and what decides them."""
    assert judged.weights is not None  # of `open_autoencoders`
    method = mask_method(judged.weights, METHODS)
    if method is None:
        return noise, "at random"
    if args.random_mask:
        return noise, f"at random, not by the mask of {method.flag}"
    return method_scores(judged.weights, method, judged.model, imgs, noise), f"by the mask of {method.flag}"


def pixels_of(judged: judging.Judged) -> str:
    """Return what a reader must know of the predicted pixels."""
    run = read_file(judged.path).get("data")
    untrained = "; the run has since predicted features, and its pixel head is no longer trained"
    features = isinstance(run, dict) and not run.get("shows_pixels", True)
    return NORM_PIX * judged.model.norm_pix_loss + untrained * features


def caption_of(names: list[str], ratio: float, masks: list[str], pixels: list[str]) -> str:
    """Return the caption of one checkpoint, or of several, with what they differ in by name."""
    if len(set(zip(masks, pixels))) == 1:
        name = f"{Path(names[0]).name}, " if len(names) == 1 else ""
        return f"{name}{ratio:.0%} removed {masks[0]}; {CAPTION}{pixels[0]}"
    each = ". ".join(f"{title}: {own}{more}" for title, own, more in zip(command_line.titles_of(names), masks, pixels))
    return f"{ratio:.0%} removed; {CAPTION}. {each}"


def main(args) -> None:
    """Draw `--count` images."""
    opened, ratio = judging.open_autoencoders(args, "of an autoencoder")
    pictures, masks = [], []
    for judged in opened:
        if args.norm_pix_loss is not None:
            judged.model.norm_pix_loss = args.norm_pix_loss
        sample = sample_images(args, judged.images, judged.model, ratio)
        noise = fixed_noise(judged.model, len(sample.imgs), args.seed, sample.imgs.device)
        scores, decided = masks_of(args, judged, sample.imgs, noise)
        stats = sample.mean, sample.std, sample.channels
        pictures.append(reconstruct(judged.model, sample.imgs, ratio, scores, *stats))
        masks.append(decided)
    names = [judged.path for judged in opened]
    caption = caption_of(names, ratio, masks, [pixels_of(judged) for judged in opened])
    labels = command_line.titles_of(names) if len(names) > 1 else [""]
    reconstruction_sheet(pictures, labels, caption, args.tile_size).save(args.out)
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    with user_errors("visualize.py"):
        main(get_args_parser().parse_args())
