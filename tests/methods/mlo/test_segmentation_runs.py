"""MLO-MAE guided by segmentation as a run: where masks come from, the split, logging, pictures, and refusals."""

import re

import numpy as np
import pytest
from helpers.dense_sets import image, mask, masks_set, palette_mask, voc_set
from helpers.launch import checkpoint, log_rows, scalars
from helpers.mlo_runs import BASE, MLO, PIXELS, pretrain
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
from methods.mlo.method import MLOMAE
from methods.mlo.segmentation_task import Segmentation, missing_classes, random_split
from util.data.dense.scenes import SegmentedScenes
from util.errors import UserError
from util.next_commands import data_words

MASKS = f"{MLO} --mlo_task segmentation --mlo_batch_size 2"


def prepared(flags: str):
    """Return the settled flags of a run, its task, and the images of stage I and those that are held out."""
    args = main_pretrain.get_args_parser().parse_args(flags.split())
    main_pretrain.settle(args)
    images = main_pretrain.read_training_images(args)
    method = MLOMAE(args, main_pretrain.build(args))
    made = []
    method.set_task = made.append
    first, held_out = method.split_images(images)
    return args, made[0], first, held_out


def names(images) -> set[str]:
    return {images.name(index) for index in range(len(images))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two epochs of six steps each on scenes."""
    folder = tmp_path_factory.mktemp("pixels")
    pretrain(f"{MLO} {PIXELS} --output_dir {folder} --epochs 2 --vis_freq 1")
    return folder


def test_log_and_pictures(run):
    tags = EventAccumulator(str(run)).Reload().Tags()
    wanted = "pixels mask_weight stage2_loss stage3_loss stage3_pixel_acc stage3_mIoU hypergrad_norm hypergrad_cosine"
    assert {f"train/{name}" for name in wanted.split()} <= set(tags["scalars"])
    assert {"masks", "reconstruction"} <= set(tags["images"]) and "mask_probability" in tags["histograms"]
    for name in ("pixel_acc", "mIoU"):
        assert all(0 < value <= 100 for _, value in scalars(run, f"train/stage3_{name}"))
    assert log_rows(run)[-1]["eval/fixed_images_loss"] > 0
    state = checkpoint(run, "checkpoint-1.pth")
    assert state["step"] == 12 and len(state["methods"]["mlo_mae.held_out"]) == 24
    assert state["methods"]["mlo_mae.stage2.head.weight"].shape[0] == 3  # background and two digits


# Data -----------------------------------------------------------------------------------------------------------------


def test_the_split_is_random_and_seeded():
    train, val = random_split(50, 0.2, 3)
    assert sorted(train + val) == list(range(50)) and len(val) == 10
    assert (train, val) == random_split(50, 0.2, 3) != random_split(50, 0.2, 4)


@pytest.mark.parametrize(
    "count,fraction,message",
    [
        (1, 0.5, "only one image"),
        (20, 0.01, r"--mlo_val_fraction 0.01 leaves none of the 20 labelled images for stage III: .* 0.05 and 0.95"),
        (20, 0.99, r"leaves none of the 20 labelled images for stage II: a fraction"),
    ],
)
def test_splits_that_are_refused(count, fraction, message):
    with pytest.raises(UserError, match=message):
        random_split(count, fraction, 0)


def test_scenes_are_their_own_labels():
    _, task, first, held_out = prepared(f"{MLO} {PIXELS}")
    assert first is task.train_images and held_out is task.val_images
    assert not names(first) & names(held_out) and len(first) == 72 and len(held_out) == 24
    train, val = (next(iter(given.loader.begin(0))) for given in task.batches((1, 2)))
    assert train.image.shape == val.image.shape == (12, 3, 16, 16)
    assert train.target.shape == val.target.shape == (12, 16, 4)
    assert (val.target.sum(-1) == 16).all() and not val.target[..., -1].any() and val.target[..., 1:].any()


def test_ignored_scenes():
    """--ignore_label 0: the background does not count."""
    _, task, *_ = prepared(f"{MLO} {PIXELS} --ignore_label 0")
    target = next(iter(task.batches((1, 2))[1].loader.begin(0))).target
    assert not target[..., 0].any() and target[..., -1].any() and target[..., 1:3].any()


def test_masks_of_the_pretraining_images(tmp_path):
    """Stage I uses no image of stage III; 0 is read as unlabelled, as the masks say, and is recorded."""
    masks_set(tmp_path, 12, labels=(*[0] * 30, *[1] * 30, 2))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    args, task, first, held_out = prepared(f"{MASKS} --dataset masks --data_path {tmp_path}")
    assert args.zero_is_ignored and task.classes == 2
    assert names(first) == names(task.train_images) and len(first) == 9 and len(held_out) == 3
    assert not names(first) & names(held_out)
    target = next(iter(task.batches((1, 2))[1].loader.begin(0))).target
    assert target.shape == (2, 16, 3) and (target.sum((0, 1)) > 0).all()


def test_masks_in_another_folder(image_folder, tmp_path):
    """ADE20K's layout beside an image folder; files that are in both are held out from stage I, too."""
    for part in ("training", "validation"):
        for number in range(8):
            image(tmp_path / "images" / part / f"{number}.jpg")
            mask(tmp_path / "annotations" / part / f"{number}.png", 0, 1, 150)
    flags = f"{MASKS.replace('same', str(tmp_path))} --mlo_dataset ade20k"
    _, task, first, held_out = prepared(f"{flags} --data_path {image_folder}")
    assert len(first) == 96 and len(held_out) == 2 and task.classes == 150 and len(task.train_images) == 6
    _, _, first, held_out = prepared(f"{flags} --dataset folder --data_path {tmp_path}/images/training")
    assert len(first) == 6 and not names(first) & names(held_out)


def test_the_layout_of_another_folder_is_masks(image_folder, tmp_path):
    """Also its images are checked by --check_leak: those of both splits are the same here."""
    masks_set(tmp_path, 8)
    flags = f"{MASKS.replace('same', str(tmp_path))} --data_path {image_folder}"
    _, task, *_ = prepared(flags)
    assert task.classes == 3 and len(task.train_images) == 6
    with pytest.raises(UserError, match=r"^--mlo_labels and --check_leak: 8 of 8 training images are also among"):
        prepared(f"{flags} --check_leak")


def test_lists_of_voc(tmp_path):
    """Pretraining reads the images of the list that has masks."""
    top = voc_set(tmp_path, 2012, {"train": ["1", "2", "3"], "val": ["9"], "trainval": [*"1239"]})
    ids = [str(number) for number in range(1, 9)]
    (top / "ImageSets" / "Segmentation" / "trainaug.txt").write_text("\n".join(ids) + "\n")
    for name in ids:
        image(top / "JPEGImages" / f"{name}.jpg")
        palette_mask(top / "SegmentationClassAug" / f"{name}.png", 3, 20, 255)
    voc = f"{MASKS} --dataset voc --data_path {tmp_path}"
    _, task, first, held_out = prepared(f"{voc} --train_split trainaug")
    assert len(first) == len(task.train_images) == 6 and len(held_out) == 2 and task.classes == 21
    voc_set(tmp_path, 2007)
    with pytest.raises(UserError, match="choose one with --voc_year"):
        prepared(voc)
    args, task, *_ = prepared(f"{voc} --voc_year 2012 --train_split trainaug")
    assert args.voc_year == [2012] and data_words(args) and len(task.train_images) == 6


def test_a_note_on_missing_classes(tmp_path, capsys):
    """A class that only one image has is missing on one side. Masks are read until all classes have been seen."""
    masks_set(tmp_path, 12, labels=(0, 1))
    mask(tmp_path / "train" / "masks" / "3.png", 2)
    (tmp_path / "classes.txt").write_text("sky\ncat\ndog\n")
    prepared(f"{MASKS} --dataset masks --data_path {tmp_path}")
    (note,) = re.findall(r"note: 1 classes .*", capsys.readouterr().out)
    read = "9 masks of stage II", "3 masks of stage III"
    assert note in [f"note: 1 classes occur in none of the {side}, among them 'dog'" for side in read]
    scenes = SegmentedScenes(0, True, 300, 32, [0, 1])
    assert missing_classes(scenes) == ([], 64)
    never = SegmentedScenes(0, True, 300, 32, [0, 1])
    never.categories = [*never.categories, "unicorn"]
    assert missing_classes(never, limit=100) == (["unicorn"], 100)


def test_a_mask_that_does_not_fit_ends_the_run(tmp_path):
    """One sentence that names it, at the latest when it is used."""
    masks_set(tmp_path, 12, labels=(0, 1, 2))
    mask(tmp_path / "train" / "masks" / "5.png", 0, size=(3, 3))
    with pytest.raises(UserError, match=r"^the mask .*5\.png has 3 x 3 pixels, but its image .*5\.jpg has 10 x 8$"):
        pretrain(f"{MASKS} --batch_size 2 --epochs 1 --dataset masks --data_path {tmp_path} --output_dir {tmp_path}/o")


# Refusals -------------------------------------------------------------------------------------------------------------

SAME = "--mlo_labels same --mlo_task segmentation"
REFUSED = {
    "--mlo_task segmentation": "--mlo_mae needs --mlo_labels: `same`, or a folder with masks",
    SAME: "--mlo_task segmentation needs masks, and --dataset imagefolder has none: pretrain on ade20k",
    f"{SAME} --dataset coco": "--mlo_task segmentation needs masks, and --dataset coco has none",
    f"{SAME} --dataset scenes --mlo_dataset voc": "--mlo_dataset has no effect with --mlo_labels same",
    f"{SAME} --dataset scenes --voc_year 2012": "--voc_year has no effect with masks of scenes: it is for voc",
    f"{SAME} --dataset scenes --mlo_feature cls": "--mlo_feature cls has no effect with --mlo_task segmentation",
    "--mlo_labels x --mlo_task segmentation --train_split aug": "--train_split has no effect with masks of masks",
    "--mlo_labels same --ignore_label 0": "--ignore_label has no effect without --mlo_task segmentation",
    "--mlo_labels same --no_zero_is_ignored": "--zero_is_ignored has no effect without --mlo_task segmentation",
    "--mlo_labels same --mlo_dataset voc": "--mlo_dataset has no effect without --mlo_task segmentation",
    "--mlo_frozen --mlo_mask_net x --mlo_task segmentation": "--mlo_task has no effect with --mlo_frozen",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_flags(flags):
    args = main_pretrain.get_args_parser().parse_args(f"{BASE} --mlo_mae {flags}".split())
    with pytest.raises(UserError, match=re.escape(REFUSED[flags])):
        main_pretrain.check(args)


def test_flags_without_the_method_are_refused():
    args = main_pretrain.get_args_parser().parse_args(f"{BASE} --ignore_label 3".split())
    with pytest.raises(UserError, match="--ignore_label has no effect without --mlo_mae"):
        main_pretrain.check(args)


def test_checked_twice():
    """A queued job checks its flags again."""
    args = main_pretrain.get_args_parser().parse_args(f"{MLO} {PIXELS}".split())
    for _ in range(2):
        main_pretrain.check(args)
        assert args.mlo_feature is None


def test_refused_files(image_folder, tmp_path):
    def refused(flags, message):
        with pytest.raises(UserError, match=message):
            pretrain(f"{MLO} --mlo_task segmentation --epochs 1 {flags} --output_dir {tmp_path}/never")
        assert not (tmp_path / "never").exists()

    other = f"--data_path {image_folder} --mlo_labels {tmp_path}"
    refused(other, rf"^--mlo_dataset masks needs train/images/ and train/masks/ below --mlo_labels {tmp_path}$")
    refused(f"{other} --mlo_dataset ade20k", f"^--mlo_dataset ade20k needs the folder .* below --mlo_labels {tmp_path}")
    refused(f"{PIXELS} --mlo_batch_size 30", "--mlo_batch_size 30 is more than the 24 .* stage III")
    refused(f"{PIXELS} --knn_freq 1", "--knn_freq needs labels, and the images that are held out have masks")
    masks_set(tmp_path, 12, labels=(0,))
    refused(other, "the masks have only one class, so there is nothing to learn from")


def test_a_head_that_is_too_large_is_not_solved():
    """192 channels and 600 classes would be 116,000 unknowns for every update; one step needs no solution."""
    args = main_pretrain.get_args_parser().parse_args(f"{MLO} {PIXELS} --mlo_stage2 solve".split())
    main_pretrain.check(args)
    task = Segmentation.__new__(Segmentation)
    task.args, task.classes, task.solved = args, 600, True
    with pytest.raises(UserError, match="the head has 115,800 weights for 600 classes, more than the 100,000"):
        task.head(192)
    task.solved = False
    assert task.head(192).weight.shape == (600, 192)


def test_another_task_is_not_resumed(run, tmp_path):
    """Other classes, or another split."""
    flags = f"{MLO} {PIXELS} --epochs 3 --resume {run}/checkpoint-1.pth --output_dir {tmp_path}"
    with pytest.raises(UserError, match="others would be held out"):
        pretrain(f"{flags} --mlo_val_fraction 0.5")
    with pytest.raises(UserError, match=r"does not fit these flags: size mismatch for mlo_mae\.stage2\.head"):
        pretrain(flags.replace("--scene_digits 0 1", "--scene_digits 0 1 7"))


def test_positions_of_a_batch(run):
    """Numbers of labelled images are those of the split, so that every image of stage II is used once an epoch."""
    drawn = checkpoint(run, "checkpoint-1.pth")["methods"]["mlo_mae._extra_state"]["drawn"]
    assert drawn == [6, 6] and np.isfinite(log_rows(run)[-1]["train/stage3_loss"])
