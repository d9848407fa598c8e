"""The cross-attention decoder: inputs of a prediction, selection of the predicted patches, and training runs."""

import json

import pytest
import torch
from helpers.launch import checkpoint
from torch import nn

import main_pretrain
import models_mae
import models_vit
from models_mae import CrossAttention, build_model
from util.errors import UserError
from util.weights.load import load_into, read_weights

SMALL = (
    "--model mae_vit_micro_patch4 --input_size 16 --aug none --num_workers 0 --warmup_epochs 0 --epochs 1 "
    "--lr 1e-3 --vis_freq 1 --batch_size 16 --device cpu --amp_dtype fp32 --decoder cross"
)


def make_model(**overrides):
    torch.manual_seed(0)
    model = build_model("mae_vit_micro_patch4", img_size=16, decoder="cross", **overrides).double()
    return model, torch.randn(3, 3, 16, 16).double(), torch.rand(3, 16)


def pretrain(folder, data, flags=""):
    flags = f"{SMALL} --data_path {data} --output_dir {folder} {flags}".split()
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags))
    return checkpoint(folder, "checkpoint-0.pth")


def test_predictions_do_not_depend_on_one_another():
    """The prediction of a patch does not depend on which others are predicted (in float64, up to rounding)."""
    model, imgs, noise = make_model()
    every, removed = (
        model.forward_pretrain(imgs, 0.75, noise, all_patches=all_patches) for all_patches in (True, False)
    )
    assert removed.pred.shape == (3, 12, 48) and every.pred.shape == (3, 16, 48)
    torch.testing.assert_close(every.pred.gather(1, removed.ids_removed[..., None].expand(-1, -1, 48)), removed.pred)
    model.decoder_fraction = 0.4
    few = model.forward_pretrain(imgs, 0.75, noise)
    assert few.pred.shape == (3, 5, 48)  # 0.4 * 12, rounded up
    torch.testing.assert_close(few.pred, removed.pred[:, :5])
    assert torch.equal(few.ids_predicted, few.ids_removed[:, :5])
    torch.testing.assert_close(model.reconstruction_loss(few), model.patch_errors(removed)[:, :5].mean())


def test_a_query_depends_only_on_its_position():
    """The derivative of an output with respect to the position embedding of another query is exactly zero."""
    model, imgs, noise = make_model()
    out = model.forward_pretrain(imgs[:1], 0.75, noise[:1])
    table = model.decoder_pos_embed.requires_grad_()
    outputs = model.decode_removed(out.latent.detach(), out.ids_keep, out.ids_removed)[0].square().sum(-1)
    slopes = torch.stack([torch.autograd.grad(output, table, retain_graph=True)[0][0] for output in outputs])
    slopes_of_queries = slopes.abs().sum(-1)[:, 1 + out.ids_removed[0]]
    assert torch.equal(slopes_of_queries != 0, torch.eye(12, dtype=torch.bool))


@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_that_of_torch(fused):
    """The output equals that of torch's multi-head attention with the same weights, up to rounding in float64."""
    torch.manual_seed(0)
    ours, theirs = CrossAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    ours.fused_attn = fused
    theirs.load_state_dict(
        {
            "in_proj_weight": torch.cat([ours.q.weight, ours.kv.weight]),
            "in_proj_bias": torch.cat([ours.q.bias, ours.kv.bias]),
            "out_proj.weight": ours.proj.weight,
            "out_proj.bias": ours.proj.bias,
        }
    )
    x, memory = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    torch.testing.assert_close(ours(x, memory), theirs(x, memory, memory)[0], rtol=1e-12, atol=1e-12)


def test_decoders_have_different_tensor_names(image_folder, tmp_path):
    """Loading a checkpoint into a model with the other decoder is an error; its encoder can be loaded into both."""
    saved = pretrain(tmp_path / "a", image_folder)
    decoder = {name.split(".")[0] for name in saved["model"] if "decoder" in name}
    assert "decoder_cross_blocks" in decoder and "decoder_blocks" not in decoder
    with pytest.raises(UserError, match=r"depth 2 \(cross\), but the model has one of width 96, depth 2, .*--decoder"):
        load_into(build_model("mae_vit_micro_patch4", img_size=16), read_weights(tmp_path / "a" / "checkpoint-0.pth"))
    load_into(build_model("mae_vit_micro_patch4", img_size=16), read_weights(tmp_path / "a" / "encoder.safetensors"))


def test_a_random_third_is_predicted(image_folder, tmp_path):
    """By default a third of the removed patches is predicted, and all patches are predicted equally often."""
    args = main_pretrain.get_args_parser().parse_args(f"{SMALL} --data_path {image_folder}".split())
    main_pretrain.settle(args)
    model = main_pretrain.build(args)
    out = model.forward_pretrain(torch.zeros(4000, 3, 16, 16), 0.75, torch.rand(4000, 16))
    assert out.ids_predicted.shape == (4000, 4)
    counts = out.ids_predicted.flatten().bincount(minlength=16)
    assert (counts - 1000).abs().max() < 5 * (1000 * 0.75) ** 0.5  # five standard deviations of a binomial count


@pytest.mark.parametrize(
    "methods",
    ["--rc_mae --rc_mask different", "--mae_k 2", "--ema_mae --wse 0 --rc_mae", "--mlo_mae --mlo_labels same"],
)
def test_methods_run_with_the_cross_decoder(image_folder, tmp_path, methods):
    """Every method trains the keys and values of both decoder blocks when not all patches are predicted."""
    saved = pretrain(tmp_path / "a", image_folder, methods + " --mlo_batch_size 8" * ("mlo" in methods))
    fresh = build_model("mae_vit_micro_patch4", img_size=16, decoder="cross").state_dict()
    assert set(fresh) == set(saved["model"])
    (row,) = [json.loads(line) for line in (tmp_path / "a" / "log.txt").read_text().splitlines()]
    assert row["train/loss"] > 0
    # The biases of keys and values start at zero and have a gradient in every method.
    biases = [name for name in fresh if name.startswith("decoder_cross_blocks") and name.endswith("kv.bias")]
    assert all(saved["model"][name].abs().sum() > 0 for name in biases) and len(biases) == 2


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--decoder self --decoder_fraction 0.5", "--decoder_fraction has no effect without --decoder cross"),
        ("--decoder_fraction 0", r"--decoder_fraction 0.0 must lie in \(0, 1\]"),
        ("--decoder_fraction 1.5", r"--decoder_fraction 1.5 must lie in \(0, 1\]"),
        (
            "--decoder_fraction 0.5 --mlo_mae --mlo_labels same",
            "not a random part of the removed patches, but those that --mlo_mae, which decides the mask, scores lowest",
        ),
    ],
)
def test_mistakes(flags, message):
    args = main_pretrain.get_args_parser().parse_args(f"{SMALL} {flags}".split())
    with pytest.raises(UserError, match=message):
        main_pretrain.check(args)


@pytest.mark.parametrize("name, millions", [("1b", 1134), ("2b", 1889), ("6.5b", 6442)])
def test_sizes_of_the_large_models(name, millions):
    """The models have about as many parameters as their names say. They are built on the meta device, which needs no
    memory."""
    with torch.device("meta"):
        model = models_vit.MODELS[f"vit_{name}_patch14"](num_classes=0)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)
    assert f"mae_vit_{name}_patch14" in models_mae.MODELS
