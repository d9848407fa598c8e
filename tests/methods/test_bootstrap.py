"""MAE-K and EMA-MAE: times and sizes of the target's updates."""

import pytest
import torch
from helpers.launch import checkpoint, log_rows, same_tensors
from helpers.teachers import BASE, made, pretrain, stepped
from helpers.tolerances import close
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import methods.bootstrap
import methods.rcmae
from methods.bootstrap import collapse, copied_at, target_features
from models_mae import build_model


def test_pictures_end_with_the_pixels(image_folder, tmp_path, capsys):
    flags = f"{BASE.replace('--vis_freq 0', '--vis_freq 1')} --data_path {image_folder} --epochs 3 --batch_size 32"
    pretrain(f"{flags} --mae_k 2 --output_dir {tmp_path}")
    assert ["eval/fixed_images_loss" in row for row in log_rows(tmp_path)] == [True, True, False]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(events.Images("reconstruction")) == 2
    assert "note: after 2 epochs the target changes from pixels to features" in capsys.readouterr().out
    ((step, text),) = (
        (event.step, event.tensor_proto.string_val[0]) for event in events.Tensors("changes/text_summary")
    )
    assert step == 2000 and b"train/features replaces train/pixels, and train/loss jumps" in text


def test_when_the_target_is_copied():
    def epochs(every, total):
        copies = []
        for epoch in range(total):
            if copied_at(epoch, every, first_copy=not copies):
                copies.append(epoch)
        return copies

    assert epochs(10, 40) == [10, 20, 30]
    assert epochs(1, 4) == [1, 2, 3]
    assert epochs(20, 20) == []
    assert [epoch for epoch in range(25, 40) if copied_at(epoch, 10, first_copy=epoch == 25)] == [25, 30]


def test_mae_k_by_hand():
    """The target is a copy of the student at the time of copying; the loss regresses the target's features."""
    pretrainer, _ = made("--mae_k 2")
    method, model = pretrainer.methods["mae_k"], pretrainer.model
    head = {name: p.clone() for name, p in method.head.named_parameters()}
    ages = []
    for epoch in range(5):
        pretrainer.before_epoch(epoch)
        if epoch in (2, 4):
            copied = model.encoder_copy()
        stepped(pretrainer, 10, first=10 * epoch)
        ages.append(method.metrics()["target_age_epochs"])
        assert method.metrics()["feature_stage"] == (epoch >= 2)
        if epoch < 2:  # weight decay does not act on a head before its first use
            assert all(torch.equal(head[name], p) for name, p in method.head.named_parameters())
        else:
            assert same_tensors(dict(copied.state_dict()), dict(method.target.network.state_dict()))
    assert ages == pytest.approx([0, 0, 1, 2, 1])
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    parts, out = pretrainer.forward_with_output(imgs, 0.75, noise)
    target = methods.bootstrap.normalized(out.select_predicted(target_features(copied, imgs)))
    expected = ((method.head(out.decoded) - target) ** 2).mean()
    assert parts["features"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("flags", ["--mae_k 2", "--ema_mae --wse 2"])
def test_features_never_reached_is_plain_mae(image_folder, tmp_path, flags, capsys):
    common = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 32"
    pretrain(f"{common} --output_dir {tmp_path}/plain")
    pretrain(f"{common} {flags} --output_dir {tmp_path}/k")
    assert "this is plain MAE, on pixels" in capsys.readouterr().out
    plain, k = (checkpoint(tmp_path / name, "checkpoint-1.pth")["model"] for name in ("plain", "k"))
    assert same_tensors(plain, k)


@pytest.mark.parametrize("when", ["epoch", "step"])
def test_ema_mae_by_hand(when):
    """The target is copied at WSE, not averaged from the start; then it is (1 - tau) * target + tau * student."""
    pretrainer, _ = made(f"--ema_mae --wse 2 --tau 0.25 --ema_update {when}")
    method, model = pretrainer.methods["ema_mae"], pretrainer.model
    target, ages = None, []
    for epoch in range(4):
        if epoch == 2:
            target = {name: p.clone() for name, p in model.named_parameters()}
        elif target and when == "epoch":
            target = {name: 0.75 * value + 0.25 * model.get_parameter(name) for name, value in target.items()}
        pretrainer.before_epoch(epoch)
        for step in range(3):
            stepped(pretrainer, 1, first=3 * epoch + step)
            if target and when == "step":
                target = {name: 0.75 * value + 0.25 * model.get_parameter(name) for name, value in target.items()}
        ages.append(method.age)
    for name, value in method.target.network.named_parameters():
        assert torch.allclose(value, target[name], atol=1e-6)
    per_step = 0.1  # of an epoch: `made` gives 100 steps in 10 epochs
    if when == "epoch":
        assert ages[2:] == pytest.approx([3 * per_step, 0.75 * 3 * per_step + 3 * per_step])
    else:
        assert ages[3] == pytest.approx(sum(per_step * 0.75**i for i in range(1, 7)))


def test_average_of_layers():
    model = build_model("mae_vit_micro_patch4", img_size=16).double()
    encoder, imgs = model.encoder_copy(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, -1, -1), encoder.embed(imgs)], 1)
    outputs = []
    for block in encoder.blocks:
        x = block(x)
        outputs.append(encoder.norm(x)[:, 1:])
    close(target_features(encoder, imgs), outputs[-1])
    close(target_features(encoder, imgs, 3), (outputs[-1] + outputs[-2] + outputs[-3]) / 3)
    close(target_features(encoder, imgs, 4), sum(outputs) / 4)


def test_collapse_diagnostics():
    """Known spectra: isotropic, one direction, zero, two equal directions."""
    x = torch.randn(20000, 8)
    result = collapse(x * 3)
    assert result["target_std"] == pytest.approx(3, rel=0.02) and result["target_rank"] == pytest.approx(8, rel=0.01)
    assert collapse(x[:, :1] @ torch.ones(1, 8))["target_rank"] == pytest.approx(1, abs=0.05)
    assert collapse(torch.ones(100, 8))["target_std"] == 0
    flat = torch.cat([x[:, :2], torch.zeros(20000, 6)], 1)
    assert collapse(flat)["target_rank"] == pytest.approx(2, rel=0.02)
    # A line has rank 1 even if products are rounded to bf16; non-finite features do not end the run.
    line = torch.randn(3000, 1) @ torch.randn(1, 192)
    with torch.autocast("cpu", torch.bfloat16):
        assert collapse(line)["target_rank"] < 1.2
    assert torch.isnan(collapse(x * float("nan"))["target_rank"])
