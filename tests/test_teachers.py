"""MAE-K, EMA-MAE, RC-MAE and DMAE in the engine: what teachers may cost, what is kept, what may be combined."""

import argparse
import itertools
import json
import math
import re
import sys

import pytest
import torch
from launch import ROOT, SMALL, checkpoint, finish, launch, log_rows, same_tensors, scalars
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_fixtures import close
from test_method_fixtures import mae
from test_resume import stop_at
from timm.optim import param_groups_weight_decay

import main_finetune
import main_linprobe
import main_pretrain
import methods.bootstrap
import methods.rcmae
import util.ema
from methods import METHODS, Pretrainer, add_method_arguments, enabled_methods
from methods.bootstrap import collapse, copied_at, target_features
from methods.dmae import DMAE, aligned_blocks
from methods.rcmae import RCMAE, gradient_cosine, momentum_at
from models_mae import build_model
from util.errors import UserError
from util.lr_sched import adjust_learning_rate
from util.rng import redrawn, sample_noise

sys.path.insert(0, str(ROOT / "tools"))
import knn
import visualize

BASE = f"{SMALL} --warmup_epochs 1 --blr 0.01 --num_workers 0 --vis_freq 0 --print_freq 1 --device cpu --amp_dtype fp32"
TARGETS = {"": "", "mae_k": "--mae_k 1", "ema_mae": "--ema_mae --wse 1"}
ADDED = {"rc_mae": "--rc_mae", "dmae": "--dmae_teacher {teacher} --mean 0.5 0.5 0.5 --std 0.25 0.25 0.25"}
LEGAL = [
    (target, *added) for target in TARGETS for n in range(3) for added in itertools.combinations(ADDED, n)
]  # fmt: skip


def pretrain(flags: str):
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags.split()))


def switches(names, teacher="") -> str:
    return " ".join((TARGETS | ADDED)[name] for name in names if name).format(teacher=teacher)


@pytest.fixture(scope="module")
def teacher(image_folder, tmp_path_factory):
    """A pretrained autoencoder of the model that all tests here use."""
    folder = tmp_path_factory.mktemp("teacher")
    flags = "--mean 0.5 0.5 0.5 --std 0.25 0.25 0.25 --epochs 15 --batch_size 16"
    pretrain(f"{BASE} {flags} --data_path {image_folder} --output_dir {folder}")
    return folder / "checkpoint-14.pth"


def made(flags: str, steps=100):
    """The pretrainer of these flags, and the flags."""
    args = main_pretrain.get_args_parser().parse_args(f"{BASE} --epochs 10 {flags}".split())
    chosen = main_pretrain.check(args)
    args.input_size = args.input_size[0]
    torch.manual_seed(0)
    model = main_pretrain.build(args)
    return Pretrainer(model, [method(args, model) for method in chosen], steps), args


def stepped(pretrainer, count=1, applied=1.0, first=0):
    optimizer = torch.optim.AdamW(
        param_groups_weight_decay(pretrainer, 0.05, no_weight_decay_list=pretrainer.no_weight_decay()), lr=1e-3
    )
    pretrainer.train()
    for step in range(first, first + count):
        imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
        pretrainer(imgs, 0.75, noise)[0].backward()
        optimizer.step()
        gradients = {name: p.grad for name, p in pretrainer.named_parameters()}
        optimizer.zero_grad()
        pretrainer.after_update(imgs, step, torch.tensor(applied))
    return gradients


# What may be combined -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", ["", "--norm_pix_loss"], ids=["", "norm_pix"])
@pytest.mark.parametrize("names", LEGAL, ids=["+".join(filter(None, names)) or "mae" for names in LEGAL])
def test_every_legal_combination(names, pixels, teacher):
    """Two steps each, in the pixel stage and in the feature stage: parts as named, gradients for the student alone."""
    pretrainer, _ = made(f"{switches(names, teacher)} {pixels}")
    expected = {"rc_mae": "consistency", "dmae": "distillation"}
    for epoch in (0, 1):
        pretrainer.before_epoch(epoch)
        gradients = stepped(pretrainer, 2)
        first = "features" if epoch and names[0] else "reconstruction"
        assert list(pretrainer.parts) == [first] + [expected[name] for name in names if name in expected]
        trained = {name for name, p in pretrainer.named_parameters() if p.requires_grad}
        assert {name for name, gradient in gradients.items() if gradient is not None} == trained
        assert not any(".teacher." in name or ".target." in name or ".heads." in name for name in trained)
        idle = {name for name in trained if gradients[name].abs().max() == 0}
        waits = "decoder_pred." if epoch else ".head."  # of a bootstrapped run; the keys' bias never gets a gradient
        assert idle == {name for name in trained if names[0] and waits in name}
    assert all(torch.isfinite(value) for value in pretrainer.parts.values())


