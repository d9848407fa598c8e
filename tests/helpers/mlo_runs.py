"""Small runs of MLO-MAE: their flags, and a function that starts one."""

import main_pretrain
from helpers.launch import SMALL

BASE = f"{SMALL} --warmup_epochs 0 --lr 1e-3 --num_workers 0 --vis_freq 0 --print_freq 1 --device cpu --amp_dtype fp32"
MLO = f"{BASE} --batch_size 12 --mlo_mae --mlo_labels same --mlo_val_fraction 0.25 --mlo_hidden 16"

# As many images as the fixture `image_folder` has, with masks.
PIXELS = "--mlo_task segmentation --dataset scenes --scene_digits 0 1 --scene_size 24 --scene_count 96 8"


def pretrain(flags: str) -> None:
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))
