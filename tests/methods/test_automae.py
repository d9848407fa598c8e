"""AutoMAE: sampling by Gumbel noise, the generator's gradient by finite differences, and runs."""

import pytest
import torch
from helpers.halves import chosen_share, trained
from helpers.launch import ranks, scalars
from helpers.resumed import check_resumed
from helpers.teachers import BASE, made, pretrain, stepped

from methods.automae import advantages, gain, gumbel
from util.data.sample_rng import sample_noise
from util.errors import UserError

# Sampling -----------------------------------------------------------------------------------------------------------


def test_gumbel_noise():
    """Finite for every number that noise can be, monotonic, and of the distribution's mean (Euler's constant)."""
    edges = torch.tensor([[0.0, 2.0**-24, 0.5, 1 - 2.0**-24]])
    assert gumbel(edges).isfinite().all() and (gumbel(edges).diff() > 0).all()
    drawn = gumbel(sample_noise(0, 0, torch.arange(500), 196))
    assert drawn.mean().item() == pytest.approx(0.5772, abs=0.02)  # 98,000 draws: five standard deviations
    assert drawn.std().item() == pytest.approx(1.2825, abs=0.02)


def test_the_first_patch_is_drawn_by_its_probability():
    """The highest of logits plus Gumbel noise is a draw from their softmax; known answer for three logits."""
    logits = torch.tensor([1.0, 0.0, -1.0])
    first = (logits + gumbel(sample_noise(0, 0, torch.arange(20000), 3))).argmax(dim=1)
    shares = torch.bincount(first, minlength=3) / 20000
    torch.testing.assert_close(shares, logits.softmax(dim=0), atol=0.018, rtol=0)  # five standard deviations


def test_an_untrained_generator_draws_random_masks():
    """All logits are 0, so that the masks are those of MAE with the same noise, exact at any ratio."""
    pretrainer, _ = made("--automae")
    imgs, noise = torch.randn(50, 3, 16, 16), sample_noise(0, 0, torch.arange(50), 16)
    for ratio in (0.1, 0.5, 0.75, 0.9):
        losses, out = pretrainer.forward_with_output(imgs, ratio, noise)
        assert (out.mask.sum(dim=1) == 16 - int(16 * (1 - ratio))).all()
        assert torch.equal(out.mask, pretrainer.model.choose_visible(noise, ratio)[1])
    plain = made("")[0](imgs, 0.9, noise)
    assert torch.equal(losses["pixels"], plain["pixels"])


def test_logits_are_bounded():
    pretrainer, _ = made("--automae --automae_limit 0.5")
    generator = pretrainer.methods["automae"].generator
    torch.nn.init.normal_(generator.logit.weight, std=100)
    logits = generator(pretrainer.model.patchify(torch.randn(4, 3, 16, 16)))
    assert 0.4 < logits.abs().max() <= 0.5


# The generator's loss -----------------------------------------------------------------------------------------------


def test_known_answers():
    """Advantages are relative to the mean of the removed patches; their gain under equal scores is 0."""
    errors, mask = torch.tensor([[1.0, 3.0, 7.0, 0.0]]), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    advantage = advantages(errors, mask)
    assert advantage.tolist() == [[-0.5, 0.5, 0, 0]]
    assert gain(torch.zeros(1, 4), advantage, 1.0) == 0
    scores = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    shares = (scores / 2).exp() / (scores / 2).exp().sum()
    assert gain(scores, advantage, 2.0).item() == pytest.approx((0.5 * (shares[0, 1] - shares[0, 0])).item())
    assert advantages(torch.zeros(1, 4), mask).isfinite().all()


def test_gradient_by_finite_differences():
    """With fixed noise and fixed errors, of the loss of the whole method; the mask itself does not change."""
    pretrainer, _ = made("--automae --automae_temperature 1.5")
    pretrainer.double()
    method, model = pretrainer.methods["automae"], pretrainer.model
    torch.nn.init.normal_(method.generator.logit.weight, std=0.5)
    imgs, noise = torch.randn(3, 3, 16, 16).double(), torch.rand(3, 16)
    losses, out = pretrainer.forward_with_output(imgs, 0.5, noise)
    advantage = advantages(out.scatter_predicted(model.patch_errors(out)).detach(), out.mask)
    parameters = dict(method.generator.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(losses["generator"], list(parameters.values()))))

    def loss():
        with torch.no_grad():
            return -gain(method.scores(model, imgs, noise), advantage, 1.5).item()

    assert losses["generator"].item() == pytest.approx(loss(), rel=1e-12)
    for name in ("embed.weight", "blocks.1.mlp.fc1.weight", "norm.bias", "logit.weight", "logit.bias"):
        flat, gradient = parameters[name].data.view(-1), gradients[name].view(-1)
        for i in gradient.abs().topk(min(2, len(flat))).indices.tolist():
            flat[i] += 1e-5
            above = loss()
            flat[i] -= 2e-5
            below = loss()
            flat[i] += 1e-5
            # Central differences of 1e-5 have errors of about 1e-10 here.
            assert gradient[i].item() == pytest.approx((above - below) / 2e-5, rel=1e-5, abs=1e-9), name
        assert gradient.abs().max() > (1e-5 if name != "logit.bias" else 0), name


