"""Export a checkpoint to the format of another library: timm, Hugging Face, ONNX, torch.export or safetensors.

python tools/export.py output_dir/checkpoint-399.pth --to timm --out encoder.safetensors
python tools/export.py finetuned/checkpoint-99.pth --to onnx --out classifier.onnx

The result of the check is written beside the export: a JSON file (classifier.onnx.json), TensorBoard and the ledger.
"""

import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation import command_line, judging
from evaluation.checkpoint import read_checkpoint
from evaluation.export import EXAMPLES, EXPORTERS, largest_difference
from evaluation.model_card import push, write_card
from util.arguments import check_numbers
from util.errors import RunFailed, UserError, user_errors
from util.parser import Parser

SUFFIXES = {"timm": ".safetensors", "safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}
# Flags of the checkpoint that the exported file stores, too.
KEPT = "model input_size patch_size in_chans global_pool nb_classes dataset mean std crop_pct norm_pix_loss mask_ratio "
KEPT += "decoder decoder_fraction decoder_embed_dim decoder_depth decoder_num_heads epochs seed layer_norm_eps "
KEPT += "targets target_mean target_std multilabel_loss pixel_range"


def get_args_parser():
    parser = Parser("Export a checkpoint to the format of another library, and check that it computes the same.")
    command_line.add_checkpoint_flags(parser)
    parser.add_argument("--to", required=True, choices=list(EXPORTERS), metavar="FORMAT", help=", ".join(EXPORTERS))
    parser.add_argument(
        "--out", required=True, help="file to write; a folder for hf-vit, hf-vitmae, and timm without an ending"
    )
    parser.add_argument(
        "--push",
        metavar="OWNER/NAME",
        default="",
        help="upload timm's folder and its model card to the Hugging Face Hub",
    )
    parser.add_argument("--license", default="", metavar="NAME", help="licence of the weights, for the model card")
    parser.add_argument("--overwrite", action="store_true", help="replace the content of --out")
    parser.add_argument("--encoder_only", action="store_true", help="leave out a classifier, or a decoder")
    command_line.add_feature_flags(parser)
    parser.add_argument(
        "--mean", type=float, nargs="+", help="per-channel means for the exported file; without it those of the run"
    )
    parser.add_argument(
        "--std", type=float, nargs="+", help="per-channel standard deviations; without it those of the run"
    )
    command_line.add_model_flags(parser)
    parser.set_defaults(dataset="imagefolder", data_path="", device="cpu", seed=0)
    return parser


def check_out(args) -> Path:
    """Return `--out` as a path. Raises UserError if the export cannot be written there."""
    out, suffix = Path(args.out), SUFFIXES.get(args.to)
    if is_timm_folder(args):
        suffix = None
    elif args.push or args.license:
        flag = "--push" if args.push else "--license"
        raise UserError(f"{flag} needs timm's own format: --to timm, and --out without an ending")
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out} must end in {suffix} for --to {args.to}")
    if out.is_dir() if suffix else out.is_file():
        raise UserError(f"--out {out} is a {'folder' if suffix else 'file'}, but --to {args.to} writes the other")
    if out.resolve() == Path(command_line.checkpoint_of(args)).resolve():
        raise UserError(f"--out {out} is the checkpoint itself: name another file")
    if not args.overwrite and (any(out.iterdir()) if out.is_dir() else out.exists()):
        raise UserError(f"--out {out} exists: give --overwrite, or another name")
    return command_line.needed_out(args)


def is_timm_folder(args) -> bool:
    """Whether timm's own format is asked for, which is a folder."""
    return args.to == "timm" and not Path(args.out).suffix


