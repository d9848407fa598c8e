"""Pictures of a segmenter's predictions: those that its run scored, in all formats; other checkpoints are refused."""

import shlex

import pytest
import torch
from helpers.launch import log_rows
from PIL import Image

import main_segment
import models_mae
from evaluation.segment_scores import SegmentScores
from evaluation.segmenter import open_segmenter, predict_labels
from tools import visualize_dense
from util.data.dense.paired import PairedDataset
from util.data.dense.segmentation import read_segmentation
from util.errors import UserError
from util.weights.file import read_file
from util.weights.load import read_weights

SCENES = "--dataset scenes --scene_digits 0 1 7 --scene_size 32 --scene_count 8 4"


def draw(flags: str) -> None:
    visualize_dense.main(visualize_dense.get_args_parser().parse_args(shlex.split(flags)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segment")
    flags = (
        f"{SCENES} --input_size 32 --model vit_micro_patch4 --head_width 16 --head_norm layer --lr 3e-3 --device cpu"
    )
    flags += f" --num_workers 0 --amp_dtype fp32 --batch_size 8 --epochs 1 --eval_flip --output_dir {folder}"
    main_segment.main(main_segment.get_args_parser().parse_args(flags.split()))
    torch.save(
        {
            "model": models_mae.mae_vit_micro_patch4(img_size=32).state_dict(),
            "args": {"model": "mae_vit_micro_patch4", "input_size": 32},
        },
        folder / "mae.pth",
    )
    return folder


def test_pictures(run, tmp_path):
    sizes = []
    for name, count in (("a.png", 1), ("b.png", 3), ("c.pdf", 2), ("d.svg", 99)):
        draw(f"{run}/checkpoint-best.pth {SCENES} --count {count} --out {tmp_path}/{name} --device cpu")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            sizes.append(picture.size)
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > 2 * sizes[0][1]
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF") and "<svg" in (tmp_path / "d.svg").read_text()


def test_the_predictions_are_those_that_the_run_scored(run):
    """With the windows and flips of the run: the file holds all that is needed."""
    path = str(run / "checkpoint-best.pth")
    args = visualize_dense.get_args_parser().parse_args(f"{path} {SCENES} --out a.png".split())
    trained = open_segmenter(args, read_weights(path), read_file(path)["model"])
    data = PairedDataset(read_segmentation(args, False), trained.resize, 0, 3, replace=False)
    scores = SegmentScores(torch.device("cpu"), 4)
    with torch.no_grad():
        for sample in (data[index] for index in range(4)):
            size = sample.target.shape
            predicted = predict_labels(trained.model, sample.image, size, trained.resize, trained.stride, trained.flip)
            scores.add([predicted], [sample.target], torch.tensor([True]))
    assert trained.flip and trained.stride == 21
    assert scores.read()["mIoU"] == pytest.approx(log_rows(run)[-1]["eval/mIoU"], abs=1e-9)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("{run}/mae.pth", "mae.pth has no head for a dense task: give a checkpoint of main_segment.py"),
        ("", "give a CHECKPOINT of main_segment.py"),
        ("{run}/checkpoint-best.pth --scene_digits 0 1 2", "has the class '2' where the training set has '7'"),
        ("{run}/checkpoint-best.pth --dataset coco", "--dataset coco has no masks of classes"),
        ("{run}/checkpoint-best.pth --count 0", "--count 0 must be positive"),
        ("{run}/checkpoint-best.pth --input_size 64", "does not fit these flags"),
        ("{run}/checkpoint-best.pth --crop_pct 0.9", "--crop_pct has no effect here"),
        ("{run}/checkpoint-best.pth --out a.doc", "--out a.doc must be a .png, .pdf or .svg file"),
    ],
)
def test_mistakes(flags, message, run, tmp_path):
    with pytest.raises(UserError) as error:
        draw(f"{SCENES} --device cpu --out {tmp_path}/a.png {flags.format(run=run)}")
    assert message in str(error.value)
