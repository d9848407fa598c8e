"""Segmentation in the shared loop: processes, accumulation and resuming change nothing; evaluation scores at the
original size; mistakes are refused."""

import json
import shlex

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint, largest_difference, log_rows, ranks, same_tensors, scalars
from sklearn.metrics import jaccard_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import main_segment
import models_segment
from engine_dense import Segmentation
from util.data.dense.scenes import SegmentedScenes
from util.data.dense.transforms import SegmentationEvaluation
from util.data.image_format import mean_std
from util.errors import UserError
from util.lr_sched import learning_rate

SCENES = "--dataset scenes --scene_digits 0 1 7 --scene_size 32 --scene_count 24 5 --input_size 32"
# fp32: where a CPU multiplies bf16 fast, `auto` is bf16, whose rounding is too coarse to compare.
BASE = f"{SCENES} --model vit_micro_patch4 --head_width 16 --head_norm layer --lr 3e-3 --num_workers 0 --device cpu"
BASE += " --rel_pos --drop_path 0 --head_dropout 0 --amp_dtype fp32 --print_freq 1"


def segment(flags: str) -> dict:
    return main_segment.main(main_segment.get_args_parser().parse_args(shlex.split(flags)))


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    """Two epochs of three steps of eight scenes."""
    folder = tmp_path_factory.mktemp("segment")
    segment(f"{BASE} --batch_size 8 --epochs 2 --save_freq 1 --keep 0 --output_dir {folder}")
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mae")
    words = f"{SCENES} --model mae_vit_micro_patch4 --batch_size 8 --epochs 1 --warmup_epochs 0 --vis_freq 0"
    words += f" --num_workers 0 --device cpu --output_dir {folder}"
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(words.split()))
    return folder / "checkpoint-0.pth"


def test_a_run_writes_what_it_measures(plain_run):
    rows = log_rows(plain_run)
    assert [row["epoch"] for row in rows] == [0, 1] and rows[-1]["eval/mIoU"] <= 100
    total = [row["train/segmentation"] + row["train/auxiliary"] for row in rows]
    assert [row["train/loss"] for row in rows] == pytest.approx(total)
    scores = json.loads((plain_run / "scores.json").read_text())
    assert scores["result"]["eval/mIoU"] == rows[-1]["eval/mIoU"]
    assert list(scores["details"]["iou"]) == ["background", "0", "1", "7"]
    board = EventAccumulator(str(plain_run), size_guidance={"images": 0})
    board.Reload()
    assert "eval/segmentation" in board.Tags()["images"] and scalars(plain_run, "eval/mIoU")
    assert checkpoint(plain_run, "checkpoint-best.pth")["classes"] == ["background", "0", "1", "7"]


def test_two_processes_and_accumulation_equal_one(plain_run, tmp_path):
    """The loss counts all pixels, so it is exact; 1e-4: the order of sums differs, and Adam turns it into steps."""
    for name, words, processes in (("two", "--batch_size 4", 2), ("accumulated", "--batch_size 4 --accum_iter 2", 1)):
        flags = f"{BASE} {words} --epochs 2 --output_dir {tmp_path / name}"
        ranks("main_segment", flags, processes) if processes > 1 else segment(flags)
        theirs, ours = (
            [point for _, point in scalars(folder, "train/loss")] for folder in (plain_run, tmp_path / name)
        )
        assert ours == pytest.approx(theirs, rel=1e-4)
        read = [json.loads((folder / "scores.json").read_text()) for folder in (plain_run, tmp_path / name)]
        counted = [scores["details"]["pixels"] for scores in read]
        assert counted[0] == counted[1] and sum(counted[1].values()) == 5 * 32 * 32  # each image once
        scores = [log_rows(folder)[-1]["eval/pixel_acc"] for folder in (plain_run, tmp_path / name)]
        assert scores[1] == pytest.approx(scores[0], abs=0.5)  # some pixels lie on the border of two classes


