"""Fine-tune a pretrained encoder for detection and instance segmentation, train one from scratch, or evaluate one.

The protocol is that of ViTDet (Li et al. 2022): Mask R-CNN on a simple feature pyramid, attention in windows,
large-scale jitter, AdamW with layer decay, and a rate that drops twice. `--pyramid fpn` is the pyramid of "Benchmarking
detection transfer learning with vision transformers" (Li et al. 2021).
"""

import util.interrupts  # noqa: F401  first: Ctrl-C is in effect while the others are imported

# isort: split
import models_detect
from engine_dense import Detection, fine_tune
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
from evaluation.summaries import detection_summary
from models_grid import HEAD_NORMS, sync_batch_norm
from util import arguments
from util.checkpoint.resume import find_resume
from util.data.dense.detection import DETECTION, read_detection
from util.data.dense.flags import add_dense_data_arguments
from util.data.dense.paired import build_paired_loader
from util.data.dense.transforms import DetectionEvaluation, DetectionTraining
from util.data.image_format import image_shape, mean_std
from util.data.presets import MIRRORED
from util.errors import UserError, user_errors
from util.parser import Flags, Parser, settled_later
from util.report.ledger import Record
from util.training.run import start
from util.training.run_length import settle_schedule

WARMUP = 250  # steps, ViTDet's


def get_args_parser() -> Parser:
    parser = Parser(
        "Fine-tune a ViT for detection and instance segmentation, train one from scratch, or evaluate one.",
        usual="--finetune CHECKPOINT --data_path PATH",
    )
    arguments.add_model_arguments(parser, default_model=None, decoder=False)
    add_detector_arguments(parser.add_argument_group("detector"))
    arguments.add_transfer_arguments(parser)
    group = arguments.add_data_arguments(parser, DETECTION)
    arguments.add_leak_argument(group)
    add_dense_data_arguments(group, "detection")
    add_image_arguments(parser.add_argument_group("crops and evaluation"))
    add_training_arguments(
        parser, "coco", batch_size=4, epochs=100, wd=0.1, schedule="step", warmup=WARMUP, layer_decay=0.7
    )
    return parser


def add_detector_arguments(group) -> None:
    def setting(*args, **options):  # --eval takes the checkpoint's
        action = group.add_argument(*args, **options)
        settled_later(action, models_detect.SETTINGS[action.dest])

    setting(
        "--detector",
        "--task",
        type=lambda word: word.removesuffix("_rcnn"),
        choices=models_detect.DETECTORS,
        help="mask: Mask R-CNN, boxes and masks; faster: Faster R-CNN, boxes alone; also mask_rcnn and faster_rcnn",
    )
    setting(
        "--pyramid",
        choices=models_detect.PYRAMIDS,
        help="simple: ViTDet's, of the last block's map; fpn: four blocks' maps and a feature pyramid network",
    )
    setting("--window", type=int, metavar="PATCHES", help="side of the windows of attention; 0: none")
    setting(
        "--global_blocks", type=int, nargs="+", metavar="BLOCK",
        help="blocks without windows, from 0; without it the last one of each quarter",
    )  # fmt: skip
    setting("--rel_pos", action="store_true", help="relative positions in attention, zero at the start")
    setting("--no_rel_pos", action="store_false", dest="rel_pos", help="absolute positions alone")
    setting(
        "--anchors", type=int, nargs=5, metavar="PIXELS",
        help="sides of the anchors, the smallest first, one for each level; without it 2 patches, doubled four times",
    )  # fmt: skip
    setting("--head_norm", choices=sorted(HEAD_NORMS), help="norm in the heads; batch is synchronised over GPUs")
    setting("--head_width", type=int, help="channels of the pyramid and the heads")


