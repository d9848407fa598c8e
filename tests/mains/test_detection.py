"""Detection in the shared loop: processes and resuming change nothing; detections are scored at the original size; the
command for evaluation gives the number of the run; mistakes are refused."""

import contextlib
import io
import json
import shlex

import numpy as np
import pytest
import torch
from helpers.dense_sets import coco_content, coco_set, dense_flags, plain_args, voc_set
from helpers.launch import checkpoint, largest_difference, log_rows, ranks, same_tensors, scalars
from PIL import Image, ImageColor, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

import main_detect
import main_pretrain
from engine_dense import Detection
from models_detect import at_original_size
from util.data.dense.detection import read_detection
from util.data.dense.paired import build_paired_loader
from util.data.dense.rle import encode
from util.data.dense.scenes import DetectedScenes
from util.data.dense.transforms import DetectionEvaluation, DetectionTraining
from util.errors import UserError

SCENES = "--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 12 5"
MODEL = "--model vit_micro_patch4 --patch_size 8 --input_size 32 --head_width 16 --window 3"
# fp32: where a CPU multiplies bf16 fast, `auto` is bf16, whose rounding is too coarse to compare. Without a threshold
# the few steps of these runs give an AP above 0.
BASE = f"{MODEL} --lsj 0.5 1.5 --lr 3e-3 --score_thresh 0 --num_workers 0 --device cpu --amp_dtype fp32 --print_freq 1"