@pytest.mark.parametrize("stop", ["--epochs 1", "--max_steps 4 --lr_schedule cosine"])
def test_resuming(stop, tmp_path):
    """After an epoch, and inside one: bit for bit. The schedule is constant so that a longer run has the same one."""
    flags = f"{BASE} --batch_size 8 --min_lr 3e-3 --warmup_steps 0 --drop_path 0.1 --head_dropout 0.1 --save_freq 1"
    segment(f"{flags} --epochs 2 --output_dir {tmp_path / 'whole'}")
    segment(f"{flags} {stop} --output_dir {tmp_path / 'parts'}")
    segment(f"{flags} --epochs 2 --resume auto --output_dir {tmp_path / 'parts'}")
    whole, parts = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("whole", "parts"))
    assert same_tensors(whole["model"], parts["model"]) and same_tensors(whole["optimizer"], parts["optimizer"])


def test_evaluation_of_a_checkpoint(plain_run, pretrained, tmp_path, capsys):
    """The command that the run proposes gives the number of the run; windows and flips are options."""
    flags = f"{SCENES} --num_workers 0 --device cpu --amp_dtype fp32 --eval"
    best = max(row["eval/mIoU"] for row in log_rows(plain_run))
    stats = segment(f"{flags} --finetune {plain_run}/checkpoint-best.pth --output_dir {tmp_path}")
    assert stats["mIoU"] == pytest.approx(best, abs=1e-9)
    text = capsys.readouterr().out
    assert "windows of 32 x 32 px every 21 px" in text and "evaluation images, 4 classes" in text
    weights = f"--resume {plain_run}/checkpoint-1.pth"
    for words, flip in (("--eval_mode whole", False), ("--eval_mode whole --eval_flip", True)):
        other = segment(f"{flags} {weights} {words} --head_norm layer --rel_pos --output_dir ''")  # as in the file
        assert other["mIoU"] == pytest.approx(expected_miou(plain_run / "checkpoint-1.pth", flip), abs=1e-9)
    with pytest.raises(UserError, match=r"--head_norm batch contradicts .*pth, which was trained with layer"):
        segment(f"{flags} {weights} --head_norm batch --output_dir ''")
    with pytest.raises(UserError, match=r"--feature_blocks 0 1 2 3 contradicts .* trained with the model's own"):
        segment(f"{flags} {weights} --feature_blocks 0 1 2 3 --output_dir ''")
    with pytest.raises(UserError, match="does not fit these flags"):
        segment(f"{flags} {weights} --input_size 48 --output_dir ''")
    with pytest.raises(UserError, match="has no segmentation head"):
        segment(f"{flags} --finetune {pretrained} --output_dir ''")


def test_evaluation_of_weights_under_another_key(plain_run, tmp_path):
    """Also of a file that holds its tensors as `state_dict`, as many tools save them, with a wrapper's prefix."""
    stored = checkpoint(plain_run, "checkpoint-1.pth")
    state = {f"module.{name}": value for name, value in stored["model"].items()}
    torch.save({"state_dict": state, "args": stored["args"], "classes": stored["classes"]}, tmp_path / "other.pth")
    flags = f"{SCENES} --num_workers 0 --device cpu --amp_dtype fp32 --eval --output_dir ''"
    paths = plain_run / "checkpoint-1.pth", tmp_path / "other.pth"
    first, other = (segment(f"{flags} --finetune {path}") for path in paths)
    assert first == other


