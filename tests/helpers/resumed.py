"""A pretraining run that is stopped and resumed, beside the same run without a stop."""

from pathlib import Path

from helpers.inject import pretrain, stop_at
from helpers.launch import checkpoint, log_rows, same_tensors, scalars

STATE = ("model", "model_ema", "optimizer", "methods", "step", "rng")


def check_resumed(monkeypatch, flags: str, folder: Path, step: int, epochs: int, tags=()) -> dict:
    """Run `flags`, and again stopped after `step` and resumed. All state, the log and the curves `tags` must be equal
    bit for bit. Return the last checkpoint; the run without a stop is in `folder`/whole."""
    last = f"checkpoint-{epochs - 1}.pth"
    pretrain(f"{flags} --output_dir {folder}/whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        pretrain(f"{flags} --output_dir {folder}/parts")
    assert not (folder / "parts" / last).exists()
    pretrain(f"{flags} --output_dir {folder}/parts --resume auto")
    ours, theirs = (checkpoint(folder / name, last) for name in ("parts", "whole"))
    for key in STATE:
        assert same_tensors(ours.get(key), theirs.get(key)), key
    assert log_rows(folder / "parts") == log_rows(folder / "whole")
    for tag in tags:
        assert scalars(folder / "parts", tag) == scalars(folder / "whole", tag), tag
    return theirs
