"""HPM: the order loss by its definition, the hardest patches by known losses, and runs that resume and are shared."""

import itertools
import math

import pytest
import torch
from helpers.halves import chosen_share, halves, trained
from helpers.launch import ranks, scalars
from helpers.resumed import check_resumed
from helpers.teachers import BASE, made, pretrain, stepped

from methods.hpm import hard_first, momentum_at, order_accuracy, order_loss, share_at
from util.data.sample_rng import sample_noise
from util.errors import UserError

# The order loss -----------------------------------------------------------------------------------------------------


def over_all_pairs(predicted, errors):
    """The definition, pair by pair; the paper's two sums count each pair twice, which the mean undoes."""
    images = []
    for losses, truth in zip(predicted, errors):
        pairs = [(i, j) for i, j in itertools.permutations(range(len(truth)), 2) if truth[i] > truth[j]]
        images.append(sum(-torch.log(torch.sigmoid(losses[i] - losses[j])) for i, j in pairs) / max(1, len(pairs)))
    return sum(images) / len(images)


def test_known_answers_of_the_order_loss():
    errors = torch.tensor([[3.0, 1.0, 2.0]])
    assert order_loss(torch.zeros(1, 3), errors).item() == pytest.approx(math.log(2))  # no order is predicted
    right, wrong = torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([[1.0, 3.0, 2.0]])
    log_sigmoid = [math.log(1 + math.exp(-difference)) for difference in (2, 1, 1)]
    assert order_loss(right, errors).item() == pytest.approx(sum(log_sigmoid) / 3)
    reverse = [math.log(1 + math.exp(difference)) for difference in (2, 1, 1)]
    assert order_loss(wrong, errors).item() == pytest.approx(sum(reverse) / 3)
    assert (order_accuracy(right, errors), order_accuracy(wrong, errors)) == (1, 0)
    assert order_loss(right, torch.ones(1, 3)) == 0  # equal errors have no order, and no NaN


def test_value_and_gradient_of_the_order_loss():
    predicted = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    errors = torch.rand(3, 6, dtype=torch.float64)
    errors[0, :2] = 0.5  # a tie: this image has one pair less
    ours, theirs = order_loss(predicted, errors), over_all_pairs(predicted, errors)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(value, predicted)[0] for value in (ours, theirs)]
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(lambda values: order_loss(values, errors), predicted)
    assert order_loss(predicted.detach() * 1e6, errors).isfinite()


# The mask -----------------------------------------------------------------------------------------------------------


def removed_by(scores, removed):
    return scores.argsort(dim=1, stable=True)[:, scores.shape[1] - removed :]


@pytest.mark.parametrize("removed", [1, 7, 12, 15])
def test_the_share_of_hardest_patches_is_exact(removed):
    """Known losses: with a share of 1 exactly the hardest are removed, with 0 those of a random mask, and between
    them as many as the share says for certain."""
    losses, noise = torch.randn(200, 16), sample_noise(0, 0, torch.arange(200), 16)
    hardest = losses.argsort(dim=1, descending=True)
    for share in (0.0, 0.25, 0.5, 1.0):
        scores = hard_first(losses, noise, removed, torch.tensor(share))
        chosen = torch.zeros(200, 16).scatter_(1, removed_by(scores, removed), 1)
        assert (chosen.sum(dim=1) == removed).all()
        certain = round(share * removed)
        assert chosen.gather(1, hardest[:, :certain]).bool().all()
        others = chosen.gather(1, hardest[:, certain:]).mean(dim=0)  # the rest is random
        if certain < removed:
            expected = (removed - certain) / (16 - certain)
            assert (others - expected).abs().max() < 5 * 0.5 / 200**0.5  # five standard deviations of 200 coins
    assert torch.equal(hard_first(losses, noise, removed, torch.tensor(0.0)), noise)
    everything = hard_first(losses, noise, removed, torch.tensor(1.0))
    assert torch.equal(removed_by(everything, removed).sort().values, hardest[:, :removed].sort().values)


