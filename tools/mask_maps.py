"""Draw the masks of a masking network: images, learned masks, random masks and heat maps (as in Figure 5 of MLO-MAE).

python tools/mask_maps.py output_dir/checkpoint-199.pth --data DIR --out masks.png
python tools/mask_maps.py output_dir/checkpoint-199.pth --data DIR --out masks10.png --mask_ratio 0.1
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from evaluation import command_line, judging
from evaluation.image_options import sample_images
from methods.mlo.masking_network import load_mask_net
from util.errors import user_errors
from util.report.pictures import mask_sheet, mask_tiles, shown_range


def get_args_parser():
    parser = command_line.data_parser("Draw the masks of a masking network beside random masks.")
    command_line.add_checkpoint_flags(parser, several=True, what="a file of a run with --mlo_mae; several are rows")
    command_line.add_picture_flags(parser)
    command_line.add_model_flags(parser)
    return parser


@torch.no_grad()
def main(args) -> None:
    """Draw `--count` images."""
    opened, ratio = judging.open_autoencoders(args, "of a run with --mlo_mae")
    tiles, ranges = [], []
    for judged in opened:
        net, embedding = load_mask_net(judged.path, judged.model)
        sample = sample_images(args, judged.images, judged.model, ratio)
        logits = net(embedding.network(sample.imgs))
        tiles.append(mask_tiles(sample.colours, logits, ratio, judged.model))
        ranges.append(shown_range(logits.sigmoid()))
    names = [judged.path for judged in opened]
    titles = command_line.titles_of(names) if len(names) > 1 else [Path(names[0]).name]
    each = "; ".join(f"{title}: probabilities from {own}" for title, own in zip(titles, ranges))
    caption = f"{ratio:.0%} of the patches removed, grey. {each}"
    mask_sheet(tiles, titles if len(names) > 1 else [""], caption, args.tile_size).save(args.out)
    print(f"{args.out}: {caption}")


if __name__ == "__main__":
    with user_errors("mask_maps.py"):
        main(get_args_parser().parse_args())
