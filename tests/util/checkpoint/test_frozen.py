"""Checkpoints that earlier code wrote (tests/fixtures/frozen/README.md): today's code reads them, finds the features of
then, and goes on as that code went on."""

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
FROZEN = sorted(freeze.FROZEN.glob("*/*.json"))


class Thawed:
    """A frozen run, its checkpoint `file` alone in a folder; `expected` is what the code of then did with it."""

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
    monkeypatch.chdir(tmp_path)  # the flags name files in it
    return Thawed(request.param, tmp_path)


# Features -------------------------------------------------------------------------------------------------------------


def close(found: torch.Tensor, expected) -> bool:
    """To 1e-5 of the largest: six digits were written down, and float32 has seven."""
    expected = torch.as_tensor(expected).flatten()
    return (found.flatten() - expected).abs().max() < 1e-5 * expected.abs().max()


def encoder_of(path, key: str = "model", head: bool = False):
    return load_encoder(read_weights(path, key), {}, head)[0]


@torch.no_grad()
def test_the_same_features(thawed):
    """As tools and fine-tuning have them, with the classifier; of a pretraining as its autoencoder has them, too."""
    for key, expected in (thawed.expected["features"] or {}).items():  # none: written with --fsdp
        model = encoder_of(thawed.file, key, head="logits" in expected)
        assert close(model.forward_tokens(freeze.example()), expected["tokens"])
        assert "logits" not in expected or close(model(freeze.example()), expected["logits"])
        if thawed.main is main_pretrain:
            autoencoder = main_pretrain.build(thawed.args())
            report = load_into(autoencoder, read_weights(thawed.file, key))
            assert not report.missing and not report.interpolated
            found = autoencoder.encode(autoencoder.embed(freeze.example()))[0]
            assert close(found, autoencoder.norm(torch.tensor(expected["tokens"]).view_as(found)))
    if thawed.encoder.exists():
        found = encoder_of(thawed.encoder).forward_tokens(freeze.example())
        assert close(found, thawed.expected["encoder"]["tokens"])


# Going on -------------------------------------------------------------------------------------------------------------


def go_on(thawed, capsys) -> dict:
    """To the end, from the file that `--resume auto` finds -> what today's code writes there."""
    assert find_resume("auto", "run").name == thawed.file.name
    flags = "--output_dir run --log_dir later --resume auto"
    if thawed.file.is_dir():
        said = ranks("helpers.frozen_script", f"{thawed.flags} {flags}", 2)
    else:
        thawed.main.main(thawed.args(flags))
        said = capsys.readouterr().out
    assert f"resumed run/{thawed.file.name}" in said
    return raw(find_resume("auto", "run"))


def raw(path: Path) -> dict:
    """All that is in a checkpoint; of a folder what lies beside the tensors, and the file that is made of it."""
    return {"folder": read_file(path / sharded.REST), **sharded.one_file(path)} if path.is_dir() else read_file(path)


def test_it_ends_as_it_did(thawed, capsys, written):
    """Every later loss, and what the last line of the log then had, to 1e-4: kernels and the order of sums have changed
    since, by 1e-7 in a step, and the steps add up (2e-7 at most with the same torch). A hypergradient is a difference
    of two passes, and 25cf908 computed it otherwise, by half a percent."""
    content = go_on(thawed, capsys)
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
    """Paths to all that is in a checkpoint, `*` for numbers and places in lists. Flags and metrics have names that
    say nothing of the format; so have the files of a folder."""
    if re.search(r"(^|\.)(args|data\.meter|source\.flags|checksums)$", path) or not isinstance(value, (dict, list)):
        return {path}
    items = value.items() if isinstance(value, dict) else ((0, item) for item in value)
    found = [keys(item, f"{path}.{'*' if isinstance(name, int) else name}".lstrip(".")) for name, item in items]
    return set().union(*found)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> set[str]:
    """The keys of all frozen checkpoints."""
    folder = tmp_path_factory.mktemp("written")
    files = [Thawed(path, folder / f"{path.parent.name}-{path.stem}").file for path in FROZEN]
    return set().union(*(keys(raw(file)) for file in files))


def test_every_method_is_frozen(written):
    names = {key.split(".")[1] for key in written if key.startswith("methods.")}
    assert {method.name for method in METHODS} <= names, "python tests/helpers/freeze.py --only KIND, with a new kind"
