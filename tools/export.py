"""Any checkpoint that we read, in the format of another library: timm, Hugging Face, ONNX, torch.export, safetensors.

python tools/export.py output_dir/checkpoint-399.pth --to timm --out encoder.safetensors
python tools/export.py finetuned/checkpoint-99.pth --to onnx --out classifier.onnx

What was checked goes beside the result, into a .json, TensorBoard and the ledger of the folder.
"""

import copy
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch

from evaluation import command_line, judging
from evaluation.export import EXAMPLES, EXPORTERS, largest_difference
from util.arguments import check_numbers
from util.data.image_format import mean_std
from util.data.transforms import check_channels
from util.errors import RunFailed, UserError, user_errors
from util.report.ledger import Record, write_json

SUFFIXES = {"timm": ".safetensors", "safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
# Flags that the new file tells, too.
KEPT = "model input_size patch_size in_chans global_pool nb_classes dataset mean std crop_pct norm_pix_loss mask_ratio "
KEPT += "decoder decoder_fraction decoder_embed_dim decoder_depth decoder_num_heads epochs seed layer_norm_eps"


def get_args_parser():
    parser = command_line.Parser(
        "Write a checkpoint in the format of another library, and check that it computes the same."
    )
    command_line.add_checkpoint_flags(parser)
    parser.add_argument("--to", required=True, choices=list(EXPORTERS), metavar="FORMAT", help=", ".join(EXPORTERS))
    parser.add_argument("--out", required=True, help="file to write; hf-vit and hf-vitmae write a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--encoder_only", action="store_true", help="leave out a classifier, or a decoder")
    command_line.add_feature_flags(parser)
    parser.add_argument(
        "--mean", type=float, nargs="+", help="per-channel means for the new file; without it the run's own"
    )
    parser.add_argument("--std", type=float, nargs="+", help="per-channel standard deviations, likewise")
    command_line.add_model_flags(parser)
    parser.set_defaults(dataset="imagefolder", data_path="", device="cpu", seed=0)
    return parser


def check_out(args) -> Path:
    """UserError where `--out` cannot be written as it is."""
    out, suffix = Path(args.out), SUFFIXES.get(args.to)
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out} must end in {suffix} for --to {args.to}")
    if out.is_dir() if suffix else out.is_file():
        raise UserError(f"--out {out} is a {'folder' if suffix else 'file'}, and --to {args.to} writes the other")
    if out.resolve() == Path(command_line.named(args)).resolve():
        raise UserError(f"--out {out} is the checkpoint itself: name another place")
    if not args.overwrite and (any(out.iterdir()) if out.is_dir() else out.exists()):
        raise UserError(f"--out {out} exists: give --overwrite, or another place")
    return command_line.check_out(args)


def load(args) -> tuple[judging.Judged, str, dict]:
    """The autoencoder or encoder to export, which tokens its feature reads (cls, avg), and the flags of its file."""
    check_numbers(args)
    path = command_line.named(args, "to export")
    weights = judging.read(path, args.checkpoint_key)
    if weights is None:
        raise UserError("name a CHECKPOINT to export: random is a model of no use elsewhere")
    whole = args.to in ("hf-vitmae", "safetensors") and weights.has_decoder and not args.encoder_only
    if args.to == "hf-vitmae" and not whole and not args.encoder_only:
        raise UserError(
            f"{path} has no decoder ({weights.origin}), which a ViTMAE for pretraining needs: "
            "give a full pretraining checkpoint, or --encoder_only for a ViTMAEModel"
        )
    if whole:
        args, pool = copy.copy(args), args.pool or "cls"
        model = command_line.load_autoencoder(path, args)
        judged = judging.Judged(args, weights, model, torch.device("cpu"), torch.float32)
        print(f"{path}: {weights.origin}")
    else:
        judged = judging.open_trained(args, path, head=not args.encoder_only)
        pool = command_line.settle_pool(args, judged.model, path)
    check_channels(judged.args.in_chans)
    return judged, pool, flags_of(judged, None if whole else pool)


def flags_of(judged: judging.Judged, pool: str | None) -> dict:
    """What the new file tells; `pool` is None for an autoencoder."""
    args, model, stored = judged.args, judged.model, judged.weights.args
    flags = {name: stored[name] for name in KEPT.split() if stored.get(name) is not None}
    mean, std = mean_std(args.dataset, args.in_chans, args.mean, args.std)
    size = list(model.patch_embed.img_size)
    flags |= dict(patch_size=model.patch_embed.patch_size[0], in_chans=args.in_chans, mean=mean, std=std)
    flags |= dict(model=args.model, input_size=size[0] if size[0] == size[1] else size)
    return flags | (dict(global_pool=pool == "avg", nb_classes=model.num_classes) if pool else {})


def main(args) -> float:
    """The largest difference between the model and what was written."""
    out = check_out(args)
    judged, pool, flags = load(args)
    model, record = judged.model, Record("export", judged.args, judged.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what exporters say to developers of operators
        exported = EXPORTERS[args.to](model, out, pool, flags)
        difference = largest_difference(model, exported, pool, flags.get("mask_ratio", 0.75))
    mean, std = ([round(value, 5) for value in flags[name]] for name in ("mean", "std"))
    print(
        f"{out}: {exported.outputs}\n  {exported.code}\n  images {' x '.join(map(str, model.patch_embed.img_size))}, "
        f"colours in [0, 1] normalised by mean {mean} and deviation {std}\n"
        f"  checked on two random images: largest relative difference {difference:.1e}"
    )
    if not difference < 1e-4:  # rounding is far below, and a wrong tensor far above
        raise RunFailed(
            f"{out} does not compute what {command_line.named(args)} does (difference {difference:.1e}); do not use it"
        )
    result = {"largest_difference": difference}
    beside = Path(f"{out}.json") if out.is_dir() else out
    write_json(beside, judged.args, result=result, outputs=exported.outputs, code=exported.code, told=flags)
    judging.publish(judged, record, result, EXAMPLES)
    return difference


if __name__ == "__main__":
    with user_errors("export.py"):
        main(get_args_parser().parse_args())
