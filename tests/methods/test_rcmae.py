"""RC-MAE: a whole run against the reference, masks, momentum, and output files."""

import argparse
import json
import math

import pytest
import torch
from helpers.launch import checkpoint, log_rows, scalars
from helpers.small_models import reference_mae as mae
from helpers.teachers import BASE, made, pretrain
from helpers.tolerances import close
from timm.optim import param_groups_weight_decay

import main_finetune
import main_linprobe
from methods import Pretrainer
from methods.rcmae import RCMAE, gradient_cosine
from models_mae import build_model
from tools import knn, visualize
from util.data.sample_rng import redrawn, sample_noise
from util.errors import UserError
from util.lr_sched import adjust_learning_rate


def test_rc_mae_whole_run(golden):
    """Two epochs of three steps against the reference, with the momentum indexed by the global step (`globalidx`)."""
    ref, e2e = golden("rc_mae"), golden("rc_mae").meta["e2e"]
    model = mae(ref.meta["ema"]["model"], norm_pix_loss=True)
    model.load_state_dict(ref.group("e2e/student0/"))
    model = model.double()
    args = argparse.Namespace(
        **e2e,
        min_lr_=0,
        rc_gamma=e2e["gamma"],
        rc_momentum=e2e["momentum_base"],
        rc_schedule="cosine",
        rc_mask="same",
        log_grad_cosine=0,
    )
    pretrainer = Pretrainer(model, [RCMAE(args, model)], e2e["epochs"] * e2e["iters"])
    groups = param_groups_weight_decay(
        pretrainer, e2e["weight_decay"], no_weight_decay_list=pretrainer.no_weight_decay()
    )
    optimizer = torch.optim.AdamW(groups, lr=e2e["lr"], betas=(0.9, 0.95))
    pretrainer.train()
    totals, reconstructions = [], []
    for epoch in range(e2e["epochs_run"]):
        for i in range(e2e["iters"]):
            adjust_learning_rate(optimizer, epoch + i / e2e["iters"], args)
            imgs, noise = ref["e2e/imgs"][epoch, i].double(), ref["e2e/noise"][epoch, i]
            losses = pretrainer(imgs, e2e["mask_ratio"], noise)
            loss = sum(losses.values())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pretrainer.after_update(imgs, epoch * e2e["iters"] + i, torch.tensor(1.0))
            totals.append(loss.detach())
            reconstructions.append(losses["pixels"].detach())
    # Six steps of Adam amplify the rounding of the first: measured 1e-12.
    close(torch.stack(totals), ref["e2e/globalidx/loss_total"].flatten(), 1e-8)
    close(torch.stack(reconstructions), ref["e2e/globalidx/loss_student"].flatten(), 1e-8)
    for name, network in (("student", model), ("teacher", pretrainer.methods["rc_mae"].teacher.network)):
        for key, value in ref.group(f"e2e/globalidx/{name}/").items():
            close(network.state_dict()[key], value, 1e-8)


def test_momentum_follows_the_position_in_the_run(image_folder, tmp_path):
    """Continued with twice the batch, or started later: the momentum goes from the base to 1 over the whole run."""

    def momenta(folder):
        return [row["train/teacher_momentum"] for row in log_rows(tmp_path / folder)]

    flags = f"{BASE} --data_path {image_folder} --rc_mae --rc_momentum 0.9 --save_freq 1"
    pretrain(f"{flags} --epochs 4 --batch_size 16 --output_dir {tmp_path}/whole")
    pretrain(f"{flags} --epochs 4 --batch_size 16 --start_epoch 2 --output_dir {tmp_path}/late")
    assert momenta("late") == pytest.approx(momenta("whole")[2:])
    (tmp_path / "whole" / "checkpoint-3.pth").unlink()
    (tmp_path / "whole" / "checkpoint-2.pth").unlink()
    before = momenta("whole")
    pretrain(f"{flags} --epochs 4 --batch_size 32 --resume auto --output_dir {tmp_path}/whole")
    # Three steps an epoch instead of six: the same cosine, sampled more coarsely.
    assert momenta("whole") == pytest.approx(before, abs=0.01) and momenta("whole")[3] < 1


