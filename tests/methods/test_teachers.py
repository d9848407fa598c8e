"""MAE-K, EMA-MAE, RC-MAE and DMAE together: legal combinations, properties of teachers, resumption, processes."""

import argparse
import itertools
import re

import pytest
import torch
from helpers.launch import checkpoint, log_rows, ranks, same_tensors, scalars
from helpers.resumed import check_resumed
from helpers.teachers import BASE, LEGAL, made, pretrain, stepped, switches

import main_pretrain
import methods.bootstrap
import methods.rcmae
import util.compute.ema
from methods import METHODS, add_method_arguments, enabled_methods
from methods.rcmae import momentum_at
from util.errors import UserError

# Combinations ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", ["", "--norm_pix_loss"], ids=["", "norm_pix"])
@pytest.mark.parametrize("names", LEGAL, ids=["+".join(filter(None, names)) or "mae" for names in LEGAL])
def test_every_legal_combination(names, pixels, teacher):
    """Two steps in the pixel stage and in the feature stage: named loss terms, and gradients for the student alone."""
    pretrainer, _ = made(f"{switches(names, teacher)} {pixels}")
    expected = {"rc_mae": "consistency", "dmae": "distillation", "u_mae": "uniformity"}
    for epoch in (0, 1):
        pretrainer.before_epoch(epoch)
        gradients = stepped(pretrainer, 2)
        first = "features" if epoch and names[0] else "pixels"
        losses = pretrainer(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16))
        assert list(losses) == [first] + [expected[name] for name in names if name in expected]
        trained = {name for name, p in pretrainer.named_parameters() if p.requires_grad}
        assert {name for name, gradient in gradients.items() if gradient is not None} == trained
        assert not any(".teacher." in name or ".target." in name or ".heads." in name for name in trained)
        idle = {name for name in trained if gradients[name].abs().max() == 0}
        waits = "decoder_pred." if epoch else ".head."  # in the feature stage; the keys' bias never has a gradient
        assert idle == {name for name in trained if names[0] and waits in name}
        assert all(torch.isfinite(value) for value in losses.values())


def test_illegal_combinations(teacher):
    both = re.escape("--mae_k and --ema_mae both decide the target: give one of them")
    for names in itertools.product(("", "rc_mae"), ("", "dmae")):
        with pytest.raises(UserError, match=both):
            made(f"--mae_k 1 --ema_mae --wse 1 {switches(names, teacher)}")


OWNERS = {option: method for method in METHODS for option in method.options}


@pytest.mark.parametrize("declared", OWNERS, ids=lambda declared: declared.name)
def test_flags_without_effect(declared):
    """Every option is refused without its method, even with its default value."""
    option, default, flag = declared.name, declared.default, OWNERS[declared].flag
    action = next(a for a in main_pretrain.get_args_parser()._actions if f"--{option}" in a.option_strings)
    one = " ".join(["1"] * (action.nargs or 1))
    default = " ".join(map(str, default)) if isinstance(default, tuple) else default
    values = [""] if action.nargs == 0 else [f" {value}" for value in (*(action.choices or [one]), default) if value]
    switch = "--mae_k or --ema_mae" if option.startswith("bootstrap") else flag
    other = "--mae_k 1" if flag == "--rc_mae" else "--rc_mae"
    for value, beside in itertools.product(values, ("", other)):
        with pytest.raises(UserError, match=f"^--{option} has no effect without {switch}$"):
            made(f"{beside} --{option}{value}")


def test_options_have_their_defaults():
    args = made("--ema_mae --rc_mae")[1]
    assert (args.wse, args.tau, args.ema_update, args.bootstrap_layers) == (20, 0.005, "epoch", 1)
    assert (args.rc_gamma, args.rc_momentum, args.rc_schedule, args.rc_mask) == (1.0, 0.996, "cosine", "same")
    # A second check of the same flags (a job that is queued again) gives the same result.
    assert [method.name for method in enabled_methods(args, METHODS)] == ["ema_mae", "rc_mae"]


