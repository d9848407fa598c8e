"""Images of one colour, flags to read them, and the states of the random generators: for the tests of data."""

import contextlib
import io
import random

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as tvt

import main_finetune
import main_pretrain
from util.data.presets import settle_preset

PLAIN = tvt.ToTensor()


def flags(*argv, size=32):
    args = main_pretrain.get_args_parser().parse_args([str(word) for word in argv])
    args.input_size = size
    return args


def finetune_flags(*argv, size=32):
    args = main_finetune.get_args_parser().parse_args([str(word) for word in argv])
    args.input_size, args.in_chans, args.aug = size, args.in_chans or 3, args.aug or "rrc"
    with contextlib.redirect_stdout(io.StringIO()):
        settle_preset(args)
    return args


def save(path, value=0, size=(8, 8)):
    """Save an image of one colour without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def value_of(img) -> int:
    return img.convert("RGB").getpixel((0, 0))[0]


def contents(images) -> list[tuple[int, int]]:
    """Return (grey value, label) of every image."""
    return [(value_of(images.load(i)), images.targets[i]) for i in range(len(images))]


def class_folders(root, **classes):
    for name, values in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for value in values:
            save(root / name / f"{value:03d}.png", value)


def global_states():
    _, keys, *rest = np.random.get_state()
    return random.getstate(), keys.tolist(), rest, torch.get_rng_state().tolist()