def load(args) -> tuple[judging.Judged, str, dict]:
    """Open the autoencoder or encoder to export -> the model, its feature (cls or avg), the flags to store. Raises
    UserError for a checkpoint that cannot be exported to the format."""
    check_numbers(args)
    path = command_line.checkpoint_of(args, "to export")
    weights = read_checkpoint(path, args.checkpoint_key)
    if weights is None:
        raise UserError("give a CHECKPOINT to export: a random encoder is not exported")
    whole = args.to in ("hf-vitmae", "safetensors") and weights.has_decoder and not args.encoder_only
    if args.to == "hf-vitmae" and not whole and not args.encoder_only:
        raise UserError(
            f"{path} has no decoder ({weights.origin}), which a ViTMAE for pretraining needs: "
            "give a full pretraining checkpoint, or --encoder_only for a ViTMAEModel"
        )
    if whole:
        judged, pool = judging.open_autoencoder(args, weights), args.pool or "cls"
        print(f"{path}: {weights.origin}")
    else:
        judged = judging.open_trained(args, path, head=not args.encoder_only, only_plain="export.py exports")
        pool = command_line.settle_pool(args, judged.model, path)
    return judged, pool, flags_of(judged, None if whole else pool)


def flags_of(judged: judging.Judged, pool: str | None) -> dict:
    """Return the flags to store in the exported file; `pool` is None for an autoencoder."""
    assert judged.weights is not None  # `load` refuses a random encoder
    stored, resolved = judged.weights.args, judged.flags
    flags = {name: stored[name] for name in KEPT.split() if stored.get(name) is not None}
    flags |= {name: resolved[name] for name in ("patch_size", "in_chans")}
    flags |= dict(zip(("mean", "std"), judged.images.mean_std))
    flags |= {name: resolved[name] for name in ("model", "input_size")}
    epoch = judged.weights.history.get("epoch")  # the last one that was trained, which may be before --epochs
    flags |= {"origin": {"epoch": epoch}} if epoch is not None else {}
    if pool:
        flags |= dict(global_pool=pool == "avg", nb_classes=judged.model.num_classes)
    return flags | (class_names(judged) if pool and judged.model.num_classes else {})


def class_names(judged: judging.Judged) -> dict[str, list[str]]:
    """Return the names of the classifier's outputs under timm's name for them; {}, with a note, if they are unknown."""
    assert judged.weights is not None
    names, count = judged.weights.classes, judged.model.num_classes
    if len(names) == count:
        return {"label_names": names}
    what = f"{len(names)} names for" if names else "no names of"
    print(f"note: {judged.path} has {what} its {count} classes, so the exported file has none")
    return {}


def main(args) -> float:
    """Export, and return the largest difference between the outputs of the model and of the exported file. Raises
    RunFailed if it exceeds rounding."""
    out = check_out(args)
    judged, pool, flags = load(args)
    model, record = judged.model, judged.record("export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' warnings are for developers of operators
        exported = EXPORTERS[args.to](model, out, pool, flags)
        difference = largest_difference(model, exported, pool, flags.get("mask_ratio", 0.75))
    mean, std = ([round(value, 5) for value in flags[name]] for name in ("mean", "std"))
    print(
        f"{out}: {exported.outputs}\n  {exported.code}\n  images {' x '.join(map(str, model.patch_embed.img_size))}, "
        f"colours in [0, 1] normalised by mean {mean} and standard deviation {std}\n"
        f"  checked on two random images: largest relative difference {difference:.1e}"
    )
    if not difference < 1e-4:  # far above rounding, far below the effect of a wrong tensor
        raise RunFailed(
            f"{out} does not compute what {command_line.checkpoint_of(args)} does (difference {difference:.1e}); "
            "do not use it"
        )
    if is_timm_folder(args):
        write_card(judged, out, args.push, args.license)
        print(f"  model card: {out / 'README.md'}")
    if args.push:
        print(f"  uploaded to {push(out, args.push)}")
    result = {"largest_difference": difference}
    beside = Path(f"{out}.json")  # after the whole name, so that cls.onnx and cls.pt2 have one each
    judged.publish(record, result, EXAMPLES, json=beside, outputs=exported.outputs, code=exported.code, told=flags)
    return difference


if __name__ == "__main__":
    with user_errors("export.py"):
        main(get_args_parser().parse_args())