def test_what_the_gradients_reach():
    """The generator's loss trains the generator alone; the pixels do not train it."""
    pretrainer, _ = made("--automae")
    torch.nn.init.normal_(pretrainer.methods["automae"].generator.logit.weight)
    for name, mine in (("generator", True), ("pixels", False)):
        losses = pretrainer(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
        assert list(losses) == ["pixels", "generator"]
        pretrainer.zero_grad()
        losses[name].backward()
        reached = {name for name, p in pretrainer.named_parameters() if p.grad is not None}
        assert reached and all(name.startswith("methods.automae.generator.") == mine for name in reached)


def test_it_learns_to_remove_the_informative_half():
    """Half of every image is flat, half is noise, in the upper or the lower half: the generator has to look."""
    pretrainer, _ = made("--automae")
    assert chosen_share(pretrainer) == pytest.approx(0.5, abs=0.05)
    trained(pretrainer, 60)
    assert chosen_share(pretrainer) > 0.75


@pytest.mark.parametrize("flags", ["--decoder cross", "--norm_pix_loss", "--rc_mae --rc_mask different", "--u_mae"])
def test_beside_other_flags(flags):
    pretrainer, _ = made(f"--automae {flags}")
    gradients = stepped(pretrainer, 2)
    assert all(gradients[name] is not None for name, p in pretrainer.named_parameters() if p.requires_grad)


# Runs ---------------------------------------------------------------------------------------------------------------


def run(folder, more=""):
    """Flags of a run whose generator moves fast."""
    return f"{BASE} --data_path {folder} --epochs 3 --automae --lr 3e-3 {more}"


def test_resume(image_folder, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and continued: weights, optimizer, log and curve bit for bit."""
    common = run(image_folder, "--batch_size 16")
    theirs = check_resumed(monkeypatch, common, tmp_path, 8, 3, ["train/generator"])
    assert len(scalars(tmp_path / "whole", "train/generator")) == 18
    assert theirs["methods"]["automae.generator.logit.weight"].abs().max() > 0  # it was zero


@pytest.mark.parametrize("more", ["", "--fsdp"])
def test_two_processes(more, image_folder, tmp_path):
    """Masks are keyed to the image: losses are those of one process with the whole batch."""
    pretrain(run(image_folder, f"--batch_size 16 --output_dir {tmp_path}/one"))
    ranks("main_pretrain", run(image_folder, f"--batch_size 8 {more} --output_dir {tmp_path}/two"), 2)
    for name in ("pixels", "generator", "grad_norm"):
        ours, theirs = (scalars(tmp_path / folder, f"train/{name}") for folder in ("two", "one"))
        # Sums in another order, which 18 steps of Adam enlarge.
        assert [y for _, y in ours] == pytest.approx([y for _, y in theirs], rel=1e-3, abs=1e-5), name
        assert len(ours) == 18


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--automae --automae_limit 0", "--automae_limit 0.0 must be positive"),
        ("--automae --automae_temperature -1", "--automae_temperature -1.0 must be positive"),
        ("--automae --automae_width 40", "--automae_width 40 must be a multiple of 16"),
        ("--automae --automae_width 0", "--automae_width 0 must be a multiple of 16"),
        ("--automae --automae_limit inf", "--automae_limit inf is not finite"),
        ("--automae_limit 1", "--automae_limit has no effect without --automae"),
        ("--automae --mask grid", "--mask and --automae both decide the mask"),
        ("--automae --mlo_mae --mlo_labels same", "--mlo_mae runs alone and cannot be combined with --automae"),
        ("--automae --mae_k 1", "--mae_k and --automae cannot be combined"),
        ("--automae --ema_mae", "--ema_mae and --automae cannot be combined"),
        ("--automae --decoder cross --decoder_fraction 0.5", "that --automae, which decides the mask, scores lowest"),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        made(flags)