def detect(flags: str) -> dict:
    return main_detect.main(main_detect.get_args_parser().parse_args(shlex.split(flags)))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Two epochs of three steps of four scenes: the folder, and the text of the terminal."""
    folder, text = tmp_path_factory.mktemp("detect"), io.StringIO()
    with contextlib.redirect_stdout(text):
        detect(f"{SCENES} {BASE} --batch_size 4 --epochs 2 --output_dir {folder}")
    return folder, text.getvalue()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    words = f"{SCENES} --model mae_vit_micro_patch4 --patch_size 8 --input_size 32 --batch_size 4 --epochs 1"
    words += f" --warmup_epochs 0 --vis_freq 0 --num_workers 0 --device cpu --output_dir {folder}"
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(words.split()))
    return folder / "checkpoint-0.pth"


def test_a_run_writes_what_it_measures(plain_run):
    folder, text = plain_run
    rows = log_rows(folder)
    names = "proposal_objectness proposal_boxes classes boxes masks".split()
    assert [row["train/loss"] for row in rows] == pytest.approx(
        [sum(row[f"train/{name}"] for name in names) for row in rows]
    )
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["result"]["eval/box_AP"] == rows[-1]["eval/box_AP"]
    assert 0 < rows[-1]["eval/best_box_AP"] == max(row["eval/box_AP"] for row in rows)
    assert list(scores["details"]["mask_AP"]) == ["0", "1"]
    board = EventAccumulator(str(folder), size_guidance={"images": 0})
    board.Reload()
    assert "eval/detection" in board.Tags()["images"] and scalars(folder, "eval/mask_AP")
    assert checkpoint(folder, "checkpoint-best.pth")["classes"] == ["0", "1"]
    assert "Mask R-CNN, pyramid simple" in text and "evaluation images, 2 classes" in text


def test_evaluation_of_a_checkpoint(plain_run, pretrained, tmp_path):
    """The command that the run proposes gives the number of the run; the detector is that of the checkpoint."""
    folder, text = plain_run
    line = next(line for line in text.splitlines() if "main_detect.py --eval" in line)
    words = line.partition("main_detect.py ")[2] + " --num_workers 0 --device cpu --amp_dtype fp32"
    stats, best = detect(words), max(row["eval/box_AP"] for row in log_rows(folder))
    assert stats["box_AP"] == pytest.approx(best, abs=1e-9)
    assert json.loads((folder / "eval.json").read_text())["result"]["eval/box_AP"] == stats["box_AP"]
    with pytest.raises(UserError, match="has no detection head"):
        detect(f"{SCENES} --num_workers 0 --eval --finetune {pretrained} --output_dir ''")
    with pytest.raises(UserError, match="does not fit these flags"):
        detect(f"{words} --input_size 64 --output_dir ''")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--window 2", r"--window 2 contradicts .*pth, which was trained with 3: leave it out"),
        ("--pyramid fpn", "--pyramid fpn contradicts .* trained with simple"),
        ("--task faster_rcnn", "--detector faster contradicts .* trained with mask"),
        ("--no_rel_pos", "--rel_pos False contradicts .* trained with True"),
        ("--anchors 4 8 16 32 64", "--anchors 4 8 16 32 64 contradicts .* trained with the model's own"),
    ],
)
def test_an_evaluation_contradicts_its_checkpoint(flag, message, plain_run):
    with pytest.raises(UserError, match=message):
        detect(f"{SCENES} --eval --finetune {plain_run[0]}/checkpoint-best.pth {flag} --output_dir ''")


@pytest.mark.parametrize("stop", ["--epochs 1", "--max_steps 4"])
def test_resuming(stop, tmp_path):
    """After an epoch, and inside one: bit for bit. The schedule is constant so that a longer run has the same one."""
    flags = f"{SCENES} {BASE} --batch_size 4 --lr_schedule cosine --min_lr 3e-3 --warmup_steps 0 --detector faster"
    detect(f"{flags} --epochs 2 --output_dir {tmp_path / 'whole'}")
    detect(f"{flags} {stop} --output_dir {tmp_path / 'parts'}")
    detect(f"{flags} --epochs 2 --resume auto --output_dir {tmp_path / 'parts'}")
    whole, parts = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("whole", "parts"))
    assert same_tensors(whole["model"], parts["model"]) and same_tensors(whole["optimizer"], parts["optimizer"])
    with pytest.raises(UserError, match="--window 3"):
        detect(f"{flags} --window 2 --epochs 3 --resume auto --output_dir {tmp_path / 'parts'}")


def test_two_processes(tmp_path):
    """Their scores are those of one process that evaluates the checkpoint: no image is missing or counted twice, and
    both have the running statistics of the first one."""
    flags = f"{SCENES} {BASE} --batch_size 2 --epochs 1 --head_norm batch --pyramid fpn --output_dir {tmp_path}"
    text = ranks("main_detect", flags, 2)
    assert "2 processes" in text and "on 5 images" in text
    assert text.count("note: on CPUs batch norm uses the images of each process alone") == 1
    row = log_rows(tmp_path)[-1]
    flags = f"{SCENES} --eval --resume {tmp_path}/checkpoint-0.pth --score_thresh 0 --output_dir ''"
    stats = detect(f"{flags} --num_workers 0 --device cpu --amp_dtype fp32")
    assert stats["box_AP"] > 0 and stats.keys() == {key[5:] for key in row if key[:5] == "eval/" and "best" not in key}
    assert all(row[f"eval/{name}"] == pytest.approx(value, abs=1e-9) for name, value in stats.items())


def test_a_pretrained_encoder(pretrained, tmp_path, capsys):
    """The encoder starts from the file: frozen blocks keep its weights; positions are those of another size."""
    stored = checkpoint(pretrained.parent, pretrained.name)["model"]
    flags = (
        f"{SCENES} {BASE} --batch_size 4 --epochs 1 --scene_count 4 2 --no_rel_pos --pyramid fpn --trainable_blocks 1"
    )
    detect(f"{flags} --input_size 48 --finetune {pretrained} --output_dir {tmp_path}")
    assert f"{pretrained}: MAE" in capsys.readouterr().out
    model = checkpoint(tmp_path, "checkpoint-0.pth")["model"]
    names = [key for key in stored if key.startswith("blocks.") and key in model]
    frozen, tuned = ([key for key in names if (key[7] == "3") == last] for last in (False, True))
    changes = [
        largest_difference(*({key: each[key] for key in keys} for each in (stored, model))) for keys in (frozen, tuned)
    ]
    assert len(names) == 48 and changes[0] == 0 < changes[1]
    assert model["pos_embed"].shape[1] == 1 + 36


def test_pascal_voc(tmp_path, capsys):
    """VOC's scores, and the names of its classes; the command that is proposed keeps its metric."""
    voc_set(tmp_path)
    flags = f"{BASE} --dataset voc --data_path {tmp_path} --task faster_rcnn --voc_metric area --max_steps 1"
    stats = detect(f"{flags} --batch_size 2 --output_dir {tmp_path / 'run'}")
    assert {"AP50", "AP75", "AP", "AP50_07"} <= stats.keys()
    details = json.loads((tmp_path / "run" / "scores.json").read_text())["details"]
    assert list(details["AP50"]) == ["dog"]  # the person is difficult
    text = capsys.readouterr().out
    assert "Pascal VOC's AP (area)" in text and "--voc_metric area" in text and "Faster R-CNN" in text


# What is painted: the image, its size (width, height), and (colour, category, left, top, right, bottom) of its objects.
PAINTED = {
    11: ((24, 16), [("red", 3, 3, 2, 11, 9), ("green", 7, 12, 4, 23, 16)]),
    12: ((12, 16), [("green", 7, 0, 5, 7, 14), ("blue", 3, 7, 0, 12, 4)]),  # blue: a group
    13: ((20, 20), []),
}


def painted_set(root):
    """Write a COCO set of images with coloured rectangles on black, some as polygons, one as a run-length code."""
    content = {**coco_content(), "images": [], "annotations": []}
    for number, (size, objects) in PAINTED.items():
        picture = Image.new("RGB", size)
        content["images"].append(dict(id=number, file_name=f"{number}.png", width=size[0], height=size[1]))
        for colour, category, left, top, right, bottom in objects:
            ImageColor.colormap["green"] = "#00ff00"  # not HTML's, which is half as bright
            ImageDraw.Draw(picture).rectangle((left, top, right - 1, bottom - 1), fill=colour)
            corners = [left, top, right, top, right, bottom, left, bottom]
            mask = np.zeros(size[::-1], np.uint8)
            mask[top:bottom, left:right] = 1
            content["annotations"].append(
                dict(
                    id=len(content["annotations"]) + 1,
                    image_id=number,
                    category_id=category,
                    bbox=[left, top, right - left, bottom - top],
                    area=(right - left) * (bottom - top),
                    iscrowd=int(colour == "blue"),
                    segmentation=encode(mask) if colour == "blue" else [corners],
                )
            )
        for split in ("train2017", "val2017"):
            (root / split).mkdir(exist_ok=True, parents=True)
            picture.save(root / split / f"{number}.png")
    coco_set(root, content, content)
    return root


