"""`--cuda_graph`: replayed steps give what eager steps give, with a stand-in for graphs that runs on a CPU."""

import re

import pytest
import torch
from helpers.gpu_runs import METHODS, PRETRAIN, parsed, rows
from helpers.launch import checkpoint, same_tensors
from helpers.recorded import Recorded

import engine_pretrain
from methods.rcmae import RCMAE
from util.compute.ema import ema_update
from util.training.graph import TOLERANCE, compare

RUN = f"{PRETRAIN} --batch_size 256 --amp_dtype fp32"  # 2 epochs of 5 steps


def train(flags, folder, monkeypatch=None, recorder=None):
    """Pretrain; with a recorder, through `--cuda_graph`."""
    module, args = parsed("main_pretrain", f"{flags} {'--cuda_graph' * (recorder is not None)}", folder, "cpu")
    if recorder is not None:
        monkeypatch.setattr(engine_pretrain, "recorder_for", lambda device: recorder)
    module.main(args)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    train(RUN.replace("--epochs 2", "--epochs 1"), folder)
    return folder / "checkpoint-0.pth"


GRAPHED = {
    "mae": "--clip_grad 1 --warmup_epochs 1",
    "mae_k": "--mae_k 1",
    "ema_and_rc": "--ema_mae --wse 0 --ema_update step --rc_mae --log_grad_cosine 4",
    "dmae": METHODS["dmae"],
    "u_mae": "--u_mae --decoder cross --recompute cheap",
    "hpm": METHODS["hpm"],
    "automae": METHODS["automae"],
    "attmask": "--attmask hint",
    "fp16": "--amp_dtype fp16 --rc_mae --rc_mask different",
}


@pytest.mark.parametrize("name", GRAPHED)
def test_replayed_steps_are_those_of_an_eager_run(pretrained, tmp_path, monkeypatch, capsys, name):
    """Bit for bit, in all that a checkpoint holds: weights, moments, teachers, loss scale. Schedules go on: learning
    rates and momenta differ in each of the steps."""
    flags, recorder = f"{RUN} {GRAPHED[name].format(pretrained=pretrained)}", Recorded()
    train(flags, tmp_path / "eager")
    train(flags, tmp_path / "graph", monkeypatch, recorder)
    ours, theirs = (checkpoint(tmp_path / each, "checkpoint-1.pth") for each in ("graph", "eager"))
    for key in ("model", "methods", "optimizer", "scaler", "model_ema"):
        assert key not in theirs or same_nested(ours[key], theirs[key]), key
    assert rows(tmp_path / "graph") == rows(tmp_path / "eager")
    targets = 2 if name == "mae_k" else 1  # pixels, then features
    assert recorder.recordings == targets
    assert recorder.replays == 10 - 3 * targets
    notes = re.findall(r"--cuda_graph: a replayed step equals an eager one", capsys.readouterr().out)
    assert len(notes) == targets


