"""Titles of checkpoints, checks of picture flags, and what loading prints."""

import argparse

import pytest
import torch

import models_mae
from evaluation import command_line, judging
from tools import mask_maps, visualize
from util.errors import UserError
from util.report.sheet import Sheet


def save(path, ratio=0.5, size=16, channels=3):
    path.parent.mkdir(exist_ok=True)
    args = {"model": "mae_vit_micro_patch4", "input_size": size, "in_chans": channels, "mask_ratio": ratio}
    model = models_mae.mae_vit_micro_patch4(img_size=size, in_chans=channels)
    torch.save({"model": model.state_dict(), "args": args | {"mean": [0.5] * 3, "std": [0.2] * 3}}, path)
    return path


def test_titles_tell_checkpoints_apart(tmp_path):
    paths = [tmp_path / name for name in ("a/mae/checkpoint-0.pth", "b/mae/checkpoint-0.pth", "b/mae/checkpoint-1.pth")]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    names = list(map(str, paths))
    assert command_line.titles_of(names[1:]) == ["mae/checkpoint-0", "mae/checkpoint-1"]
    assert command_line.titles_of(names[:2]) == ["a/mae/checkpoint-0", "b/mae/checkpoint-0"]
    assert command_line.titles_of([names[0], "random", "vit_small_patch16_224.augreg"])[1:] == [
        "random",
        "vit_small_patch16_224.augreg",
    ]
    assert command_line.titles_of([names[0], names[0]]) == ["mae/checkpoint-0"] * 2


@pytest.mark.parametrize("ending", ["jpg", "json", "pn", ""])
def test_a_wrong_ending_names_the_right_ones(tmp_path, ending):
    args = argparse.Namespace(out=f"{tmp_path}/a.{ending}")
    with pytest.raises(UserError, match=r"--out .* must be a \.png, \.pdf or \.svg file$"):
        command_line.check_picture(args)


@pytest.mark.parametrize(
    ("find", "named"), [(command_line.needed_picture, r"\.png or \.pdf or \.svg"), (command_line.needed_out, "file")]
)
def test_an_empty_out_is_no_file(find, named):
    """`--out "$unset"` of a script: a required flag that is given, but empty."""
    with pytest.raises(UserError, match=rf"^--out is empty: give the {named} to write$"):
        find(argparse.Namespace(out=""))


def draw(flags):
    visualize.main(visualize.get_args_parser().parse_args([str(flag) for flag in flags]))


def test_reconstructions_of_several_checkpoints_are_rows(tmp_path, image_folder, monkeypatch):
    """Of the same images under the same masks; what differs between them is in the caption."""
    sheets, write = [], Sheet.save
    monkeypatch.setattr(Sheet, "save", lambda sheet, path: sheets.append(sheet) or write(sheet, path))
    one, other = save(tmp_path / "run" / "one.pth"), save(tmp_path / "run" / "other.pth")
    common = ["--data", image_folder / "val", "--count", 2, "--out"]
    draw([one, other, *common, tmp_path / "both.pdf"])
    draw([one, *common, tmp_path / "one.svg"])
    both, single = sheets
    words = [text for _, _, text in both.texts]
    assert words[:3] == ["original", "masked", "reconstruction"] and {"run/one", "run/other"} <= set(words)
    assert (tmp_path / "both.pdf").read_bytes().startswith(b"%PDF") and (tmp_path / "one.svg").stat().st_size
    left, alone = min(x for x, _, text in both.texts if text == "original"), 4
    first = both.tensor()[:, 23:119, left : left + 612]  # two images with three columns of 96 pixels
    assert torch.equal(first, single.tensor()[:, 23:119, alone : alone + 612])
    second = both.tensor()[:, 123:219, left : left + 612]
    for column in range(6):  # the weights are of other seeds: only the reconstructions differ
        tiles = [row[:, :, (at := 100 * column + 12 * (column // 3)) : at + 96] for row in (first, second)]
        assert torch.equal(*tiles) == (column % 3 < 2)


def test_checkpoints_that_do_not_fit_together(tmp_path, image_folder):
    one = save(tmp_path / "one.pth")
    ratio, size = save(tmp_path / "ratio.pth", ratio=0.75), save(tmp_path / "size.pth", size=32)
    common = ["--data", image_folder / "val", "--count", 2, "--out", tmp_path / "a.png"]
    with pytest.raises(UserError, match=r"one.pth was trained with --mask_ratio 0.5, .*ratio.pth with 0.75: give one"):
        draw([one, ratio, *common])
    with pytest.raises(
        UserError, match=r"one.pth takes images of 16x16 .*size.pth takes .* 32x32 .*draw each by itself"
    ):
        draw([one, size, *common])
    draw([one, ratio, *common, "--mask_ratio", 0.5])
    draw([one, size, *common, "--input_size", 16])
    with pytest.raises(UserError, match="give a CHECKPOINT of a run with --mlo_mae"):
        mask_maps.main(mask_maps.get_args_parser().parse_args(["--out", f"{tmp_path}/a.png"]))


def test_loading_prints_one_line_or_all_tensors(tmp_path, capsys):
    """Of encoders and of whole autoencoders, whose interpolated positions were silent before."""
    path = save(tmp_path / "a.pth")
    for command, line in (
        (
            lambda args: judging.open_encoder(args, args.checkpoint),
            "not used (decoder, not needed) (--verbose names them)",
        ),
        (
            lambda args: judging.open_trained(args, args.checkpoint),
            "not used (decoder, not needed) (--verbose names them)",
        ),
        (lambda args: judging.open_autoencoder(args, judging.read_weights(path)), "pos_embed interpolated 4x4 -> 8x8"),
    ):
        for verbose in (False, True):
            flags = [str(path), "--device", "cpu", "--input_size", "32", *["--verbose"] * verbose]
            command(judging.evaluation_parser("").parse_args(flags))
            printed = capsys.readouterr().out
            assert ("blocks.0-3 (48 tensors)" in printed) is verbose and (line in printed) is not verbose
            assert "pos_embed" in printed and (len(printed.splitlines()) > 1) is verbose
