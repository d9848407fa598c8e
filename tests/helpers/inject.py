"""Faults that are injected into runs in this process: at a step, or on the disk."""

import errno
import signal

import torch

import main_detect
import main_finetune
import main_pretrain
import main_segment
import util.training.run
from helpers.launch import SMALL
from util.training.run import Run

# Six steps per epoch on `image_folder`. After each one, a checkpoint is saved and the metrics are read.
FLAGS = f"{SMALL} --aug none --num_workers 0 --batch_size 16 --vis_freq 0 --warmup_epochs 0 --epochs 2 --device cpu "
FLAGS += "--save_steps 1 --save_freq 1 --print_freq 1"
CLASSIFIER = "--model vit_micro_patch4 --input_size 16 --num_workers 0 --batch_size 16 --warmup_epochs 0 --epochs 2 "
CLASSIFIER += "--device cpu --save_patience 0"
# Six steps per epoch, as above.
SCENES = "--dataset scenes --scene_size 32 --scene_count 24 2 --input_size 16 --model vit_micro_patch4 --batch_size 4 "
SCENES += "--head_width 16 --num_workers 0 --epochs 2 --lr 1e-3 --device cpu --amp_dtype fp32 "
SCENES += "--save_steps 1 --save_freq 1 --print_freq 1"
DENSE = {"segment": main_segment, "detect": main_detect}
FULL = OSError(errno.ENOSPC, "No space left on device")


def pretrain(flags: str) -> None:
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


def finetune(flags: str) -> dict:
    return main_finetune.main(main_finetune.get_args_parser().parse_args(flags.split()))


def dense(name: str, flags: str) -> dict:
    """Run a main of dense tasks, "segment" or "detect"."""
    return DENSE[name].main(DENSE[name].get_args_parser().parse_args(f"{SCENES} {flags}".split()))


def after_step(patch, number: int, act) -> None:
    """Call `act(run)` once `number` optimizer steps have been taken, saved and logged, before the next one begins."""
    original = Run.finish_step

    def after(self):
        original(self)
        if self.step == number:
            act(self)

    patch.setattr(Run, "finish_step", after)


def poison(tensor: torch.Tensor, value: float = float("nan")) -> None:
    """Set the first element of a tensor to `value`."""
    with torch.no_grad():
        tensor.view(-1)[0] = value


class FullDisk:
    """A disk that, while `full`, writes half of the bytes and raises ENOSPC. Affects the files of
    `util.checkpoint.atomic`, such as checkpoints, and those of `util.checkpoint.retry`. `refused` counts the failed
    writes."""

    def __init__(self, patch, full: bool = False):
        self.full, self.refused = full, 0
        patch.setattr("util.checkpoint.atomic.open", self.open, raising=False)
        patch.setattr("util.checkpoint.retry.open", self.open, raising=False)
        patch.setattr("util.checkpoint.retry.FIRST", 0.01)  # seconds between attempts

    def open(self, path, mode="r", **options):
        file = open(path, mode, **options)  # noqa: SIM115
        return _HalfWritten(file, self) if self.full and mode in ("wb", "ab") else file


class _HalfWritten:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        self.file.write(bytes(data)[: len(data) // 2])
        self.disk.refused += 1
        raise FULL

    def flush(self):
        self.file.flush()

    def fileno(self):
        return self.file.fileno()


def stop_at(monkeypatch, step):
    """Raise SIGTERM in this process just before the optimizer takes step number `step`, counted from 1."""
    original, calls = util.training.run.adjust_learning_rate, [0]

    def adjust(*args):
        calls[0] += 1
        if calls[0] == step:
            signal.raise_signal(signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(util.training.run, "adjust_learning_rate", adjust)
