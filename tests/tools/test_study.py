"""The queue of a study: order, stopping and continuing, locks, lost checkpoints, the choice of a learning rate."""

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers.parsers import parse_error
from PIL import Image

from evaluation.study import Kept, Piece, Study, check_unchanged, expected_seconds, hours_left, missing, ready
from evaluation.study_folders import Sets, add_time, whole_time
from tools.study import Queue, show, try_lock
from util.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = {
    "model": "mae_vit_micro_patch4",
    "rates": ["1e-3", "2e-3"],
    "seeds": [0, 1],
    "within": 2.0,
    "pretrain": "--batch_size 64",
    "full": "--epochs 3",
    "short": "--epochs 1",
    "evaluate": {
        "probe": "main_linprobe.py {start} {images}",
        "finetune": "main_finetune.py {start} {recipe} --epochs 2",
    },
    "recipe": "--model vit_micro_patch4",
    "few": 2,
    "scores": [["probe", "eval/acc1", "linear probe"]],
    "methods": {"mae": {}, "random": {"pretrained": False}, "other": {"flags": "--u_mae"}},
}


def study_of(folder: Path, config=CONFIG) -> Study:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    return Study(file, Kept(folder / "kept"))


def finish(study: Study, name: str, seconds: float = 36.0, **metrics) -> None:
    piece = next(piece for piece in study.pieces() if piece.name == name)
    study.kept.add(piece, {"metrics": metrics, "images_seen": 100}, seconds, "")


def names(pieces) -> list[str]:
    return [piece.name for piece in pieces]


def test_order_and_choice_of_the_rate(tmp_path):
    study = study_of(tmp_path)
    tuned = ["tune-mae-1e-3", "tune-mae-2e-3"]
    assert names(study.pieces())[:5] == [*tuned, "mae-seed0", "mae-seed0-probe", "mae-seed0-finetune"]
    assert study.best_rate("mae") is None
    finish(study, tuned[0], **{"eval/knn20_acc1": 40.0})
    finish(study, tuned[1], **{"eval/knn20_acc1": float("nan")})
    assert study.best_rate("mae") == "1e-3"
    run = {piece.name: piece for piece in study.pieces()}["mae-seed0"]
    assert "--lr 1e-3 --seed 0" in run.words and run.checkpoint == "mae-seed0/checkpoint-2.pth"


def test_only_methods_near_the_baseline_get_more_seeds(tmp_path):
    study = study_of(tmp_path)
    for name, accuracy in {"mae": 50.0, "random": 40.0, "other": 48.5}.items():
        assert f"{name}-seed1-probe" not in names(study.pieces())
        finish(study, f"{name}-seed0-probe", **{"eval/acc1": accuracy})
    more = names(study.pieces())
    assert "mae-seed1" in more and "other-seed1" in more and "random-seed1-probe" not in more


def test_what_is_missing(tmp_path):
    """A finished evaluation stays finished when the checkpoints are lost; one that is left needs them again."""
    study, out = study_of(tmp_path), tmp_path / "out"
    for rate in CONFIG["rates"]:
        finish(study, f"tune-mae-{rate}", **{"eval/knn20_acc1": 1.0})
    finish(study, "mae-seed0", loss=1.0)
    finish(study, "mae-seed0-probe", **{"eval/acc1": 50.0})
    left = names(missing(list(study.pieces()), study.kept, out))
    assert "mae-seed0" in left and "mae-seed0-probe" not in left and "tune-mae-1e-3" not in left
    (out / "mae-seed0").mkdir(parents=True)
    (out / "mae-seed0/checkpoint-2.pth").touch()
    assert "mae-seed0" not in names(missing(list(study.pieces()), study.kept, out))
    finish(study, "mae-seed0-finetune", **{"eval/acc1": 50.0})
    (out / "mae-seed0/checkpoint-2.pth").unlink()
    assert "mae-seed0" not in names(missing(list(study.pieces()), study.kept, out))


def test_ready():
    pieces = [Piece("a", "tune", ""), Piece("b", "pretrain", "", ("a",))]
    assert ready(pieces[0], {"a", "b"}) and not ready(pieces[1], {"a", "b"}) and ready(pieces[1], {"b"})


