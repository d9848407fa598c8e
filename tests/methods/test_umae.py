"""U-MAE: the uniformity loss by its definition, on several processes, in half precision, and over a resume."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.launch import checkpoint, log_rows, ranks, same_tensors, scalars
from helpers.resumed import check_resumed
from helpers.teachers import BASE, made, pretrain

from methods.umae import mean_squared_cosine
from util.errors import UserError

# The mathematics ----------------------------------------------------------------------------------------------------


def over_all_pairs(features):
    """The definition, pair by pair."""
    cosines = [F.cosine_similarity(one, other, dim=0) for one, other in itertools.permutations(features, 2)]
    return torch.stack(cosines).square().mean()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (torch.eye(3, 5), 0),  # orthogonal
        (torch.ones(4, 9), 1),  # identical
        (torch.tensor([[1.0, 0.0], [-2.0, 0.0]]), 1),  # opposite: no better
        (torch.tensor([[2.0, 0.0], [3.0, 3.0]]), 0.5),  # 45 degrees
    ],
    ids=["orthogonal", "identical", "opposite", "45 degrees"],
)
def test_known_answers(features, expected):
    assert mean_squared_cosine(features).item() == pytest.approx(expected)


def test_value_and_gradient_are_those_of_the_definition():
    features = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    loss, expected = mean_squared_cosine(features), over_all_pairs(features)
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(value, features)[0] for value in (loss, expected))
    torch.testing.assert_close(ours, theirs)
    assert theirs.abs().max() > 0.01


@pytest.mark.parametrize("features", [torch.ones(1, 5), torch.zeros(3, 5)], ids=["one image", "zeros"])
def test_no_pair_and_no_direction(features):
    """The loss and its gradient are 0, and not NaN."""
    loss = mean_squared_cosine(features.requires_grad_())
    loss.backward()
    assert loss == 0 and torch.equal(features.grad, torch.zeros_like(features))


# The method ---------------------------------------------------------------------------------------------------------


def test_the_term_of_the_loss():
    """Lambda times the loss of the mean visible patch tokens, without [cls]; its gradient reaches the encoder alone."""
    pretrainer, _ = made("--u_mae --u_mae_lambda 0.5")
    losses, out = pretrainer.forward_with_output(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
    assert list(losses) == ["pixels", "uniformity"]
    torch.testing.assert_close(losses["uniformity"], 0.5 * over_all_pairs(out.latent[:, 1:].mean(dim=1)))
    losses["uniformity"].backward()
    assert pretrainer.model.patch_embed.proj.weight.grad.abs().max() > 0
    assert pretrainer.model.decoder_embed.weight.grad is None


def test_plain_mae_stays_as_it_is():
    """Bit for bit without the flag; with it the loss of the pixels does, and nothing is trained in addition."""
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    (plain, args), (with_it, _) = made(""), made("--u_mae")
    assert not args.u_mae and not len(plain.methods)
    losses, theirs = (pretrainer(imgs, 0.75, noise) for pretrainer in (plain, with_it))
    assert list(losses) == ["pixels"] and torch.equal(losses["pixels"], theirs["pixels"])
    assert same_tensors(plain.state_dict(), with_it.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cosines_are_in_float32(dtype):
    pretrainer, _ = made("--u_mae --u_mae_lambda 1")
    with torch.autocast("cpu", dtype=dtype):
        losses, out = pretrainer.forward_with_output(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
        terms = pretrainer.methods["u_mae"].terms(pretrainer.model, out.patches, out)
    assert terms["uniformity"].dtype == torch.float32
    expected = over_all_pairs(out.latent[:, 1:].float().mean(dim=1))
    torch.testing.assert_close(terms["uniformity"], expected)
    torch.testing.assert_close(losses["uniformity"], expected)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--u_mae --u_mae_lambda 0", "--u_mae_lambda 0.0 must be positive, for example 0.01"),
        ("--u_mae --u_mae_lambda -1", "--u_mae_lambda -1.0 must be positive"),
        ("--u_mae --u_mae_lambda nan", "--u_mae_lambda nan is not finite"),
        ("--u_mae_lambda 0.1", "--u_mae_lambda has no effect without --u_mae"),
        ("--u_mae --batch_size 1", "--batch_size 1 on one process has none, give 2 or more"),
        (
            "--u_mae --mlo_mae --mlo_labels same --dataset digits",
            "--mlo_mae runs alone and cannot be combined with --u_mae",
        ),
    ],
)
def test_refusals(flags, message):
    with pytest.raises(UserError, match=message):
        made(flags)


# Runs ---------------------------------------------------------------------------------------------------------------


def run(folder, more="", epochs=2):
    """Flags of a run on 96 images where the uniformity loss weighs as much as the pixels."""
    return f"{BASE} --data_path {folder} --epochs {epochs} --u_mae --u_mae_lambda 1 {more}"


@pytest.mark.parametrize("flags", ["", "--accum_iter 2", "--fsdp"])
def test_two_processes(flags, image_folder, tmp_path):
    """The pairs are of both: the loss, its gradient, and the weights are those of one process with the whole batch."""
    one = flags.replace("--fsdp", "")
    pretrain(run(image_folder, f"{one} --batch_size 16 --output_dir {tmp_path}/one"))
    ranks("main_pretrain", run(image_folder, f"{flags} --batch_size 8 --output_dir {tmp_path}/two"), 2)
    for name in ("uniformity", "pixels", "grad_norm"):
        ours, theirs = scalars(tmp_path / "two", f"train/{name}"), scalars(tmp_path / "one", f"train/{name}")
        assert [x for x, _ in ours] == [x for x, _ in theirs] and len(ours) >= 6
        assert [y for _, y in ours] == pytest.approx([y for _, y in theirs], rel=1e-3), name
    if "--fsdp" not in flags:
        weights, expected = (checkpoint(tmp_path / name, "checkpoint-1.pth")["model"] for name in ("two", "one"))
        for name, value in expected.items():
            if not name.endswith("qkv.bias"):  # the gradient of the keys' bias is rounding, which Adam enlarges
                assert (value - weights[name]).abs().max() < 1e-4, name


def test_resume(image_folder, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch and continued: weights, optimizer, log and curve bit for bit."""
    common = run(image_folder, "--batch_size 32", epochs=4)
    check_resumed(monkeypatch, common, tmp_path, 4, 4, ["train/uniformity"])
    curve = scalars(tmp_path / "whole", "train/uniformity")
    assert len(curve) == 12
    assert curve[-1][1] < curve[0][1]  # it is trained


def test_plain_run_continued_with_it(image_folder, tmp_path, capsys):
    """The method has no tensors, so that a run of MAE goes on with it; the change is reported."""
    common = f"{BASE} --data_path {image_folder} --batch_size 32 --output_dir {tmp_path}"
    pretrain(f"{common} --epochs 2")
    pretrain(f"{common} --epochs 3 --u_mae --resume auto")
    assert "note: --u_mae was False when checkpoint-1.pth was written, now it is True" in capsys.readouterr().out
    assert [("train/uniformity" in row) for row in log_rows(tmp_path)] == [False, False, True]
