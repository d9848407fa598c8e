"""Any checkpoint that we read, in the format of another library: timm, Hugging Face, ONNX, torch.export, safetensors.

python tools/export.py output_dir/checkpoint-399.pth --to timm --out encoder.safetensors
python tools/export.py finetuned/checkpoint-99.pth --to onnx --out classifier.onnx
"""

import warnings
from pathlib import Path

import _common

from util.datasets import mean_std
from util.encoder import load_encoder
from util.errors import RunFailed, UserError, user_errors
from util.export import EXPORTERS, largest_difference
from util.transforms import check_channels

SUFFIXES = {"timm": ".safetensors", "safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
# Flags that the new file tells, too.
KEPT = "model input_size patch_size in_chans global_pool nb_classes dataset mean std crop_pct norm_pix_loss mask_ratio "
KEPT += "decoder decoder_fraction decoder_embed_dim decoder_depth decoder_num_heads epochs seed"


def get_args_parser():
    parser = _common.Parser("Write a checkpoint in the format of another library, and check that it computes the same.")
    parser.add_argument("checkpoint", help="ours, the official MAE's, timm's, or a file or folder of Hugging Face")
    parser.add_argument("--to", required=True, choices=list(EXPORTERS))
    parser.add_argument("--out", required=True, help="file to write; hf-vit and hf-vitmae write a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    parser.add_argument("--encoder_only", action="store_true", help="leave out a classifier, or a decoder")
    _common.add_feature_flags(parser)
    parser.add_argument("--mean", type=float, nargs="+", help="of the images, told in the new file; the run's own")
    parser.add_argument("--std", type=float, nargs="+")
    _common.add_model_flags(parser)
    parser.set_defaults(dataset="imagefolder")
    return parser


def check_out(args) -> Path:
    """UserError where `--out` cannot be written as it is."""
    out, suffix = Path(args.out), SUFFIXES.get(args.to)
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out} must end in {suffix} for --to {args.to}")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: the folder {out.parent} does not exist")
    if out.is_dir() if suffix else out.is_file():
        raise UserError(f"--out {out} is a {'folder' if suffix else 'file'}, and --to {args.to} writes the other")
    if out.resolve() == Path(args.checkpoint).resolve():
        raise UserError(f"--out {out} is the checkpoint itself: name another place")
    if not args.overwrite and (any(out.iterdir()) if out.is_dir() else out.exists()):
        raise UserError(f"--out {out} exists: give --overwrite, or another place")
    return out


def load(args):
    """The autoencoder or encoder to export, which tokens its feature reads (cls, avg), and the flags of its file."""
    weights = _common.read_weights(args.checkpoint, args.checkpoint_key)
    whole = args.to in ("hf-vitmae", "safetensors") and weights.has_decoder and not args.encoder_only
    if args.to == "hf-vitmae" and not whole and not args.encoder_only:
        raise UserError(
            f"{args.checkpoint} has no decoder ({weights.origin}), which a ViTMAE for pretraining needs: "
            "give a full pretraining checkpoint, or --encoder_only for a ViTMAEModel"
        )
    pooled = args.global_pool
    if whole:
        model, stored = _common.load_autoencoder(args.checkpoint, args), weights.args
        print(f"{args.checkpoint}: {weights.origin}")
    else:
        model, weights = load_encoder(args, args.checkpoint, head=not args.encoder_only)
        stored, pooled = weights.args, _common.settle_pool(args, model, pooled, args.checkpoint) == "avg"
    _common.take_data_flags(args, stored)
    check_channels(args.in_chans)
    flags = {name: stored[name] for name in KEPT.split() if stored.get(name) is not None}
    mean, std = mean_std(args)
    size = list(model.patch_embed.img_size)
    flags |= dict(patch_size=model.patch_embed.patch_size[0], in_chans=args.in_chans, mean=mean, std=std)
    flags |= dict(model=args.model, input_size=size[0] if size[0] == size[1] else size)
    if not whole:
        flags |= dict(global_pool=bool(pooled), nb_classes=model.num_classes)
    return model, "avg" if pooled else "cls", flags


def main(args) -> float:
    """The largest difference between the model and what was written."""
    out = check_out(args)
    model, pool, flags = load(args)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what exporters say to developers of operators
        exported = EXPORTERS[args.to](model, out, pool, flags)
        difference = largest_difference(model, exported, pool, flags.get("mask_ratio", 0.75))
    mean, std = ([round(value, 5) for value in flags[name]] for name in ("mean", "std"))
    print(f"{out}: {exported.outputs}\n  {exported.code}\n  images {' x '.join(map(str, model.patch_embed.img_size))}, "
          f"colours in [0, 1] normalised by mean {mean} and deviation {std}\n"
          f"  checked on two random images: largest relative difference {difference:.1e}")  # fmt: skip
    if not difference < 1e-4:  # rounding is far below, and a wrong tensor far above
        raise RunFailed(
            f"{out} does not compute what {args.checkpoint} does (difference {difference:.1e}); do not use it"
        )
    return difference


if __name__ == "__main__":
    with user_errors("export.py"):
        main(get_args_parser().parse_args())