def test_illegal_combinations(teacher):
    both = re.escape("--mae_k and --ema_mae both decide the target: give one of them")
    for names in itertools.product(("", "rc_mae"), ("", "dmae")):
        with pytest.raises(UserError, match=both):
            made(f"--mae_k 1 --ema_mae --wse 1 {switches(names, teacher)}")


OPTIONS = {name: method for method in METHODS for name in method.options}


@pytest.mark.parametrize("option", OPTIONS)
def test_flags_without_effect(option):
    """Every option is refused without its method, also when its value is the default."""
    action = next(a for a in main_pretrain.get_args_parser()._actions if f"--{option}" in a.option_strings)
    default = OPTIONS[option].options[option]
    values = [""] if action.nargs == 0 else [f" {value}" for value in (*(action.choices or ["1"]), default) if value]
    switch = "--mae_k or --ema_mae" if option.startswith("bootstrap") else OPTIONS[option].flag
    other = "--mae_k 1" if OPTIONS[option].flag == "--rc_mae" else "--rc_mae"
    for value, beside in itertools.product(values, ("", other)):
        with pytest.raises(UserError, match=f"^--{option} has no effect without {switch}$"):
            made(f"{beside} --{option}{value}")


def test_options_have_their_defaults():
    args = made("--ema_mae --rc_mae")[1]
    assert (args.wse, args.tau, args.ema_update, args.bootstrap_layers) == (20, 0.005, "epoch", 1)
    assert (args.rc_gamma, args.rc_momentum, args.rc_schedule, args.rc_mask) == (1.0, 0.996, "cosine", "same")
    # A second check of the same flags (a job that is queued again) says the same.
    assert [method.name for method in enabled_methods(args, METHODS)] == ["ema_mae", "rc_mae"]


def test_help_names_paper_and_use():
    parser = argparse.ArgumentParser()
    add_method_arguments(parser, METHODS)
    text = " ".join(parser.format_help().split())
    for method in METHODS:
        assert method.title in text and method.summary in text
        assert "Choose it" in method.summary and method.flag in text
        assert all(f"--{option}" in text for option in method.options)


@pytest.mark.parametrize(("flags", "message"), [
    ("--mae_k 0", "--mae_k 0 must be at least 1 epoch"),
    ("--ema_mae --wse -1", "--wse -1 must not be negative"),
    ("--ema_mae --tau 1.5", "--tau 1.5 must lie between 0"),
    ("--ema_mae --tau nan", "--tau nan is not finite"),
    ("--mae_k 1 --bootstrap_head none", "--bootstrap_head none needs .* --decoder_embed_dim 128, not 32"),
    ("--mae_k 1 --bootstrap_layers 5", "--bootstrap_layers 5 must be between 1 and the encoder's 4"),
    ("--rc_mae --rc_gamma -1", "--rc_gamma -1.0 must not be negative"),
    ("--rc_mae --rc_momentum 1.1", "--rc_momentum 1.1 must lie between 0 and 1"),
    ("--rc_mae --log_grad_cosine -2", "--log_grad_cosine -2 must not be negative"),
    ("--rc_mae --rc_gamma 0 --log_grad_cosine 5", "--log_grad_cosine has no effect with --rc_gamma 0"),
    ("--rc_mae --rc_gamma 0 --rc_mask different", "--rc_mask has no effect with --rc_gamma 0"),
    ("--dmae_teacher {t} --dmae_alpha 0", "--dmae_alpha 0.0 must be positive"),
    ("--dmae_teacher {t} --dmae_blocks 9", "--dmae_blocks 9 must be student:teacher pairs"),
    ("--dmae_teacher {t} --dmae_blocks 1:5", "--dmae_blocks 1:5 is out of range: .* 1 to 4, the teacher 1 to 4"),
    ("--dmae_teacher {t} --dmae_blocks 1:2,1:3", "--dmae_blocks 1:2,1:3 aligns a block of the student twice"),
    ("--dmae_teacher {t} --dmae_teacher_model mae_vit_base_patch16", "--dmae_teacher_model"),
    ("--dmae_teacher {t} --dmae_teacher_model nonsense", "nonsense"),
    ("--dmae_teacher /nowhere.pth", "/nowhere.pth does not exist"),
    # Three pairings of grids that cannot meet (the teacher has patches of 4 pixels, 4x4 of them).
    ("--dmae_teacher {t} --input_size 32", "8x8 patches do not fit into the teacher's 4x4: --dmae_teacher_size 32"),
    ("--dmae_teacher {t} --dmae_teacher_size 20", "whole number of tokens .*: --dmae_teacher_size 16 or 24 does"),
    ("--dmae_teacher {t} --dmae_teacher_size 18", "--dmae_teacher_size 18 must be a multiple .* 4: 16 or 20 would fit"),
])  # fmt: skip
def test_refusals(flags, message, teacher):
    with pytest.raises(UserError, match=message):
        made(flags.format(t=teacher))