def test_the_teacher_decides(monkeypatch):
    """Through the method: its predictions of whole images, the mask ratio of the run, exact at any ratio."""
    pretrainer, _ = made("--hpm --hpm_start 1 --mask_ratio 0.6")
    method, losses = pretrainer.methods["hpm"], torch.randn(6, 16)
    pretrainer.before_epoch(0)
    monkeypatch.setattr(method, "predicted_losses", lambda imgs: losses)
    _, out = pretrainer.forward_with_output(torch.randn(6, 3, 16, 16), 0.6, torch.rand(6, 16))
    assert torch.equal(out.ids_removed.sort().values, losses.topk(10, dim=1).indices.sort().values)
    for ratio in (0.1, 0.5, 0.9):
        _, out = pretrainer.forward_with_output(torch.randn(6, 3, 16, 16), ratio, torch.rand(6, 16))
        assert (out.mask.sum(dim=1) == 16 - int(16 * (1 - ratio))).all()


def test_schedules():
    assert [share_at(epoch, 4, 0.0, 0.5) for epoch in range(4)] == [0, 0.125, 0.25, 0.375]
    assert share_at(3, 4, 0.5, 0.5) == share_at(9, 4, 0.0, 0.5) == 0.5
    assert (momentum_at(0, 0.999), momentum_at(90, 0.999), momentum_at(10**6, 0.999)) == (0.1, 0.91, 0.999)
    pretrainer, _ = made("--hpm")
    shares = []
    for epoch in (0, 5, 9):  # of ten
        pretrainer.before_epoch(epoch)
        shares.append(round(pretrainer.metrics()["hard_share"].item(), 4))
    assert shares == [0, 0.25, 0.45]
    noise = torch.rand(4, 16)
    assert made("--hpm --hpm_end 0")[0].preview_scores(torch.randn(4, 3, 16, 16), noise) is noise


# The networks -------------------------------------------------------------------------------------------------------


def test_what_the_gradients_reach():
    """The order loss trains predictor and encoder, not the decoder; the teacher gets no gradient and follows both."""
    pretrainer, _ = made("--hpm --hpm_weight 0.5")
    method, model, imgs, noise = (
        pretrainer.methods["hpm"],
        pretrainer.model,
        torch.randn(4, 3, 16, 16),
        torch.rand(4, 16),
    )
    losses, out = pretrainer.forward_with_output(imgs, 0.75, noise)
    assert list(losses) == ["pixels", "order"]
    errors = model.patch_errors(out).detach()
    predicted = method.predictor(out.latent, out.ids_keep, out.ids_predicted)
    torch.testing.assert_close(losses["order"], 0.5 * over_all_pairs(predicted, errors))
    losses["order"].backward()
    reached = {name for name, p in pretrainer.named_parameters() if p.grad is not None}
    assert {name for name, p in method.named_parameters() if p.requires_grad} == {
        name.removeprefix("methods.hpm.") for name in reached if name.startswith("methods.hpm.")
    }
    assert not any("teacher" in name or "decoder" in name or name == "model.mask_token" for name in reached)
    assert model.patch_embed.proj.weight.grad.abs().max() > 0
    alone = made("")[0](imgs, 0.75, noise)["pixels"]
    assert losses["pixels"] == alone  # the first epoch has random masks


def test_the_teacher_is_a_moving_average():
    pretrainer, _ = made("--hpm --hpm_momentum 0.05")
    method = pretrainer.methods["hpm"]
    before = [
        method.teacher_encoder.network.patch_embed.proj.weight.clone(),
        method.teacher_predictor.network.embed.weight.clone(),
    ]
    stepped(pretrainer, 1)
    students = pretrainer.model.patch_embed.proj.weight, method.predictor.embed.weight
    after = method.teacher_encoder.network.patch_embed.proj.weight, method.teacher_predictor.network.embed.weight
    for old, new, student in zip(before, after, students):
        torch.testing.assert_close(new, 0.05 * old + 0.95 * student)
        assert not torch.equal(old, new)
    still = {name: value.clone() for name, value in method.state_dict().items() if "teacher" in name}
    stepped(pretrainer, 1, applied=0.0, first=1)
    assert all(torch.equal(method.state_dict()[name], value) for name, value in still.items())


