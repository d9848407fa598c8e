"""Segmentation and detection learn eight made-up scenes by heart: above 90 mIoU and 90 AP50, or something is broken.

python scripts/overfit_scenes.py OUT        both, five minutes of processor time

The mains train from random weights without augmentation, and are evaluated on the scenes that they trained on. The exit
code is 1 if a score is too low.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import main_detect  # noqa: E402
import main_segment  # noqa: E402
from util.errors import user_errors  # noqa: E402

COMMON = "--dataset scenes --scene_digits 0 1 7 --scene_count 8 --model vit_micro_patch4 --num_workers 0 --device cpu"
COMMON += " --max_steps 400 --eval_freq 1000 --drop_path 0 --layer_decay 1 --weight_decay 0 --amp_dtype fp32"
SEGMENT = f"{COMMON} --scene_size 32 --input_size 32 --batch_size 8 --head_width 32 --head_norm layer --head_dropout 0"
SEGMENT += " --lr 3e-3 --scale 1 1 --no_flip --no_distort"
DETECT = f"{COMMON} --scene_size 32 --input_size 32 --batch_size 4 --window 4 --head_width 32 --lr 2e-3 --lsj 1 1"
DETECT += " --lr_schedule cosine"
LOWEST = 90.0


def learn(main, reader: str, flags: str, out: Path) -> dict[str, float]:
    """Run `main`, whose function `reader` reads a split, with the training scenes as evaluation scenes. Return its
    scores."""
    read = getattr(main, reader)
    setattr(main, reader, lambda args, train, *rest, **named: read(args, True, *rest, **named))
    return main.main(main.get_args_parser().parse_args([*flags.split(), "--overwrite", "--output_dir", str(out)]))


def main(args) -> None:
    scores = learn(main_segment, "read_segmentation", SEGMENT, args.out / "segment")
    boxes = learn(main_detect, "read_detection", DETECT, args.out / "detect")
    reached = {"mIoU": scores["mIoU"], "box AP50": boxes["box_AP50"], "mask AP50": boxes["mask_AP50"]}
    print("\n" + "  ".join(f"{name} {value:.1f}" for name, value in reached.items()))
    if min(reached.values()) <= LOWEST:
        sys.exit(f"overfit_scenes.py: error: a score is not above {LOWEST:g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="output folder")
    with user_errors("overfit_scenes.py"):
        main(parser.parse_args())
