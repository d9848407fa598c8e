"""What is drawn and measured between epochs: the same on any number of processes, and of weights in bfloat16."""

import tarfile
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from launch import SMALL, log_rows, ranks
from small_models import mae
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import main_pretrain
import methods.rcmae
import util.loading
import util.shard_loading
from main_pretrain import Watch
from methods import Pretrainer
from util.datasets import read_images

CPU = torch.device("cpu")


def parsed(flags):
    return main_pretrain.get_args_parser().parse_args(f"{SMALL} --num_workers 0 --device cpu {flags}".split())


def pictures(folder) -> list[bytes]:
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    return [event.encoded_image_string for event in events.Images("reconstruction")]


def test_same_on_one_and_three_processes(image_folder, tmp_path):
    """After a step of length 0, so that the weights are equal bit for bit; one of three ranks has no image for the
    kNN."""
    flags = f"{SMALL} --data_path {image_folder} --max_steps 1 --warmup_epochs 0 --lr 0 --vis_freq 1 --knn_freq 1"
    flags += " --knn_images 2 --num_workers 0 --device cpu --amp_dtype fp32"
    for processes in (1, 3):
        ranks("main_pretrain", f"{flags} --batch_size {12 // processes} --output_dir {tmp_path}/{processes}", processes)
    one, three = (log_rows(tmp_path / str(processes))[-1] for processes in (1, 3))
    assert one["fixed_images_loss"] == three["fixed_images_loss"] and one["knn_top1"] == three["knn_top1"]
    (drawn,) = pictures(tmp_path / "1")
    assert pictures(tmp_path / "3") == [drawn]


def shards(folder, images) -> str:
    """A pattern of three shards with four of `images` each."""
    files = sorted(images.glob("train/*/*.png"))[:12]
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for file in files[4 * shard : 4 * shard + 4]:
                tar.add(file, f"{file.parent.name}_{file.stem}.png")
    return f"{folder}/{{0..2}}.tar"


@pytest.mark.parametrize("dataset", ["imagefolder", "wds"])
def test_more_processes_than_pictures(image_folder, tmp_path, monkeypatch, dataset):
    """Whichever of nine processes reads the images to be drawn, it reads all eight."""
    data = image_folder if dataset == "imagefolder" else shards(tmp_path, image_folder)
    args = parsed(f"--dataset {dataset} --data_path {data}")
    images = read_images(args, train=True)
    watch = partial(Watch, args, SimpleNamespace(device=CPU), SimpleNamespace(model=mae()), images, None)
    imgs, noise = watch().fixed
    assert len(imgs) == len(noise) == Watch.COUNT
    for rank in (0, 8):
        for module in (util.loading, util.shard_loading):
            monkeypatch.setattr(module, "get_rank", lambda rank=rank: rank)
            monkeypatch.setattr(module, "get_world_size", lambda: 9)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(watch().fixed, (imgs, noise)))


def test_gradients_of_the_cosine_on_two_ranks(monkeypatch):
    """Each rank sees every second image of the batch. Their gradients add up to those of one process, because an image
    has the same mask."""
    model, imgs, sent = mae(), torch.randn(6, 3, 16, 16), []
    args = parsed("--data_path x --rc_mae")
    methods.enabled_methods(args, methods.METHODS)
    pretrainer = Pretrainer(model, [methods.rcmae.RCMAE(args, model)])
    nn.init.normal_(pretrainer.methods["rc_mae"].teacher.network.decoder_pred.weight)
    monkeypatch.setattr(methods.rcmae, "all_reduce_sum", lambda flat: sent.append(flat) or flat)
    pretrainer.methods["rc_mae"].look(pretrainer, imgs, step=3)
    monkeypatch.setattr(methods.rcmae, "get_world_size", lambda: 2, raising=False)
    for rank in range(2):
        monkeypatch.setattr(methods.rcmae, "get_rank", lambda rank=rank: rank)
        pretrainer.methods["rc_mae"].look(pretrainer, imgs[rank::2], step=3)
    for one, *two in zip(sent[:2], sent[2:4], sent[4:]):
        torch.testing.assert_close(sum(two), one, rtol=1e-4, atol=1e-4 * one.abs().max().item())  # float32, other sums
