"""Faster variants compute the same: attention, gradient checkpointing, compiled blocks. FLOPs are counted right."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from helpers.launch import checkpoint, largest_difference, same_tensors

import main_finetune
import main_pretrain
from benchmarks.plain import PIECES, plain
from models_mae import build_model
from util.compute import kernels
from util.compute.kernels import attention_is_fused
from util.report.mfu import flop_counter, matrix_rate

BASE = (
    "--model mae_vit_micro_patch4 --input_size 16 --aug none --norm_pix_loss --num_workers 0 --warmup_epochs 0 "
    "--epochs 1 --lr 1e-3 --vis_freq 0 --batch_size 16 --device cpu"
)


def pretrain(folder, flags):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(f"{BASE} {flags} --output_dir {folder}".split()))
    return checkpoint(folder, "checkpoint-0.pth")["model"]


def losses(folder):
    return [json.loads(line)["train/loss"] for line in (folder / "log.txt").read_text().splitlines()]


def gradients(model, imgs, noise):
    model.zero_grad()
    model.reconstruction_loss(model.forward_pretrain(imgs, 0.75, noise)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def double():
    torch.manual_seed(0)
    return (
        build_model("mae_vit_micro_patch4", img_size=16).double(),
        torch.randn(3, 3, 16, 16).double(),
        torch.rand(3, 16),
    )


def test_auto_attention_is_matrix_products_in_bf16_on_a_cpu():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert not attention_is_fused("auto", cpu, torch.bfloat16)
    assert attention_is_fused("auto", cpu, torch.float32) and attention_is_fused("auto", cuda, torch.bfloat16)
    assert attention_is_fused("fused", cpu, torch.bfloat16) and not attention_is_fused("matmul", cuda, torch.bfloat16)


@pytest.mark.parametrize("change", ["matmul", "grad_checkpoint"])
def test_same_gradients(double, change):
    """Gradients differ by rounding alone, in float64."""
    model, imgs, noise = double
    before = gradients(model, imgs, noise)
    for module in model.modules():
        if change == "matmul" and hasattr(module, "fused_attn"):
            assert module.fused_attn
            module.fused_attn = False
    model.set_grad_checkpointing(change == "grad_checkpoint")
    after = gradients(model, imgs, noise)
    model.set_grad_checkpointing(False)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = True
    assert set(before) == set(after)
    assert largest_difference(before, after) < 1e-12
    assert change == "grad_checkpoint" or not same_tensors(before, after)  # the change has an effect


@pytest.mark.parametrize("pieces", [PIECES[:count] for count in range(len(PIECES) + 1)], ids=str)
def test_every_change_of_the_step_is_exact(double, pieces):
    """Loss and gradients of the textbook step equal those with each of our changes, up to rounding in float64."""
    model, imgs, noise = double
    ours = gradients(model, imgs, noise)
    loss = model.reconstruction_loss(model.forward_pretrain(imgs, 0.75, noise))
    by_the_book = plain(deepcopy(model), *pieces)
    theirs = gradients(by_the_book, imgs, noise)
    assert set(ours) == set(theirs)
    assert largest_difference(ours, theirs) < 1e-12
    out = by_the_book.forward_pretrain(imgs, 0.75, noise)
    assert out.all_patches == ("removed" not in pieces)
    torch.testing.assert_close(by_the_book.reconstruction_loss(out), loss, rtol=1e-13, atol=0)


def test_images_of_another_size_are_refused():
    """An image with the same number of pixels in another shape is refused."""
    model = build_model("mae_vit_micro_patch4", img_size=(16, 24))
    with pytest.raises(ValueError, match=r"images are \(3, 24, 16\), .* the model takes \(3, 16, 24\)"):
        model(torch.zeros(1, 3, 24, 16))


def test_grad_checkpoint_keeps_less(double):
    """Autograd keeps fewer bytes, weights excluded, between forward and backward pass."""
    model, imgs, noise = double
    kept = {}
    for on in (False, True):
        model.set_grad_checkpointing(on)
        saved = {}

        def pack(x, saved=saved):
            return saved.setdefault(x.data_ptr(), x)

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.reconstruction_loss(model.forward_pretrain(imgs, 0.75, noise))
        own = {p.data_ptr() for p in model.parameters()}
        kept[on] = sum(x.numel() for pointer, x in saved.items() if pointer not in own)
    model.set_grad_checkpointing(False)
    assert kept[True] < 0.4 * kept[False], kept


@pytest.fixture
def recomputed(monkeypatch):
    """The number of blocks passed to checkpoint()."""
    calls = []
    original = kernels.checkpoint
    monkeypatch.setattr(kernels, "checkpoint", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    return calls


@pytest.mark.parametrize("methods", ["", "--rc_mae --ema_mae --wse 0"])
def test_checkpointed_run_is_the_same(image_folder, tmp_path, methods, recomputed):
    """Equal bit for bit: the same products are computed a second time."""
    common = f"--data_path {image_folder} --amp_dtype fp32 {methods}"
    plain, again = (
        pretrain(tmp_path / name, f"{common} {flag}") for name, flag in (("a", ""), ("b", "--grad_checkpoint"))
    )
    assert same_tensors(plain, again)
    assert len(recomputed) == 6 * (4 + 2)  # steps of the second run, blocks of encoder and decoder


def test_finetuning_checkpointed_is_the_same(image_folder, tmp_path, recomputed):
    """With drop path, whose random numbers must be equal the second time."""
    common = (
        f"--model vit_micro_patch4 --input_size 16 --data_path {image_folder} --aug crop --num_workers 0 "
        f"--epochs 1 --warmup_epochs 0 --lr 1e-3 --batch_size 16 --drop_path 0.3 --amp_dtype fp32"
    )
    for name, flag in (("a", ""), ("b", "--grad_checkpoint")):
        flags = f"{common} {flag} --output_dir {tmp_path / name}".split()
        main_finetune.main(main_finetune.get_args_parser().parse_args(flags))
    assert same_tensors(*(checkpoint(tmp_path / name, "checkpoint-0.pth")["model"] for name in "ab"))
    assert len(recomputed) == 6 * 4


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("methods", ["--rc_mae --log_grad_cosine 2", "--mlo_mae --mlo_labels same --mlo_batch_size 8"])
def test_compiled_run_is_the_same(image_folder, tmp_path, methods):
    """fp32: compiled kernels add in another order. Where a gradient is rounding only (the keys' bias, to which softmax
    is invariant), AdamW makes steps of 1e-3 of it: at most half a step of difference, almost none on average. With
    gradient diagnostics, which run a compiled graph twice."""
    torch._dynamo.utils.counters.clear()
    common = f"--data_path {image_folder} --amp_dtype fp32 {methods}"
    plain, compiled = (pretrain(tmp_path / name, f"{common} {flag}") for name, flag in (("a", ""), ("b", "--compile")))
    assert list(plain) == list(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0  # blocks were compiled
    assert largest_difference(plain, compiled) < 5e-4
    differences = torch.cat([(plain[name] - compiled[name]).abs().flatten() for name in plain])
    assert differences.mean() < 1e-6, differences.mean()
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)


def closed_formula(model, images, mask_ratio, decoder_patches):
    """Return the FLOPs of a training step of MAE: 24 D^2 per token and block (6 D^2 of them for queries, keys and
    values) and 4 T D per token for attention, three times, for forward and backward pass. The patch embedding needs no
    gradient of its input, and the decoder predicts `decoder_patches`."""
    length, width = model.patch_embed.num_patches, model.cls_token.shape[-1]
    narrow, pixels = model.mask_token.shape[-1], model.decoder_pred.out_features
    visible = int(length * (1 - mask_ratio))

    def blocks(tokens, width, depth):
        return depth * tokens * (24 * width**2 + 4 * tokens * width)

    per_image = 3 * blocks(1 + visible, width, len(model.blocks))
    per_image += 3 * blocks(1 + length, narrow, len(model.decoder_blocks) - 1)
    # The last block: keys and values of all tokens, the rest for predicted ones only.
    per_image += 3 * ((1 + length) * 6 * narrow**2 + decoder_patches * (18 * narrow**2 + 4 * (1 + length) * narrow))
    per_image += 2 * 2 * visible * pixels * width
    per_image += 3 * 2 * (1 + visible) * width * narrow + 3 * 2 * decoder_patches * narrow * pixels
    return images * per_image


@pytest.mark.parametrize("fused", [True, False])
def test_flops_are_those_of_the_formula(fused):
    model = build_model("mae_vit_micro_patch4", img_size=16)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    with flop_counter() as counter:
        model.reconstruction_loss(model.forward_pretrain(torch.randn(3, 3, 16, 16), 0.75)).backward()
    assert counter.get_total_flops() == closed_formula(model, 3, 0.75, decoder_patches=12)


def test_log_mfu(image_folder, tmp_path):
    """The logged MFU is plausible, and logging changes no number of the run, random states included."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = f"--data_path {image_folder} --amp_dtype fp32"
    plain, watched = (pretrain(tmp_path / name, f"{common} {flag}") for name, flag in (("a", ""), ("b", "--log_mfu")))
    assert same_tensors(plain, watched)
    events = EventAccumulator(str(tmp_path / "b")).Reload()
    assert all(0 < point.value < 110 for point in events.Scalars("speed/mfu_percent"))
    assert "speed/mfu_percent" not in EventAccumulator(str(tmp_path / "a")).Reload().Tags()["scalars"]


def test_matrix_rate_is_a_rate():
    state = torch.get_rng_state()
    rate = matrix_rate(torch.device("cpu"), torch.float32, seconds=0.05)
    assert 1e8 < rate < 1e14
    assert torch.equal(state, torch.get_rng_state())
