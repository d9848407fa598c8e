"""Recorded numbers of the reference implementations (tests/fixtures): MAE-K, EMA-MAE, RC-MAE and DMAE in float64."""

from functools import partial

import pytest
import torch
from helpers.small_models import reference_mae as mae
from helpers.tolerances import RTOL64, TOL32, close
from torch import nn

from methods import bootstrap, dmae, rcmae
from models_encoder import PatchEncoder, gather_tokens
from models_mae import MaskedAutoencoderViT
from util.compute.ema import ema_update


def same_gradients(model, reference, extra=None):
    """Compare all gradients; no parameter may have one in one model only."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | (extra or {})
    assert gradients.keys() == reference.keys()
    for name, gradient in gradients.items():
        close(gradient, reference[name])


# MAE-K, EMA-MAE -----------------------------------------------------------------------------------------------------


def bootstrapped(ref, dtype=torch.float64):
    """Return student and target of the fixture, whose loss compares the decoder's output without a further layer."""
    student = mae(ref.meta, ref.meta["ln_eps"])
    student.load_state_dict(ref.group("student/"), strict=True)
    target = student.encoder_copy()
    target.load_state_dict(ref.group("shadow/"), strict=True)
    return student.to(dtype), target.to(dtype)


@pytest.mark.parametrize("all_patches", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_bootstrap(golden, normalize, all_patches):
    ref = golden("bootstrap")
    student, target = bootstrapped(ref)
    imgs, name = ref["imgs"].double(), "norm" if normalize else "nonorm"
    out = student.forward_pretrain(
        imgs, float(ref["mask_ratio"]), ref["noise"], head=nn.Identity(), all_patches=all_patches
    )
    with torch.no_grad():
        features = bootstrap.target_features(target, imgs)
    close(features, ref["target"])
    close(bootstrap.normalized(features), ref["target_normalized"])
    close(out.decoded, out.select_predicted(ref["pred"]))
    loss = bootstrap.feature_loss(out, out.select_predicted(bootstrap.normalized(features) if normalize else features))
    close(loss, ref[f"loss_{name}"])
    loss.backward()
    same_gradients(student, ref.group(f"grad_{name}/"))
    student.norm_pix_loss = normalize
    out.pred = student.decoder_pred(out.decoded)
    close(student.reconstruction_loss(out), ref[f"pixel_loss_{name}"])


def test_bootstrap_float32(golden):
    ref = golden("bootstrap")
    student, target = bootstrapped(ref, torch.float32)
    out = student.forward_pretrain(ref["imgs"], float(ref["mask_ratio"]), ref["noise"], head=nn.Identity())
    features = out.select_predicted(bootstrap.target_features(target, ref["imgs"]))
    close(bootstrap.feature_loss(out, bootstrap.normalized(features)), ref["loss_norm_f32"], TOL32)
    close(bootstrap.feature_loss(out, features), ref["loss_nonorm_f32"], TOL32)


def test_bootstrap_average(golden):
    """The EMA rule of the fixture; its updates happen at other times than ours."""
    ref = golden("bootstrap")
    meta = ref.meta | ref.meta["ema"]["model"]
    student, shadow = mae(meta, meta["ln_eps"]).double(), mae(meta, meta["ln_eps"]).encoder_copy().double()
    shadow.load_state_dict(ref.group("ema/shadow0/"))
    for step in (1, 2, 3):
        student.load_state_dict(ref.group(f"ema/student{step}/"), strict=False)
        ema_update(shadow, student, 1 - float(ref["ema/alpha"]))
        for name, value in ref.group(f"ema/shadow{step}/").items():
            close(shadow.get_parameter(name), value)


# RC-MAE -------------------------------------------------------------------------------------------------------------


def consistent(ref, dtype, all_patches=True):
    """Return the losses of student and teacher of the fixture, and the student."""
    student = mae(ref.meta, norm_pix_loss=ref.meta["norm_pix_loss"]).to(dtype)
    teacher = mae(ref.meta, norm_pix_loss=ref.meta["norm_pix_loss"]).to(dtype)
    student.load_state_dict(ref.group("student/"))
    teacher.load_state_dict(ref.group("teacher/"))
    imgs = ref["imgs"].to(dtype)
    out = student.forward_pretrain(imgs, float(ref["mask_ratio"]), ref["noise"], all_patches=all_patches)
    prediction = rcmae.predict(teacher, teacher.decoder_pred, imgs, out.scores, out)
    losses = student.reconstruction_loss(out), rcmae.consistency_loss(out, prediction)
    return student, out, prediction, *losses


@pytest.mark.parametrize("all_patches", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_rc_mae(golden, gamma, all_patches):
    ref = golden("rc_mae")
    student, out, prediction, reconstruction, consistency = consistent(ref, torch.float64, all_patches)
    close(out.pred, out.select_predicted(ref["student_pred"]))
    close(prediction, out.select_predicted(ref["teacher_pred"]))
    close(reconstruction, ref["loss_student"])
    close(consistency, ref["loss_consistency"])
    total = reconstruction + gamma * consistency
    close(total, ref[f"loss_total_g{gamma}"])
    total.backward()
    same_gradients(student, ref.group(f"grad_g{gamma}/"))


def test_rc_mae_float32(golden):
    ref = golden("rc_mae")
    *_, reconstruction, consistency = consistent(ref, torch.float32)
    close(reconstruction, ref["loss_student_f32"], TOL32)
    close(consistency, ref["loss_consistency_f32"], TOL32)


@pytest.mark.parametrize(("suffix", "tolerance"), [("", RTOL64), ("_f32", TOL32)])
def test_rc_mae_average(golden, suffix, tolerance):
    """Teacher weights after three updates, of all parameters, including decoder and position tables."""
    dtype = torch.float32 if suffix else torch.float64
    ref = golden("rc_mae")
    student, teacher = (mae(ref.meta["ema"]["model"]).to(dtype) for _ in range(2))
    teacher.load_state_dict(ref.group("ema/teacher0/"))
    for step, momentum in enumerate(ref["ema/momentum"].tolist(), start=1):
        student.load_state_dict(ref.group(f"ema/student{step}/"))
        ema_update(teacher, student, 1 - momentum)
    reference = ref.group(f"ema/teacher3{suffix}/")
    assert reference.keys() == dict(teacher.named_parameters()).keys()
    for name, value in reference.items():
        close(teacher.get_parameter(name), value.to(dtype), tolerance)


def test_momentum_schedule(golden):
    ref = golden("rc_mae")
    for base, final, epochs, iterations in ref.meta["sched"]:
        steps = epochs * iterations
        ours = [rcmae.momentum_at(step, steps, base) for step in range(steps)]
        name = f"momentum_schedule/base{base}_final{final}_e{epochs}_it{iterations}"
        close(torch.tensor(ours, dtype=torch.float64), ref[name])
        # The momentum rises monotonically from the base; at the last step, one before the cosine's end, it is almost 1.
        assert final == 1.0 and ours[0] == pytest.approx(base) and ours == sorted(ours)
        assert 0 < 1 - ours[-1] < 0.1 * (1 - base)


# DMAE ---------------------------------------------------------------------------------------------------------------


def distilled(ref, dtype):
    """Return student, projections and losses of a fixture whose teacher has the student's geometry."""
    meta = ref.meta
    common = {name: meta[name] for name in ("img_size", "patch_size", "mlp_ratio")}
    student = mae(common | meta["student"], norm_pix_loss=meta["norm_pix_loss"])
    weights = ref.group("student/")
    heads = {name: weights.pop(name) for name in list(weights) if name.startswith("aligned_")}
    student.load_state_dict(weights, strict=True)
    student = student.to(dtype)
    teacher = mae(common | meta["teacher"]).encoder_copy()
    teacher.load_state_dict(ref.group("teacher/"), strict=True)
    teacher = teacher.to(dtype)
    imgs = ref["imgs"].to(dtype)
    out = student.forward_pretrain(imgs, float(ref["mask_ratio"]), ref["noise"], meta["aligned"])
    with torch.no_grad():
        tokens = gather_tokens(teacher.embed(imgs), out.ids_keep)
        features = teacher.encode(tokens, meta["teacher_aligned"])[1]
    projection = {"fc-1layer": "linear", "mlp-1layer": "mlp", None: "none"}[meta["proj_mode"]]
    width, teacher_width = meta["student"]["embed_dim"], meta["teacher"]["embed_dim"]
    projections = nn.ModuleList([dmae._projection(projection, width, teacher_width) for _ in meta["aligned"]]).to(dtype)
    names = {f"aligned_feature_projection_heads.{_theirs(key)}": key for key in projections.state_dict()}
    projections.load_state_dict({names[name]: value for name, value in heads.items()})
    losses = [
        dmae.alignment_loss(project(out.blocks[s]), features[t], meta["func"].lower(), normalize=projection != "none")
        for project, s, t in zip(projections, meta["aligned"], meta["teacher_aligned"])
    ]
    return student, projections, names, out, features, losses


def _theirs(name):
    """0.weight -> 0.weight, 1.0.bias -> 1.fc1.bias, 1.2.bias -> 1.fc2.bias."""
    return name.replace(".0.", ".fc1.").replace(".2.", ".fc2.")


@pytest.mark.parametrize("name", ["dmae_fc", "dmae_mlp", "dmae_noproj_l2"])
def test_dmae(golden, name):
    ref = golden(name)
    student, projections, names, out, features, losses = distilled(ref, torch.float64)
    assert torch.equal(out.ids_keep, ref["ids_keep"]) and torch.equal(out.mask, ref["mask"].float())
    for i, (mine, its) in enumerate(zip(ref.meta["aligned"], ref.meta["teacher_aligned"])):  # numbered by pair
        close(out.blocks[mine], ref[f"student_feat{i}"])
        close(features[its], ref[f"teacher_feat{i}"])
    for block, loss in zip(ref.meta["aligned"], losses):
        close(loss, ref[f"loss_align_block{block}"])
    reconstruction = student.reconstruction_loss(out)
    close(reconstruction, ref["loss_rec"])
    total = reconstruction + sum(losses)
    close(total, ref["loss_total"])
    total.backward()
    theirs = {ours: name for name, ours in names.items()}
    same_gradients(student, ref.group("grad/"), {theirs[k]: p.grad for k, p in projections.named_parameters()})


@pytest.mark.parametrize("name", ["dmae_fc", "dmae_mlp", "dmae_noproj_l2"])
def test_dmae_float32(golden, name):
    ref = golden(name)
    *_, losses = distilled(ref, torch.float32)
    for block, loss in zip(ref.meta["aligned"], losses):
        close(loss, ref[f"loss_align_block{block}_f32"], TOL32)


OTHER_NAMES = [
    ("encoder.proj_st_2_teach.", "projection."),
    ("decoder.mask_token", "mask_token"),
    ("decoder.pos_embedding", "decoder_pos_embed"),
    ("decoder.input_layer.", "decoder_embed."),
    ("decoder.neck.", "decoder_blocks."),
    ("decoder.norm.", "decoder_norm."),
    ("decoder.pred_proj.", "decoder_pred."),
    ("encoder.", ""),
    ("pos_embedding", "pos_embed"),
    ("input_layer.", "patch_embed."),
    ("backbone.", "blocks."),
]


def renamed(group):
    """Return the arrays of a fixture with its reference's names replaced by ours."""
    result = {}
    for name, value in group.items():
        for theirs, ours in OTHER_NAMES:
            if name.startswith(theirs):
                name = ours + name[len(theirs) :]
        result[name] = value
    return result


@pytest.mark.parametrize("name", ["dmae_alt_tiny", "dmae_alt_real_geometry"])
def test_dmae_geometry(golden, name):
    """A teacher of another patch and image size. Ours resizes the image and uses the inner grid, without the padding
    whose tokens that reference discards; the position table is the reference's fresh one."""
    ref = golden(name)
    meta, grid = ref.meta, (ref.meta["grid"],) * 2
    part = meta["student"]
    student = MaskedAutoencoderViT(
        meta["img_dim"],
        meta["patch_size"],
        3,
        part["embed_dim"],
        part["num_layers"],
        part["num_heads"],
        part["dec_embed_dim"],
        part["dec_num_layers"],
        part["dec_num_heads"],
        part["ratio"],
        partial(nn.LayerNorm, eps=1e-6),
        norm_pix_loss=True,
    )
    weights = renamed(ref.group("student/"))
    projection = dmae._projection("mlp", part["embed_dim"], meta["teacher"]["embed_dim"])
    projection.load_state_dict({k[11:]: weights.pop(k) for k in list(weights) if k.startswith("projection.")})
    student.load_state_dict(weights, strict=True)
    student, projection = student.double(), projection.double()

    patch, side = meta["teacher"]["patch_size"], meta["teacher_img"] // meta["teacher"]["patch_size"]
    assert dmae.grid_offset(grid, (side, side), patch) == (meta["margin_tokens"],) * 2
    size = (grid[0] * patch, grid[1] * patch)
    assert size == (meta["resize"],) * 2
    teacher = PatchEncoder(
        size,
        patch,
        3,
        meta["teacher"]["embed_dim"],
        meta["teacher"]["num_layers"],
        meta["teacher"]["num_heads"],
        meta["teacher"]["ratio"],
        partial(nn.LayerNorm, eps=1e-6),
    )
    teacher.load_state_dict({**teacher.state_dict(), **renamed(ref.group("teacher/"))})
    teacher = teacher.double()

    imgs = ref["imgs"].double()
    larger = dmae.resized(imgs, size)
    close(larger[0, 0], ref["resized_img0_ch0"])
    out = student.forward_pretrain(imgs, float(ref["mask_ratio"]), ref["noise"], [part["extract_lay"] - 1])
    last = meta["teacher"]["num_layers"] - 1
    with torch.no_grad():
        features = teacher.encode(gather_tokens(teacher.embed(larger), out.ids_keep), [last])[1][last]
    projected = projection(out.blocks[part["extract_lay"] - 1])
    close(features, ref["teacher_out"])
    close(projected, ref["student_projected"])
    distillation = dmae.alignment_loss(projected, features)
    close(distillation, ref["loss_dist"])
    # The only difference: that reference normalises pixels with 1e-5, MAE with 1e-6.
    patches = out.select_predicted(student.patchify(imgs))
    mean, var = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
    error = ((out.pred - (patches - mean) / (var + 1e-5).sqrt()) ** 2).mean(-1)
    reconstruction = out.mean_over_predicted(error)
    close(reconstruction, ref["loss_rec"])
    (reconstruction + float(ref["alpha"]) * distillation).backward()
    gradients = renamed(ref.group("grad/"))
    own = {f"projection.{name}": p.grad for name, p in projection.named_parameters()}
    same_gradients(student, gradients, own)
