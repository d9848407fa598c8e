"""Small runs of the methods that have a teacher."""

import itertools

import pytest
import torch
from timm.optim import param_groups_weight_decay

import main_pretrain
from helpers.launch import SMALL
from methods import Pretrainer

BASE = f"{SMALL} --warmup_epochs 1 --blr 0.01 --num_workers 0 --vis_freq 0 --print_freq 1 --device cpu --amp_dtype fp32"
TARGETS = {"": "", "mae_k": "--mae_k 1", "ema_mae": "--ema_mae --wse 1"}
ADDED = {
    "rc_mae": "--rc_mae",
    "dmae": "--dmae_teacher {teacher} --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25",
    "u_mae": "--u_mae",
}
SUBSETS = [names for n in range(len(ADDED) + 1) for names in itertools.combinations(ADDED, n)]
LEGAL = [(target, *added) for target in TARGETS for added in SUBSETS]


def pretrain(flags: str):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


def switches(names, teacher="") -> str:
    return " ".join((TARGETS | ADDED)[name] for name in names if name).format(teacher=teacher)


def made(flags: str, steps=100):
    """Return the pretrainer of these flags, and the parsed flags."""
    args = main_pretrain.get_args_parser().parse_args(f"{BASE} --epochs 10 {flags}".split())
    chosen = main_pretrain.settle(args)
    torch.manual_seed(0)
    model = main_pretrain.build(args)
    return Pretrainer(model, [method(args, model) for method in chosen], steps), args


def stepped(pretrainer, count=1, applied=1.0, first=0):
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(pretrainer, 0.05, no_weight_decay_list=pretrainer.no_weight_decay()), lr=1e-3
    )
    pretrainer.train()
    for step in range(first, first + count):
        imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
        sum(pretrainer(imgs, 0.75, noise).values()).backward()
        optimizer.step()
        gradients = {name: p.grad for name, p in pretrainer.named_parameters()}
        optimizer.zero_grad()
        pretrainer.after_update(imgs, step, torch.tensor(applied))
    return gradients


@pytest.fixture(scope="session")
def teacher(image_folder, tmp_path_factory):
    """The checkpoint of a pretrained autoencoder."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = "--mean 0.5 0.5 0.5 --std 0.25 0.25 0.25 --epochs 15 --batch_size 16"
    pretrain(f"{BASE} {flags} --data_path {image_folder} --output_dir {folder}")
    return folder / "checkpoint-14.pth"
