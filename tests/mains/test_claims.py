"""No file of a run claims flags, images, code or numbers that did not make it: runs that are resumed with other flags,
folders that held another run, evaluations beside a training."""

import json
import shutil

import pytest
from helpers.inject import stop_at
from helpers.launch import SMALL, checkpoint, log_rows, scalars
from safetensors import safe_open
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.plugins.hparams import plugin_data_pb2

import engine_finetune
import main_detect
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
import util.report.ledger
import util.training.run
from evaluation import runs
from tools import export
from util.errors import UserError
from util.report import ledger
from util.weights.load import read_weights

# 96 training images: six steps an epoch.
BASE = "--batch_size 16 --epochs 1 --warmup_epochs 0 --num_workers 0 --device cpu --amp_dtype fp32"
CLASSIFIER = f"--model vit_micro_patch4 --input_size 16 {BASE}"
DENSE = f"{CLASSIFIER} --dataset scenes --scene_size 32 --scene_count 96 1 --head_width 16 --warmup_steps 0 --keep 0"
MAINS = {
    "pretrain": (main_pretrain, f"{SMALL} {BASE} --vis_freq 0 --save_freq 1"),
    "finetune": (main_finetune, f"{CLASSIFIER} --aug rrc --keep 0"),
    "linprobe": (main_linprobe, f"{CLASSIFIER} --aug none --save_freq 1 --keep 0"),
    "segment": (main_segment, DENSE),
    "detect": (main_detect, f"{DENSE} --detector faster --window 0"),
}
SUPERVISED = [name for name in MAINS if name != "pretrain"]