def test_time_left(tmp_path):
    """A pretraining of three epochs takes three times as long as the tuning of its method, else as that of another."""
    study = study_of(tmp_path, CONFIG | {"minutes": {"tune": 2, "pretrain": 2, "probe": 3, "finetune": 4}})
    pieces = {piece.name: piece for piece in study.pieces()}

    def seconds(name):
        return expected_seconds(pieces[name], list(pieces.values()), study)

    assert [seconds(name) for name in ("tune-mae-1e-3", "mae-seed0", "mae-seed0-probe")] == [120, 360, 180]
    finish(study, "tune-mae-1e-3", 36.0)
    assert seconds("mae-seed0") == seconds("other-seed0") == 108
    finish(study, "tune-other-1e-3", 72.0)
    assert seconds("mae-seed0") == 108 and seconds("other-seed0") == 216
    finish(study, "mae-seed0-finetune", 50.0)
    assert seconds("random-seed0-finetune") == 50 and seconds("mae-seed0-probe") == 180
    left = [pieces[name] for name in ("mae-seed0", "other-seed0")]
    assert hours_left(left, list(pieces.values()), study) == pytest.approx((108 + 216) / 3600)


def test_core_time_of_parts(tmp_path):
    """A part whose queue was killed is not measured: its epochs count like the others. Commands start anew."""
    assert whole_time(tmp_path) is None
    add_time(tmp_path, 7.0, 0)
    add_time(tmp_path, 5.0, 0)
    assert whole_time(tmp_path) == 5.0
    (tmp_path / "log.txt").write_text('{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n{"epoch": 3}\n{"epo')
    assert whole_time(tmp_path) is None
    add_time(tmp_path, 18.0, 2)
    assert whole_time(tmp_path) == (7 + 5 + 18) / 2 * 4


def test_rows_of_other_versions_are_skipped(tmp_path, capsys):
    config = CONFIG | {"methods": {"mae": {}, "new": {"uses": "not_there", "flags": "--x"}, "u": {"uses": "u_mae"}}}
    study = study_of(tmp_path, config)
    assert list(study.methods) == ["mae", "u"] and study.skipped == ["new"]
    show(study, tmp_path / "out")
    text = capsys.readouterr().out
    assert "skipped: this version has no method not_there" in text and "core hours" in text


def test_other_flags_are_refused(tmp_path):
    study = study_of(tmp_path)
    finish(study, "tune-mae-1e-3", loss=1.0)
    changed = study_of(tmp_path, CONFIG | {"short": "--epochs 2"})
    with pytest.raises(UserError, match=r"tune-mae-1e-3\.json was made with other flags"):
        check_unchanged(list(changed.pieces()), changed.kept)
    check_unchanged(list(study.pieces()), study.kept)


@pytest.mark.parametrize("name", ["cifar10", "rehearsal"])
def test_the_flags_of_a_study_exist(name, tmp_path):
    """Every command of the real studies is accepted by its parser."""
    study = Study(ROOT / f"configs/study/{name}.yaml", Kept(tmp_path / "kept"))
    for method in study.methods:
        for rate in study.config["rates"]:
            study.kept.results[f"tune-{method}-{rate}"] = {"metrics": {"eval/knn20_acc1": 1.0}}
    sets = Sets("data", tmp_path, study.config).flags()
    for piece in study.pieces():
        words = piece.words
        for key, value in {**sets, "out": "out", "folder": "folder"}.items():
            words = words.replace(f"{{{key}}}", value)
        program, *flags = shlex.split(words)
        assert "{" not in words and "None" not in flags and parse_error(program, flags) == "", piece.name


# The queue, on pieces that only write their results -------------------------------------------------------------------