class Looking(torch.nn.Module):
    """Detects red and green by looking at the network's input, and brings them to the original image as detectors
    do."""

    def forward(self, imgs, targets):
        boxes, labels = [], []
        for label, channel in ((1, 0), (2, 1)):
            rows, columns = torch.nonzero(imgs[0, channel] > 0, as_tuple=True)
            if len(rows):
                boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                labels.append(label)
        found = {"boxes": torch.tensor(boxes).float().reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.long)}
        found |= {"scores": torch.ones(len(labels)), "masks": torch.ones(len(labels), 1, 28, 28)}
        return [at_original_size(found, targets[0]["size"], targets[0]["original_size"])]


def test_what_is_seen_in_the_input_is_perfect(tmp_path):
    """Boxes and masks of what the network sees are those of the annotations: nothing between the file and the scores
    shifts or scales. Images of three shapes, groups and images without objects included."""
    args = dense_flags("--dataset", "coco", "--data_path", painted_set(tmp_path), task="detection")
    images, resize = read_detection(args, False, True), DetectionEvaluation((48, 48), (0.5,) * 3, (0.2,) * 3)
    task = Detection(images, resize, masks=True)
    loader = build_paired_loader(images, resize, plain_args(), 1, False)
    stats = task.score(loader, Looking(), torch.device("cpu"), torch.float32).read()
    assert stats["box_AP"] == pytest.approx(100) and stats["mask_AP"] == pytest.approx(100)
    assert task.pictures()["detection"].shape[0] == 3


def test_targets_of_training():
    """The detector is told which part of the input is an image: proposals are clipped to it."""
    transform = DetectionTraining((32, 48), (0.5,) * 3, (0.2,) * 3, scale=(0.5, 0.5), flip=0)
    images, seen = DetectedScenes(0, True, 2, 40, [0, 1]), []

    def model(imgs, targets):
        seen.extend(targets)
        return {"loss_mask": torch.ones(()), "loss_classifier": torch.zeros(())}

    samples = next(iter(build_paired_loader(images, transform, plain_args(), 2, True).begin(0)))
    losses = Detection(images, transform, masks=True).losses(model, samples, torch.device("cpu"))
    assert {name: float(loss) for name, loss in losses.items()} == {"masks": 1, "classes": 0}
    assert [list(target) for target in seen] == [["boxes", "labels", "masks", "size"]] * 2
    assert [target["size"].tolist() for target in seen] == [[16, 16]] * 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--input_size 40", "must be a multiple of two patches, 16"),
        ("--input_size 30", "--input_size 30 30 must be a multiple of the patch size 8"),
        ("--eval", "--eval needs a finished run"),
        ("--dataset digits", "--dataset digits has no boxes of objects"),
        ("--dataset voc", "boxes, but no masks of objects: give --detector faster"),
        ("--lsj 2 1", "--lsj 2 1 must be two positive numbers"),
        ("--score_thresh 1", r"--score_thresh 1.0 must lie in \[0, 1\)"),
        ("--voc_metric area", "--voc_metric has no effect with --dataset scenes"),
        ("--window -1", "--window -1 must not be negative"),
        ("--global_blocks 4", "--global_blocks 4: the encoder has the blocks 0 to 3"),
        ("--anchors 8 16 32 64 0", "--anchors 8 16 32 64 0 must be positive"),
        ("--jpeg_draft", "--jpeg_draft has no effect"),
        ("--head_width 0", "--head_width 0 must be positive"),
        ("--rois_per_image 0", "--rois_per_image 0 must be positive"),
    ],
)
def test_mistakes(flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        detect(f"{SCENES} {BASE} --batch_size 4 --epochs 1 {flags} --output_dir {tmp_path}")


def test_number_of_regions(tmp_path, monkeypatch):
    """The box head sees at most that many regions of an image."""
    seen = []
    forward = FastRCNNConvFCHead.forward
    monkeypatch.setattr(FastRCNNConvFCHead, "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    for number in (8, 512):
        detect(f"{SCENES} {BASE} --batch_size 4 --epochs 1 --rois_per_image {number} --output_dir ''")
    steps = len(seen) // 2
    assert seen[0] == 4 * 8 and seen[steps] > 4 * 8


def test_masks_are_needed_for_a_mask_detector(tmp_path):
    content = coco_content()
    content["annotations"] = [{**each, "segmentation": None} for each in content["annotations"]]
    coco_set(tmp_path, content, content)
    with pytest.raises(UserError, match=r"has boxes, but no masks .*: give --detector faster"):
        detect(f"{BASE} --dataset coco --data_path {tmp_path} --batch_size 2 --output_dir ''")
