"""Reconstructions of any autoencoder checkpoint: original, masked, reconstruction with the visible patches pasted.

python tools/visualize.py output_dir/checkpoint-399.pth --data DIR --out pictures.png
python tools/visualize.py mae_visualize_vit_base.pth --model mae_vit_base_patch16 --data a.jpg --out a.png
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from evaluation import command_line
from util.errors import user_errors
from util.report.pictures import CAPTION, captioned, fixed_noise, grid, reconstruct
from util.weights.file import read_file


def get_args_parser():
    parser = command_line.parser("Draw what an autoencoder sees and makes of it.")
    command_line.add_checkpoint_flags(parser, what="a file with a decoder: ours, the official MAE's or Hugging Face's")
    command_line.add_picture_flags(parser)
    parser.add_argument(
        "--norm_pix_loss",
        action=command_line.argparse.BooleanOptionalAction,
        help="for files that do not say whether they were trained with it",
    )
    command_line.add_model_flags(parser)
    return parser


def main(args) -> None:
    path = command_line.named(args, "of an autoencoder")
    stored_ratio = command_line.read_weights(path, args.checkpoint_key).args.get("mask_ratio", 0.75)
    ratio = command_line.check_picture_flags(args, stored_ratio)
    model = command_line.load_autoencoder(path, args)
    if args.norm_pix_loss is not None:
        model.norm_pix_loss = args.norm_pix_loss
    imgs, mean, std, _ = command_line.chosen_images(args, model, ratio)
    pictures = reconstruct(model, imgs, ratio, fixed_noise(model, len(imgs), args.seed, imgs.device), mean, std)
    norm = "; patches de-normalised with the original's mean and deviation" if model.norm_pix_loss else ""
    run = read_file(path).get("data")
    if isinstance(run, dict) and not run.get("shows_pixels", True):
        norm += "; this run went on to features and has not trained its pixel head since"
    caption = f"{Path(path).name}, {ratio:.0%} removed; {CAPTION}{norm}"
    picture: Image.Image = captioned(to_pil_image(grid(pictures, per_row=2 if len(imgs) > 1 else 1)), caption)
    picture.save(args.out)
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    with user_errors("visualize.py"):
        main(get_args_parser().parse_args())
