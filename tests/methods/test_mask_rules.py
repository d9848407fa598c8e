"""Masks by rule: known answers, exact ratios, distributions, keyed to the sample, and with every other method."""

import json

import numpy as np
import pytest
import torch
from helpers.inject import stop_at
from helpers.launch import checkpoint, log_rows, ranks, same_tensors
from helpers.teachers import BASE, made, pretrain
from PIL import Image

from evaluation.masks import mask_method, method_scores
from methods import METHODS
from methods.mask_rules import MaskRule, block_ranks, grid_ranks, list_ranks, ranked, read_masks, square_ranks
from models_mae import visible_patches
from util.data.sample_rng import redrawn, sample_noise
from util.errors import UserError
from util.weights.load import read_weights

GRID = (14, 14)
NOISE = sample_noise(0, 3, torch.arange(200), 196)
RULES = {
    "squares": lambda noise: square_ranks(noise, GRID, 4),
    "block": lambda noise: block_ranks(noise, GRID, (0.1, 0.3), (0.3, 3.33)),
    "grid": lambda noise: grid_ranks(noise, GRID),
    "list": lambda noise: list_ranks(noise, torch.tensor([[0.0] * 98 + [1.0] * 98, [1.0] * 98 + [0.0] * 98])),
}


def removed(ranks, ratio: float):
    """Masks (N, rows, columns), 1 for removed patches."""
    return (ranks >= visible_patches(ranks.shape[1], ratio)).view(-1, *GRID).int()


# The rules ----------------------------------------------------------------------------------------------------------


def test_ranks_are_lexicographic():
    values, noise = torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[0.2, 0.9, 0.1, 0.3]])
    assert ranked(values, noise).tolist() == [[3, 1, 2, 0]]


@pytest.mark.parametrize("rule", RULES)
def test_any_ratio_is_exact_and_ranks_differ(rule):
    """Each image has every rank once, so as many patches are removed as for random masks."""
    ranks = RULES[rule](NOISE)
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(196.0).expand(200, -1))
    for ratio in (0.1, 0.5, 0.75, 0.9):
        assert (removed(ranks, ratio).sum(dim=(1, 2)) == 196 - visible_patches(196, ratio)).all()


@pytest.mark.parametrize("rule", RULES)
def test_an_image_has_its_mask_in_any_batch(rule):
    assert torch.equal(RULES[rule](NOISE)[50:60], RULES[rule](NOISE[50:60]))
    assert not torch.equal(RULES[rule](NOISE[:1]), RULES[rule](redrawn(NOISE[:1])))  # another epoch: another mask


@pytest.mark.parametrize("rule", RULES)
def test_every_patch_is_removed_about_equally_often(rule):
    """Except that blocks lie inside the grid, so its corners are covered less; not even there always or never."""
    share = removed(RULES[rule](sample_noise(1, 0, torch.arange(4000), 196)), 0.5).float().mean(dim=0)
    if rule == "block":
        assert 0.03 < share.min() < 0.2 and share.max() < 0.9 and share[5:9, 5:9].min() > 0.5
    else:  # five standard deviations of 4,000 coins; patches of a square or half are removed together
        assert (share - 0.5).abs().max() < 5 * 0.5 / 4000**0.5


def test_squares_are_removed_together():
    """Known answer: at a ratio of a whole number of squares, squares are removed or stay as a whole."""
    noise = sample_noise(0, 0, torch.arange(50), 64)
    ranks = square_ranks(noise, (8, 8), 4)
    masks = (ranks >= 32).view(-1, 2, 4, 2, 4).transpose(2, 3).flatten(3)  # two of four squares are removed
    assert ((masks.sum(dim=-1) == 0) | (masks.sum(dim=-1) == 16)).all() and (masks.sum(dim=(1, 2, 3)) == 32).all()
    assert len({tuple(mask[..., 0].flatten().tolist()) for mask in masks}) == 6  # all pairs of squares
    cut = square_ranks(NOISE, GRID, 4).view(-1, *GRID)  # 14 is no multiple of 4: the last squares are smaller
    assert ((cut[:, 12:, 12:].flatten(1).amax(1) - cut[:, 12:, 12:].flatten(1).amin(1)) == 3).all()


def test_squares_of_one_patch_are_random_masks():
    assert torch.equal(square_ranks(NOISE, GRID, 1).argsort(dim=1), NOISE.argsort(dim=1))


