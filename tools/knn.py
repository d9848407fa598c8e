"""k-nearest-neighbour accuracy of a frozen encoder: no training, and k is the only hyper-parameter.

python tools/knn.py output_dir/checkpoint-399.pth --data_path DIR --out output_dir/knn.json
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import command_line, judging
from evaluation.features import knn_accuracies
from util.arguments import add_leak_argument
from util.errors import UserError, user_errors


def get_args_parser():
    parser = judging.evaluation_parser("k-nearest-neighbour accuracy of a frozen encoder.")
    parser.add_argument(
        "--k", type=int, nargs="+", default=[1, 5, 10, 20], help="numbers of neighbours, with one accuracy each"
    )
    add_leak_argument(parser)
    parser.add_argument("--out", default="", help="JSON file for the result; the ledger is in its folder")
    return parser


def main(args) -> dict:
    """Return the top-1 accuracies in percent, by name."""
    if min(args.k) < 1:
        raise UserError("--k must be positive")
    out = command_line.check_out(args, ".json")
    judged = judging.open_encoder(args, command_line.checkpoint_of(args))
    images, held_out = judging.labelled_splits(args)
    if max(args.k) > len(images):
        raise UserError(f"--k {max(args.k)}: there are only {len(images)} training images")
    record = judged.record("knn", train=images, test=held_out)
    train, test = judged.features(images, "training images"), judged.features(held_out, "test images")
    accuracies = knn_accuracies(*train, *test, args.k, judged.device)
    result = {f"knn{k}_acc1": accuracy for k, accuracy in zip(args.k, accuracies)}
    print("  ".join(f"{k}-NN {result[f'knn{k}_acc1']:.2f} %" for k in args.k))
    judged.publish(record, result, len(images) + len(held_out), json=out)
    return result


if __name__ == "__main__":
    with user_errors("knn.py"):
        main(get_args_parser().parse_args())
