"""Pictures and metrics between epochs: the same on any number of processes, also with weights in bfloat16."""

import shutil
import tarfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers.launch import SMALL, log_rows, ranks
from helpers.small_models import mae
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import main_pretrain
import methods.rcmae
import util.data.loader
import util.data.shard_loader
from evaluation.monitor import Monitor
from methods import Pretrainer
from util.data.readers import read_images
from util.parallel import fsdp
from util.parallel.fsdp import shard
from util.report.pictures import heat_map

CPU = torch.device("cpu")


def parsed(flags):
    return main_pretrain.get_args_parser().parse_args(f"{SMALL} --num_workers 0 --device cpu {flags}".split())


def pictures(folder) -> list[bytes]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return [event.encoded_image_string for event in events.Images("reconstruction")]


def test_same_on_one_and_three_processes(image_folder, tmp_path):
    """A learning rate of 0 keeps the weights equal bit for bit; one of three ranks has no image for the kNN."""
    flags = f"{SMALL} --data_path {image_folder} --max_steps 1 --warmup_epochs 0 --lr 0 --vis_freq 1 --knn_freq 1"
    flags += " --knn_images 2 --num_workers 0 --device cpu --amp_dtype fp32"
    for processes in (1, 3):
        ranks("main_pretrain", f"{flags} --batch_size {12 // processes} --output_dir {tmp_path}/{processes}", processes)
    one, three = (log_rows(tmp_path / str(processes))[-1] for processes in (1, 3))
    assert (
        one["eval/fixed_images_loss"] == three["eval/fixed_images_loss"]
        and one["eval/knn20_acc1"] == three["eval/knn20_acc1"]
    )
    (drawn,) = pictures(tmp_path / "1")
    assert pictures(tmp_path / "3") == [drawn]


@pytest.mark.parametrize("is_readable", [True, False])
def test_one_image_for_the_knn_of_two_processes(image_folder, tmp_path, is_readable):
    """One process has no image; if the only one is unreadable, the run says so and goes on."""
    shutil.copytree(image_folder, tmp_path / "data")
    if not is_readable:
        (tmp_path / "data" / "val" / "class0" / "000.png").write_bytes(b"no image")
    flags = (
        f"{SMALL} --data_path {tmp_path}/data --epochs 1 --warmup_epochs 0 --vis_freq 0 --knn_freq 1 --batch_size 16"
    )
    flags += f" --knn_images 1 --num_workers 0 --device cpu --output_dir {tmp_path}/run"
    output = ranks("main_pretrain", flags, 2)
    row = log_rows(tmp_path / "run")[-1]
    assert ("eval/knn20_acc1" in row) is is_readable
    assert ("none of the --knn_images of a split could be read" in output) is not is_readable


def shards(folder, images) -> str:
    """Write three shards of four images each, and return their pattern."""
    files = sorted(images.glob("train/*/*.png"))[:12]
    for number in range(3):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for file in files[4 * number : 4 * number + 4]:
                tar.add(file, f"{file.parent.name}_{file.stem}.png")
    return f"{folder}/{{0..2}}.tar"


@pytest.mark.parametrize("dataset", ["imagefolder", "wds"])
def test_more_processes_than_pictures(image_folder, tmp_path, monkeypatch, dataset):
    """Each of nine processes would read all eight images that are drawn."""
    data = image_folder if dataset == "imagefolder" else shards(tmp_path, image_folder)
    args = parsed(f"--dataset {dataset} --data_path {data}")
    images = read_images(args, train=True)
    watch = partial(Monitor, args, SimpleNamespace(device=CPU), SimpleNamespace(model=mae()), images, None)
    imgs, noise = watch().fixed
    assert len(imgs) == len(noise) == Monitor.COUNT
    for rank in (0, 8):
        for module in (util.data.loader, util.data.shard_loader):
            monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "get_world_size", lambda: 9)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(watch().fixed, (imgs, noise)))


