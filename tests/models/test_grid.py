"""Attention on a grid against its definition, one pair of patches at a time; windows; positions of another size."""

import pytest
import torch
import torch.nn.functional as F
from helpers.launch import same_tensors
from helpers.tolerances import close
from torch import nn

import models_grid
from models_detect import build_model as build_detector
from models_grid import (
    BiasAttention,
    GridAttention,
    GridViT,
    build_grid,
    from_windows,
    quarters,
    resize_bias,
    sync_batch_norm,
    to_windows,
)
from models_segment import build_model as build_segmenter
from util.errors import UserError


def attention(kind, *options):
    """An attention with four heads of width 2 and random tables."""
    torch.manual_seed(0)
    plain = build_grid(GridViT, "vit_micro_patch4", img_size=16, embed_dim=8, num_heads=4, feature_blocks=[3])
    made = kind(plain.blocks[0].attn, *options).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter)
    return made


def by_definition(made, x, bias):
    """Attention (N, M, D) whose logits have `bias(query, head, i, j)` added."""
    queries, keys, values = made.heads(x)
    logits = queries @ keys.transpose(-2, -1) / 2**0.5
    for image, head, i, j in torch.cartesian_prod(*map(torch.arange, logits.shape)).tolist():
        logits[image, head, i, j] += bias(queries[image, head, i], head, i, j)
    return made.proj((logits.softmax(-1) @ values).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("fused", [True, False])
def test_decomposed_relative_positions(fused):
    rows, columns = 3, 5
    made = attention(GridAttention, (rows, columns))
    made.fused_attn = fused
    x = torch.randn(2, rows * columns, 8).double()

    def bias(query, head, i, j):
        (y, x), (other_y, other_x) = divmod(i, columns), divmod(j, columns)
        return query @ made.rel_pos_h[y - other_y + rows - 1] + query @ made.rel_pos_w[x - other_x + columns - 1]

    with torch.no_grad():
        close(made(x), by_definition(made, x, bias), 1e-13)  # measured 4e-16


@pytest.mark.parametrize("fused", [True, False])
def test_relative_position_bias(fused):
    rows, columns = 2, 3
    made = attention(BiasAttention, (rows, columns))
    made.fused_attn = fused
    table = made.rel_pos_bias.relative_position_bias_table
    x = torch.randn(2, 1 + rows * columns, 8).double()

    def bias(query, head, i, j):
        if 0 in (i, j):  # the last three entries: from [cls], to [cls], itself
            return table[-1 if i == j else (-3 if i == 0 else -2), head]
        (y, x), (other_y, other_x) = divmod(i - 1, columns), divmod(j - 1, columns)
        return table[(y - other_y + rows - 1) * (2 * columns - 1) + x - other_x + columns - 1, head]

    with torch.no_grad():
        close(made(x), by_definition(made, x, bias), 1e-13)


def test_windows_are_separate_grids_padded_with_zeros():
    """Each window attends by itself; a padded one has zeros, not copies, below and on the right."""
    made, inside = attention(GridAttention, (5, 7), 3), attention(GridAttention, (3, 3))
    inside.load_state_dict(made.state_dict())
    x = torch.randn(2, 5, 7, 8).double()
    padded = F.pad(x, (0, 0, 0, 2, 0, 1))
    expected = torch.zeros_like(padded)
    for y in (0, 3):
        for z in (0, 3, 6):
            window = padded[:, y : y + 3, z : z + 3].flatten(1, 2)
            expected[:, y : y + 3, z : z + 3] = inside(window).unflatten(1, (3, 3))
    close(made(x.flatten(1, 2)), expected[:, :5, :7].flatten(1, 2), 1e-13)


def test_windows_and_back():
    x = torch.randn(2, 5 * 7, 8)
    assert to_windows(x, (5, 7), 3).shape == (2 * 6, 9, 8)
    assert torch.equal(from_windows(to_windows(x, (5, 7), 3), (5, 7), 3), x)


def encoder(**options):
    torch.manual_seed(0)
    return build_grid(GridViT, "vit_micro_patch4", **{"img_size": 16, "feature_blocks": [1, 3], **options})


def test_relative_positions_of_other_windows():
    """Tables are resampled linearly to the windows of the model; the distance 0 stays in the middle."""
    options = dict(rel_pos="decomposed", with_cls=False, global_blocks=[3])
    first, second = encoder(window=3, **options), encoder(window=4, img_size=32, **options)
    for name, parameter in first.named_parameters():
        nn.init.normal_(parameter) if "rel_pos" in name else None
    fitted = second.fit_relative(first.state_dict(), (4, 4))
    assert fitted.keys() == {name for name in second.state_dict() if "rel_pos" in name} and len(fitted) == 8
    for block, sides in ((0, (5, 7)), (3, (7, 15))):  # windows of 3 and 4, grids of 4 and 8
        name = f"blocks.{block}.attn.rel_pos_h"
        table = first.state_dict()[name]
        assert (len(table), len(fitted[name])) == sides
        expected = F.interpolate(table.T[None], size=sides[1], mode="linear")[0].T
        close(fitted[name], expected, 1e-6)
        close(fitted[name][sides[1] // 2], table[sides[0] // 2], 1e-6)
    own = {name: first.state_dict()[name] for name in fitted}
    assert same_tensors(first.fit_relative(first.state_dict(), (4, 4)), own)


def test_relative_position_bias_of_another_grid():
    """Each difference in rows and columns has the bias of the difference at the same share of the grid; pairs with
    [cls] keep theirs."""
    first, second = encoder(rel_pos="bias"), encoder(rel_pos="bias", img_size=(32, 16))
    name = "blocks.0.attn.rel_pos_bias.relative_position_bias_table"
    table = torch.arange(7.0)[:, None].expand(7, 7).flatten()[:, None].repeat(1, 4)  # the difference in rows, from 0
    table = torch.cat([table, torch.tensor([[20.0], [30], [40]]).repeat(1, 4)])
    fitted = second.fit_relative({**first.state_dict(), name: table}, (4, 4))[name]
    assert fitted.shape == second.state_dict()[name].shape and fitted[-3:].tolist() == table[-3:].tolist()
    rows = fitted[:-3].view(15, 7, 4)
    assert (rows == rows[:, :1, :1]).all() and float(rows[7, 0, 0]) == 3  # nothing depends on columns; 3: the same row
    assert (rows.diff(dim=0) >= 0).all()
    assert resize_bias(table, (4, 4), (4, 4)) is table


def test_new_relative_positions_change_nothing():
    imgs = torch.randn(2, 3, 16, 16)
    plain, biased = encoder(), encoder(rel_pos="bias")
    biased.load_state_dict(plain.state_dict(), strict=False)
    for ours, theirs in zip(biased.forward_maps(imgs, [1, 3]), plain.forward_maps(imgs, [1, 3])):
        close(ours, theirs, 1e-5)
    assert [x.shape for x in plain.forward_maps(imgs, [3, 1, 3])] == [(2, 128, 4, 4)] * 3


def test_blocks_after_the_last_feature_are_not_trained():
    """Nor are they run, nor trained after `train_last_blocks`; DDP would wait for their gradients."""
    model = encoder(feature_blocks=[0, 2])
    model.train_last_blocks(2)
    sum(x.sum() for x in model.forward_maps(torch.randn(1, 3, 16, 16), [0, 2])).backward()
    assert all(p.grad is not None for p in model.blocks[2].parameters())
    assert {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad} == {"2"}


def test_images_of_another_size_are_refused():
    """Positions are interpolated once, from the file's table, when weights are loaded."""
    with pytest.raises(UserError, match="images are 16x20, but the model has positions for 16x16"):
        encoder().forward_maps(torch.zeros(1, 3, 16, 20), [3])


@pytest.mark.parametrize("options", [dict(window=3, with_cls=False, rel_pos="decomposed"), dict(rel_pos="bias")])
def test_blocks_are_one_graph(options):
    """torch.compile traces them whole; `eager` runs the graph without compiling it, which takes minutes."""
    imgs, model = torch.randn(2, 3, 16, 24), encoder(img_size=(16, 24), **options)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter) if "rel_pos" in name else None
    plain = model.forward_maps(imgs, [1, 3])[1]
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    close(model.forward_maps(imgs, [1, 3])[1], plain, 1e-5)


def test_quarters():
    assert [quarters(depth) for depth in (12, 24, 4)] == [[2, 5, 8, 11], [5, 11, 17, 23], [0, 1, 2, 3]]


def test_batch_norm_of_several_processes(monkeypatch, capsys):
    """It is synchronised on GPUs, in all parts of a head; on CPUs torch has no such norm, and a note says what
    happens."""
    monkeypatch.setattr(models_grid, "get_world_size", lambda: 2)
    models = [
        build_segmenter("vit_micro_patch4", 5, img_size=16),
        build_detector(
            "vit_micro_patch4", 5, img_size=32, patch_size=8, head_norm="batch", pyramid="fpn", head_width=8
        ),
    ]
    for model in models:
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert sync_batch_norm(model, torch.device("cpu")) is model
        assert "on CPUs batch norm uses the images of each process alone" in capsys.readouterr().out
        synchronised = sync_batch_norm(model, torch.device("cuda"))
        kinds = [type(module) for module in synchronised.modules()]
        assert kinds.count(nn.SyncBatchNorm) == norms > 4 and nn.BatchNorm2d not in kinds


def test_one_process_keeps_its_batch_norm():
    norm = nn.BatchNorm2d(2)
    assert sync_batch_norm(norm, torch.device("cpu")) is norm