def add_image_arguments(group) -> None:
    group.add_argument(
        "--lsj", type=float, nargs=2, default=[0.1, 2.0], metavar=("LOW", "HIGH"),
        help="large-scale jitter: range of the random factor of an image's size before it is cropped; 1 1: none",
    )  # fmt: skip
    group.add_argument(
        "--score_thresh", type=float, default=models_detect.SCORE_THRESH, metavar="SCORE",
        help="detections with a lower score are left out; a higher value is faster and lowers AP",
    )  # fmt: skip
    group.add_argument(
        "--rois_per_image", type=int, default=models_detect.ROIS, metavar="N",
        help="regions of an image on which the heads are trained; fewer are faster, and as good where objects are few",
    )  # fmt: skip
    group.add_argument(
        "--voc_metric", choices=["07", "area"], default="",
        help="voc: 07 (without the flag), the precision at eleven recalls; area, that at all recalls, since 2010",
    )  # fmt: skip


def check(args) -> None:
    """Raise UserError for flags that are out of range or contradict each other."""
    check_flags(args)
    check_range("--lsj", *args.lsj)
    check_positive(args, "head_width", "rois_per_image")
    if (args.window or 0) < 0:
        raise UserError(f"--window {args.window} must not be negative; 0: attention among all patches")
    if args.anchors and min(args.anchors) < 1:
        raise UserError(f"--anchors {' '.join(map(str, args.anchors))} must be positive")
    if not 0 <= args.score_thresh < 1:
        raise UserError(f"--score_thresh {args.score_thresh} must lie in [0, 1)")
    if args.voc_metric and args.dataset != "voc":
        raise UserError(f"--voc_metric has no effect with --dataset {args.dataset}, which is scored as COCO is")


def settle_flags(args, starts: bool) -> None:
    """Settle `--voc_metric`, and `--input_size` of a run that `starts`, whose size is not that of a checkpoint."""
    if args.dataset == "voc":
        args.voc_metric = args.voc_metric or "07"
    if starts and args.input_size is None:
        args.input_size = [args.scene_size if args.dataset == "scenes" else 1024]


def main(args) -> dict[str, float]:
    """Train or evaluate once. Return the scores of the last evaluation. Raises UserError for mistakes in flags and
    files."""
    args = Flags.of(args)
    check(args)
    device = start(args)
    resume = find_resume(args.resume, args.output_dir, needed=args.eval) if args.resume else None
    settle_flags(args, starts=not args.eval and resume is None)
    weights = read_starting_weights(args, resume, models_detect)
    masks = args.detector == "mask"
    images, held_out = read_splits(
        args, weights, resume, lambda train, known: read_detection(args, train, masks, known)
    )
    size, stats = image_shape(args.input_size), mean_std(args.dataset, args.in_chans, args.mean, args.std)
    if not args.eval:
        transform = DetectionTraining(size, *stats, tuple(args.lsj), flip=MIRRORED.get(args.dataset, 0.5))
        loader = build_paired_loader(images, transform, args, args.batch_size, train=True)
        settle_schedule(args, len(loader), WARMUP)
    args.freeze()

    rcnn = {"box_score_thresh": args.score_thresh, "box_batch_size_per_image": args.rois_per_image}
    model = build_model(models_detect, args, weights, rcnn=rcnn)
    model = sync_batch_norm(model, device).to(device)
    resize = DetectionEvaluation(size, *stats)
    val_loader = build_paired_loader(held_out, resize, args, 1, train=False)
    task = Detection(held_out, resize, masks, args.voc_metric)
    recorded = arguments.flags_of_evaluation(args) if args.eval else args
    record = Record("main_detect" + " --eval" * args.eval, recorded, weights, train=images, test=held_out)
    summary, names = detection_summary(args, model, images, held_out), held_out.categories
    if args.eval:
        return evaluate_once(args, model, val_loader, device, record, task, names, summary)
    return fine_tune(args, device, model, (loader, val_loader), task, resume, record, names, summary)


if __name__ == "__main__":
    with user_errors("main_detect.py"):
        main(get_args_parser().parse_args())