def start(name, flags):
    main, base = MAINS[name]
    return main.main(main.get_args_parser().parse_args(f"{base} {flags}".split()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, image_folder):
    """A finished run of each main, in subfolders of one folder."""
    folder = tmp_path_factory.mktemp("finished")
    start("pretrain", f"--data_path {image_folder} --output_dir {folder}/pretrain")
    for name in SUPERVISED:
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


@pytest.mark.parametrize("run", SUPERVISED, indirect=True)
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


# Folders --------------------------------------------------------------------------------------------------------------


def test_files_that_are_later_than_the_resumed_checkpoint(run, monkeypatch, image_folder):
    """After a resume from an earlier checkpoint, with other flags, no file of the abandoned epochs looks like one of
    the run: best weights, scores, encoder, spikes. One that ends before its line gets a line of its own."""
    name, common, folder = "finetune", run[1], run[2]
    scores = iter([50.0, 90.0, 20.0])
    monkeypatch.setattr(engine_finetune, "save_best", save_as_best(scores))
    start(name, f"{common} --overwrite --epochs 2")
    (folder / "spikes.jsonl").write_text("".join(json.dumps({"epoch": s // 6, "step": s}) + "\n" for s in (2, 5, 6, 9)))
    assert checkpoint(folder, "checkpoint-best.pth")["epoch"] == 1 and written(folder / "scores.json")["epoch"] == 1
    with monkeypatch.context() as patch:
        patch.setattr(util.report.ledger.Record, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(name, f"{common} --resume {folder}/checkpoint-0.pth --epochs 2 --weight_decay 0.3")
    best = checkpoint(folder, "checkpoint-best.pth")  # 20 is below 50, but the weights of 50 are lost
    assert best["epoch"] == 1 and best["args"]["weight_decay"] == 0.3
    assert checkpoint(folder, "checkpoint-best.pth.abandoned")["args"]["weight_decay"] == 0.05
    assert written(folder / "scores.json.abandoned")["weight_decay"] == 0.05
    assert written(folder / "scores.json")["weight_decay"] == 0.3
    assert [json.loads(line)["step"] for line in (folder / "spikes.jsonl").read_text().splitlines()] == [2, 5]
    start(name, f"{common} --resume auto --epochs 2")
    assert [row["flags"]["weight_decay"] for row in ledger.read(folder / "results.jsonl")] == [0.05, 0.3]


def save_as_best(scores):
    """Stand in for `engine_finetune.save_best`: the scores are those of an iterator."""

    def save_best(run, *_):
        run.checkpoints.save_best(run, next(scores))
        return {}

    return save_best


def test_an_encoder_of_abandoned_epochs(run):
    name, common, folder = run
    start(name, f"{common} --resume auto --epochs 2")
    with safe_open(folder / "encoder.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["origin"])["epoch"] == 1
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        start(name, f"{common} --resume {folder}/checkpoint-0.pth --epochs 2 --weight_decay 0.3")
    assert not (folder / "encoder.safetensors").exists() and (folder / "encoder.safetensors.abandoned").exists()


def test_a_second_run_in_the_folder_of_a_first(finished, tmp_path, image_folder, capsys):
    """--overwrite leaves nothing that looks like a file of the new run: evaluations, abandoned files, curves. JSON
    files of tools, whose names are free, are named."""
    folder = tmp_path / "run"
    shutil.copytree(finished / "finetune", folder)
    common = f"--data_path {image_folder} --output_dir {folder}"
    start("finetune", f"{common} --eval --resume auto")
    for name in ("checkpoint-0.pth.abandoned", "knn.json"):
        (folder / name).touch()
    (folder / "tensorboard-knn").mkdir()
    (folder / "tensorboard-knn" / "events.out.tfevents.1.x").touch()
    before = {path for path in folder.rglob("*") if path.is_file()}
    assert {folder / "eval.json", folder / "eval_confusion.png", folder / "checkpoint-best.pth"} < before
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2)
        start("finetune", f"{common} --overwrite --blr 0.5")
    left = {path.name for path in folder.rglob("*") if path.is_file() and ".tfevents." not in path.name}
    assert left == {"args.json", "checkpoint-0-2.pth", "knn.json"}
    assert len(list(folder.rglob("*.tfevents.*"))) == 1
    assert f"note: knn.json in {folder} stay" in capsys.readouterr().out


def test_a_checkpoint_of_another_folder(run, finished):
    """It does not continue the log of a run that is not its own."""
    name, common, _ = run
    for more in ("--epochs 2", ""):  # a run that goes on, and one that is at its end
        with pytest.raises(UserError, match=r"--output_dir .*/run holds another run \(log.txt\) than --resume"):
            start(name, f"{common} {more} --resume {finished}/pretrain/checkpoint-0.pth")


def test_curves_of_another_run(run, tmp_path):
    """A --log_dir of another run is refused; with --overwrite its points are hidden."""
    name, common, _ = run
    two = f"{common} --overwrite --epochs 2 --log_dir {tmp_path}/events"
    start(name, two)
    with pytest.raises(UserError, match=r"--log_dir .*/events holds the curves of another run"):
        start(name, f"{common}-2 --log_dir {tmp_path}/events")
    assert not (tmp_path / "run-2").exists()
    start(name, two.replace("--epochs 2", "--epochs 1"))
    assert [x for x, _ in scalars(tmp_path / "events", "train/loss")] == [1000]


@pytest.mark.parametrize("kind", ["extended", "evaluated"])
def test_flags_of_the_hparams_tab(kind, run, image_folder):
    """Beside the last metrics it shows the flags that made them. (Of several in a folder, TensorBoard shows the
    first.)"""
    name, common, folder = run
    if kind == "extended":
        start(name, f"{common} --resume auto --epochs 2")
        assert hparams(folder)["epochs"] == 2
        return
    for seed in (1, 2):
        out = f"--data_path {image_folder} --output_dir {folder} --seed {seed}"
        start("finetune", f"{out} --output_dir {folder}/{seed}")
        start("finetune", f"{out} --eval --finetune {folder}/{seed}/checkpoint-0.pth")
    assert hparams(folder / "tensorboard-eval")["seed"] == "2"


def hparams(folder) -> dict:
    """Return the flags that TensorBoard's HPARAMS tab shows."""
    events = plugin_event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    flags = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: value.number_value or value.string_value for name, value in flags.items()}


def test_an_export_of_an_earlier_epoch(run, tmp_path):
    """It has the epoch of the checkpoint beside the --epochs of the run, and is read back with it."""
    _, common, folder = run
    start("pretrain", f"{common} --overwrite --epochs 2")
    flags = f"{folder}/checkpoint-0.pth --to safetensors --out {tmp_path}/x.safetensors"
    export.main(export.get_args_parser().parse_args(flags.split()))
    weights = read_weights(f"{tmp_path}/x.safetensors")
    assert weights.history["epoch"] == 0 and weights.args["epochs"] == 2


# Evaluations ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", SUPERVISED, indirect=True)
def test_an_evaluation_beside_its_training(run):
    """It changes no file of the training. Its files have no flags of training but those that made the checkpoint, and
    name the checkpoint that was evaluated, whatever --resume auto means later."""
    name, common, folder = run
    kept = {path: path.read_bytes() for path in folder.iterdir() if path.name != "results.jsonl"}
    start(name, f"{common} --eval --resume auto --epochs 77 --weight_decay 0.7")
    assert all(path.read_bytes() == content for path, content in kept.items())
    trained, judged = ledger.read(folder / "results.jsonl")
    result = written(folder / "eval.json")
    for flags in (judged["flags"], result):
        assert not {"epochs", "weight_decay", "lr", "blr", "aug", "save_freq"} & flags.keys()
    assert judged["source"]["flags"] == trained["flags"]
    source = judged["source"]
    assert result["source"] == {name: source[name] for name in ("path", "sha256", "epoch")}
    assert source["path"] == f"{folder}/checkpoint-0.pth" and result["revision"] == judged["revision"]


def test_flags_of_cached_features(finished, tmp_path, image_folder):
    """The files have no augmentation and no --blr, which it does not use; a given one is refused."""
    common = f"{CLASSIFIER} --cache_features --data_path {image_folder} --output_dir {tmp_path / 'probe'}"
    parse = main_linprobe.get_args_parser().parse_args
    main_linprobe.main(parse(common.split()))
    (line,), probe = ledger.read(tmp_path / "probe" / "results.jsonl"), written(tmp_path / "probe" / "probe.json")
    stored = checkpoint(tmp_path / "probe", "probe.pth")["args"]
    assert all((flags["aug"], flags["blr"]) == ("none", None) for flags in (line["flags"], probe, stored))
    for flag in ("--blr 0.3", "--aug rrc", "--clip_grad 1"):
        with pytest.raises(UserError, match=f"{flag.split()[0]} .*has no effect with --cache_features"):
            main_linprobe.main(parse(f"{common} --overwrite {flag}".split()))
