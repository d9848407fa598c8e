"""MLO-MAE as a run: the split of the data, logging, learned masks in other runs, tools, and refusals."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint, log_rows, ranks, same_tensors, scalars
from helpers.mlo_runs import BASE, MLO, pretrain
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main_pretrain
import util.data.readers
from engine_pretrain import mask_ratio_at
from methods.mlo.labelled_task import stratified_split, without
from methods.mlo.method import MLOMAE
from tools import mask_maps
from util.data.sources import Arrays, Subset
from util.errors import UserError


def made(flags: str):
    args = main_pretrain.get_args_parser().parse_args(f"{BASE} {flags}".split())
    return main_pretrain.check(args)


@pytest.fixture(scope="module")
def run(image_folder, tmp_path_factory):
    """Two epochs of six steps each: six moves of the head, six of the masking network."""
    folder = tmp_path_factory.mktemp("mlo")
    pretrain(f"{MLO} --data_path {image_folder} --output_dir {folder} --epochs 2 --vis_freq 1 --knn_freq 1")
    return folder


# Data -----------------------------------------------------------------------------------------------------------------


def labels(counts):
    targets = [label for label, count in enumerate(counts) for _ in range(count)]
    return Arrays(np.zeros((len(targets), 4, 4), np.uint8), targets, [f"c{i}" for i in range(len(counts))])


def test_the_split_is_disjoint_stratified_and_seeded():
    images = labels([50, 10, 40])
    train, val = stratified_split(images, 0.2, 3)
    assert sorted(train + val) == list(range(100))
    assert [sum(images.targets[index] == label for index in val) for label in range(3)] == [10, 2, 8]
    assert (train, val) == stratified_split(images, 0.2, 3) != stratified_split(images, 0.2, 4)


@pytest.mark.parametrize(
    "counts,fraction,message",
    [
        ([5, 1, 5], 0.2, "class 'c1' has fewer than two images"),
        ([100, 3], 0.01, r"--mlo_val_fraction 0.01 leaves class 'c1' of 3 images empty .* between 0.33 and 0.67 fits"),
        ([100, 3], 0.99, r"--mlo_val_fraction 0.99 leaves class 'c1' of 3 images empty"),
        ([10], 0.2, "only one class"),
    ],
)
def test_splits_that_are_refused(counts, fraction, message):
    with pytest.raises(UserError, match=message):
        stratified_split(labels(counts), fraction, 0)


def test_stage_one_never_sees_what_is_held_out(image_folder, run):
    state = checkpoint(run, "checkpoint-1.pth")
    held_out = set(state["methods"]["mlo_mae.held_out"].tolist())
    assert len(held_out) == 24
    args = main_pretrain.get_args_parser().parse_args(f"{MLO} --data_path {image_folder}".split())
    main_pretrain.settle(args)
    images = util.data.readers.read_images(args, train=True)
    method = MLOMAE(args, main_pretrain.build(args))
    first, looked_at = method.split_images(images)
    assert set(method.held_out.tolist()) == held_out
    names = {images.name(index) for index in held_out}
    stages = [first, method.batches[0].loader.dataset.images, method.batches[1].loader.dataset.images]
    seen = [{part.name(index) for index in range(len(part))} for part in stages]
    assert seen[2] == names == {looked_at.name(index) for index in range(len(looked_at))}
    assert not seen[0] & names and not seen[1] & names
    assert seen[0] == seen[1] and len(seen[0]) == 72


def test_a_file_that_is_listed_twice(image_folder, tmp_path):
    """A file with one entry held out is held out: neither stage I nor stage II uses its other entry."""
    files = sorted((image_folder / "train").glob("*/*.png"))
    lines = "".join(f"{file}\t{file.parent.name}\n" for file in files)
    (tmp_path / "list.txt").write_text(lines * 2)
    flags = f"{MLO} --dataset filelist --data_path / --train_list {tmp_path}/list.txt"
    args = main_pretrain.get_args_parser().parse_args(flags.split())
    main_pretrain.settle(args)
    images = util.data.readers.read_images(args, train=True)
    method = MLOMAE(args, main_pretrain.build(args))
    stages = (*method.split_images(images), method.batches[0].loader.dataset.images)
    first, held_out, second = ({part.name(index) for index in range(len(part))} for part in stages)
    assert held_out and first and not held_out & first and not held_out & second


def test_labelled_images_that_cannot_be_read(image_folder, tmp_path):
    """One sentence, also with data workers."""
    for split in ("train/a", "train/b"):
        (tmp_path / "broken" / split).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "broken" / split / f"{i}.png").write_bytes(b"no image")
    labels = MLO.replace("same", f"{tmp_path}/broken").replace("--num_workers 0", "--num_workers 1")
    with pytest.raises(UserError, match=r"^20 images in a row could not be read, the last one [^\n]*$"):
        pretrain(f"{labels} --mlo_batch_size 4 --data_path {image_folder} --epochs 1 --output_dir {tmp_path}/run")


def test_a_labelled_image_that_cannot_be_read(image_folder, tmp_path):
    """One rank of two reads it in some steps: the count is logged in exactly these steps, as on one process."""
    shutil.copytree(image_folder / "train", tmp_path / "labels" / "train")
    (tmp_path / "labels" / "train" / "class0" / "000.png").write_bytes(b"no image")
    flags = MLO.replace("same", f"{tmp_path}/labels").replace("--batch_size 12", "--epochs 1")
    flags = f"{flags} --data_path {image_folder} --mlo_batch_size"
    pretrain(f"{flags} 12 --batch_size 12 --output_dir {tmp_path}/one")
    ranks("main_pretrain", f"{flags} 6 --batch_size 6 --output_dir {tmp_path}/two", 2)
    one, two = (scalars(tmp_path / name, "train/bad_labelled_images") for name in ("one", "two"))
    assert one == two and {value for _, value in one} == {1.0} and len(one) < 8  # steps


def test_the_same_images_by_another_path(image_folder, tmp_path):
    """--mlo_labels is a link to the pretraining images: held-out images are removed from stage I."""
    (tmp_path / "other").symlink_to(image_folder)
    args = main_pretrain.get_args_parser().parse_args(f"--data_path {image_folder} --dataset folder".split())
    everything = util.data.readers.read_images(args, train=True)
    args.dataset, args.data_path = "imagefolder", str(tmp_path / "other")
    labelled = util.data.readers.read_images(args, train=True)
    left = without(everything, Subset(labelled, range(10)))
    assert len(left) == len(everything) - 10
    assert without(everything, Subset(labels([3]), range(3))) is everything


def test_files_are_compared_without_resolving_each(image_folder, monkeypatch):
    """Links to files are found in the listing of their folder; resolving millions takes minutes."""
    args = main_pretrain.get_args_parser().parse_args(f"--data_path {image_folder}".split())
    images = util.data.readers.read_images(args, train=True)
    calls, original = [], os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: calls.append(path) or original(path))
    assert len(without(images, Subset(images, range(10)))) == 86
    assert len(calls) == 4  # folders


def test_labels_from_another_folder(image_folder, tmp_path):
    """Unlabelled pretraining with the same files as labelled set under another path: stage I omits held-out images."""
    (tmp_path / "labelled").symlink_to(image_folder)
    pretrain(
        f"{MLO.replace('same', f'{tmp_path}/labelled')} --dataset folder --data_path {image_folder} --epochs 1 "
        f"--output_dir {tmp_path}/run"
    )
    state = checkpoint(tmp_path / "run", "checkpoint-0.pth")
    assert state["step"] == (96 - 24) // 12 and len(state["methods"]["mlo_mae.held_out"]) == 24


def test_the_test_set_is_never_opened(image_folder, tmp_path, monkeypatch):
    """Reading the test set raises; previews and kNN use the images that stage III holds out."""
    shutil.copytree(image_folder / "train", tmp_path / "data/train")
    original = util.data.readers.read_images

    def read_images(args, train):
        assert train, "the test set was opened"
        return original(args, train)

    def image_folder(*_, **__):
        raise AssertionError("a folder was opened")

    monkeypatch.setattr(main_pretrain, "read_images", read_images)
    monkeypatch.setattr("methods.mlo.labelled_task.image_folder", image_folder)
    pretrain(f"{MLO} --data_path {tmp_path}/data --output_dir {tmp_path}/run --epochs 1 --vis_freq 1 --knn_freq 1")
    assert 0 <= log_rows(tmp_path / "run")[0]["eval/knn20_acc1"] <= 100


def test_log_and_tensorboard(run):
    tags = EventAccumulator(str(run)).Reload().Tags()
    wanted = "pixels mask_weight stage2_loss stage3_loss stage3_top1 hypergrad_norm hypergrad_direct hypergrad_head"
    wanted += " hypergrad_cosine mask_entropy mask_changed"
    assert {f"train/{name}" for name in wanted.split()} <= set(tags["scalars"])
    assert "masks" in tags["images"] and "mask_probability" in tags["histograms"]
    assert all(0 <= value <= 1 for _, value in scalars(run, "train/mask_changed"))
    assert all(-1.001 <= value <= 1.001 for _, value in scalars(run, "train/hypergrad_cosine"))
    assert len(scalars(run, "train/stage3_loss")) == 6 and len(scalars(run, "train/pixels")) == 12


# A learned mask elsewhere ---------------------------------------------------------------------------------------------


def test_a_frozen_mask_in_another_run(image_folder, run, tmp_path):
    """It removes the same patches as in its own run, although the new encoder's embedding differs."""
    flags = f"{BASE} --batch_size 12 --epochs 1 --mlo_mae --mlo_mask_net {run}/checkpoint-1.pth"
    pretrain(f"{flags} --mlo_frozen --data_path {image_folder} --seed 5 --output_dir {tmp_path}/frozen")
    source, frozen = checkpoint(run, "checkpoint-1.pth"), checkpoint(tmp_path / "frozen", "checkpoint-0.pth")
    assert same_tensors(
        {k: v for k, v in source["methods"].items() if ".net." in k},
        {k: v for k, v in frozen["methods"].items() if ".net." in k},
    )
    imgs, logits = torch.randn(3, 3, 16, 16), []
    for path in (f"{run}/checkpoint-1.pth", f"{tmp_path}/frozen/checkpoint-0.pth"):
        args = main_pretrain.get_args_parser().parse_args(
            f"{BASE} --mlo_mae --mlo_frozen --mlo_mask_net {path}".split()
        )
        main_pretrain.settle(args)
        model = main_pretrain.build(args)
        logits.append(MLOMAE(args, model).logits(model, imgs))
    assert torch.equal(*logits)
    assert len(log_rows(tmp_path / "frozen")) == 1 and "train/stage3_loss" not in log_rows(tmp_path / "frozen")[0]
    pretrain(f"{flags} --data_path {image_folder} --mlo_labels same --output_dir {tmp_path}/more")  # continues to learn
    more = checkpoint(tmp_path / "more", "checkpoint-0.pth")["methods"]
    assert not torch.equal(more["mlo_mae.net.layers.0.weight"], source["methods"]["mlo_mae.net.layers.0.weight"])
    assert torch.equal(
        more["mlo_mae.embedding.network.patch_embed.proj.weight"], source["model"]["patch_embed.proj.weight"]
    )


