"""Short runs of every command with `--device`, for the tests on GPUs and on a pretended one."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from helpers.launch import SMALL, command_module
from util.data import readers
from util.training.run import Run

FAST = "--num_workers 0 --seed 0 --print_freq 1"
DATA = "--dataset digits --input_size 16"
SCENES = "--dataset scenes --scene_digits 0 1 7 --scene_size 32 --scene_count 24 5 --input_size 32"
PRETRAIN = f"{DATA} {SMALL} --batch_size 32 --warmup_epochs 0 --vis_freq 0 --epochs 2 {FAST}"
FINETUNE = f"{DATA} --model vit_micro_patch4 --batch_size 32 --epochs 1 --warmup_epochs 0 --amp_dtype fp32 {FAST}"
DENSE = f"{SCENES} --model vit_micro_patch4 --batch_size 8 --epochs 1 --head_width 16 --amp_dtype fp32 {FAST}"


METHODS = {
    "mae": "--clip_grad 1 --spike_factor 2 --amp_dtype fp32",
    "accumulation": "--accum_iter 2 --amp_dtype fp32 --norm_pix_loss",
    "bf16": "--amp_dtype bf16 --epochs 1",
    "mae_k": "--mae_k 1 --amp_dtype fp32",
    "ema_and_rc": "--ema_mae --wse 0 --ema_update step --rc_mae --amp_dtype fp32",
    "dmae": "--dmae_teacher {pretrained} --dmae_teacher_model mae_vit_micro_patch4 --amp_dtype fp32",
    "mlo": "--mlo_mae --mlo_labels same --mlo_batch_size 8 --amp_dtype fp32 --epochs 1",
    "u_mae": "--u_mae --amp_dtype fp32 --epochs 1",
    "hpm": "--hpm --hpm_start 0.5 --amp_dtype fp32",
    "automae": "--automae --amp_dtype fp32",
    "attmask": "--attmask hint --amp_dtype fp32 --epochs 1",
    "attmask_file": "--attmask high --attmask_encoder {pretrained} --amp_dtype fp32 --epochs 1",
    "cross": "--decoder cross --mask_ratio_end 0.5 --grad_checkpoint --amp_dtype fp32",
    "on_device_mae": "--data_cache device --aug mae --amp_dtype fp32 --vis_freq 1 --knn_freq 1 --epochs 1",
    "on_device_three": "--data_cache device --aug three --in_chans 3 --amp_dtype fp32 --epochs 1",
    "on_device_crop": "--data_cache device --aug crop --amp_dtype fp32 --epochs 1",
}

SUPERVISED = {
    "finetune": ("main_finetune", f"{FINETUNE} --finetune {{pretrained}} --mixup 0.8 --cutmix 1"),
    "finetune_elem": ("main_finetune", f"{FINETUNE} --mixup 0.8 --cutmix 1 --mixup_mode elem --amp_dtype fp32"),
    "finetune_pair": (
        "main_finetune",
        f"{FINETUNE} --mixup 0.8 --mixup_mode pair --class_weights balanced --drop_path 0.1",
    ),
    "probe": ("main_linprobe", f"{FINETUNE} --finetune {{pretrained}}"),
    "attentive": ("main_linprobe", f"{FINETUNE} --finetune {{pretrained}} --head attentive"),
    "cached": ("main_linprobe", f"{DATA} --finetune {{pretrained}} --cache_features --epochs 2 {FAST}"),
    "segment": ("main_segment", f"{DENSE} --head_norm layer"),
    "linear": ("main_segment", f"{DENSE} --head linear --trainable_blocks 0 --eval_mode whole --eval_flip"),
    "detect": ("main_detect", f"{DENSE} --window 4"),
    "detect_fpn": ("main_detect", f"{DENSE} --pyramid fpn --detector faster"),
}


def parsed(main: str, flags: str, folder: Path, device: str):
    """Return the module of a main or tool, and its parsed flags."""
    module = command_module(main)
    words = [*flags.split(), "--device", device]
    if "--out " not in flags:
        words += ["--output_dir", str(folder)]
    return module, module.get_args_parser().parse_args(words)


@contextmanager
def few_digits(train: int = 96, evaluation: int = 40):
    """`--dataset digits` with the first images of each split."""
    whole = readers.READERS["digits"]

    def few(args, split: bool, classes):
        images = whole(args, split, classes)
        count = train if split else evaluation
        return readers.Arrays(images.arrays[:count], images.targets[:count], images.classes)

    with patch.dict(readers.READERS, digits=few):
        yield


def rows(folder: Path) -> list[dict]:
    """The rows of a log without times and speeds."""
    read = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    timed = ("seconds", "speed/", "gpu_memory")
    return [{name: value for name, value in row.items() if not name.startswith(timed)} for row in read]


@contextmanager
def watch_steps(watch: Callable[[bool], None]):
    """Call `watch(True)` where a host must not wait, and `watch(False)` after it: in training from the second step on,
    without logging, saving, evaluation, diagnostics and the check of a graph."""
    batches, finish_step, untimed = Run.batches, Run.finish_step, Run.untimed
    inside = False

    def switch(on):
        nonlocal inside
        inside = on
        watch(on)

    def watched(run):
        iterator, last = batches(run), object()
        while True:
            switch(run.step > 0)  # the first step may wait
            batch = next(iterator, last)
            if batch is last:
                break
            yield batch
        switch(False)

    def finished(run):
        switch(False)
        finish_step(run)

    @contextmanager
    def exempt(run):
        before = inside
        switch(False)
        with untimed(run):
            yield
        switch(before)

    with patch.multiple(Run, batches=watched, finish_step=finished, untimed=exempt):
        yield
    switch(False)