def test_gradients_of_the_cosine_on_two_ranks(monkeypatch):
    """Each rank has every second image of the batch. The gradients add up to those of one process, because masks are
    tied to images."""
    model, imgs, sent = mae(), torch.randn(6, 3, 16, 16), []
    args = parsed("--data_path x --rc_mae")
    methods.enabled_methods(args, methods.METHODS)
    pretrainer = Pretrainer(model, [methods.rcmae.RCMAE(args, model)])
    nn.init.normal_(pretrainer.methods["rc_mae"].teacher.network.decoder_pred.weight)
    monkeypatch.setattr(methods.rcmae, "all_reduce_sum", lambda flat: sent.append(flat) or flat)
    pretrainer.methods["rc_mae"].diagnostics(pretrainer, imgs, step=3)
    monkeypatch.setattr(methods.rcmae, "get_world_size", lambda: 2, raising=False)
    for rank in range(2):
        monkeypatch.setattr(methods.rcmae, "get_rank", lambda rank=rank: rank)
        pretrainer.methods["rc_mae"].diagnostics(pretrainer, imgs[rank::2], step=3)
    for one, *two in zip(sent[:2], sent[2:4], sent[4:]):
        # Float32 sums in another order.
        torch.testing.assert_close(sum(two), one, rtol=1e-4, atol=1e-4 * one.abs().max().item())


# --fsdp in bfloat16 ---------------------------------------------------------------------------------------------------


class CastingNorm(nn.LayerNorm):
    """A norm that computes in float32 whatever the type of its weights, as autocast does on a GPU but not on a CPU."""

    def forward(self, x):
        return F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def after_epoch(image_folder, one_rank, monkeypatch):
    """A function that returns loss, kNN accuracy and picture of an autoencoder after an epoch. Given a type, FSDP
    shards the model and gathers its blocks in that type."""
    args = parsed(f"--data_path {image_folder} --vis_freq 1 --knn_freq 1 --batch_size 32")
    images, held_out = (read_images(args, train) for train in (True, False))

    def policy(**settings):
        return MixedPrecisionPolicy(**settings | ({"param_dtype": gathered} if "param_dtype" in settings else {}))

    def measure(dtype):
        nonlocal gathered
        gathered, drawn = dtype, []
        torch.manual_seed(0)
        pretrainer = Pretrainer(mae(norm_layer=CastingNorm))
        if gathered:
            shard(pretrainer, pretrainer.model, [], CPU, gathered)
        board = SimpleNamespace(image=lambda name, picture, epoch: drawn.append(picture))
        run = SimpleNamespace(device=CPU, ended=True, amp_dtype=gathered or torch.float32, board=board)
        row = Monitor(args, run, pretrainer, images, held_out).after_epoch(0)
        assert not torch.is_autocast_enabled("cpu")
        return row["eval/fixed_images_loss"], row["eval/knn20_acc1"], *drawn

    gathered = None
    monkeypatch.setattr(fsdp, "MixedPrecisionPolicy", policy)
    return measure


def test_blocks_gathered_in_bfloat16(after_epoch):
    (loss, accuracy, picture), (whole_loss, whole_accuracy, whole) = after_epoch(torch.bfloat16), after_epoch(None)
    # A rounding to bfloat16 changes a value by at most 0.4 %, which averages out over pixels: measured 5e-5.
    assert loss == pytest.approx(whole_loss, rel=2e-3) and loss != whole_loss
    assert (picture - whole).abs().mean() < 2e-3
    assert accuracy == pytest.approx(whole_accuracy, abs=5.1)  # the prediction of one of 20 images may change


def test_heat_maps_of_bfloat16():
    values = torch.rand(1, 4, 4).bfloat16()  # numpy has no bfloat16
    assert torch.equal(heat_map(values), heat_map(values.float()))


def test_blocks_gathered_in_float32(after_epoch):
    """Pictures equal those without --fsdp bit for bit, in float32."""
    (*numbers, picture), (*whole_numbers, whole) = after_epoch(torch.float32), after_epoch(None)
    assert numbers == whole_numbers and torch.equal(picture, whole)