def test_continued_pretraining(image_folder, run, tmp_path, capsys):
    plain = f"{BASE} --batch_size 12 --epochs 1 --data_path {image_folder} --output_dir {tmp_path}/plain"
    pretrain(plain)
    pretrain(
        f"{MLO} --data_path {image_folder} --epochs 1 --init_from {tmp_path}/plain/checkpoint-0.pth "
        f"--output_dir {tmp_path}/more"
    )
    assert "checkpoint-0.pth" in capsys.readouterr().out


def test_mask_maps(run, image_folder, tmp_path, capsys):
    for ratio in ("", "--mask_ratio 0.1"):
        flags = f"{run}/checkpoint-1.pth --data {image_folder}/val --out {tmp_path}/masks.png --count 3 {ratio}"
        mask_maps.main(mask_maps.get_args_parser().parse_args(flags.split()))
        picture = np.asarray(Image.open(tmp_path / "masks.png"))
        assert picture.std() > 10
    assert "10% of the patches removed" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"encoder\.safetensors"):
        mask_maps.main(
            mask_maps.get_args_parser().parse_args([f"{run}/encoder.safetensors", "--out", f"{tmp_path}/a.png"])
        )


def test_curriculum(image_folder, tmp_path):
    args = main_pretrain.get_args_parser().parse_args(["--mask_ratio", "0.5", "--mask_ratio_end", "0.9"])
    assert [round(mask_ratio_at(step, 5, args.mask_ratio, args.mask_ratio_end), 6) for step in range(5)] == [
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
    ]
    args.mask_ratio_end = None
    assert mask_ratio_at(3, 5, args.mask_ratio, args.mask_ratio_end) == 0.5
    for method in ("", "--mlo_mae --mlo_labels same --mlo_hidden 8", "--rc_mae --rc_mask different"):
        flags = f"{BASE} --batch_size 12 --epochs 2 --mask_ratio 0.5 --mask_ratio_end 0.9 {method} --overwrite"
        pretrain(f"{flags} --data_path {image_folder} --output_dir {tmp_path}")


