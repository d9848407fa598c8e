"""Training with most of the encoder frozen: only the last blocks, and attentive probing."""

import math

import pytest
import torch
from helpers.launch import checkpoint

import main_finetune
import main_linprobe
import models_vit
from models_vit import AttentivePool
from util.errors import UserError
from util.lr_decay import param_groups_lrd

SMALL = "--model vit_micro_patch4 --input_size 16 --batch_size 16 --num_workers 0 --device cpu --amp_dtype fp32"
FINETUNE = f"{SMALL} --in_chans 3 --aug rrc --lr 1e-2 --max_steps 6 --warmup_epochs 0 --drop_path 0.5"
PROBE = f"{SMALL} --aug none --max_steps 6 --warmup_epochs 0"


def start(main, flags):
    return main.main(main.get_args_parser().parse_args(flags.split()))


def depth_of(name):
    return int(name.split(".")[1]) if name.startswith("blocks.") else None


@pytest.mark.parametrize("blocks", [0, 1, 2])
@pytest.mark.parametrize("pooled", ["--global_pool", "--cls_token"])
def test_frozen_weights_do_not_change(blocks, pooled, image_folder, tmp_path):
    """After six steps with weight decay, frozen weights are equal bit for bit; all trained ones have moved, and the
    optimizer holds no others."""
    common = f"{FINETUNE} {pooled} --data_path {image_folder}"
    start(main_finetune, f"{common} --lr 1e-9 --output_dir {tmp_path / 'before'}")
    first = tmp_path / "before" / "checkpoint-0.pth"
    flags = f"{common} --finetune {first} --trainable_blocks {blocks} --output_dir {tmp_path / 'after'}"
    start(main_finetune, flags)
    before, after = (checkpoint(tmp_path / name, "checkpoint-0.pth") for name in ("before", "after"))
    moved = {name for name, value in after["model"].items() if not torch.equal(value, before["model"][name])}
    depth = 1 + max(depth_of(name) or 0 for name in before["model"])
    assert depth == len(models_vit.build_model("vit_micro_patch4").blocks)

    def learns(name):
        block = depth_of(name)
        norm = blocks > 0 and name.startswith(("norm.", "fc_norm."))
        return name.startswith("head.") or norm or (block is not None and block >= depth - blocks)

    assert moved == {name for name in before["model"] if learns(name)}
    groups = after["optimizer"]["param_groups"]
    assert sum(len(group["params"]) for group in groups) == len(moved)