# Teachers -----------------------------------------------------------------------------------------------------------


def saved_bytes(pretrainer):
    """What one forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _, _ = pretrainer(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
    loss.backward()
    return sum(kept.values())


def test_no_graph_of_a_teacher_is_kept(teacher):
    """Beyond what the method's own differentiable parts need: a prediction, a head, a projection."""
    plain = saved_bytes(made("")[0])
    for names in LEGAL[1:]:
        pretrainer, _ = made(switches(names, teacher))
        pretrainer.before_epoch(1)
        saved_bytes(pretrainer)  # the first pass also introduces a pretrained teacher
        # A teacher's graph would be another `plain` at least (bootstrap: four times the tokens).
        assert saved_bytes(pretrainer) < 1.25 * plain, names


def test_teachers_stay_asleep(teacher):
    """No gradient, eval mode whatever happens, and only what is needed runs."""
    pretrainer, _ = made(switches(("ema_mae", "rc_mae", "dmae"), teacher))
    pretrainer.before_epoch(1)
    pretrainer.train()
    parts = pretrainer.methods
    sleepers = [parts["ema_mae"].target, parts["rc_mae"].teacher, *parts["rc_mae"].heads.values(),
                parts["dmae"]._teacher[0]]  # fmt: skip
    for sleeper in sleepers:
        assert not any(module.training for module in sleeper.modules())
        assert not any(p.requires_grad for p in sleeper.parameters())
    seen = []

    def watch(name):
        return lambda module, inputs, output: seen.append((name, inputs[0].shape[1], output.requires_grad))

    for name, sleeper in zip(("target", "ema", "pretrained"), (sleepers[0], sleepers[1], sleepers[-1])):
        for block in sleeper.network.blocks:
            block.register_forward_hook(watch(name))
    pretrainer(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
    assert not any(requires_grad for *_, requires_grad in seen)
    # The target sees all 16 patches, the others the 4 visible ones; the pretrained one stops after block 3 of 4.
    assert [(name, tokens) for name, tokens, _ in seen] == (
        [("target", 17)] * 4 + [("ema", 5)] * 4 + [("pretrained", 5)] * 3
    )  # fmt: skip
    assert not hasattr(sleepers[-1].network, "decoder_blocks")


def test_skipped_steps_move_no_teacher():
    """`applied` 0: bit for bit."""
    pretrainer, _ = made("--ema_mae --wse 0 --ema_update step --tau 0.5 --rc_mae --rc_momentum 0.5")
    pretrainer.before_epoch(0)
    before = {name: value.clone() for name, value in pretrainer.methods.state_dict().items() if "extra" not in name}
    stepped(pretrainer, 1, applied=0.0)
    after = pretrainer.methods.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"ema_mae.head.weight", "ema_mae.head.bias"}
    stepped(pretrainer, 1, applied=1.0)
    assert not torch.equal(before["rc_mae.teacher.network.decoder_pred.weight"],
                           after["rc_mae.teacher.network.decoder_pred.weight"])  # fmt: skip


