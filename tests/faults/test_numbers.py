"""NaN and Inf stop every rank at the same step, whatever their source; overflows and loss spikes are reported."""

import json
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.inject import CLASSIFIER, FLAGS, after_step, finetune, poison, pretrain
from helpers.launch import checkpoint, ranks

from util.checkpoint.files import list_checkpoints
from util.compute.precision import NativeScalerWithGradNormCount
from util.errors import RunFailed, UserError
from util.training.numerics import MIN_SCALE, OverflowDetector, SpikeDetector
from util.training.run import Run


def last_parameter(run):
    return list(run.saved_model.parameters())[-1]


def poison_last(run, value=math.nan):
    poison(last_parameter(run), value)


FAULTS = {
    "NaN in a weight": (
        "",
        lambda run: poison(last_parameter(run)),
        "train/pixels became .* model.decoder_pred.bias",
    ),
    "Inf in a weight": (
        "",
        lambda run: poison(last_parameter(run), math.inf),
        "train/pixels became .* non-finite, too",
    ),
    "NaN in a gradient": ("", lambda run: last_parameter(run).register_hook(lambda g: g * math.nan), "gradient became"),
    "Inf in a gradient": ("", lambda run: last_parameter(run).register_hook(lambda g: g / 0), "gradient became"),
    "NaN in an average": (
        "--rc_mae",
        lambda run: [poison(p) for p in run.exported()["model_ema"].parameters()],
        "consistency became",
    ),
    "NaN in a target encoder": (
        "--mae_k 1",
        lambda run: [poison(p) for p in run.methods["mae_k"].parameters()],
        "became",
    ),
    "NaN in a teacher": (
        "--dmae_teacher {teacher}",
        lambda run: [poison(p) for p in run.methods["dmae"].external_networks()[0].parameters()],
        "became",
    ),
    "NaN in the masking network": (
        "--mlo_mae --mlo_labels same --mlo_batch_size 8",
        lambda run: [poison(p) for p in run.methods["mlo_mae"].net.parameters()],
        "became",
    ),
}


@pytest.fixture(scope="module")
def teacher_file(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("teacher")
    flags = FLAGS.replace("--epochs 2", "--epochs 1").replace("--save_steps 1", "--save_steps 0")
    pretrain(f"{flags} --data_path {image_folder} --output_dir {folder}")
    return folder / "checkpoint-0.pth"


@pytest.mark.parametrize("fault", FAULTS)
def test_not_a_number(image_folder, tmp_path, monkeypatch, teacher_file, fault):
    """The fault follows a step of the second epoch: the next step is named, and the earlier checkpoint is unchanged."""
    flags, inject, message = FAULTS[fault]
    flags = f"{FLAGS} {flags.format(teacher=teacher_file)} --data_path {image_folder} --output_dir {tmp_path}"
    before = {}

    def spoil(run):
        newest = list_checkpoints(tmp_path)[0]
        before.update(newest=newest, content=newest.read_bytes())
        inject(run)

    after_step(monkeypatch, 7, spoil)
    with pytest.raises(RunFailed, match=f"{message}.*") as failure:
        pretrain(flags)
    assert "at step 7 (epoch 1)" in str(failure.value) or "after step 8" in str(failure.value)
    assert list_checkpoints(tmp_path)[0] == before["newest"]
    assert before["newest"].read_bytes() == before["content"]


def test_a_weight_that_no_loss_reads(image_folder, tmp_path, monkeypatch):
    """The next checkpoint would contain it and replace a good one, so it is not written."""

    def spoil(run):
        run.saved_model.register_buffer("unused", torch.full((3,), math.inf))

    after_step(monkeypatch, 3, spoil)
    with pytest.raises(RunFailed, match=r"weight model.unused is non-finite after step 4: not saved"):
        pretrain(f"{FLAGS} --data_path {image_folder} --output_dir {tmp_path}")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0-3.pth"]


def test_a_moment_of_the_optimizer(image_folder, tmp_path, monkeypatch):
    """An infinite second moment would freeze its weight unnoticed."""

    def spoil(run):
        poison(run.optimizer.state[last_parameter(run)]["exp_avg_sq"], math.inf)

    after_step(monkeypatch, 3, spoil)
    with pytest.raises(RunFailed, match=r"optimizer state model.decoder_pred.bias.exp_avg_sq is non-finite"):
        pretrain(f"{FLAGS} --data_path {image_folder} --output_dir {tmp_path}")
    assert checkpoint(tmp_path, "checkpoint-0-3.pth")["step"] == 3


def test_fine_tuning(image_folder, tmp_path, monkeypatch):
    after_step(monkeypatch, 7, lambda run: poison(run.saved_model.head.weight))
    with pytest.raises(RunFailed, match=r"train/classification became non-finite at step 7 .*weight head.weight"):
        finetune(f"{CLASSIFIER} --data_path {image_folder} --output_dir {tmp_path} --print_freq 1")
    assert checkpoint(tmp_path, "checkpoint-0.pth")["epoch"] == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("weight", "train/pixels became non-finite at step 3 (epoch 0); weight model.decoder_pred.bias on rank 1"),
        ("gradient", "gradient became non-finite at step 3"),
        ("teacher", "non-finite at step 3"),
    ],
)
def test_one_rank_stops_both(image_folder, tmp_path, teacher_file, fault, message):
    flags = FLAGS.replace("--batch_size 16", "--batch_size 8").replace("--print_freq 1", "--print_freq 2")
    if fault == "teacher":
        flags += f" --dmae_teacher {teacher_file}"
    output = ranks("helpers.fault_script", f"{fault} {flags} --data_path {image_folder} --output_dir {tmp_path}", 2)
    lines = {line for line in output.splitlines() if "became" in line and line.startswith("rank")}
    assert {line.split(":")[0] for line in lines} == {"rank 0", "rank 1"}
    assert all(message in line for line in lines)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-0-3.pth"]
    assert checkpoint(tmp_path, "checkpoint-0-3.pth")["step"] == 3


