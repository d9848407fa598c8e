"""Augmentation that suits the images: flags that are not given are settled by the preset or by a resumed checkpoint."""

import pytest
import torch
from helpers.launch import checkpoint

import main_finetune
from util.data.presets import OFFICIAL, PRESETS, mixes, settle_preset
from util.datasets import build_transform


def settled(*words, size=224, stored=None):
    args = main_finetune.get_args_parser().parse_args([str(word) for word in words])
    args.input_size, args.in_chans, args.aug = size, 3, "rrc"
    settle_preset(args, stored or {})
    return {name: getattr(args, name) for name in OFFICIAL}


def test_small_images_are_spared():
    """RandAugment, random erasing and mirroring of 16-pixel digits cost 20 points of accuracy."""
    assert settled() == OFFICIAL and settled(size=32) == OFFICIAL  # as before
    assert settled(size=28) == settled(size=[28, 64]) == PRESETS["tiny"]
    assert settled("--dataset", "digits", size=224) == PRESETS["tiny"] | {"hflip": 0.0}  # a 2 must stay a 2


def test_flags_override_the_preset():
    given = settled("--dataset", "digits", "--aa", "augmix-m5", "--reprob", 0.1, "--hflip", 0.5)
    assert given == PRESETS["tiny"] | {"aa": "augmix-m5", "reprob": 0.1, "hflip": 0.5}
    assert settled("--aa", "none")["aa"] is None and settled("--aa", "none")["reprob"] == 0.25
    assert settled("--aug_preset", "full", "--mixup", 0.2) == PRESETS["full"] | {"mixup": 0.2}
    assert settled("--aug_preset", "official", "--dataset", "digits")["reprob"] == 0.25


def test_a_resumed_run_keeps_its_augmentation():
    """Also one of the time before these defaults, which stored the official ones and no --hflip."""
    old = {"aa": None, "reprob": 0.25, "smoothing": 0.1, "drop_path": 0.2, "mixup": 0.0, "cutmix": 0.0}
    assert settled("--dataset", "digits", stored=old) == old | {"hflip": 0.5}
    assert settled("--dataset", "digits", "--reprob", 0, stored=old)["reprob"] == 0


@pytest.mark.parametrize(
    "words, expected",
    [([], False), (["--aug_preset", "full"], True), (["--aug_preset", "full", "--mixup", 0, "--cutmix", 0], False)],
)
def test_mixing_is_known_before_it_is_settled(words, expected):
    args = main_finetune.get_args_parser().parse_args([str(word) for word in words])
    assert mixes(args) == expected


def test_a_fork_that_does_not_settle():
    args = main_finetune.get_args_parser().parse_args([])
    args.input_size, args.in_chans, args.aug = 16, 3, "rrc"
    names = [type(step).__name__ for step in build_transform(True, args).transforms]
    assert "RandAugment" not in names and "RandomErasing" not in names and args.aa == "auto"


def test_a_run_stores_and_resumes_it(tmp_path, capsys):
    words = "--model vit_micro_patch4 --dataset digits --input_size 16 --batch_size 64 --num_workers 0 --device cpu"
    words = f"{words} --warmup_epochs 0 --output_dir {tmp_path}".split()

    def run(*more):
        main_finetune.main(main_finetune.get_args_parser().parse_args([*words, *more]))
        return capsys.readouterr().out

    assert "preset tiny, aug crop, aa none, reprob 0.3" in run("--epochs", "1", "--reprob", "0.3")
    stored = checkpoint(tmp_path, "checkpoint-0.pth")["args"]
    assert stored["reprob"] == 0.3 and stored["aa"] is None and stored["hflip"] == 0
    assert "note: --reprob" not in run("--epochs", "2", "--resume", "auto")
    assert checkpoint(tmp_path, "checkpoint-1.pth")["args"]["reprob"] == 0.3
    assert torch.isfinite(torch.tensor(stored["smoothing"]))
