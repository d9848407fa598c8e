"""Every command with `--device` on a pretended GPU (helpers/card.py): no tensor is on the wrong device, the host waits
for the device in no training step, and the numbers are those of the CPU.

The host must not wait inside a step: on small models that would cost a GPU a tenth of its time.
"""

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from helpers.card import CUDA, Card, Held
from helpers.gpu_runs import (
    DATA,
    DENSE,
    FAST,
    FINETUNE,
    METHODS,
    PRETRAIN,
    SCENES,
    SUPERVISED,
    parsed,
    rows,
    watch_steps,
)
from helpers.parsers import parser_of
from helpers.recorded import Recorded

import engine_finetune
import engine_pretrain
from methods.pretrainer import Pretrainer
from util.training.run import Run

ROOT = Path(__file__).resolve().parent.parent.parent


def run(main: str, flags: str, folder: Path, device: str = "cuda") -> Card:
    """Run a main or tool, on a pretended GPU with `cuda`."""
    module, args = parsed(main, flags, folder, device)
    card = Card()
    if device == "cpu":
        module.main(args)
        return card
    with card, watch_steps(card.watch):
        module.main(args)
    return card


def check_same(ours: list[dict], theirs: list[dict]) -> None:
    """The kernels are the same; sums of several tensors may be taken in another order."""
    assert [row.keys() for row in ours] == [row.keys() for row in theirs]
    for mine, other in zip(ours, theirs):
        different = {name: (mine[name], other[name]) for name in mine if mine[name] != pytest.approx(other[name], 1e-5)}
        assert not different


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    run("main_pretrain", PRETRAIN.replace("--epochs 2", "--epochs 1"), folder, "cpu")
    return folder / "checkpoint-0.pth"


# Under autocast, copies of weights in bf16 are not shared as on a CPU. Cached images are resized by matrices on a GPU,
# and one after the other on a CPU, which rounds differently. Boxes are chosen by value: rounding chooses others.
OTHER_NUMBERS = {"on_device_mae", "on_device_three", "on_device_crop", "bf16", "detect", "detect_fpn"}


@pytest.mark.parametrize("name", METHODS)
def test_pretraining(pretrained, tmp_path, name):
    flags = f"{PRETRAIN} {METHODS[name].format(pretrained=pretrained)}"
    assert run("main_pretrain", flags, tmp_path / "cuda").waits == []
    if name not in OTHER_NUMBERS:
        run("main_pretrain", flags, tmp_path / "cpu", "cpu")
        check_same(rows(tmp_path / "cuda"), rows(tmp_path / "cpu"))


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_training(pretrained, tmp_path, name):
    """Detection waits inside torchvision, whose numbers of boxes depend on values."""
    main, flags = SUPERVISED[name]
    flags = flags.format(pretrained=pretrained)
    waits = run(main, flags, tmp_path / "cuda").waits
    outside = [place for place in waits if not (main == "main_detect" and place.startswith("models_detect.py"))]
    assert outside == []
    if name not in {"cached"} | OTHER_NUMBERS:  # cached features: probe.json
        run(main, flags, tmp_path / "cpu", "cpu")
        check_same(rows(tmp_path / "cuda"), rows(tmp_path / "cpu"))


@pytest.mark.parametrize("name", ["mae", "ema_and_rc"])
def test_replayed_steps(tmp_path, monkeypatch, name):
    """`--cuda_graph` with a stand-in for graphs: nothing of the step is on the host or waits for the device, nor does
    what is around a replay. The learning rate is rounded to float32."""
    recorder, flags = Recorded(), f"{PRETRAIN} {METHODS[name]}"
    monkeypatch.setattr(engine_pretrain, "recorder_for", lambda device: recorder)
    assert run("main_pretrain", f"{flags} --cuda_graph", tmp_path / "cuda").waits == []
    assert recorder.recordings == 1 and recorder.replays == 3
    run("main_pretrain", flags, tmp_path / "cpu", "cpu")
    check_same(rows(tmp_path / "cuda"), rows(tmp_path / "cpu"))


TOOLS = {
    "knn": "--out {out}.json",
    "fewshot": "--shots 1  --out {out}.json",
    "tsne": "--images 30 --perplexity 5 --out {out}.png",
    "attention": "--count 2 --out {out}.png",
    "feature_viz": "--steps 2 --out {out}.png",
    "predict": "--out {out}.csv",
    "robustness": "--corrupt --corruptions contrast --images 20 --out {out}.json",
    "dense_probe": "--k 1 --penalty 1 --out {out}.json",
    "visualize_dense": "--count 2 --out {out}.png",
}
"""Tools with `--device`, and their flags."""


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, pretrained):
    folder = tmp_path_factory.mktemp("finetuned")
    run("main_finetune", f"{FINETUNE} --finetune {pretrained}", folder, "cpu")
    run("main_segment", f"{DENSE} --head_norm layer", folder / "segmenter", "cpu")
    return folder / "checkpoint-0.pth"