FAKE = """
import json, os, sys
name, folder, checkpoint, order = sys.argv[1:]
open(order, "a").write(name + chr(10))
if name in os.environ.get("FAIL", "").split():
    sys.exit(3)
if checkpoint:
    open(checkpoint, "w").close()
metrics = {"eval/acc1": 50.0, "eval/knn20_acc1": 20.0 if name.endswith("2e-3") else 10.0}
row = {"command": "main_pretrain", "flags": {}, "metrics": metrics, "images_seen": 10, "seconds": 1.5}
open(folder + "/results.jsonl", "a").write(json.dumps(row) + chr(10))
"""
SHORT = CONFIG | {"seeds": [0], "methods": {"mae": {}, "random": {"pretrained": False}}}
EVERYTHING = ["tune-mae-1e-3", "tune-mae-2e-3", "mae-seed0", "mae-seed0-probe", "mae-seed0-finetune"]
EVERYTHING += ["random-seed0-probe", "random-seed0-finetune"]


class FakeQueue(Queue):
    poll_seconds = 0.02

    def command(self, piece):
        checkpoint = str(self.out / piece.checkpoint) if piece.checkpoint else ""
        folder = self.out / piece.name
        return [sys.executable, "-ISc", FAKE, piece.name, str(folder), checkpoint, str(self.out.parent / "order")]


