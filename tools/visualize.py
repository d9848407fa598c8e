"""Reconstructions of any autoencoder checkpoint: original, masked, reconstruction with the visible patches pasted.

python tools/visualize.py output_dir/checkpoint-399.pth --data DIR --out pictures.png
python tools/visualize.py mae_visualize_vit_base.pth --model mae_vit_base_patch16 --data a.jpg --out a.png
"""

from pathlib import Path

import _common
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from util.errors import user_errors
from util.visual import CAPTION, captioned, fixed_noise, grid, reconstruct
from util.weights_file import read_file


def get_args_parser():
    parser = _common.parser("Draw what an autoencoder sees and makes of it.")
    _common.add_checkpoint_flags(parser, what="a file with a decoder: ours, the official MAE's or Hugging Face's")
    _common.add_picture_flags(parser)
    parser.add_argument(
        "--norm_pix_loss",
        action=_common.argparse.BooleanOptionalAction,
        help="for files that do not say whether they were trained with it",
    )
    _common.add_model_flags(parser)
    return parser


def main(args) -> None:
    path = _common.named(args, "of an autoencoder")
    stored_ratio = _common.read_weights(path, args.checkpoint_key).args.get("mask_ratio", 0.75)
    ratio = _common.check_picture_flags(args, stored_ratio)
    model = _common.load_autoencoder(path, args)
    if args.norm_pix_loss is not None:
        model.norm_pix_loss = args.norm_pix_loss
    imgs, mean, std, _ = _common.chosen_images(args, model, ratio)
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
