"""Checkpoints of earlier revisions (tests/fixtures/frozen/README.md): today's code reads them, computes the same
features, and resumes with the same losses."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from helpers import freeze
from helpers.launch import ranks

import main_finetune
import main_linprobe
import main_pretrain
from evaluation.encoder import load_encoder
from methods import METHODS
from util.checkpoint import sharded
from util.checkpoint.resume import find_resume
from util.weights.file import read_file
from util.weights.load import load_into, read_weights

MAINS = {"main_pretrain": main_pretrain, "main_finetune": main_finetune, "main_linprobe": main_linprobe}
WITHOUT_TENSORS = {"u_mae"}  # methods that add nothing to a checkpoint
FROZEN = sorted(freeze.FROZEN.glob("*/*.json"))


class Thawed:
    """A frozen run: its checkpoint `file` alone in a folder, and `expected`, the numbers of the code that wrote it."""

    def __init__(self, path: Path, folder: Path):
        self.expected = json.loads(path.read_text())
        self.main, self.flags = MAINS[self.expected["main"]], self.expected["flags"]
        self.file = freeze.unpack(path.with_suffix(".tar.xz"), folder / "run")
        self.encoder = folder / "run" / "encoder.safetensors"
        if "teacher.pth" in self.flags:
            freeze.unpack(freeze.TEACHER, folder / "teacher").rename(folder / "teacher.pth")

    def args(self, more: str = "") -> Namespace:
        return self.main.get_args_parser().parse_args(f"{self.flags} {more}".split())


@pytest.fixture(autouse=True)
def tiny():
    with freeze.tiny_models():
        yield


@pytest.fixture(params=FROZEN, ids=[f"{path.parent.name}-{path.stem}" for path in FROZEN])
def thawed(request, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the flags name files in this folder
    return Thawed(request.param, tmp_path)


# Features -------------------------------------------------------------------------------------------------------------


def close(result: torch.Tensor, expected) -> bool:
    """Compare to 1e-5 of the largest value: six digits were recorded, and float32 has seven."""
    expected = torch.as_tensor(expected).flatten()
    return (result.flatten() - expected).abs().max() < 1e-5 * expected.abs().max()


def encoder_of(path, key: str = "model", head: bool = False):
    return load_encoder(read_weights(path, key), {}, head)[0]


@torch.no_grad()
def test_the_same_features(thawed):
    """Features as tools and fine-tuning compute them, with the classifier; for a pretraining also by its
    autoencoder."""
    for key, expected in (thawed.expected["features"] or {}).items():  # none were recorded with --fsdp
        model = encoder_of(thawed.file, key, head="logits" in expected)
        assert close(model.forward_tokens(freeze.example()), expected["tokens"])
        assert "logits" not in expected or close(model(freeze.example()), expected["logits"])
        if thawed.main is main_pretrain:
            autoencoder = main_pretrain.build(thawed.args())
            report = load_into(autoencoder, read_weights(thawed.file, key))
            assert not report.missing and not report.interpolated
            result = autoencoder.encode(autoencoder.embed(freeze.example()))[0]
            assert close(result, autoencoder.norm(torch.tensor(expected["tokens"]).view_as(result)))
    if thawed.encoder.exists():
        result = encoder_of(thawed.encoder).forward_tokens(freeze.example())
        assert close(result, thawed.expected["encoder"]["tokens"])


# Resuming -------------------------------------------------------------------------------------------------------------


def resume_run(thawed, capsys) -> dict:
    """Resume with --resume auto, run to the end, and return the output of today's code."""
    assert find_resume("auto", "run").name == thawed.file.name
    flags = "--output_dir run --log_dir later --resume auto"
    if thawed.file.is_dir():
        output = ranks("helpers.frozen_script", f"{thawed.flags} {flags}", 2)
    else:
        thawed.main.main(thawed.args(flags))
        output = capsys.readouterr().out
    assert f"resumed run/{thawed.file.name}" in output
    return raw(find_resume("auto", "run"))


def raw(path: Path) -> dict:
    """Return the content of a checkpoint; for a folder its state without tensors, and the single file made from it."""
    return {"folder": read_file(path / sharded.REST), **sharded.one_file(path)} if path.is_dir() else read_file(path)


def test_it_resumes_with_the_same_numbers(thawed, capsys, written):
    """All later losses and the last line of the log agree to 1e-4: kernels and the order of sums have changed since, by
    1e-7 a step, which accumulates (2e-7 at most with the same torch). A hypergradient is a difference of two passes,
    and 25cf908 computed it differently by half a percent."""
    content = resume_run(thawed, capsys)
    losses = freeze.scalars(Path("later"))
    assert losses == [[x, pytest.approx(loss, rel=1e-4)] for x, loss in thawed.expected["losses"]] and len(losses) > 5
    then = thawed.expected["log"][-1]
    ours = freeze.log_rows(Path("run"))[-1]
    for name, value in then.items():
        assert ours[name] == pytest.approx(value, rel=1e-2 if "hypergrad" in name else 1e-4), name
    new = keys(content) - written
    assert not new, (
        f"no frozen checkpoint has {sorted(new)}: if a change of the format is meant, python tests/helpers/freeze.py"
    )


# The format -----------------------------------------------------------------------------------------------------------


def keys(value, path: str = "") -> set[str]:
    """Return the paths to all values of a checkpoint, with `*` for numbers and indices of lists. The names of flags,
    metrics and files of a folder are not part of the format."""
    if re.search(r"(^|\.)(args|data\.meter|source\.flags|checksums)$", path) or not isinstance(value, (dict, list)):
        return {path}
    items = value.items() if isinstance(value, dict) else ((0, item) for item in value)
    result = [keys(item, f"{path}.{'*' if isinstance(name, int) else name}".lstrip(".")) for name, item in items]
    return set().union(*result)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> set[str]:
    """The key paths of all frozen checkpoints."""
    folder = tmp_path_factory.mktemp("written")
    files = [Thawed(path, folder / f"{path.parent.name}-{path.stem}").file for path in FROZEN]
    return set().union(*(keys(raw(file)) for file in files))


def test_every_method_is_frozen(written):
    """By the flags of the frozen runs: a method may have no tensors. Those of the others are in the checkpoints."""
    runs = [json.loads(path.read_text()) for path in FROZEN]
    parser = main_pretrain.get_args_parser()
    flags = [parser.parse_args(run["flags"].split()) for run in runs if run["main"] == "main_pretrain"]
    on = {method.name for method in METHODS if any(map(method.enabled, flags))}
    assert {method.name for method in METHODS} == on, "python tests/helpers/freeze.py --only KIND, with a new kind"
    assert {key.split(".")[1] for key in written if key.startswith("methods.")} == on - WITHOUT_TENSORS
