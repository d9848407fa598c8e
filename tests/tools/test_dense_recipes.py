"""The recipes of segmentation and detection: the numbers of their protocols, on any number of processes."""

import os
import shlex
import subprocess

import pytest
import torch
from helpers.launch import ROOT, log_rows

import main_detect
import main_segment
import models_detect
import models_vit
from evaluation.dense import build_model, note_start
from util.lr_sched import learning_rate
from util.training.run_length import run_length, settle_schedule
from util.weights.load import read_weights

MAINS = {"main_segment.py": main_segment, "main_detect.py": main_detect}
STAND_IN = """#!/bin/bash
printf '%q ' "$@" >> "$CALLS"; echo >> "$CALLS"
"""
UPERNET = dict(
    dataset="ade20k", input_size=[512], short_side=512, scale=[0.5, 2.0], head="upernet", rel_pos=True, aux_weight=0.4,
    head_norm="batch", max_steps=160000, warmup_steps=1500, lr=1e-4, lr_schedule="linear", min_lr=0, weight_decay=0.05,
    layer_decay=0.65, drop_path=0.1, eval_mode="slide", stride=341,
)  # fmt: skip
COCO = dict(
    dataset="coco", detector="mask", input_size=[1024], lsj=[0.1, 2.0], max_steps=184375, weight_decay=0.1,
    drop_path=0.1, rel_pos=True, score_thresh=0.05, min_lr=0,
)  # fmt: skip
BENCHMARKING = COCO | dict(
    pyramid="fpn", window=16, head_norm="batch", lr=8e-5, lr_schedule="cosine", warmup_steps=461, layer_decay=1
)
# By recipe: images per step, and flags.
PROTOCOLS = {
    "segment/mae_ade20k": (16, UPERNET | dict(expects="pretrained")),
    "segment/mlo_ade20k": (8, UPERNET | dict(expects="finetuned")),
    "segment/linear_ade20k": (
        16,
        dict(head="linear", trainable_blocks=0, max_steps=40000, lr=1e-3, weight_decay=1e-3, drop_path=0, stride=341),
    ),
    "detect/benchmarking_coco": (64, BENCHMARKING),
    "detect/benchmarking_coco_25ep": (64, BENCHMARKING | dict(max_steps=46093)),
    "detect/vitdet_coco": (
        64,
        COCO
        | dict(pyramid="simple", window=14, head_norm="layer", lr=1e-4, lr_schedule="step", warmup_steps=250)
        | dict(layer_decay=0.7),
    ),
    "detect/voc07": (
        16,
        dict(dataset="voc", voc_year=[2007], detector="faster", input_size=[512], epochs=50, lr=1e-4, weight_decay=1e-4)
        | dict(lr_schedule="constant", warmup_steps=0, layer_decay=1, drop_path=0, pyramid="simple", window=14),
    ),
}


@pytest.fixture
def started(tmp_path):
    """A function that runs a recipe with a stand-in for python, and returns (exit code, errors, processes, main, parsed
    flags); the last three are None if nothing was started."""
    (tmp_path / "python").write_text(STAND_IN)
    (tmp_path / "python").chmod(0o755)

    def start(name: str, *flags: str, **variables: str):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {**os.environ, "PYTHON": str(tmp_path / "python"), "CALLS": str(calls), "GPUS": "1", **variables}
        script = ["bash", str(ROOT / "scripts" / f"{name}.sh"), *flags]
        done = subprocess.run(script, env=env, capture_output=True, text=True)
        (words,) = [shlex.split(line) for line in calls.read_text().splitlines()] or [[]]
        if not words:
            return done.returncode, done.stderr, None, None, None
        index = next(index for index, word in enumerate(words) if os.path.basename(word) in MAINS)
        processes = [int(word.partition("=")[2]) for word in words if word.startswith("--nproc_per_node")]
        main = MAINS[os.path.basename(words[index])]
        args = main.get_args_parser().parse_args(words[index + 1 :])
        main.check(args)
        return done.returncode, done.stderr, (processes or [1])[0], main, args

    return start


def test_every_recipe_is_tested():
    scripts = {str(path.relative_to(ROOT / "scripts"))[:-3] for path in ROOT.glob("scripts/[sd]e*t/[!_]*.sh")}
    assert scripts == set(PROTOCOLS)


@pytest.mark.parametrize("gpus", [1, 8])
@pytest.mark.parametrize("name", PROTOCOLS)
def test_numbers_of_the_protocol(started, name, gpus):
    code, errors, processes, main, args = started(name, "--finetune", "x.pth", "--output_dir", "out", GPUS=str(gpus))
    assert code == 0 and processes == gpus, errors
    effective, expected = PROTOCOLS[name]
    assert {flag: getattr(args, flag) for flag in expected} == expected
    assert args.batch_size * args.accum_iter * gpus == effective
    assert args.resume == "auto" and args.finetune == "x.pth" and args.model == "vit_base_patch16"
    assert main is (main_segment if name.startswith("segment") else main_detect)


def test_your_flags_win(started):
    """Also those of a recipe that another one starts; BATCH keeps the batch of a step."""
    args = started("detect/benchmarking_coco_25ep", "--max_steps", "7", "--lr", "1", BATCH="4", GPUS="2")[-1]
    assert (args.max_steps, args.lr, args.batch_size, args.accum_iter) == (7, 1, 4, 8)


@pytest.mark.parametrize(("gpus", "nodes", "expected"), [("3", "1", None), ("8", "4", (2, 1)), ("128", "1", None)])
def test_batches_of_many_processes(started, gpus, nodes, expected):
    """64 images on 32 processes; numbers of processes that do not divide them are refused."""
    where = dict(GPUS=gpus, NODES=nodes, NODE_RANK="0", MASTER="host:1")
    code, errors, _, _, args = started("detect/vitdet_coco", **where)
    if expected is None:
        assert code == 2 and f"cannot be divided among {gpus} processes" in errors and args is None
    else:
        assert (args.batch_size, args.accum_iter) == expected


