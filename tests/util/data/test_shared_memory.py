"""Little shared memory, as in containers, and other ends of data workers: a sentence with what helps, no traceback."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers.launch import ROOT

from util.data import loader, shared_memory
from util.data.loader import Loader
from util.data.samples import Sample
from util.data.shared_memory import check_shared_memory
from util.errors import RunFailed, UserError, user_errors, worker_failure
from util.notes import note_once

HELP = ("--num_workers 0", "--shm-size", "--ipc=host")


@pytest.fixture
def free(monkeypatch):
    """A function that sets the size of the free shared memory."""
    note_once.cache_clear()
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def set_free(size):
        stats = SimpleNamespace(f_blocks=1, f_bavail=size // 4096, f_frsize=4096)
        monkeypatch.setattr(shared_memory.os, "statvfs", lambda path: stats)

    return set_free


def test_a_batch_that_does_not_fit(free):
    """128 images of 3 x 224 x 224 in float32 are 77 MB."""
    free(64 * 2**20)
    with pytest.raises(UserError) as caught:
        check_shared_memory(10, 128, 3, 224)
    words = ("--num_workers 10", "77 MB", "--batch_size 128", "/dev/shm", "67 MB free", *HELP)
    assert all(word in str(caught.value) for word in words)
    check_shared_memory(0, 128, 3, 224)


def test_batches_that_may_fill_it(free, capsys):
    free(64 * 2**20)
    for _ in range(2):  # the loaders of training and evaluation
        check_shared_memory(10, 64, 3, (224, 224))
    shown = capsys.readouterr().out
    assert shown.count("note:") == 1 and "771 MB" in shown and all(word in shown for word in HELP)


def test_enough(free, monkeypatch, capsys):
    free(64 * 2**20)
    check_shared_memory(4, 64, 3, 32)
    assert not capsys.readouterr().out
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")  # all processes of a node share it
    check_shared_memory(4, 64, 3, 32)
    assert "note:" in capsys.readouterr().out


def test_systems_without_such_a_folder(monkeypatch):
    monkeypatch.setattr(shared_memory, "FOLDER", "/nowhere")
    check_shared_memory(10, 10**6, 3, 224)


class Failing(torch.utils.data.Dataset):
    """Samples whose worker fails at index 3."""

    def __init__(self, fail):
        self.fail = fail

    def __len__(self):
        return 8

    def __getitem__(self, key):
        if key[1] == 3:
            self.fail()
        return Sample(torch.zeros(3, 4, 4), 0, key[1], 0)


def out_of_memory():
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_17_1_0>: No space left on device (28)")


def kill(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "fail, words",
    [
        (out_of_memory, HELP),
        (kill(signal.SIGBUS), HELP),
        (kill(signal.SIGKILL), ("killed", "memory", "--num_workers")),
        (kill(signal.SIGSEGV), ("Segmentation fault", "--num_workers 0")),
        (lambda: os._exit(3), ("exited unexpectedly", "/dev/shm", "--num_workers 0")),
    ],
)
def test_a_worker_that_fails(fail, words):
    with pytest.raises(RunFailed) as caught:
        list(Loader(Failing(fail), 2, shuffle=False, seed=0, num_workers=1).begin(0))
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


@pytest.mark.parametrize("in_worker", [True, False])
def test_batches_are_shared_before_they_are_sent(monkeypatch, in_worker):
    """torch itself would share labels while it sends a batch. If that fails, it prints an error and loses the batch,
    and the main process waits forever."""
    monkeypatch.setattr(loader, "get_worker_info", lambda: object() if in_worker else None)
    batch = loader.collate([Sample(torch.ones(3, 4, 4), i, i, 0) for i in range(2)])
    assert all(column.is_shared() is in_worker for column in batch) and batch.index.tolist() == [0, 1]


def test_other_errors_of_a_dataset_are_not_changed():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug") as caught:
        list(Loader(Failing(fail), 2, shuffle=False, seed=0, num_workers=1).begin(0))
    assert not isinstance(caught.value, RunFailed)


def test_workers_that_cannot_be_started(monkeypatch):
    """Their semaphores are files in /dev/shm, too."""

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multiprocessing, "Lock", full)
    with pytest.raises(UserError) as caught:
        iter(Loader(Failing(lambda: None), 2, shuffle=False, seed=0, num_workers=2).begin(0))
    assert all(word in str(caught.value) for word in ("--num_workers 2", "No space left on device", *HELP))


@pytest.mark.parametrize(
    "message, words",
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            HELP,
        ),
        ("unable to allocate shared memory(shm) for file </torch_17868_2363774970_0>: Success (0)", HELP),
        ("unable to resize file </torch_1_2_3> to the right size: No space left on device (28)", HELP),
        ("unable to write to file </torch_1_2_3>: No space left on device (28)", HELP),
        ("received 0 items of ancdata", ("ulimit -n",)),
        ("Too many open files. Communication with the workers is no longer possible.", ("ulimit -n",)),
    ],
)
def test_torchs_messages(message, words, capsys):
    """torch raises some of them in the middle of a step (from a signal handler), so the mains explain them too."""
    with pytest.raises(SystemExit) as caught, user_errors("main.py"):
        raise RuntimeError(message)
    shown = capsys.readouterr().err
    assert caught.value.code == 1 and shown.startswith("main.py: error: ") and shown.count("\n") == 1
    assert all(word in shown for word in words)


def test_other_errors_are_not_explained():
    for error in (RuntimeError("size mismatch"), RunFailed("shared memory"), OSError("Bus error"), MemoryError()):
        assert worker_failure(error) is None


def test_a_real_container_size(tmp_path):
    """A small /dev/shm of its own, with room for one batch (1.6 MB): the run ends with the sentence."""
    alone = ["unshare", "--mount", "bash", "-c"]
    mount = "mount -t tmpfs -o size={} tmpfs /dev/shm"
    if not shutil.which("unshare") or subprocess.run([*alone, mount.format("1m")], capture_output=True).returncode:
        pytest.skip("this machine does not allow a mount of its own")
    run = f"{sys.executable} main_finetune.py --dataset digits --model vit_micro_patch4 --input_size 64 --in_chans 3"
    run += f" --epochs 1 --warmup_epochs 0 --batch_size 128 --device cpu --num_workers 4 --output_dir {tmp_path}/run"
    command = f"{mount.format('2500k')} && {run}"
    done = subprocess.run([*alone, command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error:") == 1 and all(word in done.stderr for word in HELP)
    assert "note: the batches that --num_workers 4 prepare take up to 13 MB of /dev/shm" in done.stdout


def test_a_file_system_without_a_limit(monkeypatch):
    """A tmpfs of size 0 and ramfs report no blocks at all."""
    monkeypatch.setattr(shared_memory.os, "statvfs", lambda _: SimpleNamespace(f_blocks=0, f_bavail=0, f_frsize=4096))
    shared_memory.check_shared_memory(8, 512, 3, 224)