def test_blocks_are_rectangles():
    """The first block is a rectangle of the drawn size and aspect ratio: where nothing else is removed, it is all."""
    scale, aspect = (0.1, 0.2), (0.5, 2.0)
    ranks = block_ranks(NOISE, GRID, scale, aspect).view(-1, *GRID)
    area, shape = redrawn(NOISE, 1)[:, 0], redrawn(NOISE, 2)[:, 0]
    for image in range(50):
        share = 0.1 + 0.1 * area[image].item()
        height = round((share * 196 * 0.5 * 4 ** shape[image].item()) ** 0.5)
        width = round((share * 196 / (0.5 * 4 ** shape[image].item())) ** 0.5)
        rows, columns = (ranks[image] >= 196 - height * width).nonzero().T
        assert (rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (height, width)


def test_blocks_are_compact():
    """Fewer neighbours differ than in random masks of the same ratio; and the ranges of size are obeyed."""
    borders = {
        name: (masks.diff(dim=1).abs().sum() + masks.diff(dim=2).abs().sum()).item()
        for name, masks in (
            ("block", removed(RULES["block"](NOISE), 0.5)),
            ("random", removed(ranked(NOISE, NOISE), 0.5)),
        )
    }
    assert borders["block"] < 0.4 * borders["random"]
    whole = block_ranks(NOISE, GRID, (1.0, 1.0), (1.0, 1.0))
    assert torch.equal(whole.argsort(dim=1), NOISE.argsort(dim=1))  # one block with everything


def test_a_grid_leaves_one_of_four():
    """Known answers of ordered dithering: one patch of every 2 x 2, then the diagonal, in a shifted pattern."""
    visible = 1 - removed(grid_ranks(NOISE, GRID), 0.75)
    assert (visible.view(-1, 7, 2, 7, 2).sum(dim=(2, 4)) == 1).all()
    assert (visible == visible[:, :2, :2].repeat(1, 7, 7)).all()  # the same place in each
    assert len({tuple(each.flatten().tolist()) for each in visible}) == 4
    diagonal = removed(grid_ranks(NOISE, GRID), 0.5)
    assert (diagonal.diff(dim=1).abs() == 1).all() and (diagonal.diff(dim=2).abs() == 1).all()  # a chessboard


# Files --------------------------------------------------------------------------------------------------------------


def test_masks_of_files(tmp_path):
    """Arrays and pictures are averaged over the patches; the highest patches are removed, ties at random."""
    masks = np.zeros((2, 28, 28), np.uint8)
    masks[0, :14], masks[1, :, 14:] = 255, 255
    np.save(tmp_path / "masks.npy", masks)
    (tmp_path / "pictures").mkdir()
    for i, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "pictures/notes.txt").write_text("no picture")
    from_array, from_pictures = (
        read_masks(str(tmp_path / "masks.npy"), GRID),
        read_masks(str(tmp_path / "pictures"), GRID),
    )
    assert torch.equal(from_array, from_pictures) and from_array.shape == (2, 196)
    assert torch.equal(read_masks(str(tmp_path / "pictures/1.png"), GRID), from_array[1:])
    drawn = removed(list_ranks(NOISE, from_array), 0.5)
    upper, right = drawn[:, :7].sum(dim=(1, 2)) == 98, drawn[:, :, 7:].sum(dim=(1, 2)) == 98
    assert (upper ^ right).all() and 60 < upper.sum() < 140
    quarter = removed(list_ranks(NOISE, from_array), 0.25)  # half of the marked patches, another half in each image
    assert len({tuple(mask.flatten().tolist()) for mask in quarter}) == 200


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npy", None, "is neither an array .* nor pictures"),
        ("text.npy", b"hello", "is neither an array"),
        ("text.png", b"hello", "is neither an array"),
        ("flat.npy", np.zeros(4), r"has the shape \(4,\): an array \(masks, height, width\)"),
        ("nan.npy", np.full((1, 4, 4), np.nan), "values that are not finite"),
        ("objects.npy", np.array([{}], dtype=object), "is neither an array"),
        ("empty", {}, "has no picture"),
    ],
)
def test_files_that_are_no_masks(name, content, message, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif isinstance(content, np.ndarray):
        np.save(tmp_path / name, content, allow_pickle=True)
    elif content is not None:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=message) as caught:
        read_masks(str(tmp_path / name), GRID)
    assert str(caught.value).startswith("--mask_file ")


# The method ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "masks.npy"
    np.save(path, np.random.default_rng(0).random((3, 16, 16)))
    return path


FLAGS = {
    "squares": "--mask_block 2",
    "block": "--mask block --mask_scale 0.1 0.2",
    "grid": "--mask grid",
    "list": "--mask list --mask_file {masks}",
}


@pytest.mark.parametrize("rule", FLAGS)
def test_the_method(rule, masks):
    """It decides the mask of the forward pass, previews are the same, and nothing is trained in addition."""
    pretrainer, _ = made(FLAGS[rule].format(masks=masks))
    imgs, noise = torch.randn(6, 3, 16, 16), torch.rand(6, 16)
    _, out = pretrainer.forward_with_output(imgs, 0.5, noise)
    method = pretrainer.methods["mask"]
    assert torch.equal(out.scores, method.scores(pretrainer.model, imgs, noise))
    assert torch.equal(pretrainer.preview_scores(imgs, noise), out.scores)
    assert not list(method.parameters()) and out.mask.sum() == 6 * 8


