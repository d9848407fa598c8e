"""The queue of a study: order, stopping and continuing, locks, lost checkpoints, the choice of a learning rate."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from evaluation.study import Kept, Piece, Study, check_unchanged, hours_left, missing, ready
from evaluation.study_tables import BEGIN, END, cell, rates_table, scores_table, write_results
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


def finish(study: Study, name: str, **metrics) -> None:
    piece = next(piece for piece in study.pieces() if piece.name == name)
    study.kept.add(piece, {"metrics": metrics, "images_seen": 100}, 36.0, "")


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


def test_ready_and_time_left():
    pieces = [Piece("a", "tune", ""), Piece("b", "pretrain", "", ("a",))]
    assert ready(pieces[0], {"a", "b"}) and not ready(pieces[1], {"a", "b"}) and ready(pieces[1], {"b"})


def test_time_left(tmp_path):
    study = study_of(tmp_path)
    assert hours_left(list(study.pieces()), study.kept) is None
    finish(study, "tune-mae-1e-3", loss=1.0)
    left = [piece for piece in study.pieces() if piece.kind == "tune"]
    assert hours_left(left, study.kept) == pytest.approx(len(left) * 0.01)


def test_other_flags_are_refused(tmp_path):
    study = study_of(tmp_path)
    finish(study, "tune-mae-1e-3", loss=1.0)
    changed = study_of(tmp_path, CONFIG | {"short": "--epochs 2"})
    with pytest.raises(UserError, match=r"tune-mae-1e-3\.json was made with other flags"):
        check_unchanged(list(changed.pieces()), changed.kept)
    check_unchanged(list(study.pieces()), study.kept)


def test_cells():
    assert cell([]) == "" and cell([1.0]) == "1.00 (n = 1)" and cell([1.0, 3.0]) == "2.00 ± 1.41 (n = 2)"


def test_tables(tmp_path):
    study = study_of(tmp_path)
    for rate, accuracy in zip(CONFIG["rates"], (40.0, 45.0)):
        finish(study, f"tune-mae-{rate}", **{"eval/knn20_acc1": accuracy})
    finish(study, "mae-seed0", loss=1.0)
    finish(study, "mae-seed0-probe", **{"eval/acc1": 50.0})
    finish(study, "mae-seed1-probe", **{"eval/acc1": 52.0})
    assert scores_table(study)[2:] == ["| mae | 100 | 0.01 | 51.00 ± 1.41 (n = 2) |"]
    assert rates_table(study)[2:] == ["| mae | 40.00 | 45.00 | 2e-3 |"]
    page = tmp_path / "results.md"
    page.write_text("# Results\n")
    with pytest.raises(UserError, match="has no lines"):
        write_results(study, page)
    page.write_text(f"# Results\n\n{BEGIN}\nold\n{END}\n\nend\n")
    (study.kept.folder / "mae-seed0.txt").write_text('{"epoch": 0, "eval/knn20_acc1": 30, "train/target_rank": 9}\n')
    write_results(study, page)
    text = page.read_text()
    assert "old" not in text and text.endswith(f"{END}\n\nend\n") and "51.00 ± 1.41" in text and "study.png" in text
    assert (tmp_path / "study.png").stat().st_size > 5000


# The queue itself, on pieces that train for real ----------------------------------------------------------------------

TINY = {
    **CONFIG,
    "pretrain": "--batch_size 32 --input_size 8 --patch_size 4 --num_workers 0 --keep 1 --amp_dtype fp32 --vis_freq 0 "
    "--knn_freq 1 --save_freq 1 --warmup_epochs 0 --decoder_depth 1 --decoder_embed_dim 32 --decoder_num_heads 2",
    "full": "--epochs 12",
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
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.05)


def test_a_study_is_stopped_killed_and_continued(tmp_path, small_set):
    """SIGTERM lets the run save; a killed queue leaves its run behind, which no other queue starts a second time."""
    queue = start(tmp_path, small_set, TINY)
    run = tmp_path / "out/mae-seed0"
    wait_for(run / "checkpoint-0.pth", queue)
    queue.send_signal(signal.SIGTERM)
    said, _ = queue.communicate(timeout=500)
    assert queue.returncode == 130 and "goes on" in said
    assert (tmp_path / "kept/tune-mae-1e-3.json").exists() and not (tmp_path / "kept/mae-seed0.json").exists()
    epochs = len((run / "log.txt").read_text().splitlines())

    queue = start(tmp_path, small_set, TINY)
    deadline = time.monotonic() + 500
    while len((run / "log.txt").read_text().splitlines()) <= epochs:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    queue.kill()
    queue.wait()
    with (tmp_path / "out/locks/mae-seed0").open("w") as lock, pytest.raises(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with (tmp_path / "out/locks/mae-seed0").open("w") as lock:
        pids = subprocess.run(
            ["pgrep", "-f", f"main_pretrain.py.*{run}"], capture_output=True, text=True
        ).stdout.split()
        for pid in pids:
            os.kill(int(pid), signal.SIGKILL)
        fcntl.flock(lock, fcntl.LOCK_EX)

    queue = start(tmp_path, small_set, TINY)
    said, _ = queue.communicate(timeout=300)
    assert queue.returncode == 0, said
    kept = json.loads((tmp_path / "kept/mae-seed0-knn.json").read_text())
    assert 0 <= kept["metrics"]["eval/knn5_acc1"] <= 100
    rows = [json.loads(line) for line in (tmp_path / "kept/mae-seed0.txt").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == list(range(12)) and not any("seconds" in row for row in rows)
