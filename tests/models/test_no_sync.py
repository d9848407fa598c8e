"""The host never waits for the device inside a step: on small models that would cost a GPU a tenth of its time.

On a GPU torch reports every synchronisation. On a CPU the operations that would synchronise are counted: reading a
number from a tensor, and results whose size depends on values.
"""

from contextlib import contextmanager

import pytest
import torch
from helpers.launch import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

import main_pretrain
from util.training.run import Run

SYNCHRONISING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
METHODS = ["--spike_factor 2", "--mae_k 1", "--ema_mae --wse 0 --ema_update step --rc_mae", "--dmae_teacher {teacher}"]


class Synchronisations(TorchDispatchMode):
    """Records the names of synchronising operations on floating-point or index tensors while `active`."""

    def __init__(self):
        super().__init__()
        self.names, self.active = [], False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(i, torch.Tensor) and i.dtype is torch.bool
            for a in args
            if isinstance(a, (list, tuple))
            for i in a
        )
        if self.active and (name in SYNCHRONISING or by_mask):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def synchronisations(monkeypatch):
    """Record operations of steps, from the forward pass to the methods' updates. Reading the metrics and the
    diagnostics once an epoch, whose time does not count, are exempt."""
    recorder, batches, diagnostics, finish_step = Synchronisations(), Run.batches, Run.measuring, Run.finish_step

    def record(on):
        recorder.active = on
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("error" if on else "default")

    def stepwise(self):
        for batch in batches(self):
            record(self.step > 0)  # the first step may synchronise
            yield batch
            record(False)

    def finish(self):
        record(False)
        finish_step(self)

    @contextmanager
    def exempt(self):
        before = recorder.active
        record(False)
        with diagnostics(self):
            yield
        record(before)

    monkeypatch.setattr(Run, "batches", stepwise)
    monkeypatch.setattr(Run, "finish_step", finish)
    monkeypatch.setattr(Run, "measuring", exempt)
    with recorder:
        yield recorder
    record(False)


def pretrain(folder, data, flags):
    flags = (
        f"{SMALL} --data_path {data} --aug none --num_workers 0 --batch_size 16 --vis_freq 0 --warmup_epochs 0 "
        f"--epochs 2 --clip_grad 1 --output_dir {folder} {flags}"
    )
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


@pytest.mark.parametrize("methods", METHODS)
def test_no_step_synchronises(image_folder, tmp_path, synchronisations, methods):
    if "teacher" in methods:
        pretrain(tmp_path / "t", image_folder, "")
    pretrain(
        tmp_path / "run",
        image_folder,
        "--amp_dtype bf16 " + methods.format(teacher=tmp_path / "t/checkpoint-1.pth"),
    )
    assert synchronisations.names == []


def test_a_synchronisation_is_recorded(image_folder, tmp_path, synchronisations, monkeypatch):
    """A number read in the middle of a step is recorded."""
    original = Run.backward
    monkeypatch.setattr(
        Run, "backward", lambda self, losses, batch: (sum(losses.values()).item(), original(self, losses, batch))
    )
    pretrain(tmp_path, image_folder, "")
    assert set(synchronisations.names) == {"_local_scalar_dense"} and len(synchronisations.names) == 11
