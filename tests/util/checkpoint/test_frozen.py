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
from methods import METHODS, Method, Option
from util.checkpoint import sharded
from util.checkpoint.resume import find_resume
from util.errors import UserError
from util.report.names import renamed
from util.weights.file import read_file
from util.weights.load import load_into, read_weights

MAINS = {"main_pretrain": main_pretrain, "main_finetune": main_finetune, "main_linprobe": main_linprobe}
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
    then = renamed(thawed.expected["log"][-1])
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
    metrics, files of a folder, and what changed on a resume, are not part of the format."""
    if re.search(r"(^|\.)(args|data\.meter|source\.flags|earlier|checksums)$", path) or not isinstance(
        value, (dict, list)
    ):
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


def flags_of(method: type[Method]) -> str:
    """Return flags that turn `method` on: those of a run in `freeze.KINDS`, else its switch alone."""
    parse = main_pretrain.get_args_parser().parse_args
    pretrainings = [flags for main, flags, _ in freeze.KINDS.values() if main == "main_pretrain"]
    known = next((flags for flags in pretrainings if method.enabled(parse(flags.split()))), None)
    value = method.switch.choices[1] if method.switch.choices else "1"  # the first choice is the default
    return known or f"{freeze.ALL} {method.flag}" + ("" if isinstance(method.switch.default, bool) else f" {value}")


def has_state(method: type[Method]) -> bool:
    """Return whether checkpoints store something of `method`, or whether it takes more than its switch to tell."""
    if method.rank_state is not Method.rank_state or method.exported is not Method.exported:
        return True
    try:
        args = main_pretrain.get_args_parser().parse_args(flags_of(method).split())
        main_pretrain.settle(args)
        return bool(method(args, main_pretrain.build(args)).state_dict())
    except (UserError, SystemExit):  # it needs other flags
        return True


def check_frozen(known: list[type[Method]], written: set[str]) -> None:
    """Fail if the state of a method is in none of the frozen checkpoints, whose key paths are `written`."""
    frozen = {key.split(".")[1] for key in written if key.startswith("methods.")}
    for method in known:
        assert method.name in frozen or not has_state(method), (
            f"no frozen checkpoint holds the state of {method.flag}: add a run with it to KINDS in "
            f"tests/helpers/freeze.py, say {method.name!r}, and commit the two files that "
            f"`python tests/helpers/freeze.py --only {method.name}` writes"
        )


def test_every_method_is_frozen(written):
    """A method without state adds nothing to a checkpoint, and needs no frozen one."""
    check_frozen(METHODS, written)


class Stateless(Method):
    name, title, slot = "stateless", "Stateless", "mask"
    switch = Option("stateless", 0.0, "turn it on")

    def __init__(self, args, model):
        super().__init__()

    def scores(self, model, imgs, noise):
        return noise.square()


class Stateful(Stateless):
    name, switch = "stateful", Option("stateful", False, "turn it on")

    def __init__(self, args, model):
        super().__init__(args, model)
        self.register_buffer("count", torch.zeros(()))


def test_a_new_method_is_frozen_if_it_has_state(written, monkeypatch):
    """The message says what to do: a frozen checkpoint with its key passes."""
    known = [*METHODS, Stateless, Stateful]
    monkeypatch.setattr(main_pretrain, "METHODS", known)
    check_frozen(known[:-1], written)
    with pytest.raises(AssertionError, match=r"holds the state of --stateful: add a run with it to KINDS"):
        check_frozen(known, written)
    check_frozen(known, written | {"methods.stateful.count"})