@pytest.mark.parametrize("flags", ["--decoder cross", "--norm_pix_loss --hpm_depth 2", "--rc_mae --rc_mask different"])
def test_beside_other_flags(flags):
    pretrainer, _ = made(f"--hpm --hpm_start 0.5 {flags}")
    pretrainer.before_epoch(3)
    gradients = stepped(pretrainer, 2)
    assert all(gradients[name] is not None for name, p in pretrainer.named_parameters() if p.requires_grad)
    assert len(pretrainer.methods["hpm"].predictor.blocks) == (2 if "depth" in flags else 1)


def test_it_learns_which_half_is_hard():
    """Half of every image is flat, half is noise. Trained on random masks, the predictor orders their errors, and the
    teacher's masks then remove the noise. Of all pairs half are within a half, where order is chance: 0.75 at best."""
    pretrainer, _ = made("--hpm --hpm_end 1")
    method = pretrainer.methods["hpm"]
    assert chosen_share(pretrainer) == pytest.approx(0.5, abs=0.05)
    trained(pretrainer, 120)
    assert method.accuracy > 0.65
    method.share.fill_(1)
    assert chosen_share(pretrainer) > 0.9
    hard = halves(50, seed=9)
    losses = method.predicted_losses(hard[0])
    assert (losses * hard[1]).sum() / hard[1].sum() > (losses * (1 - hard[1])).sum() / (1 - hard[1]).sum()


# Runs ---------------------------------------------------------------------------------------------------------------


def run(folder, more=""):
    flags = "--hpm --hpm_start 0.5 --hpm_end 1 --hpm_momentum 0.9"
    return f"{BASE} --data_path {folder} --epochs 3 {flags} {more}"


@pytest.mark.parametrize("more", ["", "--mask_ratio_end 0.5 --accum_iter 2"])
def test_resume(more, image_folder, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and continued: weights, teacher, optimizer, log and curve bit for bit."""
    common = run(image_folder, f"--batch_size 16 {more}")
    tags = [f"train/{name}" for name in ("order", "order_accuracy", "hard_share")]
    check_resumed(monkeypatch, common, tmp_path, 4 if more else 8, 3, tags)
    assert all(len(scalars(tmp_path / "whole", tag)) >= 9 for tag in tags)


@pytest.mark.parametrize("more", ["", "--fsdp"])
def test_two_processes(more, image_folder, tmp_path):
    """Masks are keyed to the image: loss, order and weights are those of one process with the whole batch."""
    pretrain(run(image_folder, f"--batch_size 16 --output_dir {tmp_path}/one"))
    ranks("main_pretrain", run(image_folder, f"--batch_size 8 {more} --output_dir {tmp_path}/two"), 2)
    for name in ("pixels", "order", "order_accuracy", "grad_norm"):
        ours, theirs = (scalars(tmp_path / folder, f"train/{name}") for folder in ("two", "one"))
        # Sums in another order. Rounding may change the order of nearly equal predictions: 3 of 16 * 66 pairs at most.
        flipped = 3 / (16 * 66) if name == "order_accuracy" else None
        assert [y for _, y in ours] == pytest.approx([y for _, y in theirs], rel=1e-3, abs=flipped), name
        assert len(ours) == 18


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--hpm --hpm_end 1.5", "--hpm_end 1.5 must lie between 0"),
        ("--hpm --hpm_start -0.1", "--hpm_start -0.1 must lie between 0"),
        ("--hpm --hpm_weight 0", "--hpm_weight 0.0 must be positive"),
        ("--hpm --hpm_momentum 1", r"--hpm_momentum 1.0 must lie in \[0, 1\)"),
        ("--hpm --hpm_depth 0", "--hpm_depth 0 must be at least 1 block"),
        ("--hpm --hpm_weight nan", "--hpm_weight nan is not finite"),
        ("--hpm_end 0.5", "--hpm_end has no effect without --hpm"),
        ("--hpm --mask block", "--mask and --hpm both decide the mask"),
        ("--hpm --automae", "--hpm and --automae both decide the mask"),
        ("--hpm --mlo_mae --mlo_labels same", "--mlo_mae runs alone and cannot be combined with --hpm"),
        ("--hpm --mae_k 1", "--mae_k and --hpm cannot be combined"),
        ("--hpm --ema_mae", "--ema_mae and --hpm cannot be combined"),
        ("--hpm --decoder cross --decoder_fraction 0.5", "that --hpm, which decides the mask, scores lowest"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        made(flags)