def test_average_after_real_steps_only(image_folder, tmp_path, monkeypatch):
    """Accumulation 4: one update per step. A scaler that skips (fp16, far too large a scale): none in those steps."""
    calls = []

    def spy(teacher, student, rate, applied=1.0):
        before = {name: p.clone() for name, p in teacher.named_parameters()}
        update(teacher, student, rate, applied)
        still = all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
        calls.append((rate, float(applied), still))

    update = util.ema.ema_update
    monkeypatch.setattr(methods.rcmae, "ema_update", spy)
    flags = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 8 --accum_iter 4 --rc_mae --rc_momentum 0.9"
    pretrain(f"{flags} --output_dir {tmp_path}/a")
    assert [rate for rate, *_ in calls] == pytest.approx([1 - momentum_at(step, 6, 0.9) for step in range(6)])
    assert [still for *_, still in calls] == [True] + [False] * 5  # the warm-up begins with a learning rate of 0

    calls.clear()
    scaler, make = torch.amp.GradScaler, torch.amp.GradScaler.__init__
    monkeypatch.setattr(scaler, "__init__", lambda self, *a, **k: make(self, *a, **{**k, "init_scale": 2.0**24}))
    pretrain(f"{flags} --epochs 6 --amp_dtype fp16 --output_dir {tmp_path}/b")
    applied = [value for _, value, _ in calls]
    assert applied[:3] == [0.0] * 3 and applied[-1] == 1.0  # 2^24 overflows until it has been halved often enough
    assert all(still == (value == 0) for _, value, still in calls)


# MAE-K and EMA-MAE --------------------------------------------------------------------------------------------------


def test_pictures_end_with_the_pixels(image_folder, tmp_path, capsys):
    flags = f"{BASE.replace('--vis_freq 0', '--vis_freq 1')} --data_path {image_folder} --epochs 3 --batch_size 32"
    pretrain(f"{flags} --mae_k 2 --output_dir {tmp_path}")
    assert ["fixed_images_loss" in row for row in log_rows(tmp_path)] == [True, True, False]
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert len(events.Images("reconstruction")) == 2
    assert "epoch 2: from here on the target is features" in capsys.readouterr().out


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
    """The target is the student of the copy's moment; its features, not the student's, are the loss."""
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
        if epoch < 2:  # an idle head is not worn down while it waits
            assert all(torch.equal(head[name], p) for name, p in method.head.named_parameters())
        else:
            assert same_tensors(dict(copied.state_dict()), dict(method.target.network.state_dict()))
    assert ages == pytest.approx([0, 0, 1, 2, 1])
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    parts, out = pretrainer.losses(imgs, 0.75, noise)
    target = methods.bootstrap.normalized(target_features(copied, imgs))
    expected = ((method.head(out.decoded) - target) ** 2).mean(-1)[out.mask.bool()].mean()
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
    """A copy at WSE, not an average from the start; then (1 - tau) * target + tau * student."""
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
    per_step = 0.1  # of an epoch: `made` says 100 steps in 10 epochs
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


def test_collapse_watch():
    """Known spectra: isotropic, one direction, nothing, two equal directions."""
    x = torch.randn(20000, 8)
    found = collapse(x * 3)
    assert found["target_std"] == pytest.approx(3, rel=0.02) and found["target_rank"] == pytest.approx(8, rel=0.01)
    assert collapse(x[:, :1] @ torch.ones(1, 8))["target_rank"] == pytest.approx(1, abs=0.05)
    assert collapse(torch.ones(100, 8))["target_std"] == 0
    flat = torch.cat([x[:, :2], torch.zeros(20000, 6)], 1)
    assert collapse(flat)["target_rank"] == pytest.approx(2, rel=0.02)
    # A line has rank 1 also where products are rounded to bf16, and features that broke do not end the run.
    line = torch.randn(3000, 1) @ torch.randn(1, 192)
    with torch.autocast("cpu", torch.bfloat16):
        assert collapse(line)["target_rank"] < 1.2
    assert torch.isnan(collapse(x * float("nan"))["target_rank"])


# RC-MAE -------------------------------------------------------------------------------------------------------------


