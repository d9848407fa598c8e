"""Reconstructions of any autoencoder checkpoint: original, masked, reconstruction with the visible patches pasted.

python tools/visualize.py output_dir/checkpoint-399.pth --data DIR --out pictures.png
python tools/visualize.py mae_visualize_vit_base.pth --model mae_vit_base_patch16 --data a.jpg --out a.png
"""

from pathlib import Path

import _common
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from util.datasets import Files, input_size, mean_std, read_images
from util.errors import UserError, user_errors
from util.loading import KeyedDataset
from util.transforms import check_channels, eval_transform
from util.visual import CAPTION, captioned, fixed_noise, grid, reconstruct
from util.weights import read_file


def get_args_parser():
    parser = _common.parser("Draw what an autoencoder sees and makes of it.")
    parser.add_argument("checkpoint")
    parser.add_argument("--data", default="", help="an image, or a folder of images; instead of --dataset/--data_path")
    parser.add_argument("--out", required=True, help="PNG file to write")
    parser.add_argument("--mask_ratio", type=float, help="the run's own by default, else 0.75")
    parser.add_argument("--count", type=int, default=8, help="images, evenly spaced over the set")
    parser.add_argument("--norm_pix_loss", action=_common.argparse.BooleanOptionalAction,
                        help="for files that do not say whether they were trained with it")  # fmt: skip
    _common.add_model_flags(parser)
    return parser


def images_of(args):
    """`--data`, else the validation images of the data set, else its training images."""
    if args.data:
        path = Path(args.data)
        if path.is_file():
            return Files([str(path)], [-1], None)
        args.dataset, args.data_path = "folder", str(path)
        return read_images(args, train=True)
    try:
        return read_images(args, train=False)
    except UserError:
        return read_images(args, train=True)


def main(args) -> None:
    stored_ratio = _common.read_weights(args.checkpoint, args.checkpoint_key).args.get("mask_ratio", 0.75)
    ratio = args.mask_ratio if args.mask_ratio is not None else stored_ratio
    if not 0 < ratio < 1:
        raise UserError(f"--mask_ratio {ratio} must lie between 0 and 1, both excluded")
    if args.count < 1:
        raise UserError(f"--count {args.count} must be positive")
    out = Path(args.out)
    if out.suffix.lower() != ".png" or not out.parent.is_dir():
        raise UserError(f"--out {out} must be a .png file in a folder that exists")
    model = _common.load_autoencoder(args.checkpoint, args)
    if args.norm_pix_loss is not None:
        model.norm_pix_loss = args.norm_pix_loss
    check_channels(args.in_chans)
    if int(model.patch_embed.num_patches * (1 - ratio)) < 1:
        raise UserError(f"--mask_ratio {ratio} leaves no visible patch of {model.patch_embed.num_patches}: lower it")
    mean, std = mean_std(args)
    images = images_of(args)
    dataset = KeyedDataset(images, eval_transform(input_size(args), mean, std, args.crop_pct), args, replace=False)
    places = torch.linspace(0, len(images) - 1, min(args.count, len(images))).long().tolist()
    samples = [sample for sample in (dataset[place] for place in places) if not sample.bad]
    if not samples:
        raise UserError("none of the chosen images could be read; their names are above")
    imgs = torch.stack([sample.image for sample in samples])
    pictures = reconstruct(model, imgs, ratio, fixed_noise(model, len(imgs), args.seed, imgs.device), mean, std)
    norm = "; patches de-normalised with the original's mean and deviation" if model.norm_pix_loss else ""
    run = read_file(args.checkpoint).get("data")
    if isinstance(run, dict) and not run.get("shows_pixels", True):
        norm += "; this run went on to features and has not trained its pixel head since"
    caption = f"{Path(args.checkpoint).name}, {ratio:.0%} removed; {CAPTION}{norm}"
    picture: Image.Image = captioned(to_pil_image(grid(pictures, per_row=2 if len(imgs) > 1 else 1)), caption)
    picture.save(out)
    print(f"{out}: {caption}")


if __name__ == "__main__":
    with user_errors("visualize.py"):
        main(get_args_parser().parse_args())
