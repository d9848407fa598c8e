"""Draw the masks of a masking network: images, learned masks, random masks and heat maps (as in Figure 5 of MLO-MAE).

python tools/mask_maps.py output_dir/checkpoint-199.pth --data DIR --out masks.png
python tools/mask_maps.py output_dir/checkpoint-199.pth --data DIR --out masks10.png --mask_ratio 0.1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torchvision.transforms.functional import to_pil_image

from evaluation import command_line, judging
from evaluation.image_options import sample_images
from methods.mlo.masking_network import load_mask_net
from util.errors import user_errors
from util.report.pictures import captioned, denormalized, mask_picture
from util.weights.load import read_weights

CAPTION = "columns: image, learned mask, random mask, probability of removal (dark to bright, in each image)"


def get_args_parser():
    parser = command_line.data_parser("Draw the masks of a masking network beside random masks.")
    command_line.add_checkpoint_flags(parser, what="a file of a run with --mlo_mae")
    command_line.add_picture_flags(parser)
    command_line.add_model_flags(parser)
    return parser


@torch.no_grad()
def main(args) -> None:
    """Draw `--count` images."""
    path = command_line.checkpoint_of(args, "of a run with --mlo_mae")
    weights = read_weights(path, args.checkpoint_key)
    ratio = command_line.check_picture_flags(args, weights.args.get("mask_ratio", 0.75))
    judged = judging.open_autoencoder(args, weights)
    net, embedding = load_mask_net(path, judged.model)
    sample = sample_images(args, judged.images, judged.model, ratio)
    logits = net(embedding.network(sample.imgs))
    colours = denormalized(sample.imgs, sample.mean, sample.std)
    picture = mask_picture(colours, logits, ratio, judged.model, per_row=2 if len(colours) > 1 else 1)
    p = logits.sigmoid()
    caption = f"{Path(path).name}, {ratio:.0%} removed; {CAPTION}; from {p.min():.2g} to {p.max():.2g}"
    captioned(to_pil_image(picture), caption).save(args.out)
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    with user_errors("mask_maps.py"):
        main(get_args_parser().parse_args())