def test_random_masks_without_the_method():
    pretrainer, _ = made("--mask random")
    assert not len(pretrainer.methods)


@pytest.mark.parametrize("other", ["--mae_k 1", "--rc_mae --rc_mask different", "--u_mae", "--decoder cross"])
def test_with_other_methods(other, image_folder, tmp_path):
    pretrain(
        f"{BASE} --data_path {image_folder} --batch_size 16 --epochs 2 --mask block {other} --output_dir {tmp_path}"
    )
    assert all(np.isfinite(row["train/loss"]) for row in log_rows(tmp_path))


def test_a_teacher_with_another_mask_gets_one_of_the_same_rule():
    """RC-MAE's `--rc_mask different`: blocks, too, independent of the student's; random masks stay as they were."""
    pretrainer, _ = made("--mask block --mask_scale 0.3 0.4 --rc_mae --rc_mask different")
    noise = torch.rand(8, 16)
    _, out = pretrainer.forward_with_output(torch.randn(8, 3, 16, 16), 0.5, noise)
    method = pretrainer.methods["mask"]
    assert torch.equal(out.redraw(), method.scores(pretrainer.model, None, redrawn(noise)))
    assert not torch.equal(out.redraw(), out.scores)
    plain, _ = made("--rc_mae --rc_mask different")
    _, out = plain.forward_with_output(torch.randn(8, 3, 16, 16), 0.5, noise)
    assert torch.equal(out.redraw(), redrawn(noise))


def test_a_run_resumes_and_tools_read_its_masks(image_folder, masks, tmp_path, monkeypatch):
    """Bit-identically; the masks of a file are in the checkpoint, so tools do not need the file."""
    own = tmp_path / "masks.npy"
    own.write_bytes(masks.read_bytes())
    flags = f"{BASE} --data_path {image_folder} --batch_size 16 --epochs 2 --mask list --mask_file {own}"
    pretrain(f"{flags} --output_dir {tmp_path}/whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        pretrain(f"{flags} --output_dir {tmp_path}/cut")
    pretrain(f"{flags} --output_dir {tmp_path}/cut --resume auto")
    ours, theirs = (checkpoint(tmp_path / name, "checkpoint-1.pth") for name in ("cut", "whole"))
    assert same_tensors(ours["model"], theirs["model"])
    own.unlink()
    weights, noise = read_weights(tmp_path / "whole/checkpoint-1.pth"), torch.rand(5, 16)
    pretrainer, _ = made(f"--mask list --mask_file {masks}")
    method = mask_method(weights, METHODS)
    assert method is MaskRule
    scores = method_scores(weights, method, pretrainer.model, torch.randn(5, 3, 16, 16), noise)
    assert torch.equal(scores, pretrainer.methods["mask"].scores(pretrainer.model, None, noise))
    assert json.loads((tmp_path / "whole/args.json").read_text())["mask"] == "list"


def test_two_processes_equal_one(image_folder, tmp_path):
    flags = f"{BASE} --data_path {image_folder} --epochs 1 --mask block --u_mae --lr 1e-3"
    pretrain(f"{flags} --batch_size 16 --output_dir {tmp_path}/one")
    ranks("main_pretrain", f"{flags} --batch_size 8 --output_dir {tmp_path}/two", 2)
    ours, theirs = (log_rows(tmp_path / name)[0] for name in ("one", "two"))
    assert ours["train/pixels"] == pytest.approx(theirs["train/pixels"], rel=1e-5)  # sums in another order


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--mask blocks", None),
        ("--mask block --mlo_mae --mlo_labels same", "--mask and --mlo_mae both decide the mask|runs alone"),
        ("--mask_scale 0.1 0.2", "--mask_scale has no effect without --mask"),
        ("--mask grid --mask_block 2", "--mask_block has no effect with --mask grid"),
        ("--mask grid --mask_file a.npy", "--mask_file has no effect with --mask grid"),
        ("--mask list", "--mask list needs --mask_file"),
        ("--mask_block 0", "--mask_block 0 must be positive"),
        ("--mask_block 4", "--mask_block 4 is as large as the image of 4 x 4 patches"),
        ("--mask block --mask_scale 0.3 0.1", "--mask_scale 0.3 0.1 must be two shares"),
        ("--mask block --mask_aspect 0 1", "--mask_aspect 0 1 must be two positive numbers"),
        ("--mask grid --decoder cross --decoder_fraction 0.5", "that --mask, which decides the mask, scores lowest"),
    ],
)
def test_mistakes(flags, message):
    with pytest.raises(SystemExit if message is None else UserError, match=message):
        made(flags)