def test_rc_mae_whole_run(golden):
    """Two epochs of three steps against the reference, with the momentum indexed by the global step (`globalidx`)."""
    ref, e2e = golden("rc_mae"), golden("rc_mae").meta["e2e"]
    model = mae(ref.meta["ema"]["model"], norm_pix_loss=True)
    model.load_state_dict(ref.group("e2e/student0/"))
    model = model.double()
    args = argparse.Namespace(**e2e, min_lr_=0, rc_gamma=e2e["gamma"], rc_momentum=e2e["momentum_base"],
                              rc_schedule="cosine", rc_mask="same", log_grad_cosine=0)  # fmt: skip
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
            loss, _, _ = pretrainer(imgs, e2e["mask_ratio"], noise)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            pretrainer.after_update(imgs, epoch * e2e["iters"] + i, torch.tensor(1.0))
            totals.append(loss.detach())
            reconstructions.append(pretrainer.parts["reconstruction"])
    # Six steps of Adam enlarge the rounding of the first: measured 1e-12.
    close(torch.stack(totals), ref["e2e/globalidx/loss_total"].flatten(), 1e-8)
    close(torch.stack(reconstructions), ref["e2e/globalidx/loss_student"].flatten(), 1e-8)
    for name, network in (("student", model), ("teacher", pretrainer.methods["rc_mae"].teacher.network)):
        for key, value in ref.group(f"e2e/globalidx/{name}/").items():
            close(network.state_dict()[key], value, 1e-8)


