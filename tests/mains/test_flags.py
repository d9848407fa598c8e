"""Flags are settled before a run begins and then frozen, and what is stored of them is what the run used."""

import argparse
import copy
import json
import pickle

import pytest
import torch
from helpers.launch import SMALL, checkpoint

import engine_dense
import main_detect
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from util.arguments import flags_of_evaluation
from util.parser import Flags
from util.weights.file import read_file

BASE = "--batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu --amp_dtype fp32"
ENCODER = f"--model vit_micro_patch4 --input_size 16 {BASE}"
RUNS = {
    "pretrain": (main_pretrain, f"{SMALL} {BASE} --decoder cross --vis_freq 0", "checkpoint-0.pth"),
    "mlo_mae": (main_pretrain, f"{SMALL} {BASE} --mlo_mae --mlo_labels same --vis_freq 0", "checkpoint-0.pth"),
    "finetune": (main_finetune, ENCODER, "checkpoint-0.pth"),
    "linprobe": (main_linprobe, ENCODER, "checkpoint-0.pth"),
    "cached probe": (main_linprobe, f"{ENCODER} --cache_features", "probe.pth"),
    "evaluation": (main_finetune, f"{ENCODER} --eval --finetune {{finetuned}}/checkpoint-0.pth", None),
}
SCENES = f"--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 16 2 --head_width 8 {ENCODER}"
RUNS |= {
    "segment": (main_segment, SCENES, "checkpoint-0.pth"),
    "detect": (main_detect, f"{SCENES} --window 2", "checkpoint-0.pth"),
    "evaluation of a segmenter": (
        main_segment,
        SCENES.replace("--head_width 8 ", "--eval --finetune {segment}/checkpoint-0.pth "),
        None,
    ),
}
# Flags that are not given in RUNS, and what they are in the end: 96 images, of which MLO-MAE holds 24 out.
SETTLED = {
    "pretrain": {"decoder_fraction": 1 / 3, "lr": 1e-3 * 8 / 256},
    "mlo_mae": {"mlo_head_lr": 1e-2, "decoder_fraction": None},
    "finetune": {"nb_classes": 4, "patch_size": 4, "in_chans": 3, "aug": "rrc", "lr": 1e-3 * 8 / 256},
    "linprobe": {"nb_classes": 4, "patch_size": 4, "aug": "rrc", "lr": 0.1 * 8 / 256},
    "cached probe": {"nb_classes": 4, "lr": 8 / 256},
    "evaluation": {"nb_classes": 4, "lr": None},
    "segment": {"head": "upernet", "rel_pos": False, "nb_classes": 3, "stride": 10, "eval_mode": "slide", "lr": 1e-4},
    "detect": {"detector": "mask", "pyramid": "simple", "rel_pos": True, "window": 2, "anchors": None, "nb_classes": 2},
    "evaluation of a segmenter": {"head": "upernet", "head_width": 8, "aux_weight": 0.4, "short_side": 16},
}


def start(main, flags: str, folder, images) -> Flags:
    args = main.get_args_parser().parse_args(f"{flags} --data_path {images} --output_dir {folder}".split())
    main.main(args)
    return args


@pytest.fixture(scope="module")
def finetuned(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    start(main_finetune, ENCODER, folder, image_folder)
    return folder


@pytest.fixture(scope="module")
def segmented(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmented")
    start(main_segment, SCENES, folder, image_folder)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_settled_then_frozen(name, image_folder, finetuned, segmented, tmp_path, monkeypatch):
    """What is recorded of a run is frozen before the run is made, and equal in every file."""
    main, flags, file = RUNS[name]
    owner = main if hasattr(main, "Run") else engine_dense
    frozen, original = [], owner.Run.__init__

    def init(self, args, *rest, **named):
        frozen.append(args.frozen)
        original(self, args, *rest, **named)

    monkeypatch.setattr(owner.Run, "__init__", init)
    args = start(main, flags.format(finetuned=finetuned, segment=segmented), tmp_path, image_folder)
    trains = name != "cached probe" and "evaluation" not in name
    assert args.frozen and all(frozen) and len(frozen) == trains
    for flag in ("lr", "epochs", "input_size", "no_such_flag"):
        with pytest.raises(AttributeError, match=f"--{flag} cannot change"):
            setattr(args, flag, 1)
    assert {flag: getattr(args, flag) for flag in SETTLED[name]} == SETTLED[name]
    assert (args.rank, args.world_size, args.distributed, args.log_dir) == (0, 1, False, str(tmp_path))
    assert args.input_size == 16 and args.mean is args.std is None
    used, (line,) = json.loads(json.dumps(vars(args))), (tmp_path / "results.jsonl").read_text().splitlines()
    recorded = vars(flags_of_evaluation(args)) if "evaluation" in name else used
    assert json.loads(line)["flags"] == recorded
    if file is not None:
        assert checkpoint(tmp_path, file)["args"] == used
        written = json.loads((tmp_path / ("args.json" if file != "probe.pth" else "probe.json")).read_text())
        assert {flag: value for flag, value in written.items() if flag in used} == used


def test_what_frozen_flags_refuse():
    args = main_pretrain.get_args_parser().parse_args([])
    args.epochs = 3
    args.freeze()
    for other in (args, copy.copy(args), copy.deepcopy(args)):
        with pytest.raises(AttributeError, match="--epochs cannot change"):
            other.epochs = 4
        with pytest.raises(AttributeError, match="--epochs cannot change"):
            del other.epochs
        assert other == args and vars(other) == vars(args) and other.epochs == 3
    assert not any(name.strip("_") == "frozen" for name in vars(args))
    assert not Flags(**vars(args)).frozen


def test_pickled_flags_are_a_plain_namespace(tmp_path):
    """A checkpoint of one's own loop that holds the flags is read without this project's classes, here too."""
    args = main_pretrain.get_args_parser().parse_args(["--mask_ratio", "0.5"])
    args.freeze()
    assert type(pickle.loads(pickle.dumps(args))) is argparse.Namespace
    torch.save({"model": {}, "args": args}, tmp_path / "own.pth")
    assert vars(read_file(tmp_path / "own.pth")["args"]) == vars(args)


def test_flags_of_other_namespaces_can_be_settled():
    """Of a wrapper that makes a plain Namespace, and of a second run in the same process."""
    parsed = main_pretrain.get_args_parser().parse_args([])
    assert Flags.of(parsed) is parsed
    parsed.freeze()
    for args in (argparse.Namespace(lr=1), parsed):
        again = Flags.of(args)
        again.lr = 2
        assert isinstance(again, Flags) and vars(again).keys() == vars(args).keys() and args.lr != 2