def test_help_names_paper_and_use():
    parser = argparse.ArgumentParser()
    add_method_arguments(parser, METHODS)
    text = " ".join(parser.format_help().split())
    for method in METHODS:
        assert method.title in text and method.summary in text
        assert "Choose it" in method.summary and method.flag in text
        assert all(f"--{option.name}" in text for option in method.options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
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
        # Three pairs of incompatible grids (the teacher has 4x4 patches of 4 pixels).
        ("--dmae_teacher {t} --input_size 32", "8x8 patches do not fit into the teacher's 4x4: --dmae_teacher_size 32"),
        ("--dmae_teacher {t} --dmae_teacher_size 20", "whole number of tokens .*: --dmae_teacher_size 16 or 24 does"),
        (
            "--dmae_teacher {t} --dmae_teacher_size 18",
            "--dmae_teacher_size 18 must be a multiple .* 4: 16 or 20 would fit",
        ),
    ],
)
def test_refusals(flags, message, teacher):
    with pytest.raises(UserError, match=message):
        made(flags.format(t=teacher))


# Teachers -----------------------------------------------------------------------------------------------------------


def saved_bytes(pretrainer):
    """Return the bytes that one forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = sum(pretrainer(torch.randn(4, 3, 16, 16), 0.75, torch.rand(4, 16)).values())
    loss.backward()
    return sum(kept.values())


def test_no_graph_of_a_teacher_is_kept(teacher):
    """Only the method's differentiable parts keep activations: a prediction, a head, a projection."""
    plain = saved_bytes(made("")[0])
    for names in LEGAL[1:]:
        pretrainer, _ = made(switches(names, teacher))
        pretrainer.before_epoch(1)
        saved_bytes(pretrainer)  # the first pass includes the sanity check of a pretrained teacher
        # A teacher's graph would need at least `plain` again (bootstrap: four times the tokens).
        assert saved_bytes(pretrainer) < 1.25 * plain, names


def test_teachers_are_frozen_and_run_only_needed_blocks(teacher):
    """Teachers have no gradients, stay in eval mode, and run only the blocks that are needed."""
    pretrainer, _ = made(switches(("ema_mae", "rc_mae", "dmae"), teacher))
    pretrainer.before_epoch(1)
    pretrainer.train()
    parts = pretrainer.methods
    sleepers = [
        parts["ema_mae"].target,
        parts["rc_mae"].teacher,
        *parts["rc_mae"].heads.values(),
        parts["dmae"]._teacher[0],
    ]
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
    # The target encodes all 16 patches, the others the 4 visible ones; the pretrained one stops after block 3 of 4.
    assert [(name, tokens) for name, tokens, _ in seen] == (
        [("target", 17)] * 4 + [("ema", 5)] * 4 + [("pretrained", 5)] * 3
    )
    assert not hasattr(sleepers[-1].network, "decoder_blocks")


def test_skipped_steps_move_no_teacher():
    """With `applied` 0 teachers stay equal bit for bit."""
    pretrainer, _ = made("--ema_mae --wse 0 --ema_update step --tau 0.5 --rc_mae --rc_momentum 0.5")
    pretrainer.before_epoch(0)
    before = {name: value.clone() for name, value in pretrainer.methods.state_dict().items() if "extra" not in name}
    stepped(pretrainer, 1, applied=0.0)
    after = pretrainer.methods.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"ema_mae.head.weight", "ema_mae.head.bias"}
    stepped(pretrainer, 1, applied=1.0)
    assert not torch.equal(
        before["rc_mae.teacher.network.decoder_pred.weight"], after["rc_mae.teacher.network.decoder_pred.weight"]
    )


def test_average_after_real_steps_only(image_folder, tmp_path, monkeypatch):
    """Accumulation of 4: one update per step. Steps that the scaler skips (fp16, far too large a scale): none."""
    calls = []

    def spy(teacher, student, rate, applied=1.0):
        before = {name: p.clone() for name, p in teacher.named_parameters()}
        update(teacher, student, rate, applied)
        still = all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
        calls.append((rate, float(applied), still))

    update = util.compute.ema.ema_update
    monkeypatch.setattr(methods.rcmae, "ema_update", spy)
    flags = f"{BASE} --data_path {image_folder} --epochs 2 --batch_size 8 --accum_iter 4 --rc_mae --rc_momentum 0.9"
    pretrain(f"{flags} --output_dir {tmp_path}/a")
    assert [rate for rate, *_ in calls] == pytest.approx([1 - momentum_at(step, 6, 0.9) for step in range(6)])
    assert [still for *_, still in calls] == [True] + [False] * 5  # the warm-up starts with a learning rate of 0

    calls.clear()
    scaler, make = torch.amp.GradScaler, torch.amp.GradScaler.__init__
    monkeypatch.setattr(scaler, "__init__", lambda self, *a, **k: make(self, *a, **{**k, "init_scale": 2.0**24}))
    pretrain(f"{flags} --epochs 6 --amp_dtype fp16 --output_dir {tmp_path}/b")
    applied = [value for _, value, _ in calls]
    assert applied[:3] == [0.0] * 3 and applied[-1] == 1.0  # 2^24 overflows until it has been halved several times
    assert all(still == (value == 0) for _, value, still in calls)


