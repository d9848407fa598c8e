"""The interface of methods: a test method works by its hooks alone, and slots decide which methods combine."""

import argparse
from typing import ClassVar

import pytest
import torch
from helpers.launch import checkpoint, log_rows, scalars

import main_pretrain
import methods
from methods import Method, Option, Pretrainer, add_method_arguments, enabled_methods
from models_encoder import gather_tokens
from models_mae import build_model
from util.errors import UserError


class Smooth(Method):
    """Penalises the size of the latent tokens, replaces the target, and keeps a moving average."""

    name, title, slot = "smooth", "Smooth (nobody 2026)", "target"
    switch = Option("smooth", 0.0, "weight of the penalty")
    calls: ClassVar[list] = []

    def __init__(self, args, model):
        super().__init__()
        self.weight = args.smooth
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("average", torch.zeros(()))

    @staticmethod
    def check(args):
        if args.smooth < 0:
            raise UserError("--smooth must not be negative")

    def blocks(self):
        return (1,)

    def before_epoch(self, model, epoch):
        self.calls.append(("epoch", epoch))

    def patch_loss(self, model, imgs, out):
        return out.mean_over_predicted(((out.pred - 1) ** 2).mean(-1))

    def terms(self, model, imgs, out):
        return {"penalty": self.weight * self.scale * out.blocks[1].square().mean()}

    def after_update(self, model, imgs, step, applied):
        self.average.add_(applied)
        self.calls.append(("step", step))


class Rival(Smooth):
    name, title = "rival", "Rival"
    switch = Option("rival", False, "turn it on")

    @staticmethod
    def check(args):
        pass


def parse(flags):
    parser = argparse.ArgumentParser()
    add_method_arguments(parser, [Smooth, Rival])
    return parser.parse_args(flags)


def test_slots():
    assert enabled_methods(parse([]), [Smooth, Rival]) == []
    assert enabled_methods(parse(["--rival"]), [Smooth, Rival]) == [Rival]
    with pytest.raises(UserError, match="--smooth and --rival both decide the target"):
        enabled_methods(parse(["--rival", "--smooth", "1"]), [Smooth, Rival])
    with pytest.raises(UserError, match="must not be negative"):
        enabled_methods(parse(["--smooth", "-1"]), [Smooth, Rival])


def test_exclusion_without_a_slot(monkeypatch):
    monkeypatch.setattr(Smooth, "slot", None)
    monkeypatch.setattr(Rival, "excludes", ("smooth",))
    with pytest.raises(UserError, match="--smooth and --rival cannot be combined"):
        enabled_methods(parse(["--rival", "--smooth", "1"]), [Smooth, Rival])


class Alone(Smooth):
    name, title, slot, exclusive = "alone", "Alone", None, True
    switch = Option("alone", False, "turn it on")
    check = Method.check


@pytest.mark.parametrize("order", [[Smooth, Rival, Alone], [Alone, Rival, Smooth]])
def test_an_exclusive_method_combines_with_no_other(order, monkeypatch):
    """It says so itself; the others, added later, need not know of it."""
    parser = argparse.ArgumentParser()
    add_method_arguments(parser, order)
    monkeypatch.setattr(Rival, "slot", None)
    assert enabled_methods(parser.parse_args(["--alone"]), order) == [Alone]
    with pytest.raises(
        UserError, match="--alone runs alone and cannot be combined with --rival: give one or the other"
    ):
        enabled_methods(parser.parse_args(["--alone", "--rival"]), order)
    with pytest.raises(UserError, match=r"--alone runs alone and cannot be combined with .* and .*: give one"):
        enabled_methods(parser.parse_args(["--alone", "--rival", "--smooth", "1"]), order)


def test_partial_decoding_names_the_method_that_decides_the_mask(monkeypatch):
    """A mask that nothing learned is not called learned."""
    monkeypatch.setattr(Rival, "slot", "mask")
    monkeypatch.setattr(main_pretrain, "METHODS", [Rival])
    parse = main_pretrain.get_args_parser().parse_args
    flags = ["--data_path", "x", "--decoder", "cross"]
    with pytest.raises(UserError, match="those that --rival, which decides the mask, scores lowest: give 1") as error:
        main_pretrain.check(parse([*flags, "--rival", "--decoder_fraction", "0.5"]))
    assert "learned" not in str(error.value)
    args = parse([*flags, "--rival"])
    main_pretrain.settle(args)
    assert args.decoder_fraction == 1


