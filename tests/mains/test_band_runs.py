"""The mains and the tools on data sets of 13 bands, as a user starts them."""

import json

import numpy as np
import pytest
import torch
from helpers.band_sets import BANDS, class_folders, stats
from helpers.launch import SMALL, command_module
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from models_mae import build_model
from util.errors import UserError
from util.report.pictures import denormalized, reconstruct, rgb, shown_channels

RUN = f"{SMALL} --in_chans {BANDS} --batch_size 4 --warmup_epochs 0 --num_workers 0 --device cpu --amp_dtype fp32"
CLASSIFIER = RUN.replace("mae_vit", "vit").replace("--decoder_embed_dim 32 --decoder_depth 1 --decoder_num_heads 2", "")


def run(main, flags: str):
    return main.main(main.get_args_parser().parse_args(flags.split()))


def tool(name: str, flags: str):
    return run(command_module(name), flags)


@pytest.fixture(scope="module", params=[".tif", ".npy", ".npz"])
def bands(request, tmp_path_factory):
    """A data set of bands, and the checkpoint of two steps of pretraining on it."""
    root = class_folders(tmp_path_factory.mktemp("bands"), request.param)
    flags = f"--data_path {root} {stats()} {RUN} --max_steps 2 --vis_freq 1 --knn_freq 1 --knn_images 8"
    run(main_pretrain, f"{flags} --output_dir {root}/mae --show_channels 3 2 1")
    return root, root / "mae" / "checkpoint-0.pth"


def test_pretraining(bands):
    root, checkpoint = bands
    rows = [json.loads(line) for line in (root / "mae/log.txt").read_text().splitlines()]
    assert np.isfinite(rows[-1]["train/loss"]) and np.isfinite(rows[-1]["eval/fixed_images_loss"])
    state = torch.load(checkpoint, weights_only=True)["model"]
    assert state["patch_embed.proj.weight"].shape[1] == BANDS


def test_fine_tuning_probing_and_evaluation(bands, tmp_path, capsys):
    root, checkpoint = bands
    data = f"--data_path {root} {stats()} --finetune {checkpoint}"
    more = "--aug_preset official --max_steps 2"
    tuned = run(main_finetune, f"{data} {CLASSIFIER} {more} --output_dir {tmp_path}/tuned")
    assert "note: --aa none: the policies of --aa change colours" in capsys.readouterr().out
    assert "16bit" in json.dumps(torch.load(tmp_path / "tuned/checkpoint-0.pth", weights_only=True)["args"])
    flags = f"{data} --eval --resume {tmp_path}/tuned/checkpoint-0.pth --num_workers 0 --device cpu --amp_dtype fp32"
    again = run(main_finetune, f"{flags} --output_dir {tmp_path}/again")
    assert again["loss"] == pytest.approx(tuned["loss"], rel=1e-5)  # sums over other batches
    for more in ("--max_steps 2", "--cache_features --epochs 1"):
        scores = run(main_linprobe, f"{data} {CLASSIFIER} {more} --output_dir {tmp_path}/{len(more)}")
        assert any(0 <= value <= 100 for name, value in scores.items() if "acc1" in name), scores
    tool("predict", f"{tmp_path}/tuned/checkpoint-0.pth --data {root}/val --out {tmp_path}/p.csv --device cpu")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 5


def test_judging_tools(bands, tmp_path):
    root, checkpoint = bands
    data = f"{checkpoint} --data_path {root} --device cpu --num_workers 0"
    tool("knn", f"{data} --k 3 --amp_dtype fp32")
    tool("fewshot", f"{data} --shots 1 --amp_dtype fp32")
    tool("attention", f"{data} --out {tmp_path}/a.png --count 2 --show_channels 3 2 1")
    tool("visualize", f"{checkpoint} --data_path {root} --out {tmp_path}/v.png --count 2")
    tool("feature_viz", f"{checkpoint} --blocks 0 --channels 0 1 --steps 1 --out {tmp_path}/f.png --device cpu")
    for name in "avf":
        assert np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).std() > 0


