"""`--logger`: what arrives in wandb and trackio, offline and with the real packages, and what a failing logger does."""

import importlib.util
import json
import struct

import pytest
import torch
from helpers.launch import DIGITS, checkpoint, log_rows, ranks, same_tensors, scalars

import main_linprobe
import main_pretrain
from util.errors import UserError
from util.report import loggers
from util.report.loggers import MOST_FAILURES, Online, check_loggers, open_loggers

wandb = pytest.importorskip("wandb")
trackio = pytest.importorskip("trackio")
wandb_internal_pb2 = pytest.importorskip("wandb.proto.wandb_internal_pb2")
FLAGS = f"{DIGITS} --num_workers 0".replace("--batch_size 64", "--batch_size 512").replace("--vis_freq 0", "")
ALL = "--logger tensorboard wandb trackio"


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    yield
    wandb.teardown()


def pretrain(flags: str) -> None:
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(f"{FLAGS} {flags}".split()))


def wandb_records(folder) -> list:
    """Return the records of all offline runs in a folder. A file of wandb's is a LevelDB log: blocks of 32 KiB, a
    header of 7 bytes before each piece."""
    wandb.teardown()  # ends the process that writes the files
    records = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data, place, piece = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack("<IHB", data[place : place + 7])
            piece += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # a whole record, or its last piece
                records.append(wandb_internal_pb2.Record.FromString(piece))
                piece = b""
    return records


def wandb_points(folder) -> list[dict]:
    points = [record.history.item for record in wandb_records(folder) if record.WhichOneof("record_type") == "history"]
    return [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in each} for each in points]


def trackio_points(project: str, run: str) -> list[dict]:
    return trackio.sqlite_storage.SQLiteStorage.get_logs(project, run)


def test_what_arrives_and_a_resumed_run(tmp_path):
    """Scalars, pictures, histograms, flags; the resumed run is the same one; the weights are those without loggers."""
    out = tmp_path / "study" / "run"
    pretrain(f"{ALL} --rc_mae --vis_freq 1 --save_freq 1 --output_dir {out}")
    noted = json.loads((out / "loggers.json").read_text())
    assert {(run["project"], run["name"]) for run in noted.values()} == {("study", "run")}
    (run,) = {
        (record.run.run_id, record.run.project)
        for record in wandb_records(out)
        if record.WhichOneof("record_type") == "run"
    }
    assert run == (noted["wandb"]["id"], "study")
    expected = [(x, pytest.approx(y, rel=1e-5)) for x, y in scalars(out, "train/loss")]
    points = wandb_points(out)
    assert [(int(1000 * p["epoch"]), p["train/loss"]) for p in points if "train/loss" in p] == expected
    assert any(p.get("reconstruction/_type") == "image-file" for p in points)
    name = f"run-{noted['trackio']['id']}"
    rows = trackio_points("study", name)
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == expected
    assert any("reconstruction" in row for row in rows)
    config = {
        item.key or item.nested_key[0]: json.loads(item.value_json)
        for record in wandb_records(out)
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }
    assert config["rc_mae"] is True and config["batch_size"] == 512 and config["method"] == "rc_mae"

    weights = checkpoint(out, "checkpoint-1.pth")["model"]
    pretrain(f"{ALL} --rc_mae --vis_freq 1 --save_freq 1 --output_dir {out} --resume {out}/checkpoint-0.pth")
    assert json.loads((out / "loggers.json").read_text()) == noted
    ids = {record.run.run_id for record in wandb_records(out) if record.WhichOneof("record_type") == "run"}
    assert ids == {noted["wandb"]["id"]}
    again = [row["step"] for row in trackio_points("study", name) if "train/loss" in row]
    assert again == [x for x, _ in expected] + [expected[-1][0]]  # the points after the checkpoint come twice
    pretrain(f"--logger none --rc_mae --vis_freq 1 --output_dir {tmp_path}/plain")
    assert not [*(tmp_path / "plain").glob("events*")] and not (tmp_path / "plain" / "wandb").exists()
    for other in (checkpoint(out, "checkpoint-1.pth"), checkpoint(tmp_path / "plain", "checkpoint-1.pth")):
        assert same_tensors(other["model"], weights)