def test_pretrainer_without_methods_is_a_bare_mae():
    model = build_model("mae_vit_micro_patch4", img_size=16)
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    losses, out = Pretrainer(model).forward_with_output(imgs, mask_ratio=0.5, noise=noise)
    expected = model(imgs, 0.5, noise)
    assert torch.equal(out.mask, expected[2])
    assert list(losses) == ["pixels"]
    assert torch.allclose(losses["pixels"], expected[0], rtol=1e-6)  # summed in another order
    removed = model.choose_visible(noise, 0.5)[2].argsort(dim=1)[:, 8:]
    assert torch.allclose(out.pred, gather_tokens(expected[1], removed), atol=1e-6)


def test_terms_of_the_loss():
    model = build_model("mae_vit_micro_patch4", img_size=16)
    pretrainer = Pretrainer(model, [Smooth(parse(["--smooth", "0.5"]), model)])
    imgs, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    losses = pretrainer(imgs, 0.5, noise)
    out = model.forward_pretrain(imgs, 0.5, noise, (1,))
    reconstruction = ((out.pred - 1) ** 2).mean(-1).mean()
    penalty = 0.5 * out.blocks[1].square().mean()
    assert losses == {"pixels": reconstruction, "penalty": penalty}
    assert all(loss.requires_grad for loss in losses.values())


def test_scores_decide_the_mask():
    """The patches with the highest scores are removed."""
    model = build_model("mae_vit_micro_patch4", img_size=16)
    pretrainer = Pretrainer(model, [Smooth(parse([]), model)])
    scores = torch.rand(2, 16)
    given = torch.rand(2, 16)
    pretrainer.methods["smooth"].scores = lambda model, imgs, noise: scores if noise is given else None
    _, out = pretrainer.forward_with_output(torch.randn(2, 3, 16, 16), 0.75, noise=given)
    assert torch.equal(out.mask.bool(), scores >= scores.sort(dim=1).values[:, 4:5])


def test_a_method_through_the_main(image_folder, tmp_path, monkeypatch):
    """Flags, log, optimizer, checkpoint and resumption work without changes to main or engine."""
    monkeypatch.setattr(methods, "METHODS", [Smooth])
    monkeypatch.setattr(main_pretrain, "METHODS", [Smooth])
    Smooth.calls.clear()
    flags = f"--data_path {image_folder} --model mae_vit_micro_patch4 --input_size 16 --batch_size 8 --accum_iter 4 "
    flags += "--epochs 2 --warmup_epochs 1 --num_workers 0 --vis_freq 0 --smooth 0.1 --device cpu --lr 1e-3 "
    flags += f"--save_freq 1 --print_freq 1 --output_dir {tmp_path}"
    parser = main_pretrain.get_args_parser()
    assert "Smooth (nobody 2026)" in parser.format_help()
    main_pretrain.main(parser.parse_args(flags.split()))
    assert Smooth.calls == [
        ("epoch", 0),
        *(("step", i) for i in range(3)),
        ("epoch", 1),
        *(("step", i) for i in range(3, 6)),
    ]
    state = checkpoint(tmp_path, "checkpoint-1.pth")
    assert state["methods"]["smooth.average"] == 6 and state["methods"]["smooth.scale"] != 1
    assert not any("smooth" in key for key in state["model"])
    assert log_rows(tmp_path)[1]["train/penalty"] > 0 and len(scalars(tmp_path, "train/penalty")) == 6
    (tmp_path / "checkpoint-1.pth").unlink()
    main_pretrain.main(parser.parse_args([*flags.split(), "--resume", "auto"]))
    again = checkpoint(tmp_path, "checkpoint-1.pth")
    assert all(torch.equal(again["methods"][key], value) for key, value in state["methods"].items())


@pytest.mark.parametrize("name", ["pixels", "loss"])
def test_names_of_terms_are_unique(name):
    """A term under the name of another one, or under one of the log's own, would replace it without a word."""
    model = build_model("mae_vit_micro_patch4", img_size=16)
    pretrainer = Pretrainer(model, [Smooth(parse(["--smooth", "0.5"]), model)])
    pretrainer.methods["smooth"].terms = lambda model, imgs, out: {name: out.pred.mean()}
    with pytest.raises(ValueError, match="names of its own"):
        pretrainer(torch.randn(2, 3, 16, 16))


@pytest.mark.parametrize("hook", ["metrics", "diagnostics"])
def test_names_of_metrics_and_diagnostics_are_unique(hook):
    model = build_model("mae_vit_micro_patch4", img_size=16)
    pretrainer = Pretrainer(model, [Smooth(parse(["--smooth", "1"]), model), Rival(parse(["--smooth", "1"]), model)])
    for method in pretrainer.methods.values():
        method.diagnostics_every = 2
        setattr(method, hook, lambda *_: {"same": 1.0})
    with pytest.raises(ValueError, match="not same, same"):
        pretrainer.metrics() if hook == "metrics" else pretrainer.diagnostics(torch.zeros(1), 4)
    assert pretrainer.diagnostics(torch.zeros(1), 5) == {}
