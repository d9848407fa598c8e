"""docs/adding_a_method.md: its code is that of the files that it names, and its short examples train."""

import re

import torch
from helpers.pages import ROOT
from helpers.teachers import made, stepped

import main_pretrain
import methods
from methods import Method

PAGE = (ROOT / "docs/adding_a_method.md").read_text(encoding="utf-8")
# A block of Python, and the file that the comment above it names.
BLOCK = re.compile(r"(?:^<!-- from (\S+) -->\n)?^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(PAGE)


def without_empty_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def test_blocks_are_those_of_the_files():
    """Verbatim, and each comment belongs to a block."""
    files = [file for file, _ in BLOCKS if file]
    assert len(files) == PAGE.count("<!-- from ") > 5
    for file, body in BLOCKS:
        assert not file or body in (ROOT / file).read_text(encoding="utf-8"), f"{file} has other lines than\n{body}"


def test_the_whole_method_is_shown():
    shown = [line for file, body in BLOCKS if file == "methods/umae.py" for line in without_empty_lines(body)]
    assert shown == without_empty_lines((ROOT / "methods/umae.py").read_text(encoding="utf-8"))


def test_the_examples_of_hooks_train(monkeypatch):
    """All three at once: patches of high contrast are removed, the error is absolute, the average follows."""
    (code,) = (body for file, body in BLOCKS if not file)
    exec(code, namespace := {"__name__": "example"})
    examples = [one for one in namespace.values() if isinstance(one, type) and one.__module__ == "example"]
    assert len(examples) == 3 and all(issubclass(example, Method) for example in examples)
    monkeypatch.setattr(main_pretrain, "METHODS", [*methods.METHODS, *examples])

    pretrainer, _ = made("--contrast 1000 --absolute_error --average 0.5")
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    losses, out = pretrainer.forward_with_output(imgs, 0.75, noise)
    contrast = out.patches.std(dim=-1)
    visible = contrast.gather(1, out.ids_keep)
    assert visible.max(dim=1).values.le(contrast.gather(1, out.ids_removed).min(dim=1).values + 1e-3).all()
    removed = out.patches.gather(1, out.ids_predicted[..., None].expand_as(out.pred))
    torch.testing.assert_close(losses, {"pixels": (out.pred - removed).abs().mean()})

    average = pretrainer.methods["average"].teacher.network.patch_embed.proj.weight
    before = average.clone()
    stepped(pretrainer, 1)
    torch.testing.assert_close(average, (before + pretrainer.model.patch_embed.proj.weight) / 2)
