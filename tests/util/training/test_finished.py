"""Resuming a finished run changes none of its files, whatever the flags. Files that a kill at its end prevented are
written with the run's own flags."""

import json
import shutil

import pytest
from helpers.launch import SMALL, ranks
from helpers.refusals import listing
from safetensors import safe_open

import main_detect
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from util.report import ledger

# 96 training images: six steps an epoch.
BASE = "--batch_size 16 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu --amp_dtype fp32"
CLASSIFIER = f"--model vit_micro_patch4 --input_size 16 {BASE}"
SCENES = "--dataset scenes --scene_digits 0 1 --scene_size 32 --scene_count 48 2 --head_width 16"
MAINS = {
    "pretrain": (main_pretrain, f"{SMALL} {BASE} --vis_freq 0 --rc_mae"),
    "finetune": (main_finetune, f"{CLASSIFIER} --aug rrc"),
    "linprobe": (main_linprobe, CLASSIFIER),
    "segment": (main_segment, f"{CLASSIFIER} {SCENES}"),
    "detect": (main_detect, f"{CLASSIFIER} {SCENES} --patch_size 8 --window 0"),
}
OTHER = "--resume auto --blr 5 --weight_decay 0.3 --seed 9 --batch_size 12"


def start(name, flags):
    main, base = MAINS[name]
    return main.main(main.get_args_parser().parse_args(f"{base} {flags}".split()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """A finished run of each main, in subfolders of one folder."""
    folder = tmp_path_factory.mktemp("finished")
    for name in MAINS:
        start(name, f"--data_path {image_folder} --output_dir {folder / name}")
    return folder


@pytest.fixture
def run(finished, tmp_path, image_folder, request):
    """(name, flags, folder) of a copy of one finished run."""
    name = getattr(request, "param", "pretrain")
    shutil.copytree(finished / name, tmp_path / "run")
    return name, f"--data_path {image_folder} --output_dir {tmp_path / 'run'}", tmp_path / "run"


def metadata(path) -> dict:
    with safe_open(path, framework="pt") as file:
        return {name: json.loads(value) for name, value in file.metadata().items() if name != "format"}


@pytest.mark.parametrize("run", MAINS, indirect=True)
@pytest.mark.parametrize("flags", ["", "--log_dir {}/events", "--max_steps 3"])
def test_nothing_is_written(run, flags, tmp_path, capsys):
    name, common, folder = run
    before = listing(tmp_path)
    start(name, f"{common} {OTHER} {flags.format(tmp_path)}")
    assert listing(tmp_path) == before
    output = capsys.readouterr().out
    assert f"already finished: {folder}/checkpoint-0.pth is the state after 1 epochs" in output
    assert "nothing is trained or written\n" in output
    assert "note: --weight_decay was" in output


@pytest.mark.parametrize("run", MAINS, indirect=True)
def test_killed_before_its_last_files(run, capsys):
    """They equal those of the undisturbed run, except for times."""
    name, common, folder = run
    (whole,) = ledger.read(folder / "results.jsonl")
    encoders = {path.name: metadata(path) for path in folder.glob("encoder*")}
    assert len(encoders) == (2 if name == "pretrain" else 0)
    written = ("encoder", "results", ".hparams")
    before = {path: seen for path, seen in listing(folder).items() if not any(part in path for part in written)}
    for path in (folder / "results.jsonl", *folder.glob("encoder*")):
        path.unlink()
    start(name, f"{common} {OTHER}")
    (again,) = ledger.read(folder / "results.jsonl")
    for key in whole.keys() - {"finished", "seconds"}:
        assert again[key] == whole[key], key
    for path, flags in encoders.items():
        result = metadata(folder / path)
        assert result["origin"].pop("seconds") <= flags["origin"].pop("seconds") and result == flags
    assert f"its results are written: {', '.join([*sorted(encoders), 'results.jsonl'])}\n" in capsys.readouterr().out
    after, events = listing(folder), f"{folder}/events"
    assert all(after[path] == seen for path, seen in before.items() if path != str(folder))
    assert all(path in before or path.startswith((events, f"{folder}/encoder", f"{folder}/results")) for path in after)


def test_killed_at_the_end_of_an_extension(run, monkeypatch):
    """The line and the encoders of the shorter run exist, and do not count as those of the longer one."""
    name, common, folder = run
    with monkeypatch.context() as patch:
        patch.setattr(main_pretrain, "write_results", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(name, f"{common} --resume auto --epochs 2")
    assert metadata(folder / "encoder.safetensors")["origin"]["epoch"] == 0
    start(name, f"{common} --resume auto --epochs 2")
    first, second = ledger.read(folder / "results.jsonl")
    assert (first["flags"]["epochs"], second["flags"]["epochs"]) == (1, 2)
    assert second["images_seen"] == 2 * first["images_seen"] and first["metrics"] != second["metrics"]
    for path in folder.glob("encoder*"):
        assert metadata(path)["epochs"] == 2 and metadata(path)["origin"]["epoch"] == 1


def test_an_earlier_checkpoint_of_a_finished_run(run):
    """`--epochs 1` with the checkpoint after one epoch of two: nothing is left to train, and no file is renamed."""
    name, common, folder = run
    start(name, f"{common} --resume auto --epochs 2")
    before = listing(folder)
    start(name, f"{common} --resume {folder}/checkpoint-0.pth")
    assert listing(folder) == before


def test_two_processes(run):
    """Both ranks agree that encoders are missing, although only one checks."""
    name, common, folder = run
    (folder / "encoder_ema.safetensors").unlink()
    flags = f"{MAINS[name][1]} {common} {OTHER} --batch_size 8"
    output = ranks("main_pretrain", flags, 2)
    assert "its results are written: encoder.safetensors, encoder_ema.safetensors\n" in output
    assert len(ledger.read(folder / "results.jsonl")) == 1
    assert metadata(folder / "encoder_ema.safetensors")["batch_size"] == 16
