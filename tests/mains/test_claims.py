"""No file of a run claims flags, images, code or numbers that did not make it: runs that are resumed with other flags,
folders that held another run, evaluations beside a training."""

import json
import shutil

import pytest
from helpers.inject import stop_at
from helpers.launch import SMALL, checkpoint, log_rows
from safetensors import safe_open

import main_finetune
import main_linprobe
import main_pretrain
import util.report.ledger
import util.training.run
from evaluation import runs
from util.errors import UserError
from util.report import ledger

# 96 training images: six steps an epoch.
BASE = "--batch_size 16 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu --amp_dtype fp32"
CLASSIFIER = f"--model vit_micro_patch4 --input_size 16 {BASE}"
MAINS = {
    "pretrain": (main_pretrain, f"{SMALL} {BASE} --vis_freq 0 --save_freq 1"),
    "finetune": (main_finetune, f"{CLASSIFIER} --aug rrc --keep 0"),
    "linprobe": (main_linprobe, f"{CLASSIFIER} --aug none --save_freq 1 --keep 0"),
}


def start(name, flags):
    main, base = MAINS[name]
    return main.main(main.get_args_parser().parse_args(f"{base} {flags}".split()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """A finished run of each main, in subfolders of one folder."""
    folder = tmp_path_factory.mktemp("finished")
    start("pretrain", f"--data_path {image_folder} --output_dir {folder}/pretrain")
    for name in ("finetune", "linprobe"):
        weights = f"--finetune {folder}/pretrain/checkpoint-0.pth"
        start(name, f"{weights} --data_path {image_folder} --output_dir {folder}/{name}")
    return folder


@pytest.fixture
def run(finished, tmp_path, image_folder, request):
    """(name, flags, folder) of a copy of one finished run."""
    name = getattr(request, "param", "pretrain")
    shutil.copytree(finished / name, tmp_path / "run")
    return name, f"--data_path {image_folder} --output_dir {tmp_path / 'run'}", tmp_path / "run"


def written(path) -> dict:
    return json.loads(path.read_text())


# Resumed runs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", MAINS, indirect=True)
def test_flags_of_earlier_epochs(run, monkeypatch):
    """args.json, checkpoints, ledger and encoder of a run that is extended twice, with other flags and another
    revision, have the flags of its last part, and say until which epoch the others held."""
    name, common, folder = run
    first = written(folder / "args.json")
    monkeypatch.setattr(util.report.ledger, "revision", lambda: "other")
    start(name, f"{common} --resume auto --epochs 2 --weight_decay 0.3 --print_freq 3")
    start(name, f"{common} --resume auto --epochs 3 --weight_decay 0.3 --print_freq 3")
    args = written(folder / "args.json")
    one, two = args["earlier"]
    assert (one["until_epoch"], one["until_step"]) == (1, 6) and (two["until_epoch"], two["until_step"]) == (2, 12)
    assert one["flags"] == {"epochs": 1} | {flag: first[flag] for flag in ("weight_decay", "print_freq")}
    assert one["revision"] == first["revision"] and args["revision"] == "other"
    assert two == {"until_epoch": 2, "until_step": 12, "flags": {"epochs": 2}}
    assert (args["epochs"], args["weight_decay"], args["print_freq"]) == (3, 0.3, 3)
    state, line = checkpoint(folder, "checkpoint-2.pth"), ledger.read(folder / "results.jsonl")[-1]
    assert state["origin"]["earlier"] == line["earlier"] == args["earlier"]
    assert state["args"] == line["flags"] and state["args"].items() <= args.items()
    assert line["revision"] == f"{first['revision']}, other"
    if name == "pretrain":
        with safe_open(folder / "encoder.safetensors", framework="pt") as file:
            assert json.loads(file.metadata()["origin"])["earlier"] == args["earlier"]


def test_parts_that_do_not_differ(run, monkeypatch):
    """A run that was stopped and goes on as it was has no earlier parts. If it was resumed with other flags in vain,
    these made nothing and are mentioned nowhere."""
    name, common, folder = run
    two = f"{common} --epochs 2 --save_steps 1"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        start(name, f"{two} --overwrite")
    with monkeypatch.context() as patch:
        patch.setattr(util.training.run.Run, "batches", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(name, f"{two} --resume auto --weight_decay 0.123")
    assert written(folder / "args.json")["earlier"] == [
        {"until_epoch": 0.5, "until_step": 3, "flags": {"weight_decay": 0.05}}
    ]
    start(name, f"{two} --resume auto")
    assert "earlier" not in written(folder / "args.json") and "0.123" not in (folder / "results.jsonl").read_text()


def test_other_images(run, image_folder, tmp_path, capsys):
    """--data_path may change when a run is resumed; the record says that the images did."""
    name, common, folder = run
    shutil.copytree(image_folder, tmp_path / "images")
    next((tmp_path / "images" / "train").rglob("*.png")).rename(tmp_path / "images" / "train" / "class0" / "new.png")
    start(name, f"{common} --data_path {tmp_path}/images --epochs 2 --resume auto")
    assert "note: the train images are not those of the checkpoint" in capsys.readouterr().out
    first, second = ledger.read(folder / "results.jsonl")
    assert second["earlier"][0]["data"] == first["data"] != second["data"]


@pytest.mark.parametrize("run", ["finetune", "linprobe"], indirect=True)
@pytest.mark.parametrize("given", ["", "--finetune {other}"])
def test_weights_that_a_resumed_run_started_from(run, given, finished, capsys):
    """--finetune has no effect on a resumed run, whether it is given or not: the files keep the first one."""
    name, common, folder = run
    other = finished / "pretrain" / "encoder.safetensors"
    start(name, f"{common} --epochs 2 --resume auto {given.format(other=other)}")
    used = str(finished / "pretrain" / "checkpoint-0.pth")
    line = ledger.read(folder / "results.jsonl")[-1]
    assert line["flags"]["finetune"] == line["source"]["path"] == used
    assert (
        written(folder / "args.json")["finetune"] == checkpoint(folder, "checkpoint-1.pth")["args"]["finetune"] == used
    )
    assert (f"note: --finetune {other} has no effect on the resumed run" in capsys.readouterr().out) == bool(given)


def test_images_seen(run):
    """Skipped epochs were not seen; a part with another batch size counts its own images."""
    name, common, folder = run
    start(name, f"{common} --overwrite --start_epoch 1 --epochs 2")
    (line,) = ledger.read(folder / "results.jsonl")
    assert line["images_seen"] == 96 and [row["epoch"] for row in log_rows(folder)] == [1]
    start(name, f"{common} --resume auto --epochs 3 --batch_size 40")  # two batches: 16 images are dropped
    assert ledger.read(folder / "results.jsonl")[-1]["images_seen"] == 96 + 80
    assert written(folder / "args.json")["start_epoch"] == 1


def test_hardware_of_a_run_whose_results_are_written_later(run, monkeypatch):
    """The line that a kill prevented has the hardware that trained, not that of the process which writes it."""
    name, common, folder = run
    (whole,) = ledger.read(folder / "results.jsonl")
    (folder / "results.jsonl").unlink()
    monkeypatch.setattr(util.training.run, "hardware", lambda *_: {"device": "other"})
    monkeypatch.setattr(util.report.ledger, "hardware", lambda *_: {"device": "other"})
    start(name, f"{common} --resume auto")
    (again,) = ledger.read(folder / "results.jsonl")
    assert again["hardware"] == whole["hardware"]


def test_runs_that_changed_on_the_way_are_not_averaged(run, tmp_path, image_folder):
    """collect.py refuses to average a run with one whose flags were others for some epochs."""
    name, common, folder = run
    start(name, f"{common} --resume auto --epochs 2")
    other = tmp_path / "run-seed1"
    start(name, f"--data_path {image_folder} --output_dir {other} --epochs 2 --seed 1")
    found = runs.read_runs([str(folder), str(other)])
    assert [one.get("earlier") for one in found] == [[{"until_epoch": 1.0, "epochs": 1}], None]
    with pytest.raises(UserError, match=r"differ in earlier: \(until_epoch 1, epochs 1\) in .*, absent in"):
        runs.check_alike(found, "run", set(), True)
