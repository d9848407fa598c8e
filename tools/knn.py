"""k-nearest-neighbour accuracy of a frozen encoder (no training, no hyper-parameter but k).

python tools/knn.py --finetune output_dir/checkpoint-399.pth --data_path DIR
"""

import json
from pathlib import Path

import _common

from util.amp import choose_amp_dtype
from util.arguments import add_finetuning_arguments
from util.datasets import input_size, mean_std, read_images
from util.distributed import choose_device
from util.encoder import build_encoder, count_classes, settle_model, token_feature
from util.errors import UserError, user_errors
from util.features import extract, knn_accuracy
from util.loading import build_loader
from util.rng import seeded
from util.transforms import check_channels, eval_transform


def get_args_parser():
    parser = _common.parser("k-nearest-neighbour accuracy of a frozen encoder.")
    add_finetuning_arguments(parser, pooled=True)
    group = parser.add_argument_group("model (from the checkpoint where it says)")
    group.add_argument("--model")
    group.add_argument("--input_size", type=int, nargs="+", metavar=("H", "W"))
    group.add_argument("--patch_size", type=int)
    group.add_argument("--in_chans", type=int)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 10, 20], help="neighbours; one accuracy each")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--out", default="", help="JSON file for the result")
    return parser


def main(args) -> dict:
    """Accuracy by k, in percent."""
    if min(args.k) < 1 or args.batch_size < 1:
        raise UserError("--k and --batch_size must be positive")
    weights = settle_model(args, args.finetune)
    check_channels(args.in_chans)
    splits = [read_images(args, train=train) for train in (True, False)]
    count_classes(args, splits[0])
    pool = "avg" if args.global_pool else "cls"
    args.global_pool = False  # the encoder's own final norm, whichever tokens are read
    with seeded(args.seed):  # as main_linprobe does: the same random encoder
        model = build_encoder(args, weights)
    device = choose_device(args.device)
    model.to(device).eval()
    transform = eval_transform(input_size(args), *mean_std(args), args.crop_pct)
    loaders = [build_loader(images, transform, args, args.batch_size, train=False) for images in splits]
    dtype = choose_amp_dtype(args.amp_dtype, device)
    train, test = (extract(lambda imgs: token_feature(model, imgs, pool), loader, device, dtype) for loader in loaders)
    result = {f"knn{k}_acc1": knn_accuracy(*train, *test, k=k) for k in args.k}
    print("  ".join(f"{k}-NN {result[f'knn{k}_acc1']:.2f} %" for k in args.k))
    if args.out:
        Path(args.out).write_text(json.dumps({**vars(args), "pool": pool, "result": result}, default=str) + "\n")
    return result


if __name__ == "__main__":
    with user_errors("knn.py"):
        main(get_args_parser().parse_args())
