"""Fine-tune a pretrained encoder for semantic segmentation, train one from scratch, or evaluate one.

The protocol is that of BEiT and MAE on ADE20K (He et al. 2022, Appendix A.4): UPerNet on four blocks of the encoder,
AdamW with layer decay, a linear schedule, crops of one size, and sliding windows in the evaluation. `--head linear
--trainable_blocks 0` trains a linear classifier on frozen patch tokens.
"""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
from functools import partial

import models_segment
from engine_dense import Segmentation, fine_tune
from engine_finetune import evaluate_once
from evaluation.dense import (
    add_training_arguments,
    build_model,
    check_flags,
    check_positive,
    check_range,
    read_splits,
    read_starting_weights,
)
from evaluation.segmenter import settle_evaluation
from evaluation.summaries import segmentation_summary
from models_grid import sync_batch_norm
from util import arguments
from util.checkpoint.resume import find_resume
from util.data.dense.flags import add_dense_data_arguments
from util.data.dense.paired import build_paired_loader
from util.data.dense.segmentation import SEGMENTATION, read_segmentation
from util.data.dense.transforms import SegmentationEvaluation, SegmentationTraining
from util.data.image_format import image_shape, mean_std
from util.data.presets import MIRRORED
from util.errors import UserError, user_errors
from util.parser import Flags, Parser, rare, settled_later
from util.report.ledger import Record
from util.training.run import start
from util.training.run_length import settle_schedule


def get_args_parser() -> Parser:
    parser = Parser(
        "Fine-tune a ViT for semantic segmentation, train one from scratch, or evaluate one.",
        usual="--finetune CHECKPOINT --data_path PATH",
    )
    arguments.add_model_arguments(parser, default_model=None, decoder=False)
    add_head_arguments(parser.add_argument_group("head"))
    arguments.add_transfer_arguments(parser)
    group = arguments.add_data_arguments(parser, SEGMENTATION)
    arguments.add_leak_argument(group)
    add_dense_data_arguments(group, "segmentation")
    add_image_arguments(parser.add_argument_group("crops and evaluation"))
    add_training_arguments(
        parser, "ade20k", batch_size=16, epochs=50, wd=0.05, schedule="linear", warmup=1500, layer_decay=0.65
    )
    return parser


def add_head_arguments(group) -> None:
    def setting(*args, **options):  # --eval takes the checkpoint's
        action = group.add_argument(*args, **options)
        settled_later(action, models_segment.SETTINGS[action.dest])

    setting(
        "--head",
        choices=models_segment.HEADS,
        help="upernet: pyramid pooling and a feature pyramid on four blocks; linear: one layer on the patch tokens",
    )
    setting("--head_width", type=int, help="channels of upernet; without it the encoder's width")
    setting(
        "--head_norm",
        choices=["batch", "layer"],
        help="norm in the head; batch needs two images per process, and is synchronised over GPUs",
    )
    setting("--feature_blocks", type=int, nargs="+", metavar="BLOCK", help="blocks that the head reads, from 0")
    setting("--rel_pos", action="store_true", help="relative position bias in attention, zero at the start")
    rare(group.add_argument("--head_dropout", type=float, default=0.1, help="share of channels that upernet drops"))
    setting("--aux_weight", type=float, help="weight of the auxiliary head's loss; 0: none")


def add_image_arguments(group) -> None:
    group.add_argument(
        "--scale", type=float, nargs=2, default=[0.5, 2.0], metavar=("LOW", "HIGH"),
        help="range of the random factor of an image's size before it is cropped",
    )  # fmt: skip
    group.add_argument(
        "--short_side", type=int, help="shorter side of an image at scale 1, in training and evaluation; without it "
        "that of --input_size",
    )  # fmt: skip
    rare(
        group.add_argument(
            "--no_flip", action="store_false", dest="flip", help="images are not mirrored; digits never are"
        )
    )
    rare(group.add_argument("--no_distort", action="store_false", dest="distort", help="colours are not distorted"))
    group.add_argument(
        "--eval_mode",
        choices=["slide", "whole"],
        help="slide: windows of --input_size, one every --stride pixels; whole: the image is made to fit; without it "
        "slide, and with --eval, as for the next two flags, what the run had",
    )
    group.add_argument("--stride", type=int, help="of the windows, in pixels; without it two thirds of --input_size")
    group.add_argument(
        "--eval_flip", action="store_true", default=None, help="average in the logits of the mirrored image"
    )


def check(args) -> None:
    """Raise UserError for flags that are out of range or contradict each other."""
    check_flags(args)
    check_range("--scale", *args.scale)
    check_positive(args, "short_side", "stride", "head_width")
    if not 0 <= args.head_dropout < 1:
        raise UserError(f"--head_dropout {args.head_dropout} must lie in [0, 1)")
    if (args.aux_weight or 0) < 0:
        raise UserError(f"--aux_weight {args.aux_weight} must not be negative; 0 leaves the auxiliary head out")
    if args.eval_mode == "whole" and args.stride is not None:
        raise UserError("--stride has no effect with --eval_mode whole")


def main(args) -> dict[str, float]:
    """Train or evaluate once. Return the scores of the last evaluation. Raises UserError for mistakes in flags and
    files."""
    args = Flags.of(args)
    check(args)
    device = start(args)
    resume = find_resume(args.resume, args.output_dir, needed=args.eval) if args.resume else None
    weights = read_starting_weights(args, resume, models_segment)
    if args.eval and args.zero_is_ignored is None:  # the meaning of the masks is that of the training
        assert weights is not None  # `read_starting_weights` has read those to evaluate
        args.zero_is_ignored = weights.args.get("zero_is_ignored")
    images, held_out = read_splits(args, weights, resume, partial(read_segmentation, args))
    settle_evaluation(args, weights.args if args.eval and weights else {})
    size, stats = image_shape(args.input_size), mean_std(args.dataset, args.in_chans, args.mean, args.std)
    if not args.eval:
        transform = SegmentationTraining(
            size, *stats, args.ignore_label, tuple(args.scale), args.short_side,
            flip=MIRRORED.get(args.dataset, 0.5) if args.flip else 0.0, distort=args.distort,
        )  # fmt: skip
        loader = build_paired_loader(images, transform, args, args.batch_size, train=True)
        settle_schedule(args, len(loader))
    args.freeze()

    model = build_model(models_segment, args, weights, ignore_label=args.ignore_label, dropout=args.head_dropout)
    model = sync_batch_norm(model, device).to(device)
    resize = SegmentationEvaluation(size, *stats, args.short_side if args.eval_mode == "slide" else None)
    val_loader = build_paired_loader(held_out, resize, args, 1, train=False)
    task = Segmentation(held_out.categories, resize, args.stride, args.eval_flip, args.ignore_label)
    recorded = arguments.flags_of_evaluation(args) if args.eval else args
    record = Record("main_segment" + " --eval" * args.eval, recorded, weights, train=images, test=held_out)
    summary = segmentation_summary(args, model, images, held_out)
    if args.eval:
        return evaluate_once(args, model, val_loader, device, record, task, held_out.categories, summary)
    return fine_tune(args, device, model, (loader, val_loader), task, resume, record, held_out.categories, summary)


if __name__ == "__main__":
    with user_errors("main_segment.py"):
        main(get_args_parser().parse_args())
