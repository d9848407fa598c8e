"""Recorded numbers of the reference implementations (tests/fixtures): networks, positions, schedules, optimizers."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.tolerances import RTOL64, TOL32, close
from timm.optim import param_groups_weight_decay
from torch import nn

import models_mae
import models_vit
from util.lars import LARS
from util.lr_decay import param_groups_lrd
from util.lr_sched import adjust_learning_rate
from util.pos_embed import get_2d_sincos_pos_embed, interpolate_pos_embed


def mae_of(meta, dtype):
    names = "img_size patch_size embed_dim depth num_heads decoder_embed_dim decoder_depth decoder_num_heads".split()
    model = models_mae.MaskedAutoencoderViT(
        **{name: meta[name] for name in names},
        norm_pix_loss=meta["norm_pix_loss"],
        norm_layer=partial(nn.LayerNorm, eps=meta["ln_eps"]),
    )
    return model.to(dtype)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", ["mae_a", "mae_b", "mae_c"])
def test_mae_float64(golden, name, trained):
    """`trained`: gradients of the training pass, which predicts the removed patches alone."""
    ref = golden(name)
    model = mae_of(ref.meta, torch.float64)
    model.load_state_dict(ref.group("sd/"), strict=True)
    imgs, noise, ratio = ref["imgs"].double(), ref["noise"], float(ref["mask_ratio"])

    loss, pred, mask = model(imgs, mask_ratio=ratio, noise=noise)
    if trained:
        out = model.forward_pretrain(imgs, ratio, noise)
        assert torch.equal(out.mask, mask) and torch.equal(out.ids_restore, ref["ids_restore"])
        close(out.pred, out.select_predicted(ref["pred"]))
        assert torch.equal(out.scatter_predicted(out.select_predicted(mask)), mask)
        loss = model.reconstruction_loss(out)
    loss.backward()
    latent, _, ids_restore = model.forward_encoder(imgs, ratio, noise)

    close(loss, ref["loss"])
    close(pred, ref["pred"])
    close(latent, ref["latent"])
    assert torch.equal(mask, ref["mask"].float())
    assert torch.equal(ids_restore, ref["ids_restore"])
    if "target" in ref.arrays.files:
        close(model.pixel_target(imgs), ref["target"])
    gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert set(gradients) == set(ref.group("grad/"))
    for key, gradient in ref.group("grad/").items():
        close(gradients[key], gradient)


@pytest.mark.parametrize("name", ["mae_a", "mae_b", "mae_c"])
def test_mae_float32(golden, name):
    ref = golden(name)
    model = mae_of(ref.meta, torch.float32)
    model.load_state_dict(ref.group("sd/"), strict=True)
    loss, pred, _ = model(ref["imgs"], mask_ratio=float(ref["mask_ratio"]), noise=ref["noise"])
    close(loss, ref["loss_f32"], TOL32)
    close(pred, ref["pred_f32"], TOL32)


def vit_of(meta):
    names = "img_size patch_size embed_dim depth num_heads num_classes global_pool".split()
    norm = partial(nn.LayerNorm, eps=meta["ln_eps"])
    return models_vit.VisionTransformer(**{name: meta[name] for name in names}, norm_layer=norm)


@pytest.mark.parametrize("name", ["vit_a", "vit_b"])
def test_vit(golden, name):
    ref = golden(name)
    model = vit_of(ref.meta).double().eval()
    model.load_state_dict(ref.group("sd/"), strict=True)
    features = model.forward_features(ref["imgs"].double())
    logits = model(ref["imgs"].double())
    ce = nn.functional.cross_entropy(logits, ref["labels"])
    ce.backward()
    close(features, ref["features"])
    close(logits, ref["logits"])
    close(ce, ref["ce"])
    gradients = dict(model.named_parameters())
    for key, gradient in ref.group("grad/").items():
        close(gradients[key].grad, gradient)
    close(model.float()(ref["imgs"]), ref["logits_f32"], TOL32)


@pytest.mark.parametrize("name", ["vit_a", "vit_b"])
def test_layer_decay_groups(golden, name):
    ref = golden(name)
    model = vit_of(ref.meta)
    groups = param_groups_lrd(model, ref.meta["weight_decay"], model.no_weight_decay(), ref.meta["layer_decay"])
    names = {id(p): key for key, p in model.named_parameters()}
    ours = {names[id(p)]: [g["lr_scale"], g["weight_decay"]] for g in groups for p in g["params"]}
    theirs = ref.json("lrd_json")
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=1e-12)


def test_probe_crop_is_one_draw_cut_to_the_image():
    """On a narrow image most draws do not fit: they are clamped to its width; torchvision would draw again."""
    from util.crop import RandomResizedCrop

    img = torch.zeros(3, 100, 20)
    boxes = [RandomResizedCrop.get_params(img, (0.5, 1.0), (3 / 4, 4 / 3)) for _ in range(200)]
    assert all(top >= 0 and top + h <= 100 and left == 0 and w == 20 for top, left, h, w in boxes)
    heights = torch.tensor([h for _, _, h, _ in boxes], dtype=torch.float)
    # sqrt(area / aspect) with area in 1000..2000 and aspect in 3/4..4/3: from 27.4 to 51.6
    assert heights.min() >= 27 and heights.max() <= 52 and heights.std() > 3


def test_positions(golden):
    ref = golden("pos_embed")
    for dim, grid in ref.meta["sincos"]:
        ours = get_2d_sincos_pos_embed(dim, grid, cls_token=True)
        np.testing.assert_allclose(ours, ref[f"sincos/d{dim}_g{grid}"].numpy(), rtol=0, atol=1e-12)


def test_position_interpolation(golden):
    ref = golden("pos_embed")
    dim, _, grids = ref.meta["interp"][0]
    for grid in grids:
        model = models_mae.MaskedAutoencoderViT(
            img_size=grid, patch_size=1, embed_dim=dim, depth=0, num_heads=1, decoder_depth=0, decoder_embed_dim=4
        )
        for suffix, dtype, tolerance in (("", torch.float64, RTOL64), ("_f32", torch.float32, TOL32)):
            state = {"pos_embed": ref["interp0/in"].to(dtype)}
            interpolate_pos_embed(model, state)
            close(state["pos_embed"], ref[f"interp0/g{grid}{suffix}"].to(dtype), tolerance)


def test_learning_rate(golden):
    ref = golden("schedules")
    for i in range(len(ref.meta["lr"])):
        lr, min_lr, warmup, epochs = ref[f"lr{i}/args"].tolist()
        args = SimpleNamespace(lr=lr, min_lr=min_lr, warmup_epochs=warmup, epochs=epochs)
        optimizer = SimpleNamespace(param_groups=[{}, {"lr_scale": 0.3164}])
        for epoch, plain, scaled in zip(ref[f"lr{i}/epoch"], ref[f"lr{i}/lr"], ref[f"lr{i}/lr_scaled_0.3164"]):
            assert adjust_learning_rate(optimizer, float(epoch), args) == pytest.approx(float(plain), rel=1e-12)
            assert optimizer.param_groups[1]["lr"] == pytest.approx(float(scaled), rel=1e-12)


@pytest.mark.parametrize("i", [0, 1])
def test_lars(golden, i):
    ref = golden("schedules")
    setting = ref.meta["lars"][i]
    options = {key: setting[key] for key in ("lr", "momentum", "weight_decay", "trust_coefficient")}
    for suffix, dtype, tolerance in (("", torch.float64, 1e-12), ("_f32", torch.float32, TOL32)):
        params = {key: nn.Parameter(value.to(dtype)) for key, value in ref.group(f"lars{i}/p0/").items()}
        optimizer = LARS(params.values(), **options)
        for t in range(5):
            for key, p in params.items():
                p.grad = ref[f"lars{i}/grad{t}/{key}"].to(dtype)
            if "lr_steps" in setting:
                optimizer.param_groups[0]["lr"] = setting["lr_steps"][t]
            optimizer.step()
            for key, p in params.items():
                if suffix == "" or f"lars{i}/p{t + 1}{suffix}/{key}" in ref.arrays.files:
                    close(p.detach(), ref[f"lars{i}/p{t + 1}{suffix}/{key}"].to(dtype), tolerance)


def test_weight_decay_groups(golden):
    ref = golden("schedules")
    model = models_mae.MaskedAutoencoderViT(**ref.meta["wd_model"])
    names = {id(p): key for key, p in model.named_parameters()}
    groups = param_groups_weight_decay(model, ref.meta["wd"])
    ours = {names[id(p)]: g["weight_decay"] for g in groups for p in g["params"]}
    assert ours == ref.json("adamw_wd_json")


@pytest.mark.parametrize("name", ["vit_a", "vit_b"])
def test_probe_head(golden, name):
    """BatchNorm without affine in front of the linear head: training and inference statistics."""
    from main_linprobe import probe_head

    ref = golden(name)
    head = probe_head(nn.Linear(ref.meta["embed_dim"], ref.meta["num_classes"])).double()
    head[1].load_state_dict({key: ref[f"sd/head.{key}"] for key in ("weight", "bias")})
    close(head(ref["features"]), ref["linprobe_logits_train"])
    close(head[0].running_mean, ref["linprobe_running_mean"])
    close(head[0].running_var, ref["linprobe_running_var"])
    close(head.eval()(ref["features"]), ref["linprobe_logits_eval"])
