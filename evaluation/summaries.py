"""What each main script tells about its run at the start, and the commands that it proposes at the end."""

import os
from collections.abc import Sequence
from functools import partial

import numpy as np

from methods import Method
from methods.selection import settings
from models_detect import SCORE_THRESH
from models_mae import visible_patches
from models_timm import TimmEncoder
from util.data.dense.flags import add_dense_data_arguments
from util.data.image_format import image_shape
from util.data.presets import OFFICIAL, preset_of
from util.next_commands import command, data_words, tensorboard
from util.report.blocks import Row, row
from util.report.start_rows import data_rows, model_row
from util.training.announcements import Summary


def pretraining_summary(args, model, chosen: Sequence[type[Method]], images, held_out) -> Summary:
    """Return what main_pretrain.py tells about the images, the autoencoder `model` and the enabled methods."""
    classes = getattr(images, "classes", None)
    ratios = [ratio for ratio in (args.mask_ratio, args.mask_ratio_end) if ratio is not None]
    visible = " to ".join(str(visible_patches(model.patch_embed.num_patches, ratio)) for ratio in ratios)
    names = " + ".join(method.title.partition(" (")[0] for method in chosen) or "MAE"
    target = "normalised pixels" if args.norm_pix_loss else "pixels"
    mask = f"mask ratio {' to '.join(f'{ratio:g}' for ratio in ratios)}"
    rows = (
        *data_rows(args, images, held_out, classes),
        model_row(args, model, f"{visible} visible", forward=lambda mae, imgs: mae(imgs, args.mask_ratio)),
        row("method", names, mask, target, *settings(args, chosen)),
    )
    return Summary(rows, partial(_after_pretraining, args, classes is not None))


def _after_pretraining(args, labelled: bool, weights: str) -> list[str]:
    """Return commands for transfer if the images are `labelled`, else for pictures and an export."""
    folder, data = os.path.normpath(args.output_dir), data_words(args)
    if labelled:
        probe = ["--global_pool", "--cache_features", "--output_dir", f"{folder}-probe"]
        first = command("main_finetune.py", "--finetune", weights, *data, "--output_dir", f"{folder}-finetune")
        second = command("main_linprobe.py", "--finetune", weights, *data, *probe)
    else:
        picture, encoder = (os.path.join(folder, name) for name in ("reconstructions.png", "encoder-timm.safetensors"))
        first = command("tools/visualize.py", weights, *data, "--out", picture)
        second = command("tools/export.py", weights, "--to", "timm", "--out", encoder)
    return [first, second, tensorboard(folder, args.log_dir)]


def finetuning_summary(args, model, images, held_out) -> Summary:
    """Return what main_finetune.py tells about the images and the classifier `model`."""
    feature = "mean of the patches" if args.global_pool else "[cls] token"
    rows = (
        *data_rows(args, images, held_out, getattr(held_out, "classes", None)),
        model_row(args, model, feature),
        *([] if args.eval else _finetuning_rows(args)),
    )
    return Summary(rows, partial(_after_supervised, "main_finetune.py", args))


def _finetuning_rows(args) -> list[Row]:
    shown = (f"{name} {'none' if getattr(args, name) is None else getattr(args, name)}" for name in ("aug", *OFFICIAL))
    preset = None if args.resume else f"preset {preset_of(args)}"  # a resumed run keeps the values of its checkpoint
    return [
        row("fine-tuning", f"targets {args.targets}", f"layer decay {args.layer_decay:g}"),
        row("augmentation", preset, *shown),
    ]


def probe_summary(args, model, images, held_out) -> Summary:
    """Return what main_linprobe.py tells about the images and the frozen encoder `model`."""
    feature = "mean of the patches" if args.global_pool else "[cls] token"
    cached = "on cached features" if args.cache_features else f"augmentation {args.aug}"
    rows = (
        *data_rows(args, images, held_out, getattr(held_out, "classes", None)),
        model_row(args, model, "frozen"),
        row("head", args.head, feature if args.head == "linear" else None, cached),
    )
    return Summary(rows, partial(_after_supervised, "main_linprobe.py", args))