def test_momentum_follows_the_place_in_the_run(image_folder, tmp_path):
    """Continued with twice the batch, or begun later: from the base to 1 over the whole run, and no further."""

    def momenta(folder):
        return [row["train_teacher_momentum"] for row in log_rows(tmp_path / folder)]

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
    """Drawn from the student's noise: the same every time, unrelated to it, and uniform."""
    noise = sample_noise(0, 0, torch.arange(2000), 64)
    other = redrawn(noise)
    assert torch.equal(other, redrawn(noise)) and other.min() >= 0 and other.max() < 1
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), other.flatten()]))[0, 1]) < 0.01
    assert torch.histc(other, 10, 0, 1) == pytest.approx(12800, rel=0.05)
    model = build_model("mae_vit_micro_patch4", img_size=32)
    same = [set(model.choose_visible(n[None], 0.75)[0][0].tolist()) for n in noise]
    new = [set(model.choose_visible(n[None], 0.75)[0][0].tolist()) for n in other]
    # 16 of 64 each: by chance they share a quarter, 4.
    assert sum(len(a & b) for a, b in zip(same, new)) / 2000 == pytest.approx(4, abs=0.15)

    for kind, equal in (("same", True), ("different", False)):
        pretrainer, _ = made(f"--rc_mae --rc_mask {kind}")
        method = pretrainer.methods["rc_mae"]
        # The teacher is still the student: with the same mask it predicts the same.
        parts, _ = pretrainer.losses(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
        assert (parts["consistency"].item() == 0) == equal, method


def test_gradient_cosine():
    a, b = torch.nn.Parameter(torch.tensor([1.0, 2.0])), torch.nn.Parameter(torch.tensor([3.0]))
    unused = torch.nn.Parameter(torch.ones(5))
    one, other = a[0] * 3 + 4 * b[0] + (a[1] * b[0]), a[0] * 4 - 3 * b[0]
    expected = (3 * 4 + (4 + 2) * -3) / math.sqrt(3**2 + 3**2 + 6**2) / 5
    assert gradient_cosine(one, other, [a, b, unused]).item() == pytest.approx(expected, rel=1e-6)


def test_what_rc_mae_leaves_behind(image_folder, tmp_path, capsys):
    """TensorBoard, `model_ema`, and every consumer of `--checkpoint_key`."""
    flags = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 32 --rc_mae --rc_momentum 0.5"
    pretrain(f"{flags} --log_grad_cosine 2 --mae_k 1 --output_dir {tmp_path}")
    for name in ("consistency", "teacher_momentum", "feature_stage", "target_age_epochs"):
        assert len(scalars(tmp_path, f"train/{name}")) == 6, name
    assert [x for x, _ in scalars(tmp_path, "train/reconstruction")] == [333, 666, 1000]
    assert [x for x, _ in scalars(tmp_path, "train/features")] == [1333, 1666, 2000]
    cosines = scalars(tmp_path, "train/grad_cosine")
    # Every second step but the first, whose learning rate is 0: the teacher is still the student.
    assert [x for x, _ in cosines] == [1000, 1666] and all(-1 <= value <= 1 for _, value in cosines)
    assert [x for x, _ in scalars(tmp_path, "train/target_std")] == [1333]  # the first step of the feature epoch
    row = log_rows(tmp_path)[1]
    assert {"train_features", "train_consistency", "train_target_rank", "train_grad_cosine"} <= row.keys()

    path = tmp_path / "checkpoint-1.pth"
    state = checkpoint(tmp_path, "checkpoint-1.pth")
    assert state["model"].keys() == state["model_ema"].keys()
    assert not torch.equal(state["model"]["decoder_pred.bias"], state["model_ema"]["decoder_pred.bias"])
    encoders = [(tmp_path / f"encoder{kind}.safetensors").read_bytes() for kind in ("", "_ema")]
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
    assert "has not trained its pixel head since" in capsys.readouterr().out
    stored = [json.loads((tmp_path / f"p{key}" / "probe.json").read_text()) for key in ("model", "model_ema")]
    assert [run["checkpoint_key"] for run in stored] == ["model", "model_ema"]
    with pytest.raises(UserError, match=r"no key 'teacher': --checkpoint_key must be one of .*\(model, model_ema\)"):
        knn.main(knn.get_args_parser().parse_args(f"{data} --checkpoint_key teacher".split()))


def test_looks_are_not_timed(image_folder, tmp_path, monkeypatch):
    """A look that takes long changes no figure of speed."""
    import time

    look = RCMAE.look
    monkeypatch.setattr(RCMAE, "look", lambda *args: time.sleep(0.5) or look(*args))
    flags = f"{BASE} --data_path {image_folder} --epochs 1 --warmup_epochs 0 --batch_size 32"
    began = time.perf_counter()
    pretrain(f"{flags} --rc_mae --log_grad_cosine 1 --output_dir {tmp_path}")
    wall = time.perf_counter() - began
    row = json.loads((tmp_path / "log.txt").read_text())
    assert wall > 1.5 and row["seconds"] < wall - 1.4  # three looks of half a second


# DMAE ---------------------------------------------------------------------------------------------------------------


def test_default_blocks():
    assert aligned_blocks(None, 12, 24) == [(8, 17)]
    assert aligned_blocks("9:18,12:24", 12, 24) == [(8, 17), (11, 23)]
    assert aligned_blocks(None, 1, 2) == [(0, 0)]


def test_teacher_is_checked_and_not_stored(image_folder, tmp_path, teacher, capsys):
    """Its loss on the first batch is printed, once; the checkpoint has its hash; a resume refuses another file."""
    flags = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 32 --save_freq 1 --output_dir {tmp_path} "
    flags += f"{switches(['dmae'])}".replace("--dmae_teacher", f"--dmae_teacher {teacher}")
    pretrain(f"{flags} --dmae_blocks 2:3,4:4 --dmae_proj mlp")
    said = capsys.readouterr().out
    found = re.findall(r"teacher: reconstruction loss (\S+) on the first batch, (\S+) if it predicted zeros", said)
    assert len(found) == 1
    loss, nothing = (float(number) for number in found[0])
    rows = log_rows(teacher.parent)
    # Colour and noise: the teacher does better than nothing, about as well as its own log says.
    assert loss < 0.9 * nothing and loss == pytest.approx(rows[-1]["train_reconstruction"], rel=0.25)
    assert {"train_distillation_2", "train_distillation_4"} <= log_rows(tmp_path)[0].keys()
    state = checkpoint(tmp_path, "checkpoint-1.pth")["methods"]
    assert {name.split(".")[1] for name in state} == {"projections", "_extra_state"}
    assert len(state["dmae._extra_state"]["sha256"]) == 64

    other = tmp_path / "other.pth"
    content = torch.load(teacher, weights_only=True)
    content["model"]["norm.bias"] += 1
    torch.save(content, other)
    with pytest.raises(UserError, match="is not the file this run began with"):
        pretrain(f"{flags} --dmae_blocks 2:3,4:4 --dmae_proj mlp --resume auto --dmae_teacher {other}")
    del content["model"]["blocks.1.norm1.bias"]
    torch.save(content, other)
    with pytest.raises(UserError, match=r"blocks\.1\.norm1\.bias"):
        pretrain(f"{flags} --dmae_blocks 2:3,4:4 --overwrite --dmae_teacher {other}")


def test_untrained_teacher_is_seen(tmp_path, capsys):
    args = "--norm_pix_loss"
    model = made(args)[0].model
    torch.save({"model": model.state_dict(), "args": {"model": "mae_vit_micro_patch4", "norm_pix_loss": True,
                "input_size": 16, "decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}},
               tmp_path / "raw.pth")  # fmt: skip
    pretrainer, _ = made(f"{args} --dmae_teacher {tmp_path}/raw.pth")
    pretrainer(torch.randn(8, 3, 16, 16), 0.75, torch.rand(8, 16))
    assert "WARNING: hardly better" in capsys.readouterr().out


def test_other_pixels_are_warned_about(teacher, capsys):
    made(f"--dmae_teacher {teacher}")
    assert "warning: the teacher was trained on pixels with mean 0.500/0.500/0.500" in capsys.readouterr().out
    made(switches(["dmae"], teacher))
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("positions", ["inner", "fresh"])
def test_larger_teacher_grid(tmp_path, positions):
    """A teacher of another patch and image size, as a file of weights alone: which positions its inner tokens get."""
    whole = build_model("mae_vit_micro_patch4", img_size=64, patch_size=8)
    with torch.no_grad():
        whole.pos_embed.normal_()
    torch.save({"model": whole.state_dict(), "args": {"model": "mae_vit_micro_patch4", "patch_size": 8,
                "input_size": 64}}, tmp_path / "t.pth")  # fmt: skip
    pretrainer, _ = made(f"--dmae_teacher {tmp_path}/t.pth --dmae_teacher_pos {positions}")
    method = pretrainer.methods["dmae"]
    imgs = torch.randn(2, 3, 16, 16)
    ids = torch.tensor([[5, 0, 15], [1, 2, 3]])
    features = method.teacher_features(imgs, ids)[2]
    # By hand, with the padding: 16 px resized to 4 patches of 8, 16 px of zeros around, rows and columns 2 to 5 kept.
    padded = torch.nn.functional.pad(torch.nn.functional.interpolate(imgs, (32, 32), mode="bilinear"), (16,) * 4)
    kept = [8 * row + column for row in range(2, 6) for column in range(2, 6)]
    tokens = whole.patch_embed(padded)[:, kept]
    fresh = build_model("mae_vit_micro_patch4", img_size=16).pos_embed
    table = whole.pos_embed[:, 1:][:, kept] if positions == "inner" else fresh[:, 1:]
    cls = (whole.pos_embed if positions == "inner" else fresh)[:, :1]
    x = torch.cat([(whole.cls_token + cls).expand(2, -1, -1), whole.gather(tokens + table, ids)], 1)
    for block in whole.blocks[:3]:
        x = block(x)
    assert torch.allclose(features, x, atol=1e-5)


def test_teacher_files_that_say_little(tmp_path, capsys):
    """Bare weights: the grid is that of their positions; a decoder of unknown heads is left out, and this is said."""
    whole = build_model("mae_vit_micro_patch4", img_size=16, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    with torch.no_grad():
        whole.pos_embed.normal_()
    torch.save(whole.state_dict(), tmp_path / "bare.pth")
    pretrainer, _ = made(f"--dmae_teacher {tmp_path}/bare.pth")
    assert torch.equal(pretrainer.methods["dmae"]._teacher[0].network.pos_embed, whole.pos_embed)
    said = capsys.readouterr().out
    assert "(width 32, depth 1) is not its model's: left out" in said and "interpolated" not in said
    with pytest.raises(UserError, match="sees 3 channels, the student 1"):
        made(f"--dmae_teacher {tmp_path}/bare.pth --in_chans 1 --mean 0.5 --std 0.5")


def test_teacher_moves_along(teacher):
    """To another type, hence to another device; and it is in nobody's parameters."""
    pretrainer, _ = made(switches(["dmae"], teacher))
    pretrainer.double()
    method = pretrainer.methods["dmae"]
    assert method._teacher[0].network.cls_token.dtype == torch.float64
    assert {name.split(".")[0] for name, _ in method.named_parameters()} == {"projections"}
    assert isinstance(method, DMAE)


# Checkpoints, processes ---------------------------------------------------------------------------------------------

RESUMED = [
    ("--ema_mae --wse 2 --tau 0.3", 2),  # in the middle of the warm-up
    ("--ema_mae --wse 2 --tau 0.3", 6),  # exactly at WSE: the checkpoint is from before the copy
    ("--ema_mae --wse 1 --tau 0.3 --ema_update step --rc_mae --rc_mask different", 8),  # in the feature stage
    ("--mae_k 2 --rc_mae --log_grad_cosine 2", 12),  # at a refresh
    ("--mae_k 2 --dmae_teacher {t} --rc_mae", 13),  # just after it
]


@pytest.mark.parametrize(("flags", "step"), RESUMED)
def test_resume(flags, step, image_folder, tmp_path, teacher, monkeypatch):
    """Stopped after that step (three an epoch) and continued: all state and all curves bit for bit."""
    flags = flags.format(t=teacher)
    run = f"{BASE} --data_path {image_folder} --epochs 6 --batch_size 32 {flags} --output_dir {tmp_path}"
    pretrain(f"{run}/whole")
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        pretrain(f"{run}/parts")
    assert not (tmp_path / "parts" / "checkpoint-5.pth").exists()
    pretrain(f"{run}/parts --resume auto")
    ours, theirs = (checkpoint(tmp_path / name, "checkpoint-5.pth") for name in ("parts", "whole"))
    for key in ("model", "model_ema", "optimizer", "methods", "step", "rng"):
        assert same_tensors(ours.get(key), theirs.get(key)), key
    assert log_rows(tmp_path / "parts") == log_rows(tmp_path / "whole")
    for name in log_rows(tmp_path / "whole")[-1].keys() & {"train_features", "train_consistency", "train_grad_cosine"}:
        series = name.replace("train_", "train/")
        assert scalars(tmp_path / "parts", series) == scalars(tmp_path / "whole", series)


def test_plain_run_continued_with_a_method(image_folder, tmp_path):
    """`--init_from` takes the weights, and teachers begin as copies of them; `--resume` says that it cannot."""
    common = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 32 --save_freq 1"
    pretrain(f"{common} --output_dir {tmp_path}/plain")
    path = tmp_path / "plain" / "checkpoint-1.pth"
    more = f"--rc_mae --rc_momentum 1 --ema_mae --wse 0 --tau 0 --lr 0 --init_from {path}"
    pretrain(f"{common} {more} --output_dir {tmp_path}/more")
    start = checkpoint(tmp_path / "plain", "checkpoint-1.pth")["model"]
    state = checkpoint(tmp_path / "more", "checkpoint-1.pth")
    assert same_tensors(start, state["model_ema"])
    prefix = "ema_mae.target.network."
    target = {name[len(prefix) :]: value for name, value in state["methods"].items() if name.startswith(prefix)}
    assert same_tensors(target, {name: start[name] for name in target}) and len(target) > 20
    with pytest.raises(UserError, match=r"other methods \(none\) than this run has \(rc_mae\): .*--init_from"):
        pretrain(f"{common} --epochs 4 --rc_mae --resume {path} --output_dir {tmp_path}/other")


def test_two_processes(image_folder, tmp_path, teacher):
    """60 steps through the warm-up and the feature stage with everything on: as one process, to rounding; teachers the
    same on both ranks bit for bit; gradients travel once per step; no more messages than plain MAE."""
    flags = f"{BASE} --data_path {image_folder} --epochs 5 --save_freq 5 --print_freq 12 --clip_grad 1 --blr 1e-3 "
    flags += "--ema_mae --wse 2 --tau 0.2 --rc_mae --rc_momentum 0.9 --rc_mask different "
    flags += switches(["dmae"], teacher)
    pretrain(f"{flags} --batch_size 8 --output_dir {tmp_path}/one")
    said = r"rank \d: 60 first buckets, methods (\S+), (\d+) reductions"
    output = finish(launch("tests/rank_script.py", f"count {flags} --batch_size 4 --output_dir {tmp_path}/two", 2))
    first, second = re.findall(said, output)
    assert first == second
    plain = f"{BASE} --data_path {image_folder} --epochs 5 --save_freq 5 --print_freq 12 --batch_size 4"
    output = finish(launch("tests/rank_script.py", f"count {plain} --output_dir {tmp_path}/mae", 2))
    assert {reductions for _, reductions in re.findall(said, output)} == {first[1]}
    one, two = (checkpoint(tmp_path / name, "checkpoint-4.pth") for name in ("one", "two"))
    for key in ("model", "model_ema", "methods"):
        for name, value in one[key].items():
            # Sixty steps of Adam, up to 3e-5 each, enlarge rounding where gradients vanish: that of the keys' bias is 0
            # but for rounding, so that it goes where chance wants.
            if isinstance(value, torch.Tensor) and not name.endswith("qkv.bias"):
                assert (value - two[key][name]).abs().max() < 2e-4, name
    for name in ("loss", "features", "consistency", "distillation", "grad_norm"):
        ours, theirs = scalars(tmp_path / "two", f"train/{name}"), scalars(tmp_path / "one", f"train/{name}")
        assert [x for x, _ in ours] == [x for x, _ in theirs]
        assert [y for _, y in ours] == pytest.approx([y for _, y in theirs], rel=1e-3)
