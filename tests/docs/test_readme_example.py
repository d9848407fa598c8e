"""The example method of the README works: its flag enables it, and its term has a gradient."""

import torch
from helpers.pages import ROOT, blocks

import main_pretrain
import methods
from methods import Method, enabled_methods
from models_mae import build_model


def test_the_readme_example_trains(monkeypatch):
    (code,) = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    exec(code, namespace := {"__name__": "example"})
    (example,) = (one for one in namespace.values() if isinstance(one, type) and one.__module__ == "example")
    assert issubclass(example, Method)
    monkeypatch.setattr(main_pretrain, "METHODS", [*methods.METHODS, example])
    args = main_pretrain.get_args_parser().parse_args(["--short_tokens", "0.5"])
    assert enabled_methods(args, main_pretrain.METHODS) == [example]
    model = build_model("mae_vit_micro_patch4", img_size=16)
    imgs = torch.rand(2, 3, 16, 16)
    out = model.forward_pretrain(imgs, 0.75)
    (loss,) = example(args, model).terms(model, imgs, out).values()
    torch.testing.assert_close(loss, 0.5 * (out.latent**2).mean())
    loss.backward()
    assert model.cls_token.grad.abs().sum() > 0