def test_released_weights_start_a_run(tmp_path, capsys):
    root = class_folders(tmp_path / "set")
    sizes = dict(img_size=16, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    torch.save({"model": build_model("mae_vit_micro_patch4", **sizes).state_dict()}, tmp_path / "rgb.pth")
    data = f"--data_path {root} {stats()} --max_steps 2"
    run(main_pretrain, f"{data} {RUN} --vis_freq 0 --init_from {tmp_path}/rgb.pth --output_dir {tmp_path}/mae")
    run(main_finetune, f"{data} {CLASSIFIER} --finetune {tmp_path}/rgb.pth --output_dir {tmp_path}/tuned")
    assert capsys.readouterr().out.count("repeated and scaled by 3/13 for --in_chans 13") == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "--in_chans 13 needs --mean and --std, 13 numbers each: tools/mean_std.py"),
        (stats(12), "one number per channel: --in_chans is 13"),
        (f"{stats()} --aug three", "--aug three needs 1 or 3 channels"),
        (f"{stats()} --data_cache ram", "--data_cache ram keeps 8 bits"),
        (f"{stats()} --show_channels 3 2 13", "--show_channels 13: the images have 13 channels, from 0 to 12"),
        (f"{stats()} --in_chans 12 {stats(12)}", "it has 13 bands, but --in_chans is 12"),
        ("--in_chans 3", "it has 13 bands, but --in_chans is 3"),
        (f"{stats()} --dataset digits", "--in_chans 13: image 0 has 1 channel"),
        (f"{stats()} --device mps", "--device mps needs an Apple GPU"),
        (f"{stats()} --mlo_mae --device mps", "--mlo_mae computes in float64, which --device mps lacks"),
    ],
)
def test_refusals_of_pretraining(tmp_path, flags, words):
    root = class_folders(tmp_path / "set")
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        run(main_pretrain, f"--data_path {root} {RUN} --max_steps 2 --output_dir {tmp_path}/out {flags}")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.pth"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--aa rand-m9-mstd0.5-inc1", "--aa rand-m9-mstd0.5-inc1 needs 1 or 3 channels"),
        ("--aa none --color_jitter 0.4", "--color_jitter is for images of 1 to 4 channels"),
    ],
)
def test_refusals_of_fine_tuning(tmp_path, flags, words):
    root = class_folders(tmp_path / "set")
    with pytest.raises(UserError, match=words):
        run(main_finetune, f"--data_path {root} {stats()} {CLASSIFIER} --output_dir {tmp_path}/out {flags}")


# Pictures -------------------------------------------------------------------------------------------------------------


def test_shown_channels():
    """Two standard deviations below the mean are black, the mean is grey, two above are white."""
    imgs = torch.arange(5.0)[None, :, None, None].expand(2, 5, 4, 4) - 2  # channel i is i - 2 deviations from the mean
    shown = denormalized(imgs, (0.02,) * 5, (0.005,) * 5, shown_channels(5, (4, 2, 0)))
    assert shown.shape == (2, 3, 4, 4) and shown[0, :, 0, 0].tolist() == [1.0, 0.5, 0.0]
    assert shown_channels(5, None) == (0, 1, 2) and shown_channels(4, None) is None
    assert shown_channels(3, (2, 1, 0)) == (2, 1, 0)
    assert torch.equal(rgb(imgs, (4, 2, 0)), imgs[:, [4, 2, 0]])
    for wrong in ((0, 1, 5), (-1, 0, 1)):
        with pytest.raises(UserError, match="--show_channels"):
            shown_channels(5, wrong)


def test_reconstructions_show_the_chosen_channels():
    sizes = dict(img_size=16, in_chans=5, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    model = build_model("mae_vit_micro_patch4", **sizes)
    imgs, noise = torch.randn(2, 5, 16, 16), torch.rand(2, 16)
    stats = (0.02,) * 5, (0.005,) * 5
    pictures = reconstruct(model, imgs, 0.75, noise, *stats, (4, 0, 2))
    assert pictures.shape == (2, 3, 3, 16, 16)
    torch.testing.assert_close(pictures[:, 0], (imgs[:, [4, 0, 2]] / 4 + 0.5).clamp(0, 1))  # float32
    _, _, mask = model(imgs, mask_ratio=0.75, noise=noise)
    removed = model.unpatchify(mask[..., None].expand(-1, -1, 16 * 5).contiguous())[:, :3].bool()
    assert (pictures[:, 1][removed] == 0.5).all()
    assert torch.equal(pictures[:, 1][~removed], pictures[:, 0][~removed])
