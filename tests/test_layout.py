"""The layout of the project: permitted imports between rooms, the names that forks import, independent tests."""

import ast
from pathlib import Path

import pytest
from helpers import layout

ROOT = Path(__file__).resolve().parent.parent
PLANTED = {
    "upward": ("util/errors", "from util.report.ledger import read", "util/errors.py:1 imports util.report.ledger"),
    "method in a model": ("models_mae", "import methods", "models_mae.py:1 imports methods"),
    "engine in a tool": ("tools/knn", "from engine_finetune import evaluate", "a tool imports engine_finetune"),
    "tool in a tool": ("tools/knn", "from tools import fewshot", "a tool imports the tool tools.fewshot"),
    "late": (
        "methods/rcmae",
        "def f():\n    import util.pos_embed",
        "methods/rcmae.py:2 imports util.pos_embed inside",
    ),
    "no room": ("util/odds_and_ends", "x = 1", "util.odds_and_ends is in no room"),
}


def test_no_import_breaks_the_layout():
    assert layout.faults(layout.modules(ROOT)) == []


@pytest.mark.parametrize("fault", PLANTED)
def test_planted_faults_are_reported(fault):
    file, line, expected = PLANTED[fault]
    sources = layout.modules(ROOT)
    module = file.replace("/", ".")
    sources[module] = f"{line}\n{sources.get(module, '')}".replace("from __future__", "# from __future__")
    assert any(expected in sentence for sentence in layout.faults(sources))


def test_circles_are_reported():
    """A circle through a third module inside one room, where no import goes upwards."""
    sources = layout.modules(ROOT)
    sources["util.data.images"] = f"import util.data.labels\n{sources['util.data.images']}"
    assert any("util.data.images" in sentence and "a circle" in sentence for sentence in layout.faults(sources))


def test_tests_do_not_import_tests():
    """Code that tests share is in tests/helpers; no test inserts tools/ into sys.path."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.split(".")[-1].startswith("test_") for name in names), f"{path}:{node.lineno}"
        assert path == Path(__file__) or 'ROOT / "tools"))' not in text, f"{path} inserts tools/ into sys.path"


def test_names_that_forks_import():
    """The names that forks of the official repository take from `util`, imported as they do."""
    import util.lr_sched as lr_sched
    import util.misc as misc
    from util.crop import RandomResizedCrop
    from util.datasets import build_dataset, build_transform
    from util.lars import LARS
    from util.lr_decay import param_groups_lrd
    from util.misc import NativeScalerWithGradNormCount as NativeScaler
    from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed

    names = "MetricLogger SmoothedValue init_distributed_mode save_model load_model save_on_master is_main_process"
    names += (
        " get_rank get_world_size is_dist_avail_and_initialized setup_for_distributed all_reduce_mean get_grad_norm_"
    )
    assert all(callable(getattr(misc, name)) for name in names.split())
    assert callable(lr_sched.adjust_learning_rate) and NativeScaler is misc.NativeScalerWithGradNormCount
    assert all(map(callable, (RandomResizedCrop, build_dataset, build_transform, LARS, param_groups_lrd)))
    assert get_2d_sincos_pos_embed(8, 2, cls_token=True).shape == (5, 8) and callable(interpolate_pos_embed)