def test_other_mask():
    """The teacher's mask is derived from the student's noise: reproducible, independent of it, and uniform."""
    noise = sample_noise(0, 0, torch.arange(2000), 64)
    other = redrawn(noise)
    assert torch.equal(other, redrawn(noise)) and other.min() >= 0 and other.max() < 1
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.01
    assert torch.histc(other, 10, 0, 1) == pytest.approx(12800, rel=0.05)
    model = build_model("mae_vit_micro_patch4", img_size=32)
    same = [set(model.choose_visible(n[None], 0.75)[0][0].tolist()) for n in noise]
    new = [set(model.choose_visible(n[None], 0.75)[0][0].tolist()) for n in other]
    # Both keep 16 of 64 patches; the expected overlap is a quarter, 4.
    assert sum(len(a & b) for a, b in zip(same, new)) / 2000 == pytest.approx(4, abs=0.15)

    for mask, equal in (("same", True), ("different", False)):
        pretrainer, _ = made(f"--rc_mae --rc_mask {mask}")
        method = pretrainer.methods["rc_mae"]
        # The teacher still equals the student: with the same mask it has the same predictions.
        parts = pretrainer(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
        assert (parts["consistency"].item() == 0) == equal, method


def test_gradient_cosine():
    a, b = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))
    unused = torch.nn.Parameter(torch.ones(5))
    one, other = a[0] * 3 + 4 * b[0] + (a[1] * b[0]), a[0] * 4 - 3 * b[0]
    expected = (3 * 4 + (4 + 2) * -3) / math.sqrt(3**2 + 3**2 + 6**2) / 5
    assert gradient_cosine(one, other, [a, b, unused]).item() == pytest.approx(expected, rel=1e-6)


def test_output_of_rc_mae(image_folder, tmp_path, capsys):
    """TensorBoard, `model_ema`, and every command with --checkpoint_key."""
    flags = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 32 --rc_mae --rc_momentum 0.5"
    pretrain(f"{flags} --log_grad_cosine 2 --mae_k 1 --output_dir {tmp_path}")
    for name in ("consistency", "teacher_momentum", "feature_stage", "target_age_epochs"):
        assert len(scalars(tmp_path, f"train/{name}")) == 6, name
    assert [x for x, _ in scalars(tmp_path, "train/pixels")] == [333, 666, 1000]
    assert [x for x, _ in scalars(tmp_path, "train/features")] == [1333, 1666, 2000]
    cosines = scalars(tmp_path, "train/grad_cosine")
    # Every second step except the first, whose learning rate is 0, so that the teacher still equals the student.
    assert [x for x, _ in cosines] == [1000, 1666] and all(-1 <= value <= 1 for _, value in cosines)
    assert [x for x, _ in scalars(tmp_path, "train/target_std")] == [1333]  # the first step of the feature epoch
    row = log_rows(tmp_path)[1]
    assert {"train/features", "train/consistency", "train/target_rank", "train/grad_cosine"} <= row.keys()

    path = tmp_path / "checkpoint-1.pth"
    state = checkpoint(tmp_path, "checkpoint-1.pth")
    assert state["model"].keys() == state["model_ema"].keys()
    assert not torch.equal(state["model"]["decoder_pred.bias"], state["model_ema"]["decoder_pred.bias"])
    encoders = [(tmp_path / f"encoder{suffix}.safetensors").read_bytes() for suffix in ("", "_ema")]
    assert encoders[0] != encoders[1]
    data = f"--data_path {image_folder} --device cpu --finetune {path}"
    for key in ("model", "model_ema"):
        more = f"{data} --checkpoint_key {key} --num_workers 0 --batch_size 32 --epochs 1 --warmup_epochs 0"
        parse = main_finetune.get_args_parser().parse_args
        main_finetune.main(parse(f"{more} --output_dir {tmp_path}/f{key}".split()))
        parse = main_linprobe.get_args_parser().parse_args
        main_linprobe.main(parse(f"{more} --cache_features --output_dir {tmp_path}/p{key}".split()))
        knn.main(knn.get_args_parser().parse_args(f"{data} --checkpoint_key {key} --out {tmp_path}/{key}.json".split()))
        arguments = f"{path} --checkpoint_key {key} --data_path {image_folder} --out {tmp_path}/{key}.png"
        visualize.main(visualize.get_args_parser().parse_args(arguments.split()))
    assert (tmp_path / "model.png").read_bytes() != (tmp_path / "model_ema.png").read_bytes()
    assert "its pixel head is no longer trained" in capsys.readouterr().out
    stored = [json.loads((tmp_path / f"p{key}" / "probe.json").read_text()) for key in ("model", "model_ema")]
    assert [run["checkpoint_key"] for run in stored] == ["model", "model_ema"]
    with pytest.raises(UserError, match=r"no key 'teacher': --checkpoint_key must be one of .*\(model, model_ema\)"):
        knn.main(knn.get_args_parser().parse_args(f"{data} --checkpoint_key teacher".split()))


def test_time_of_diagnostics_does_not_count(image_folder, tmp_path, monkeypatch):
    """Slow diagnostics do not change the logged speed."""
    import time

    original = RCMAE.diagnostics
    monkeypatch.setattr(RCMAE, "diagnostics", lambda *args: time.sleep(0.5) or original(*args))
    flags = f"{BASE} --data_path {image_folder} --epochs 1 --warmup_epochs 0 --batch_size 32"
    began = time.perf_counter()
    pretrain(f"{flags} --rc_mae --log_grad_cosine 1 --output_dir {tmp_path}")
    wall = time.perf_counter() - began
    row = json.loads((tmp_path / "log.txt").read_text())
    assert wall > 1.5 and row["seconds"] < wall - 1.4  # diagnostics took half a second, three times
