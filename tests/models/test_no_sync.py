"""The host never waits for the device inside a step: it would cost a GPU a tenth of its time on small models.

On a GPU torch itself finds every wait. On a CPU the operations that would wait are counted: a number read from a
tensor, and results whose size depends on the values.
"""

from contextlib import contextmanager

import pytest
import torch
from helpers.launch import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

import main_pretrain
from util.training.run import Run

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
METHODS = ["--spike_factor 2", "--mae_k 1", "--ema_mae --wse 0 --ema_update step --rc_mae", "--dmae_teacher {teacher}"]


class Waiting(TorchDispatchMode):
    """Names of waiting operations on floating-point or index tensors, while `watching`."""

    def __init__(self):
        super().__init__()
        self.found, self.watching = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype is torch.bool
            for a in args
            if isinstance(a, (list, tuple))
            for i in a
        )
        if self.watching and (name in WAITS or by_mask):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch):
    """Steps are watched, from their forward pass to what the methods do after them; reading the metrics is not, nor a
    closer look once an epoch, whose time is not counted."""
    waiting, batches, diagnostics, finish_step = Waiting(), Run.batches, Run.diagnostics, Run.finish_step

    def watch(on):
        waiting.watching = on
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    def stepwise(self, header):
        for batch in batches(self, header):
            watch(self.step > 0)  # what is made once, at the first step, may wait
            yield batch
            watch(False)

    def finish(self):
        watch(False)
        finish_step(self)

    @contextmanager
    def unwatched(self):
        before = waiting.watching
        watch(False)
        with diagnostics(self):
            yield
        watch(before)

    monkeypatch.setattr(Run, "batches", stepwise)
    monkeypatch.setattr(Run, "finish_step", finish)
    monkeypatch.setattr(Run, "diagnostics", unwatched)
    with waiting:
        yield waiting
    watch(False)


def pretrain(folder, data, flags):
    flags = (
        f"{SMALL} --data_path {data} --aug none --num_workers 0 --batch_size 16 --vis_freq 0 --warmup_epochs 0 "
        f"--epochs 2 --clip_grad 1 --output_dir {folder} {flags}"
    )
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


@pytest.mark.parametrize("methods", METHODS)
def test_no_step_waits(image_folder, tmp_path, watched, methods):
    if "teacher" in methods:
        pretrain(tmp_path / "t", image_folder, "")
    pretrain(
        tmp_path / "run",
        image_folder,
        "--amp_dtype bf16 " + methods.format(teacher=tmp_path / "t/checkpoint-1.pth"),
    )
    assert watched.found == []


def test_the_watch_sees(image_folder, tmp_path, watched, monkeypatch):
    """A number read in the middle of a step is found."""
    original = Run.backward
    monkeypatch.setattr(
        Run, "backward", lambda self, losses, batch: (sum(losses.values()).item(), original(self, losses, batch))
    )
    pretrain(tmp_path, image_folder, "")
    assert set(watched.found) == {"_local_scalar_dense"} and len(watched.found) == 11
