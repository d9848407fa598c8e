"""The default of --num_workers, and the note about too many."""

import os
import warnings

import pytest

import main_finetune
from util.notes import note_once
from util.parallel import cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that describes a machine: cores of the affinity, files of the control group, processes."""

    def describe(affinity, files=(), **environment):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(affinity)))
        monkeypatch.setattr(cores, "_CGROUP", tmp_path)
        for name in ("LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name, text in dict(files).items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        note_once.cache_clear()

    return describe


V1 = {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    "affinity,files,environment,workers",
    [
        (2, {}, {}, 2),
        (64, {}, {}, 10),
        (64, {"cpu.max": "250000 100000\n"}, {}, 3),
        (6, {"cpu.max": "max 100000\n"}, {}, 6),
        (64, V1, {}, 4),
        (16, {}, {"LOCAL_WORLD_SIZE": "8"}, 2),
        (4, {}, {"LOCAL_WORLD_SIZE": "8"}, 1),
    ],
)
def test_default(machine, affinity, files, environment, workers):
    machine(affinity, files, **environment)
    assert cores.default_workers("imagefolder") == workers


@pytest.mark.parametrize("dataset", ["wds", "hfds/cifar10"])
def test_the_order_of_streams_does_not_depend_on_the_machine(machine, dataset):
    machine(2)
    assert cores.default_workers(dataset) == 10


def test_one_note_instead_of_the_warning_of_torch(machine, tmp_path, capsys):
    machine(1)
    flags = "--dataset digits --model vit_micro_patch4 --input_size 16 --epochs 1 --warmup_epochs 0 --device cpu "
    flags += f"--batch_size 512 --num_workers 3 --output_dir {tmp_path}"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        main_finetune.main(main_finetune.get_args_parser().parse_args(flags.split()))
    shown = capsys.readouterr()
    notes = [line for line in shown.out.splitlines() if "more than the 1 core" in line]
    assert len(notes) == 1 and "--num_workers 3" in notes[0] and "give --num_workers 1" in notes[0]
    assert "DataLoader will create" not in shown.out + shown.err


def test_a_run_uses_and_records_the_default(machine, tmp_path):
    machine(1)
    flags = "--dataset digits --model vit_micro_patch4 --input_size 16 --epochs 1 --warmup_epochs 0 --device cpu "
    args = main_finetune.get_args_parser().parse_args(f"{flags} --batch_size 512 --output_dir {tmp_path}".split())
    assert args.num_workers is None
    main_finetune.main(args)
    assert '"num_workers": 1' in (tmp_path / "args.json").read_text()
