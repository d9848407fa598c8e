"""The same runs on a real GPU. Skipped without one; scripts/gpu_check.sh runs them."""

import pytest
import torch
from helpers.gpu_runs import METHODS, PRETRAIN, SUPERVISED, parsed, rows, watch_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def run(main, flags, folder, device="cuda", waits=False):
    """Run a main. On a GPU, a step that makes the host wait raises, unless `waits`."""
    module, args = parsed(main, flags, folder, device)
    if device == "cpu" or waits:
        module.main(args)
        return
    with watch_steps(lambda on: torch.cuda.set_sync_debug_mode("error" if on else "default")):
        module.main(args)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run("main_pretrain", PRETRAIN.replace("--epochs 2", "--epochs 1"), folder, "cpu")
    return folder / "checkpoint-0.pth"


def check_close(ours: list[dict], theirs: list[dict], tolerance: float) -> None:
    """Compare the losses of the logs."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs):
        assert mine["train/loss"] == pytest.approx(other["train/loss"], rel=tolerance)


@pytest.mark.parametrize("name", METHODS)
def test_pretraining(pretrained, tmp_path, name):
    """Six steps from the same weights: TF32 rounds products to 1e-3, and dropped paths and resized crops are others."""
    flags = f"{PRETRAIN} {METHODS[name].format(pretrained=pretrained)}"
    run("main_pretrain", flags, tmp_path / "cuda")
    run("main_pretrain", flags, tmp_path / "cpu", "cpu")
    check_close(rows(tmp_path / "cuda"), rows(tmp_path / "cpu"), 0.02)


GRAPHED = ["mae", "bf16", "mae_k", "ema_and_rc", "dmae", "u_mae", "hpm", "automae", "attmask"]


@pytest.mark.parametrize("name", GRAPHED)
def test_cuda_graph(pretrained, tmp_path, capsys, name):
    """Replayed steps follow eager ones. Products have the same types; only the learning rate is rounded."""
    flags = f"{PRETRAIN} {METHODS[name].format(pretrained=pretrained)} --epochs 3"
    run("main_pretrain", f"{flags} --cuda_graph", tmp_path / "graph")
    said = capsys.readouterr().out
    assert "--cuda_graph: a replayed step equals an eager one" in said and "differs" not in said
    run("main_pretrain", flags, tmp_path / "eager")
    check_close(rows(tmp_path / "graph"), rows(tmp_path / "eager"), 1e-3)


@pytest.mark.parametrize("flags", ["--compile", "--recompute cheap", "--amp_dtype fp16", "--log_mfu"])
def test_cuda_graph_beside_other_flags(tmp_path, capsys, flags):
    run("main_pretrain", f"{PRETRAIN} --rc_mae {flags} --cuda_graph", tmp_path / "graph", waits=True)
    assert "--cuda_graph: a replayed step equals an eager one" in capsys.readouterr().out
    run("main_pretrain", f"{PRETRAIN} --rc_mae {flags}", tmp_path / "eager", waits=True)
    check_close(rows(tmp_path / "graph"), rows(tmp_path / "eager"), 1e-2)


@pytest.mark.parametrize("name", [name for name in SUPERVISED if name != "cached"])
def test_supervised_training(pretrained, tmp_path, name):
    main, flags = SUPERVISED[name]
    flags = flags.format(pretrained=pretrained)
    run(main, flags, tmp_path / "cuda", waits=main == "main_detect")
    run(main, flags, tmp_path / "cpu", "cpu")
    check_close(rows(tmp_path / "cuda"), rows(tmp_path / "cpu"), 0.05)


@pytest.mark.parametrize("graph", ["", "--cuda_graph"])
@pytest.mark.parametrize("name", ["mae", "ema_and_rc", "bf16"])
def test_deterministic_runs_are_resumed_bit_by_bit(tmp_path, name, graph):
    flags = f"{PRETRAIN} {METHODS[name]} {graph} --epochs 2 --save_freq 1 --keep 0 --deterministic"
    run("main_pretrain", flags, tmp_path / "whole", waits=True)
    run("main_pretrain", flags, tmp_path / "cut", waits=True)
    (tmp_path / "cut/checkpoint-1.pth").unlink()
    run("main_pretrain", f"{flags} --resume auto", tmp_path / "cut", waits=True)
    ours, theirs = (torch.load(tmp_path / each / "checkpoint-1.pth", "cpu")["model"] for each in ("cut", "whole"))
    assert all(torch.equal(ours[tensor], theirs[tensor]) for tensor in theirs)