def test_histograms_and_texts(tmp_path):
    args = main_pretrain.get_args_parser().parse_args(f"{ALL} --output_dir {tmp_path}/run".split())
    (tmp_path / "run").mkdir()
    board = open_loggers(args, None, {"lr": 0.5})
    board.histogram("values", torch.arange(10.0), 1)
    board.text("changes", "another target", 1)
    board.close()
    points = wandb_points(tmp_path / "run")
    assert any(p.get("changes") == "another target" for p in points)
    assert any(p.get("values/_type", (p.get("values") or {})) for p in points)
    (run,) = trackio.sqlite_storage.SQLiteStorage.get_runs(tmp_path.name)
    assert any("values" in row for row in trackio_points(tmp_path.name, run))


def test_two_processes_log_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    ranks("main_pretrain", f"{FLAGS} --epochs 1 --logger wandb --output_dir {tmp_path}/run", 2)
    assert len([*(tmp_path / "run" / "wandb").glob("offline-run-*")]) == 1
    assert len([point for point in wandb_points(tmp_path / "run") if "train/loss" in point]) == 1


def test_a_probe_and_its_scores(tmp_path):
    flags = "--dataset digits --model vit_micro_patch4 --input_size 16 --cache_features --epochs 2 --warmup_epochs 0"
    flags += f" --device cpu --num_workers 0 --logger wandb --log_project p --log_name n --output_dir {tmp_path}/probe"
    result = main_linprobe.main(main_linprobe.get_args_parser().parse_args(flags.split()))
    (point,) = (p for p in wandb_points(tmp_path / "probe") if "eval/acc1" in p)
    assert point["eval/acc1"] == pytest.approx(result["eval/acc1"])


@pytest.mark.parametrize("where", ["send", "begin", "finish"])
def test_a_failing_logger_never_ends_a_run(tmp_path, monkeypatch, capsys, where):
    def fail(self, *_):
        raise ConnectionError("the network is down\nfor now")

    monkeypatch.setattr(loggers.Trackio, where, fail)
    pretrain(f"--logger trackio --epochs 1 --print_freq 1 --output_dir {tmp_path}/run")
    output = capsys.readouterr().out
    assert output.count("--logger trackio failed (ConnectionError: the network is down); the run goes on") == 1
    assert len(log_rows(tmp_path / "run")) == 1 and (tmp_path / "run" / "encoder.safetensors").exists()


def test_gives_up_after_failures_in_a_row():
    class Service(Online):
        def begin(self, names, folder, config):
            self.run = object()

        def send(self, values, epoch): ...

        def finish(self): ...

    calls = []
    logger = Service("wandb", {}, "", {})
    for fails in [True] * (MOST_FAILURES - 1) + [False] + [True] * (MOST_FAILURES + 3):
        logger.attempt(lambda fails=fails: calls.append(1 / (not fails)) if not fails else calls.append(1) or 1 / 0)
    assert len(calls) == 2 * MOST_FAILURES


def test_without_a_key(tmp_path, monkeypatch, capsys):
    """wandb would ask on a terminal; without one the sentence says what to do."""

    def init(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"give a key with `wandb login`, or set WANDB_MODE=offline"):
        pretrain(f"--logger wandb --output_dir {tmp_path}/run")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--logger none wandb", "--logger none excludes others: leave out none, or wandb"),
        ("--log_name x", "--log_name has no effect without --logger wandb or trackio"),
        ("--logger trackio", "--logger trackio needs the package trackio: pip install trackio"),
    ],
)
def test_refusals(flags, sentence, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trackio" else name)
    with pytest.raises(UserError, match=sentence):
        check_loggers(main_pretrain.get_args_parser().parse_args(flags.split()))


def test_sync_tensorboard_is_refused(tmp_path):
    """It patches torch's writer, which this project replaces: without the refusal nothing would arrive."""
    args = main_pretrain.get_args_parser().parse_args([])
    check_loggers(args)
    run = wandb.init(project="p", dir=str(tmp_path), sync_tensorboard=True)
    with pytest.raises(UserError, match=r"sync_tensorboard does not see .* give --logger tensorboard wandb"):
        check_loggers(args)
    loggers.Board(str(tmp_path / "ours")).scalars({"train/loss": 1.5}, 1)
    run.finish()
    assert not any("train/loss" in point for point in wandb_points(tmp_path))
    check_loggers(args)
