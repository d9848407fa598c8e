"""Previews of a method that decides the mask: TensorBoard's pictures, `fixed_images_loss` and tools/visualize.py show
its masks, and leave the run as it is."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.launch import checkpoint, log_rows, same_tensors
from helpers.mlo_runs import BASE, MLO, pretrain
from PIL import Image

import main_pretrain
from evaluation.image_options import sample_images
from evaluation.masks import method_scores
from evaluation.monitor import Monitor
from methods import METHODS, Method, Option, Pretrainer
from methods.mlo.method import MLOMAE
from tools import visualize
from util.data.readers import read_images
from util.errors import UserError
from util.report.pictures import denormalized, fixed_noise
from util.weights.load import read_weights


class UpperHalf(Method):
    """Removes the upper half of every image and, if there is more to remove, random patches. Has a buffer."""

    name, title, slot = "upper", "Upper half", "mask"
    switch = Option("upper", False, "turn it on")

    def __init__(self, args, model):
        super().__init__()
        self.register_buffer("bonus", torch.zeros(model.patch_embed.num_patches))

    def begin(self, model, methods, steps):
        self.bonus[: len(self.bonus) // 2] = 1

    def scores(self, model, imgs, noise):
        assert not self.training or torch.is_grad_enabled()  # previews are in eval mode
        return noise + self.bonus


@pytest.fixture
def upper(monkeypatch):
    monkeypatch.setattr(main_pretrain, "METHODS", [*METHODS, UpperHalf])
    monkeypatch.setattr(visualize, "METHODS", [*METHODS, UpperHalf])


@pytest.fixture(scope="module")
def mlo(image_folder, tmp_path_factory):
    """Two epochs with pictures after each; six updates of the masking network."""
    folder = tmp_path_factory.mktemp("mlo")
    pretrain(f"{MLO} --data_path {image_folder} --output_dir {folder} --epochs 2 --vis_freq 1 --save_freq 1")
    return folder


def corner(row: int, column: int, columns: int = 3) -> tuple[int, int]:
    """Return the upper left pixel of a tile of 96 pixels below one line of titles, in a sheet of `columns` for an
    image."""
    return 15 + 4 + 4 + 100 * row, 4 + 100 * column + 12 * (column // columns)


def removed_upper_half(picture: torch.Tensor, count: int) -> bool:
    """Return whether the second column of a sheet of 16 x 16 images with half of the patches removed, enlarged to 96,
    is grey in the upper half and in no lower half as a whole."""
    for i in range(count):
        top, left = corner(i // 2, 3 * (i % 2) + 1)
        tile = picture[:, top : top + 96, left : left + 96]
        if (tile[:, :48] - 0.5).abs().max() > 1e-2 or (tile[:, 48:] - 0.5).abs().max() < 0.05:
            return False
    return True


def monitor(image_folder, method=None):
    """Return the monitor of an untrained model with `method`, and the pictures that it will draw."""
    flags = f"{BASE} --data_path {image_folder} --vis_freq 1 --mask_ratio 0.5"
    args = main_pretrain.get_args_parser().parse_args(flags.split())
    torch.manual_seed(0)
    model = main_pretrain.build(args)
    pretrainer = Pretrainer(model, [method(args, model)] if method else [])
    drawn = []
    board = SimpleNamespace(image=lambda name, picture, epoch: drawn.append(picture))
    run = SimpleNamespace(device=torch.device("cpu"), ended=True, amp_dtype=torch.float32, board=board)
    return Monitor(args, run, pretrainer, read_images(args, True), None), drawn


def test_previews_show_the_mask_of_the_method(image_folder):
    """The picture and the loss are those of its masks, in training mode before and after."""
    watch, drawn = monitor(image_folder, UpperHalf)
    loss = watch.after_epoch(0)["eval/fixed_images_loss"]
    assert removed_upper_half(drawn[0], 8) and watch.pretrainer.training and watch.pretrainer.methods.training
    imgs, noise = watch.fixed
    upper = (torch.arange(16) < 8).float().expand(len(imgs), 16)
    assert loss == pytest.approx(watch.pretrainer.model(imgs, 0.5, upper)[0].item(), rel=1e-6)  # sums of other order
    plain, _ = monitor(image_folder)
    at_random = plain.after_epoch(0)["eval/fixed_images_loss"]
    assert at_random == plain.pretrainer.model(imgs, 0.5, noise)[0].item() != loss


def test_previews_of_mlo_mae(image_folder, mlo, tmp_path):
    """`fixed_images_loss` is that of the masking network's masks; with and without previews the run is the same."""
    state, weights = checkpoint(mlo, "checkpoint-1.pth"), read_weights(mlo / "checkpoint-1.pth")
    args = main_pretrain.get_args_parser().parse_args(f"{MLO} --data_path {image_folder} --vis_freq 1".split())
    main_pretrain.settle(args)
    model = main_pretrain.build(args)
    model.load_state_dict(state["model"])
    held_out = MLOMAE(args, model).split_images(read_images(args, True))[1]
    run = SimpleNamespace(device=torch.device("cpu"))
    imgs, noise = Monitor(args, run, Pretrainer(model), None, held_out).fixed
    scores = method_scores(weights, MLOMAE, model, imgs, noise)
    expected = model(imgs, 0.75, scores)[0].item()
    assert log_rows(mlo)[-1]["eval/fixed_images_loss"] == pytest.approx(expected, rel=1e-6)  # log.txt has seven digits
    assert expected != pytest.approx(model(imgs, 0.75, noise)[0].item(), rel=1e-3)
    pretrain(f"{MLO} --data_path {image_folder} --output_dir {tmp_path} --epochs 2 --save_freq 1")
    again = checkpoint(tmp_path, "checkpoint-1.pth")
    for key in ("model", "methods", "optimizer", "rng"):
        assert same_tensors(again[key], state[key]), key