# Overflow -------------------------------------------------------------------------------------------------------------


class Overflowing:
    """A weight and a scaler on the CPU whose scale starts high enough for more than 50 halvings."""

    def __init__(self, patch):
        patch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**60))
        self.scaler = NativeScalerWithGradNormCount(enabled=True, device="cpu")
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.optimizer = torch.optim.AdamW([self.weight], fused=True)

    def step(self, factor: float) -> None:
        loss = (self.weight * factor).sum()
        self.scaler(loss, self.optimizer, parameters=[self.weight])
        self.optimizer.zero_grad(set_to_none=True)


def test_fifty_overflows_in_a_row_are_reported_once(monkeypatch, capsys):
    run = Overflowing(monkeypatch)
    watch, before = OverflowDetector(run.scaler), run.weight.detach().clone()
    for step in range(1, 61):
        run.step(math.inf)
        if step % 7 == 0:
            watch.read(step)
        output = capsys.readouterr().out
        # The first reading of the metrics after 50 overflows.
        assert ("56 steps in a row (until step 56)" in output) == (step == 56)
    assert torch.equal(run.weight, before)
    run.step(1.0)
    run.step(math.inf)
    watch.read(62)
    assert run.scaler.overflows() == (1, 1) and capsys.readouterr().out == ""


def test_a_row_that_ended_before_the_reading_is_reported(monkeypatch, capsys):
    run = Overflowing(monkeypatch)
    for factor in [math.inf] * 50 + [1.0]:
        run.step(factor)
    OverflowDetector(run.scaler).read(51)
    assert "50 steps in a row" in capsys.readouterr().out


def test_no_scale_is_small_enough():
    scaler = SimpleNamespace(enabled=True, scale=MIN_SCALE / 2, overflows=lambda: (31, 31))
    with pytest.raises(RunFailed, match="overflows at every scale"):
        OverflowDetector(scaler).read(31)


# Spikes ---------------------------------------------------------------------------------------------------------------


def test_spikes_are_steps_above_the_median():
    """Losses around 1 with a spike in step 30, and one before the median has enough steps."""
    spikes, steps = SpikeDetector(3.0), []
    for step in range(40):
        leap = 10.0 if step in (5, 30) else 1.0 + 0.1 * (step % 3)
        for half in (0, 1):  # two micro-batches
            spikes.add(step, torch.tensor(leap + half * 0.2), torch.tensor([2 * step + half]))
        if step % 4 == 3:
            steps += spikes.read(lambda index: f"{index}.png")
    assert [spike["step"] for spike in steps] == [30]
    assert steps[0]["images"] == ["60.png", "61.png"] and steps[0]["indices"] == [60, 61]
    assert steps[0]["loss"] == pytest.approx(10.1, rel=1e-6)  # float32
    assert steps[0]["usual"] == pytest.approx(1.2, rel=1e-6)


def test_spike_factor_is_off_by_default():
    spikes = SpikeDetector(None)
    spikes.add(0, torch.tensor(1.0), torch.tensor([0]))
    assert spikes.read(str) == [] and spikes._steps == []


def test_spike_factor_lists_the_images(image_folder, tmp_path, monkeypatch, capsys):
    """The images of one step are made a hundred times brighter: exactly these images are listed."""
    flags = f"{FLAGS.replace('--epochs 2', '--epochs 5').replace('--save_steps 1', '')} --spike_factor 3"
    original, given = Run._next, []

    def bright(self, samples):
        batch = original(self, samples)
        if self.step != 25:
            return batch
        given.extend(batch.index.tolist())
        return batch._replace(image=batch.image * 100)

    monkeypatch.setattr(Run, "_next", bright)
    pretrain(f"{flags} --print_freq 4 --data_path {image_folder} --output_dir {tmp_path}")
    rows = [json.loads(line) for line in (tmp_path / "spikes.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"], row["indices"]) for row in rows] == [(25, 4, given)]
    assert len(rows[0]["images"]) == 16 and all(name.startswith(str(image_folder)) for name in rows[0]["images"])
    output = capsys.readouterr().out
    assert "loss spike at step 25" in output and f"its 16 images ({rows[0]['images'][0]}" in output


def test_spike_factor_is_checked(image_folder, tmp_path):
    with pytest.raises(UserError, match=r"--spike_factor 0.5 must be above 1"):
        pretrain(f"{FLAGS} --spike_factor 0.5 --data_path {image_folder} --output_dir {tmp_path}")