def rate(args, step: int, batches: int) -> float:
    """The learning rate after so many steps, in epochs of so many micro-batches."""
    return learning_rate(run_length(batches, args.accum_iter, 0, step)[1] if step else 0, args)


def test_learning_rates(started):
    """Rates after given steps. ADE20K has 20,210 training images, COCO 117,266 with objects, VOC 2007 has 5,011."""
    args, batches = started("segment/mae_ade20k")[-1], 20210 // 16
    assert settle_schedule(args, batches) == 160000
    rates = [rate(args, step, batches) for step in (750, 1500, 80750, 160000)]
    assert rates == pytest.approx([5e-5, 1e-4, 5e-5, 0])
    args, batches = started("detect/benchmarking_coco")[-1], 117266 // 8
    assert args.accum_iter == 8 and settle_schedule(args, batches, main_detect.WARMUP) == 184375
    rates = [rate(args, step, batches) for step in (0, 461, 92418, 184375)]
    # Epochs end with a shorter window, by which the schedule shifts: 1e-7 is a thousandth of the rate.
    assert rates == pytest.approx([0, 8e-5, 4e-5, 0], abs=1e-7)
    args = started("detect/vitdet_coco")[-1]  # ViTDet drops the rate after 163,889 and 177,546 steps
    settle_schedule(args, batches, main_detect.WARMUP)
    steps = (250, 163880, 163900, 177540, 177555)
    assert [rate(args, step, batches) for step in steps] == pytest.approx([1e-4, 1e-4, 1e-5, 1e-5, 1e-6])
    args, batches = started("detect/voc07")[-1], 5011 // 16
    settle_schedule(args, batches, main_detect.WARMUP)
    assert {rate(args, step, batches) for step in (0, 1, 9000)} == {1e-4}


@pytest.mark.parametrize(("name", "millions"), [("vitdet_coco", 111), ("benchmarking_coco", 118.67), ("voc07", None)])
def test_detectors(started, name, millions):
    """The numbers of RPN and heads of both papers, and the published sizes: of ViTDet, without the table of positions,
    and of MIMDet's implementation, which has smaller tables of relative positions."""
    args = started(f"detect/{name}")[-1]
    args.nb_classes, args.in_chans = 20 if name == "voc07" else 80, 3
    with torch.device("meta"):
        model = build_model(models_detect, args, None)
    rpn, heads = model.rpn, model.roi_heads
    assert rpn._pre_nms_top_n == {"training": 2000, "testing": 1000}
    assert rpn._post_nms_top_n == {"training": 1000, "testing": 1000}
    sampler = rpn.fg_bg_sampler
    assert (rpn.nms_thresh, sampler.batch_size_per_image, sampler.positive_fraction) == (0.7, 256, 0.5)
    assert (rpn.proposal_matcher.high_threshold, rpn.proposal_matcher.low_threshold) == (0.7, 0.3)
    sampler = heads.fg_bg_sampler
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (512, 0.25)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.05, 0.5, 100)
    convolutions = [module for module in rpn.head.conv.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 2 and rpn.anchor_generator.sizes == ((32,), (64,), (128,), (256,), (512,))
    windows = [block.attn.window for block in model.blocks]
    assert [index for index, window in enumerate(windows) if not window] == [2, 5, 8, 11]
    assert set(windows) == {0, args.window}
    count = sum(p.numel() for p in model.parameters()) - (model.pos_embed.numel() if name == "vitdet_coco" else 0)
    assert millions is None or count / 1e6 == pytest.approx(millions, rel=3e-3)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_rehearsals_are_legal(started, name):
    """A rehearsal changes data, model and length, and keeps the other numbers."""
    effective, expected = PROTOCOLS[name]
    args = started(name, "--cpu_small", "--output_dir", "out")[-1]
    assert args.dataset == "scenes" and args.max_steps == 8 and args.model == "vit_micro_patch4"
    assert args.batch_size * args.accum_iter == (effective if name.startswith("segment") else 4)
    changed = {"dataset", "voc_year", "input_size", "short_side", "stride", "max_steps", "warmup_steps"}
    assert all(getattr(args, flag) == expected[flag] for flag in expected.keys() - changed)


def test_a_rehearsal_runs(started, tmp_path):
    main, args = started("segment/linear_ade20k", "--cpu_small", "--output_dir", str(tmp_path / "out"))[-2:]
    args.device = "cpu"
    main.main(args)
    assert log_rows(tmp_path / "out")[-1]["eval/mIoU"] > 0


def test_the_start_of_a_protocol(tmp_path, capsys):
    """MLO-MAE's starts from a classifier, the others from a pretraining."""
    files = {}
    for name, classes in (("pretrained", 0), ("finetuned", 10)):
        torch.save(
            {"model": models_vit.build_model("vit_micro_patch4", num_classes=classes).state_dict()}, tmp_path / name
        )
        files[name] = read_weights(tmp_path / name)
    for expected in files:
        for name, weights in files.items():
            note_start(expected, weights)
            text = capsys.readouterr().out
            assert (f"note: {tmp_path / name} is a" in text) == (name != expected)
        note_start(expected, None)
        assert "note: the encoder is random" in capsys.readouterr().out
    files["pretrained"].dropped = ["roi_heads.box_head.0.0.weight"]
    note_start("pretrained", files["pretrained"])
    assert "is a detector of main_detect.py: the protocol starts from a pretrained" in capsys.readouterr().out
    note_start(None, files["pretrained"])
    assert capsys.readouterr().out == ""
