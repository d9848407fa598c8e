"""What a masking network removes: images, learned masks, random masks and heat maps (the paper's Figure 5).

python tools/mask_maps.py output_dir/checkpoint-199.pth --data DIR --out masks.png
python tools/mask_maps.py output_dir/checkpoint-199.pth --data DIR --out masks10.png --mask_ratio 0.1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from torchvision.transforms.functional import to_pil_image

from evaluation import command_line
from methods.mlo.masking_network import load_mask_net
from util.errors import user_errors
from util.report.pictures import captioned, denormalized, mask_picture

CAPTION = "columns: image, learned mask, random mask, how likely removed (dark to bright, of each image)"


def get_args_parser():
    parser = command_line.parser("Draw what a masking network removes, beside random masks.")
    command_line.add_checkpoint_flags(parser, what="a file of a run with --mlo_mae")
    command_line.add_picture_flags(parser)
    command_line.add_model_flags(parser)
    return parser


@torch.no_grad()
def main(args) -> None:
    path = command_line.named(args, "of a run with --mlo_mae")
    stored_ratio = command_line.read_weights(path, args.checkpoint_key).args.get("mask_ratio", 0.75)
    ratio = command_line.check_picture_flags(args, stored_ratio)
    model = command_line.load_autoencoder(path, args)
    net, embedding = load_mask_net(path, model)
    imgs, mean, std, _ = command_line.chosen_images(args, model, ratio)
    logits = net(embedding.network(imgs))
    picture = mask_picture(denormalized(imgs, mean, std), logits, ratio, model, per_row=2 if len(imgs) > 1 else 1)
    p = logits.sigmoid()
    caption = f"{Path(path).name}, {ratio:.0%} removed; {CAPTION}; from {p.min():.2g} to {p.max():.2g}"
    captioned(to_pil_image(picture), caption).save(args.out)
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    with user_errors("mask_maps.py"):
        main(get_args_parser().parse_args())