# Checkpoints, processes ---------------------------------------------------------------------------------------------

RESUMED = [
    ("--ema_mae --wse 2 --tau 0.3", 2),  # in the middle of the warm-up
    ("--ema_mae --wse 2 --tau 0.3", 6),  # exactly at WSE: the checkpoint precedes the copy
    ("--ema_mae --wse 1 --tau 0.3 --ema_update step --rc_mae --rc_mask different", 8),  # in the feature stage
    ("--mae_k 2 --rc_mae --log_grad_cosine 2", 12),  # at a refresh
    ("--mae_k 2 --dmae_teacher {t} --rc_mae", 13),  # just after it
]


@pytest.mark.parametrize(("flags", "step"), RESUMED)
def test_resume(flags, step, image_folder, tmp_path, teacher, monkeypatch):
    """Stopped after a step (three an epoch) and resumed: all state and all curves are equal bit for bit."""
    flags = flags.format(t=teacher)
    run = f"{BASE} --data_path {image_folder} --epochs 6 --batch_size 32 {flags}"
    check_resumed(monkeypatch, run, tmp_path, step, 6)
    for name in log_rows(tmp_path / "whole")[-1].keys() & {"train/features", "train/consistency", "train/grad_cosine"}:
        assert scalars(tmp_path / "parts", name) == scalars(tmp_path / "whole", name)


def test_plain_run_continued_with_a_method(image_folder, tmp_path):
    """--init_from takes the weights, and teachers start as copies of them; --resume refuses."""
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
    """60 steps through the warm-up and the feature stage with all methods: equal to one process up to rounding.
    Teachers are equal on both ranks bit for bit, gradients are sent once per step, with no more messages than plain
    MAE, except for two in each of the three epochs that measure the target's features."""
    flags = f"{BASE} --data_path {image_folder} --epochs 5 --save_freq 5 --print_freq 12 --clip_grad 1 --blr 1e-3 "
    flags += "--ema_mae --wse 2 --tau 0.2 --rc_mae --rc_momentum 0.9 --rc_mask different "
    flags += switches(["dmae"], teacher)
    pretrain(f"{flags} --batch_size 8 --output_dir {tmp_path}/one")
    pattern = r"rank \d: 60 first buckets, methods (\S+), (\d+) reductions"
    output = ranks("helpers.rank_script", f"count {flags} --batch_size 4 --output_dir {tmp_path}/two", 2)
    first, second = re.findall(pattern, output)
    assert first == second
    plain = f"{BASE} --data_path {image_folder} --epochs 5 --save_freq 5 --print_freq 12 --batch_size 4"
    output = ranks("helpers.rank_script", f"count {plain} --output_dir {tmp_path}/mae", 2)
    assert {int(reductions) + 2 * 3 for _, reductions in re.findall(pattern, output)} == {int(first[1])}
    one, two = (checkpoint(tmp_path / name, "checkpoint-4.pth") for name in ("one", "two"))
    for key in ("model", "model_ema", "methods"):
        for name, value in one[key].items():
            # Sixty steps of Adam, up to 3e-5 each, amplify rounding where gradients vanish. That of the keys'
            # bias is 0 up to rounding, so its direction is random.
            if isinstance(value, torch.Tensor) and not name.endswith("qkv.bias"):
                assert (value - two[key][name]).abs().max() < 2e-4, name
    for name in ("loss", "features", "consistency", "distillation", "grad_norm"):
        ours, theirs = scalars(tmp_path / "two", f"train/{name}"), scalars(tmp_path / "one", f"train/{name}")
        assert [x for x, _ in ours] == [x for x, _ in theirs]
        assert [y for _, y in ours] == pytest.approx([y for _, y in theirs], rel=1e-3)