def timm_probe_summary(args, encoder: TimmEncoder, pool: str, images, held_out) -> Summary:
    """Return what main_linprobe.py tells about the images and the frozen encoder of timm's, of which `pool` is read."""
    parameters = f"{sum(p.numel() for p in encoder.parameters()) / 1e6:.2f} M parameters"
    feature = {"own": "the model's own feature", "avg": "mean of the patches", "cls": "[cls] token"}[pool]
    rows = (
        *data_rows(args, images, held_out, getattr(held_out, "classes", None)),
        row("model", encoder.name, parameters, f"{' x '.join(map(str, encoder.img_size))} px", "frozen"),
        row("head", args.head, feature, "on cached features"),
    )
    folder = os.path.normpath(args.output_dir)
    after = [command("tools/collect.py", folder), tensorboard(folder, args.log_dir)]
    return Summary(rows, lambda weights: after)


def _maps(model, imgs):
    return model.forward_maps(imgs, model.feature_blocks)


def segmentation_summary(args, model, images, held_out) -> Summary:
    """Return what main_segment.py tells about the images and the segmenter `model`."""
    blocks = " ".join(map(str, model.feature_blocks))
    norm, position = f"{args.head_norm} norm", "relative positions" if args.rel_pos else None
    size = " x ".join(map(str, image_shape(args.input_size)))
    window = f"windows of {size} px every {args.stride} px" if args.stride else f"whole images in {size} px"
    rows = (
        *data_rows(args, images, held_out, held_out.categories),
        model_row(args, model, forward=_maps, part="the encoder"),
        row("head", args.head, f"blocks {blocks}", norm, position),
        row("evaluation", window, "and mirrored" if args.eval_flip else None, "at the original size"),
    )
    return Summary(rows, partial(_after_segmentation, args))


def _after_segmentation(args, weights: str) -> list[str]:
    return _after_dense("main_segment.py", "segmentation", args, weights)


def detection_summary(args, model, images, held_out) -> Summary:
    """Return what main_detect.py tells about the images and the detector `model`."""
    windows = f"windows of {args.window} x {args.window} patches" if args.window else "global attention"
    detector = {"mask": "Mask R-CNN", "faster": "Faster R-CNN"}[args.detector]
    position = "relative positions" if args.rel_pos else None
    scores = f"Pascal VOC's AP ({args.voc_metric})" if args.voc_metric else "COCO's AP"
    rows = (
        *data_rows(args, images, held_out, held_out.categories),
        model_row(args, model, windows, position, forward=_maps, part="the encoder"),
        row("detector", detector, f"pyramid {args.pyramid}", f"{args.head_norm} norm"),
        row("evaluation", scores, f"detections with a score from {args.score_thresh:g}", "at the original size"),
    )
    return Summary(rows, partial(_after_detection, args))


def _after_detection(args, weights: str) -> list[str]:
    flags = ["--score_thresh", f"{args.score_thresh:g}"] * (args.score_thresh != SCORE_THRESH)
    flags += ["--voc_metric", args.voc_metric] * (args.voc_metric not in ("", "07"))
    return _after_dense("main_detect.py", "detection", args, weights, flags)


def _after_dense(script: str, task: str, args, weights: str, flags: Sequence[str] = ()) -> list[str]:
    """Return commands that evaluate the best weights, with `flags`, and show results and curves."""
    folder = os.path.normpath(args.output_dir)
    data = data_words(args, extra=partial(add_dense_data_arguments, task=task))
    size = ["--input_size", *map(str, np.atleast_1d(args.input_size))]
    evaluate = command(script, "--eval", "--finetune", weights, *data, *size, *flags, "--output_dir", folder)
    picture = command("tools/visualize_dense.py", weights, *data, "--out", os.path.join(folder, "predictions.png"))
    pictures = [picture] if task == "segmentation" else []
    return [
        *([] if args.eval else [evaluate]),
        *pictures,
        command("tools/collect.py", folder),
        tensorboard(folder, args.log_dir),
    ]


def _after_supervised(script: str, args, weights: str) -> list[str]:
    """Return commands that evaluate the best weights, predict, and show the curves."""
    folder, data = os.path.normpath(args.output_dir), data_words(args)
    predict = command("tools/predict.py", weights, *data, "--out", os.path.join(folder, "predictions.csv"))
    if args.eval:
        return [predict, command("tools/collect.py", folder), tensorboard(folder, args.log_dir)]
    feature = ["--global_pool"] if script == "main_linprobe.py" and args.global_pool else []
    feature += ["--head", "attentive"] if getattr(args, "head", "") == "attentive" else []
    labels = data_words(args, labels=hasattr(args, "targets"))
    evaluate = ["--eval", "--finetune", weights, *feature, *labels, "--output_dir", folder]
    return [command(script, *evaluate), predict, tensorboard(folder, args.log_dir)]