# tools/visualize.py ---------------------------------------------------------------------------------------------------


def draw(flags: str):
    visualize.main(visualize.get_args_parser().parse_args(flags.split()))


def test_visualize_a_new_method(image_folder, tmp_path, upper, capsys):
    """The method is rebuilt with its tensors from the checkpoint; `--random_mask` draws MAE's masks."""
    flags = f"{BASE} --data_path {image_folder} --epochs 1 --output_dir {tmp_path}"
    pretrain(f"{flags} --upper --mask_ratio 0.5")
    command = f"{tmp_path}/checkpoint-0.pth --data {image_folder}/val --count 4 --out {tmp_path}"
    draw(f"{command}/method.png")
    assert "checkpoint-0.pth, 50% removed by the mask of --upper; removed patches" in capsys.readouterr().out
    draw(f"{command}/random.png --random_mask")
    assert "50% removed at random, not by the mask of --upper; removed patches" in capsys.readouterr().out
    pictures = [
        torch.from_numpy(np.array(Image.open(tmp_path / f"{name}.png"))).permute(2, 0, 1) / 255
        for name in ("method", "random")
    ]
    assert [removed_upper_half(picture, 4) for picture in pictures] == [True, False]


def test_visualize_mlo_mae(image_folder, mlo, tmp_path, capsys):
    """The second column is the image without the patches of the highest probability."""
    out = tmp_path / "a.png"
    flags = f"{mlo}/checkpoint-1.pth --data {image_folder}/val --count 2 --out {out}"
    draw(flags)
    assert "75% removed by the mask of --mlo_mae" in capsys.readouterr().out
    args, weights = visualize.get_args_parser().parse_args(flags.split()), read_weights(mlo / "checkpoint-1.pth")
    judged = visualize.judging.open_autoencoder(args, weights)
    sample = sample_images(args, judged.images, judged.model)
    noise = fixed_noise(judged.model, 2, 0, "cpu")
    scores = method_scores(weights, MLOMAE, judged.model, sample.imgs, noise)
    mask = judged.model.choose_visible(scores, 0.75)[1].view(2, 1, 4, 4)
    mask = mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    images = denormalized(sample.imgs, sample.mean, sample.std)
    expected = (images * (1 - mask) + 0.5 * mask)[0].repeat_interleave(6, 1).repeat_interleave(6, 2)
    drawn = torch.from_numpy(np.array(Image.open(out))).permute(2, 0, 1) / 255
    top, left = corner(0, 1)
    assert (drawn[:, top : top + 96, left : left + 96] - expected).abs().max() < 0.01  # 8 bits
    assert not torch.equal(mask, judged.model.choose_visible(noise, 0.75)[1].view(2, 1, 4, 4))


def test_masks_that_cannot_be_rebuilt(image_folder, mlo, tmp_path):
    """A file without the masking network, and another grid of patches."""
    state = checkpoint(mlo, "checkpoint-1.pth")
    state.pop("methods")
    torch.save(state, tmp_path / "bare.pth")
    for file, more, why in (
        (f"{tmp_path}/bare.pth", "", "holds no masking network"),
        (f"{mlo}/checkpoint-1.pth", "--input_size 24", "is for 16 patches"),
    ):
        flags = f"{file} --data {image_folder}/val --out {tmp_path}/a.png {more}"
        with pytest.raises(UserError, match=rf"the masks of --mlo_mae cannot be drawn: .*{why}.*--random_mask"):
            draw(flags)
        assert not (tmp_path / "a.png").exists()
        draw(f"{flags} --random_mask")
        (tmp_path / "a.png").unlink()