def test_frozen_blocks_have_no_drop_path():
    """No drop path and no gradient below the last block; the learning rates are those of full fine-tuning."""
    model = models_vit.build_model("vit_micro_patch4", img_size=16, num_classes=3, drop_path_rate=0.9)
    whole = {id(p): g["lr_scale"] for g in param_groups_lrd(model, layer_decay=0.5) for p in g["params"]}
    model.train_last_blocks(1)
    model.train()
    assert [block.training for block in model.blocks] == [False] * (len(model.blocks) - 1) + [True]
    seen = []
    model.blocks[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    imgs = torch.randn(4, 3, 16, 16)
    model(imgs).sum().backward()
    model(imgs)
    assert torch.equal(*seen) and not seen[0].requires_grad  # equal outputs: nothing was dropped
    assert all((p.grad is None) == (not p.requires_grad) for p in model.parameters())
    groups = param_groups_lrd(model, layer_decay=0.5)
    assert all(whole[id(p)] == group["lr_scale"] for group in groups for p in group["params"])
    assert {group["lr_scale"] for group in groups} == {1.0, 0.5}
    assert not model.eval().blocks[-1].training


def test_attention_written_out():
    """softmax(q k / sqrt(d)) v for each head, with the projections of query and patches cut from one matrix."""
    pool, (heads, dim) = AttentivePool(12, 3).double(), (3, 12)
    torch.nn.init.normal_(pool.attention.in_proj_bias)  # biases start at zero, which would hide an error
    tokens = torch.randn(2, 5, dim, dtype=torch.float64)
    w, b = pool.attention.in_proj_weight.chunk(3), pool.attention.in_proj_bias.chunk(3)
    q = (pool.query[0, 0] @ w[0].T + b[0]).view(heads, -1)
    k, v = ((tokens @ w[i].T + b[i]).view(2, 5, heads, -1) for i in (1, 2))
    weights = (torch.einsum("hd,nlhd->nhl", q, k) / math.sqrt(dim / heads)).softmax(-1)
    read = torch.einsum("nhl,nlhd->nhd", weights, v).reshape(2, dim)
    torch.testing.assert_close(pool(tokens), pool.attention.out_proj(read))


def test_attentive_probe(image_folder, tmp_path):
    """It reads normalised patch tokens without [cls], trains only its head, and can be evaluated from its
    checkpoint."""
    flags = f"{PROBE} --head attentive --in_chans 3 --data_path {image_folder}"
    stats = start(main_linprobe, f"{flags} --output_dir {tmp_path / 'a'}")
    state = checkpoint(tmp_path / "a", "checkpoint-0.pth")
    assert state["args"]["blr"] == 1e-3 and "head.0.query" in state["model"]
    learned = sum(len(group["params"]) for group in state["optimizer"]["param_groups"])
    assert learned == sum(
        name.startswith("head.") and "running" not in name and "tracked" not in name for name in state["model"]
    )
    again = start(
        main_linprobe, f"{flags} --eval --resume {tmp_path / 'a/checkpoint-0.pth'} --output_dir {tmp_path / 'b'}"
    )
    assert again == pytest.approx(stats, rel=1e-6)
    probe = main_linprobe.Probe(models_vit.build_model("vit_micro_patch4", img_size=16, num_classes=4), attentive=True)
    probe.vit.load_state_dict(state["model"])
    imgs = torch.randn(3, 3, 16, 16)
    pool, norm, linear = probe.eval().vit.head
    patches = probe.vit.norm(probe.vit.forward_tokens(imgs))[:, 1:]
    torch.testing.assert_close(probe(imgs), linear(norm(pool(patches))))
    fresh = main_linprobe.get_args_parser().parse_args([])
    assert fresh.blr == 0.1 and fresh.head == "linear"


@pytest.mark.parametrize(
    "main,flags,words",
    [
        (main_finetune, "--trainable_blocks 99", "--trainable_blocks 99 must be between 0 and the encoder's"),
        (main_finetune, "--trainable_blocks 1 --eval --finetune x", "--trainable_blocks has no effect with --eval"),
        (main_linprobe, "--head attentive --cache_features", "--cache_features has no effect with --head attentive"),
        (main_linprobe, "--head attentive --global_pool", "--global_pool has no effect with --head attentive"),
    ],
)
def test_refusals(main, flags, words, image_folder, tmp_path):
    base = f"{FINETUNE if main is main_finetune else SMALL} --data_path {image_folder} --output_dir {tmp_path / 'out'}"
    with pytest.raises(UserError, match=words):
        start(main, f"{base} {flags}")
    assert not (tmp_path / "out").exists()


def test_probes_of_another_head_do_not_fit(image_folder, tmp_path):
    flags = f"{PROBE} --in_chans 3 --data_path {image_folder}"
    start(main_linprobe, f"{flags} --output_dir {tmp_path / 'a'}")
    with pytest.raises(UserError, match="was written with --head linear, this run has attentive"):
        start(main_linprobe, f"{flags} --head attentive --resume auto --output_dir {tmp_path / 'a'}")
    with pytest.raises(UserError, match="has no classifier of this probe"):
        start(
            main_linprobe, f"{flags} --head attentive --eval --resume {tmp_path / 'a/checkpoint-0.pth'} --output_dir x"
        )