@pytest.fixture
def fake(tmp_path, small_set):
    """A function that runs a queue of fake pieces -> exit code and the names of the pieces that ran, in order."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(config=SHORT, jobs: int = 1) -> tuple[int, list[str]]:
        (tmp_path / "order").unlink(missing_ok=True)
        code = queue_of(tmp_path, small_set, config, jobs).run()
        order = tmp_path / "order"
        return code, order.read_text().split() if order.exists() else []

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def queue_of(folder: Path, data: Path, config=SHORT, jobs: int = 1) -> FakeQueue:
    args = argparse.Namespace(out=str(folder / "out"), data=str(data), jobs=jobs)
    return FakeQueue(args, study_of(folder, config))


def test_the_queue_runs_everything_once(fake, tmp_path, capsys):
    assert fake() == (0, EVERYTHING)
    assert "(7 left, about" in capsys.readouterr().out
    assert fake() == (0, []) and "nothing is left" in capsys.readouterr().out
    kept = json.loads((tmp_path / "kept/mae-seed0.json").read_text())
    assert "--lr 2e-3" in kept["words"] and kept["seconds"] == 1.5 and 0 <= kept["core_seconds"] < 60


def test_a_lost_folder(fake, tmp_path):
    """Finished evaluations stay finished; a missing one needs its pretraining again, but neither tuning nor the
    others."""
    fake()
    shutil.rmtree(tmp_path / "out")
    assert fake() == (0, [])
    (tmp_path / "kept/mae-seed0-finetune.json").unlink()
    assert fake() == (0, ["mae-seed0", "mae-seed0-finetune"])


def test_a_failure_stops_only_what_needs_it(fake, monkeypatch, capsys):
    monkeypatch.setenv("FAIL", "mae-seed0")
    assert fake(jobs=2)[0] == 1
    text = capsys.readouterr()
    assert "mae-seed0 failed with exit code 3" in text.err and "3 pieces are left" in text.out
    monkeypatch.delenv("FAIL")
    assert fake() == (0, EVERYTHING[2:5])


def test_a_piece_of_another_queue_is_waited_for(fake, tmp_path, small_set):
    """Whoever holds the lock runs the piece; this queue does the rest, and waits."""
    (tmp_path / "out").mkdir()
    lock = try_lock(tmp_path / "out", "tune-mae-2e-3")
    assert lock is not None and try_lock(tmp_path / "out", "tune-mae-2e-3") is None
    released = threading.Timer(2, lock.close)
    released.start()
    code, order = fake()
    assert code == 0 and sorted(order) == sorted(EVERYTHING)
    assert order.index("random-seed0-finetune") < order.index("tune-mae-2e-3") < order.index("mae-seed0")


def test_a_piece_that_another_queue_has_just_finished_is_not_started(tmp_path, small_set):
    queue = queue_of(tmp_path, small_set)
    queue.out.mkdir()
    piece = queue.state()[1][0]
    finish(study_of(tmp_path, SHORT), piece.name, **{"eval/knn20_acc1": 1.0})  # meanwhile, by another process
    assert queue.start(piece) and queue.running == []


def test_other_flags_and_another_data_set_are_refused(fake, tmp_path, small_set):
    fake()
    with pytest.raises(UserError, match="made with other flags"):
        fake(SHORT | {"short": "--epochs 2"})
    shutil.copytree(small_set, tmp_path / "other")
    with pytest.raises(UserError, match=r"other is not .*set, of which .*out is a study"):
        queue_of(tmp_path, tmp_path / "other").run()
    shutil.rmtree(small_set)  # the set has moved: the links are made again
    queue_of(tmp_path, tmp_path / "other").sets.make()
    assert (tmp_path / "out/data/few/val").resolve() == tmp_path / "other/val"


def test_parts_of_the_data_set(tmp_path, small_set):
    """Tuning sees no image that it is judged by, and no test image."""
    Sets(str(small_set), tmp_path / "out", CONFIG).make()
    parts = tmp_path / "out/data"
    held_out = {
        split: {path.resolve() for path in (parts / "held_out" / split).rglob("*.png")} for split in ("train", "val")
    }
    assert [len(files) for files in held_out.values()] == [72, 8] and not held_out["train"] & held_out["val"]
    assert all("train" in path.parts for files in held_out.values() for path in files)
    assert len(list((parts / "few/train").rglob("*.png"))) == 2 * CONFIG["few"]


# The queue itself, on pieces that train for real ----------------------------------------------------------------------

TINY = {
    **CONFIG,
    "pretrain": "--batch_size 32 --input_size 8 --patch_size 4 --num_workers 0 --keep 1 --amp_dtype fp32 --vis_freq 0 "
    "--knn_freq 1 --save_freq 1 --warmup_epochs 0 --decoder_depth 1 --decoder_embed_dim 32 --decoder_num_heads 2",
    "full": "--epochs 12",
    "short": "--epochs 8",
    "rates": ["1e-3"],
    "seeds": [0],
    "evaluate": {"knn": "tools/knn.py {encoder} {images} --model vit_micro_patch4 --k 5 --out {folder}/knn.json"},
    "scores": [["knn", "eval/knn5_acc1", "5-NN"]],
    "methods": {"mae": {}},
}


@pytest.fixture
def small_set(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 4)):
        for label in "ab":
            folder = tmp_path / "set" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "set"


def start(folder: Path, data: Path, config) -> subprocess.Popen:
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    words = [sys.executable, str(ROOT / "tools/study.py"), str(folder / "out"), "--data", str(data)]
    words += ["--study", str(folder / "tiny.yaml"), "--keep", str(folder / "kept")]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 500
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


def kill_runs(run: Path) -> None:
    """Kill the pieces that write into a folder, which a killed queue leaves behind."""
    found = subprocess.run(["pgrep", "-f", f"main_pretrain.py.*{run}"], capture_output=True, text=True)
    for pid in found.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def test_a_study_is_stopped_killed_and_continued(tmp_path, small_set):
    """SIGTERM lets a tuning save, and it resumes; a killed queue leaves its run behind, which no other queue starts a
    second time."""
    tuning, run = tmp_path / "out/tune-mae-1e-3", tmp_path / "out/mae-seed0"
    queue = start(tmp_path, small_set, TINY)
    wait_for(tuning / "checkpoint-0.pth", queue)
    queue.send_signal(signal.SIGTERM)
    said, _ = queue.communicate(timeout=500)
    assert queue.returncode == 130 and "goes on" in said
    assert not (tmp_path / "kept").exists()

    queue = start(tmp_path, small_set, TINY)
    wait_for(run / "checkpoint-0.pth", queue)
    rows = [json.loads(line) for line in (tmp_path / "kept/tune-mae-1e-3.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(8))
    queue.kill()
    queue.wait()
    with (tmp_path / "out/locks/mae-seed0").open("w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    kill_runs(run)
    with (tmp_path / "out/locks/mae-seed0").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

    queue = start(tmp_path, small_set, TINY)
    said, _ = queue.communicate(timeout=500)
    assert queue.returncode == 0, said
    kept = json.loads((tmp_path / "kept/mae-seed0-knn.json").read_text())
    assert 0 <= kept["metrics"]["eval/knn5_acc1"] <= 100
    rows = [json.loads(line) for line in (tmp_path / "kept/mae-seed0.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(12)) and not any("seconds" in row for row in rows)