# Refusals -------------------------------------------------------------------------------------------------------------

REFUSED = {
    "": "--mlo_mae needs --mlo_labels",
    "--mlo_labels same --mae_k 2": "--mlo_mae runs alone and cannot be combined with --mae_k: give one",
    "--mlo_labels same --ema_mae --wse 2": "--mlo_mae runs alone and cannot be combined with --ema_mae: give one",
    "--mlo_labels same --rc_mae": "--mlo_mae runs alone and cannot be combined with --rc_mae: give one",
    "--mlo_labels same --mlo_val_fraction 1": "--mlo_val_fraction 1.0 must lie between 0 and 1",
    "--mlo_labels same --epochs 3 --mlo_warmup_epochs 3": "--mlo_warmup_epochs 3 must lie in [0, --epochs 3)",
    "--mlo_labels same --mlo_unroll 0": "--mlo_unroll 0 must be positive",
    "--mlo_labels same --mlo_mask_lr 0": "--mlo_mask_lr 0.0 must be a positive number",
    "--mlo_labels same --mlo_weight_decay -1": "--mlo_weight_decay -1.0 must not be negative",
    "--mlo_labels same --mlo_hypergrad jvp --mlo_fd_alpha 0.1": "--mlo_fd_alpha has no effect without",
    "--mlo_labels same --mlo_unroll 1 --mlo_unroll_grad last": "--mlo_unroll_grad last has no effect with",
    "--mlo_labels same --blo_lambda 2": "--blo_lambda has no effect without --mlo_levels 2",
    "--mlo_labels same --mlo_prox 2": "--mlo_prox has no effect without --mlo_stage2 finetune",
    "--mlo_labels same --mlo_stage2 finetune": "--mlo_stage2 finetune needs --mlo_prox",
    "--mlo_labels same --mlo_levels 2 --mlo_head_lr 1": "--mlo_head_lr has no effect with --mlo_levels 2",
    "--mlo_labels same --mlo_levels 2 --no_mlo_head_path": "--no_mlo_head_path has no effect with --mlo_levels 2",
    "--mlo_labels same --mlo_levels 2 --mlo_head_norm": "--mlo_head_norm has no effect unless with --mlo_stage2 linear",
    "--mlo_labels same --mlo_levels 2 --mlo_stage2 solve": "--mlo_stage2 solve has no effect with --mlo_levels 2",
    "--mlo_labels same --mlo_stage2 solve --mlo_head_lr 1": "--mlo_head_lr has no effect with --mlo_stage2 solve",
    "--mlo_labels same --mlo_stage2 solve --mlo_head_norm": "--mlo_head_norm has no effect with --mlo_stage2 solve",
    "--mlo_labels same --mlo_ridge 0.1": "--mlo_ridge has no effect without --mlo_stage2 solve",
    "--mlo_labels same --mlo_stage2 solve --mlo_ridge 0": "--mlo_ridge 0.0 must be a positive number",
    "--mlo_frozen": "--mlo_frozen needs --mlo_mask_net",
    "--mlo_frozen --mlo_mask_net x --mlo_labels same": "--mlo_labels has no effect with --mlo_frozen",
    "--mlo_labels same --mask_ratio_end 1": "--mask_ratio_end 1.0 must lie between 0 and 1",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_refused_flags(flags):
    with pytest.raises(UserError, match=re.escape(REFUSED[flags])):
        made(f"--mlo_mae {flags}")


def test_checked_twice():
    """A queued job checks its flags again."""
    for flags in ("", "--mlo_levels 2", "--mlo_hypergrad jvp"):
        args = main_pretrain.get_args_parser().parse_args(f"{MLO} {flags}".split())
        main_pretrain.check(args)
        main_pretrain.check(args)


def test_refused_files(image_folder, run, tmp_path):
    def refused(flags, message):
        with pytest.raises(UserError, match=message):
            pretrain(f"{MLO} --epochs 1 {flags} --output_dir {tmp_path}/never")
        assert not (tmp_path / "never").exists()

    refused(f"--dataset folder --data_path {image_folder}", "needs labels, and --dataset folder has none")
    refused(f"--data_path {image_folder} --mlo_labels {tmp_path}", f"--mlo_labels {tmp_path} has no train/ folder")
    refused(f"--data_path {image_folder} --mlo_batch_size 30", "--mlo_batch_size 30 is more than the 24 .* stage III")
    net = f"--data_path {image_folder} --mlo_hidden 512 --mlo_mask_net"
    refused(f"{net} {run}/checkpoint-1.pth --input_size 24", r"is for 16 patches of 4 pixels.* this run has 6x6 of 4")
    refused(f"{net} {run}/checkpoint-1.pth --input_size 8 32", r"is for 16 patches.* this run has 2x8 of 4")
    unlabelled = f"--dataset folder --data_path {image_folder} --mlo_labels {image_folder} --knn_freq 1"
    refused(unlabelled, "--knn_freq needs one set of labels")
    plain = tmp_path / "plain.pth"
    torch.save({"model": {}}, plain)
    refused(f"{net} {plain}", "holds no masking network: give a checkpoint of a run with --mlo_mae")


def test_another_split_is_not_resumed(image_folder, run, tmp_path):
    shutil.copy(run / "checkpoint-1.pth", tmp_path)
    with pytest.raises(UserError, match="others would be held out"):
        pretrain(
            f"{MLO} --data_path {image_folder} --epochs 3 --mlo_val_fraction 0.5 --resume {tmp_path}/checkpoint-1.pth"
        )
