"""Pictures of what segmenters and detectors predict: what their runs scored, in all formats, of several checkpoints;
other checkpoints are refused."""

import shlex

import pytest
import torch
from helpers.launch import log_rows
from PIL import Image

import main_detect
import main_segment
import models_mae
from evaluation.detect_scores import CocoScores
from evaluation.segment_scores import SegmentScores
from tools import visualize_dense
from util.errors import UserError
from util.report.sheet import Sheet

SCENES = "--dataset scenes --scene_digits 0 1 7 --scene_size 32 --scene_count 8 4"


RUN = f"{SCENES} --input_size 32 --model vit_micro_patch4 --head_width 16 --head_norm layer --lr 3e-3 --device cpu"
RUN += " --num_workers 0 --amp_dtype fp32 --batch_size 8 --epochs 1"


def draw(flags: str) -> None:
    visualize_dense.main(visualize_dense.get_args_parser().parse_args(shlex.split(flags)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with the runs segment/ and detect/, both with relative positions, and an autoencoder."""
    folder = tmp_path_factory.mktemp("dense")
    flags = f"{RUN} --eval_flip --rel_pos --output_dir {folder}/segment"
    main_segment.main(main_segment.get_args_parser().parse_args(flags.split()))
    flags = f"{RUN} --patch_size 8 --window 3 --score_thresh 0.05 --output_dir {folder}/detect"
    main_detect.main(main_detect.get_args_parser().parse_args(flags.split()))
    mae = {
        "model": models_mae.mae_vit_micro_patch4(img_size=32).state_dict(),
        "args": {"model": "mae_vit_micro_patch4", "input_size": 32},
    }
    torch.save(mae, folder / "mae.pth")
    return folder


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_pictures(task, run, tmp_path):
    sizes = []
    for name, count in (("a.png", 1), ("b.png", 4), ("c.pdf", 2), ("d.svg", 99)):
        draw(f"{run}/{task}/checkpoint-best.pth {SCENES} --count {count} --out {tmp_path}/{name} --device cpu")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            sizes.append(picture.size)
    assert sizes[1][1] > 1.5 * sizes[0][1] > 400
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF") and "<svg" in (tmp_path / "d.svg").read_text()


@pytest.mark.parametrize("task", ["segment", "detect"])
def test_the_predictions_are_those_that_the_run_scored(task, run):
    """With the windows and flips of the run, on its images: the file holds all that is needed."""
    args = visualize_dense.get_args_parser().parse_args("--out a.png --count 4 --device cpu".split())
    trained = visualize_dense.open_dense(args, str(run / task / "checkpoint-best.pth"))
    assert args.dataset == "scenes" and args.scene_count == [8, 4]
    shown, ignore = visualize_dense.predictions(args, trained)
    cpu, good = torch.device("cpu"), torch.tensor([True])
    scores = SegmentScores(cpu, 4) if task == "segment" else CocoScores(cpu, masks=True)
    for each in shown:
        scores.add([each.prediction], [each.truth], good)
    name = scores.headline
    assert scores.read()[name] == pytest.approx(log_rows(run / task)[-1][f"eval/{name}"], abs=1e-9)
    assert task == "detect" or (trained.flip and trained.stride == 21 and ignore == 255)


def test_checkpoints_as_rows(run, tmp_path, monkeypatch):
    sheets, paths = [], [run / "detect" / f"checkpoint-{name}.pth" for name in ("best", "0")]
    monkeypatch.setattr(Sheet, "save", lambda sheet, path: sheets.append(sheet))
    draw(f"{paths[0]} {paths[1]} --score_thresh 0.01 --count 1 --out {tmp_path}/a.png --device cpu")
    words = "".join(text for _, _, text in sheets[0].texts)  # titles are wrapped
    for text in ("detect/checkpoint-best", "detect/checkpoint-0", "detections with a score from 0.01"):
        assert text in words
    assert any(mark.words[0] in "017" for mark in sheets[0].marks if mark.words)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("mae.pth", "mae.pth has no head for a dense task: give a checkpoint of main_segment.py or main_detect.py"),
        ("", "give a CHECKPOINT of main_segment.py or main_detect.py"),
        ("segment {scenes} --scene_digits 0 1 2", "has the class '2' where the training set has '7'"),
        ("detect {scenes} --scene_digits 0 1 2", "has the category '2' where the training set has '7'"),
        ("segment --dataset coco", "--dataset coco has no masks of classes"),
        ("segment --scene_seed 3", "--scene_seed has no effect without --dataset"),
        ("segment --score_thresh 0.2", "--score_thresh has no effect for "),
        ("detect --score_thresh 2", "--score_thresh 2 must lie in [0, 1]"),
        ("detect --tile_size 5", "--tile_size 5 must lie between"),
        ("detect segment", "are of different tasks: draw each by itself"),
        ("segment --count 0", "--count 0 must be positive"),
        ("segment --input_size 64", "does not fit these flags"),
        ("segment --crop_pct 0.9", "--crop_pct has no effect here"),
        ("segment --out a.doc", "--out a.doc must be a .png, .pdf or .svg file"),
    ],
)
def test_mistakes(flags, message, run, tmp_path):
    named = {name: run / name / "checkpoint-best.pth" for name in ("segment", "detect")} | {"mae.pth": run / "mae.pth"}
    words = [str(named.get(word, word)) for word in flags.format(scenes=SCENES).split()]
    with pytest.raises(UserError) as error:
        draw(f"--device cpu --out {tmp_path}/a.png {' '.join(words)}")
    assert message in str(error.value)