@pytest.mark.parametrize("name", TOOLS)
def test_tools(pretrained, finetuned, tmp_path, name):
    checkpoint = {
        "predict": finetuned,
        "robustness": finetuned,
        "visualize_dense": finetuned.parent / "segmenter/checkpoint-0.pth",
    }.get(name, pretrained)
    data = SCENES if "dense" in name else DATA
    data = "" if name == "feature_viz" else f"{data} --num_workers 0"
    flags = f"{checkpoint} {data} {TOOLS[name].format(out=tmp_path / 'out')}"
    run(name, flags, tmp_path)
    assert any(tmp_path.glob("out*"))


def test_no_command_is_left_out():
    scripts = [*ROOT.glob("main_*.py"), *ROOT.glob("tools/*.py")]
    scripts = [path for path in scripts if '"--device"' in path.read_text() or "parser" in path.read_text()]
    with_device = set()
    for path in scripts:
        try:
            parser = parser_of(str(path.relative_to(ROOT)))
        except AssertionError:
            continue
        if "--device" in parser._option_string_actions:
            with_device.add(path.stem)
    mains = {"main_pretrain", *(main for main, _ in SUPERVISED.values())}
    assert with_device == mains | TOOLS.keys() | {"quickstart", "main_lit"}  # starts mains; tests/mains/test_lit.py


CONTINUED = {
    "main_pretrain": f"{SCENES} --model mae_vit_micro_patch4 --batch_size 8 --warmup_epochs 0 --vis_freq 0 --rc_mae",
    "main_segment": f"{DENSE} --head_norm layer",
}


@pytest.mark.parametrize("main", CONTINUED)
def test_a_run_continues(tmp_path, main):
    """Loss scale, random numbers and optimizer are restored on the device."""
    flags = f"{CONTINUED[main]} {FAST} --amp_dtype fp16 --epochs 2 --save_freq 1 --keep 0"
    run(main, flags, tmp_path / "whole")
    (tmp_path / "cut").mkdir()
    start = shutil.copy(tmp_path / "whole/checkpoint-0.pth", tmp_path / "cut")
    run(main, f"{flags} --resume {start}", tmp_path / "cut")
    ours, theirs = (torch.load(tmp_path / name / "checkpoint-1.pth")["model"] for name in ("cut", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# The pretended GPU itself ---------------------------------------------------------------------------------------------


def test_a_planted_wait_is_found(tmp_path, monkeypatch):
    """With its file and line, once a step after the first."""
    original = Run.backward
    monkeypatch.setattr(engine_finetune.Run, "backward", lambda *args: (sum(args[1].values()).item(), original(*args)))
    waits = run("main_finetune", FINETUNE, tmp_path).waits
    assert len(waits) == 2 and all(wait.startswith("engine_finetune.py:") and "item" in wait for wait in waits)


def test_a_planted_tensor_on_the_host_is_found(tmp_path, monkeypatch):
    original = Pretrainer.forward
    monkeypatch.setattr(Pretrainer, "forward", lambda self, imgs, **rest: original(self, imgs + torch.ones(16), **rest))
    with pytest.raises(RuntimeError, match="same device, but got cuda:0 and cpu"):
        run("main_pretrain", PRETRAIN, tmp_path)


WAITING = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool(x.sum() > 0),
    "list": lambda x: x.tolist(),
    "array": lambda x: x.cpu().numpy(),
    "copy": lambda x: x.to("cpu"),
    "by mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "index of the host": lambda x: x[torch.tensor([0])],
    "to the device": lambda x: torch.ones(3).to(CUDA),
    "numbers": lambda x: torch.tensor([1.0], device=CUDA),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "into the host": lambda x: torch.empty(4).copy_(x),
}
FREE = {
    "sum": lambda x: x.sum(),
    "zeros": lambda x: torch.zeros(3, device=CUDA) + x[:3],
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "without waiting": lambda x: torch.ones(4).to(CUDA, non_blocking=True) + x,
    "gather": lambda x: x[torch.zeros(2, dtype=torch.long, device=CUDA)],
    "where": lambda x: torch.where(x > 0, x, 0.0),
}


@pytest.mark.parametrize("name", [*WAITING, *FREE])
def test_where_the_host_waits(name):
    with Card() as card:
        x = torch.arange(4.0, device=CUDA)
        card.watching = True
        (WAITING | FREE)[name](x)
    assert len(card.waits) == (name in WAITING), card.waits


def test_gradients_and_updates_are_those_of_the_cpu():
    """Also of a tensor that is moved inside the graph, of views, and of in-place changes."""
    grads = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        with Card():
            model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2)).to(device)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            start = torch.randn(6, 4, requires_grad=True)
            x = start.to(device)[1:].clone()
            x[0] += 1
            model(x).square().mean().backward()
            optimizer.step()
            values = [start.grad, *itertools.chain(*((p.grad, p.detach()) for p in model.parameters()))]
            grads.append([value.host if isinstance(value, Held) else value for value in values])
            assert all(isinstance(p, Held) == (device == "cuda") for p in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(*grads))