def same_nested(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_nested(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same_nested, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_run_is_resumed_exactly(tmp_path, monkeypatch):
    """Inside an epoch: after it, some steps are eager again. Without the flag, the run goes on likewise."""
    flags = f"{RUN} --rc_mae --save_steps 4 --keep 0"
    train(flags, tmp_path / "whole", monkeypatch, Recorded())
    for name, recorder in (("graph", Recorded()), ("eager", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint-0.pth").write_bytes((tmp_path / "whole/checkpoint-0.pth").read_bytes())
        train(f"{flags} --resume auto", tmp_path / name, monkeypatch, recorder)
        ours, theirs = (checkpoint(tmp_path / each, "checkpoint-1.pth") for each in (name, "whole"))
        assert all(same_nested(ours[key], theirs[key]) for key in ("model", "optimizer", "methods"))


def test_learning_rates_in_checkpoints_are_numbers(tmp_path, monkeypatch):
    train(f"{RUN} --epochs 1", tmp_path, monkeypatch, Recorded())
    groups = checkpoint(tmp_path, "checkpoint-0.pth")["optimizer"]["param_groups"]
    assert all(isinstance(group["lr"], float) and group["capturable"] is False for group in groups)


class Partial(Recorded):
    """Replays the first half of the operations; the results of the others are never computed."""

    def record(self, function):
        result = super().record(function)
        kept = len(self.operations) // 2
        for *_, results in self.operations[kept:]:
            for tensor in results:
                tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        del self.operations[kept:]
        return result


def test_a_wrong_graph_is_noticed(tmp_path, monkeypatch, capsys):
    """The run says so, and goes on as an eager one."""
    recorder = Partial()
    train(RUN, tmp_path / "eager")
    train(RUN, tmp_path / "graph", monkeypatch, recorder)
    said = capsys.readouterr().out
    assert "a replayed step differs from an eager one (gradient norm and weights and optimizer;" in said
    assert recorder.replays == 1
    assert same_tensors(*(checkpoint(tmp_path / each, "checkpoint-1.pth")["model"] for each in ("graph", "eager")))


def forgetful(self, model, imgs, step, applied):
    ema_update(self.teacher.network, model, 1 - self.momentum, applied)


def test_a_number_of_the_recording_would_be_noticed(tmp_path, monkeypatch):
    """The stand-in is as forgetful as a graph: a method whose momentum is a number goes wrong."""
    numbers = RCMAE.scheduled_numbers
    monkeypatch.setattr(RCMAE, "scheduled_numbers", lambda self, step: numbers(self, step) and {})
    monkeypatch.setattr(RCMAE, "after_update", forgetful)
    train(f"{RUN} --rc_mae --rc_momentum 0.5", tmp_path / "eager")
    train(f"{RUN} --rc_mae --rc_momentum 0.5", tmp_path / "graph", monkeypatch, Recorded())
    ours, theirs = (checkpoint(tmp_path / each, "checkpoint-1.pth") for each in ("graph", "eager"))
    assert not same_tensors(ours["model"], theirs["model"])


def test_a_wait_inside_the_step_is_an_error(tmp_path, monkeypatch):
    update = RCMAE.after_update
    monkeypatch.setattr(RCMAE, "after_update", lambda self, *rest: float(rest[-1]) and update(self, *rest))
    with pytest.raises(RuntimeError, match="makes the host wait for the device inside a recorded step"):
        train(f"{RUN} --rc_mae", tmp_path, monkeypatch, Recorded())


OBSTACLES = {
    "": "cpu has no CUDA graphs",
    "--accum_iter 2": "--accum_iter",
    "--mask_ratio_end 0.5": "--mask_ratio_end",
    "--grad_checkpoint": "--grad_checkpoint",
    "--mlo_mae --mlo_labels same --mlo_batch_size 8": "--mlo_mae: its hooks keep images",
}


@pytest.mark.parametrize("flags", OBSTACLES)
def test_where_a_step_cannot_be_recorded_a_note_says_why(tmp_path, monkeypatch, capsys, flags):
    recorder = Recorded()
    if flags:
        monkeypatch.setattr(engine_pretrain, "recorder_for", lambda device: recorder)
    train(f"{RUN} --epochs 1 --max_steps 1 {flags} --cuda_graph", tmp_path)
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: --cuda_graph")]
    assert len(notes) == 1 and OBSTACLES[flags] in notes[0]
    assert recorder.recordings == 0


def test_differences_are_relative():
    before = {kind: {"a": torch.zeros(4)} for kind in ("weights", "frozen weights", "optimizer")}
    after = {**before, "weights": {"a": torch.ones(4)}}
    other = {**before, "weights": {"a": torch.ones(4) * 1.5}}
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    differences = compare(before, ({"loss": one}, two, after), ({"loss": two}, two, other))
    assert differences == {"loss": 1.0, "gradient norm": 0.0, "weights": 0.5, "frozen weights": 0.0, "optimizer": 0.0}
    assert differences.keys() == TOLERANCE.keys()