def expected_miou(path, flip: bool) -> float:
    """The score of whole scenes by a loop over them, with the logits of the mirrored scene averaged in if `flip`."""
    scenes, predicted, truth = SegmentedScenes(0, False, 5, 32, [0, 1, 7]), [], []
    sizes = dict(img_size=32, head_width=16, head_norm="layer", rel_pos=True)
    model = models_segment.build_model("vit_micro_patch4", 4, **sizes).eval()
    model.load_state_dict(checkpoint(path.parent, path.name)["model"])
    mean, std = (torch.tensor(values)[:, None, None] for values in mean_std("scenes", 3, None, None))
    for index in range(len(scenes)):
        img = (torch.from_numpy(np.array(scenes.load(index))).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            logits = model(img[None]) + (model(img[None].flip(-1)).flip(-1) if flip else 0)
        predicted.append(logits[0].argmax(0).flatten())
        truth.append(torch.from_numpy(scenes.scene(index).classes).flatten())
    truth, predicted = torch.cat(truth), torch.cat(predicted)
    labels = sorted({*truth.tolist(), *predicted.tolist()})
    return 100 * jaccard_score(truth, predicted, average="macro", labels=labels)


def test_a_pretrained_encoder_and_frozen_blocks(pretrained, tmp_path, capsys):
    """The encoder starts from the file; the linear probe leaves it as it is, and a fine-tuned one does not."""
    stored = checkpoint(pretrained.parent, pretrained.name)["model"]
    for name, words in (("probe", "--head linear --trainable_blocks 0"), ("all", "")):
        flags = f"{BASE} --batch_size 8 --epochs 1 {words} --finetune {pretrained} --output_dir {tmp_path / name}"
        segment(flags)
        assert f"{pretrained}: MAE" in capsys.readouterr().out
        model = checkpoint(tmp_path / name, "checkpoint-0.pth")["model"]
        names = [key for key in stored if key.startswith("blocks.") and key in model]
        change = largest_difference(*({key: state[key] for key in names} for state in (stored, model)))
        assert len(names) == 48 and (change == 0 if name == "probe" else change > 0)


def test_a_pixelwise_model_needs_no_windows():
    """Windows of a network that looks at one pixel give the labels of the whole image, also with padding and flips."""
    weight = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))

    class Pixelwise(torch.nn.Module):
        def forward(self, imgs):
            return torch.einsum("kc,nchw->nkhw", weight, imgs)

    resize = SegmentationEvaluation((32, 32), (0.5,) * 3, (0.2,) * 3, short_side=32)
    img = torch.randn(3, 32, 50, generator=torch.Generator().manual_seed(1))
    predictions = [
        Segmentation(["a", "b", "c"], resize, stride, flip, 255).predict(Pixelwise(), img, (32, 50))
        for stride, flip in ((32, False), (10, False), (7, True))
    ]
    assert torch.equal(predictions[0], weight.matmul(img.flatten(1)).argmax(0).view(32, 50))
    assert all(torch.equal(predictions[0], other) for other in predictions[1:])


def test_schedules():
    args = main_segment.get_args_parser().parse_args("--epochs 10 --lr 1 --min_lr 0.1 --warmup_epochs 2".split())
    assert [learning_rate(epoch, args) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.5, 1, 0.55, 0.1])
    args.lr_schedule, args.lr_steps = "step", [0.5, 0.9]
    assert [learning_rate(epoch, args) for epoch in (1, 4, 5, 9)] == pytest.approx([0.5, 1, 0.1, 0.01])
    args.lr_schedule = "cosine"
    assert learning_rate(6, args) == pytest.approx(0.55)
    args.lr_schedule = "constant"
    assert [learning_rate(epoch, args) for epoch in (1, 2, 10)] == [0.5, 1, 1]


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--stride 40", "--stride 40 is larger than the window of 32 pixels"),
        ("--stride 8 --eval_mode whole", "--stride has no effect with --eval_mode whole"),
        ("--scale 2 1", "--scale 2 1 must be two positive numbers"),
        ("--warmup_steps 3 --warmup_epochs 1", "--warmup_steps and --warmup_epochs both"),
        ("--feature_blocks 0 1 2 9", "--feature_blocks 9: the encoder has the blocks 0 to 3"),
        ("--input_size 30", "--input_size 30 30 must be a multiple of the patch size 4"),
        ("--eval", "--eval needs a finished run"),
        ("--jpeg_draft", "--jpeg_draft has no effect"),
        ("--val_split val", "--val_split has no effect with --dataset scenes: it is for voc"),
        ("--batch_size 1 --head_norm batch", "--head_norm layer"),
        ("--dataset digits", "--dataset digits has no masks of classes"),
    ],
)
def test_mistakes(flags, message, tmp_path):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        segment(f"{BASE} --batch_size 8 --epochs 1 {flags} --output_dir {tmp_path}")
