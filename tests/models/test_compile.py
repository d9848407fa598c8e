"""`--compile`: encoder and decoder are compiled whole and once. They are traced here, and run without generating code,
which takes minutes of processor time."""

from copy import deepcopy

import pytest
import torch
from helpers.launch import same_tensors
from torch import nn

import models_vit
from models_mae import build_model
from util.compute import kernels
from util.compute.kernels import compile_networks


@pytest.fixture
def traced(monkeypatch):
    """The graphs that were traced, as lists of the shapes of their inputs."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in inputs])
        return graph.forward

    original = torch.compile
    monkeypatch.setattr(kernels.torch, "compile", lambda function, **how: original(function, backend=backend, **how))
    monkeypatch.setattr(nn.Module, "compile", blocks_too(backend))
    torch._dynamo.reset()
    yield graphs
    torch._dynamo.reset()


def blocks_too(backend):
    def compile_(module, **how):
        module._compiled_call_impl = torch._dynamo.optimize(backend, dynamic=how.get("dynamic"))(module._call_impl)

    return compile_


def step(model, loss_of) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    loss = loss_of(model)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def test_drop_path_does_not_compile_each_block_anew(traced):
    """Fine-tuning: one graph for training, one for evaluation, whatever the rates of the blocks."""
    model = models_vit.build_model("vit_micro_patch4", img_size=16, num_classes=4, drop_path_rate=0.3)
    plain, imgs = deepcopy(model), torch.randn(6, 3, 16, 16)
    compile_networks(model)
    for _ in range(3):
        assert same_tensors(*(step(each, lambda m: m(imgs).square().mean()) for each in (model, plain)))
    assert len(traced) == 1
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            model(imgs)
    assert len(traced) == 2
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("decoder", ["self", "cross"])
def test_encoder_and_decoder_are_one_graph_each(traced, decoder):
    """With the sizes of this run, none of them symbolic."""
    model = build_model("mae_vit_micro_patch4", img_size=16, decoder=decoder)
    plain, imgs, noise = deepcopy(model), torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    compile_networks(model)

    def loss_of(m):
        return m.reconstruction_loss(m.forward_pretrain(imgs, 0.75, noise))

    for _ in range(3):
        assert same_tensors(*(step(each, loss_of) for each in (model, plain)))
    assert len(traced) == 2
    sizes = [size for graph in traced for shape in graph for size in (shape if isinstance(shape, tuple) else [shape])]
    assert all(type(size) is int for size in sizes)


def test_a_curriculum_compiles_for_all_lengths(traced):
    model = build_model("mae_vit_micro_patch4", img_size=16)
    imgs, noise = torch.randn(4, 3, 16, 16), torch.rand(4, 16)
    compile_networks(model, dynamic=None)
    for ratio in (0.4, 0.5, 0.6, 0.7, 0.8):
        step(model, lambda m, ratio=ratio: m.reconstruction_loss(m.forward_pretrain(imgs, ratio, noise)))
    assert len(traced) <= 4  # each part for the first length, and for all others


def test_blocks_alone(traced):
    """As DDP and FSDP need them, and where blocks are recomputed."""
    for parts, grad_checkpoint in ((False, False), (True, True)):
        model = build_model("mae_vit_micro_patch4", img_size=16)
        model.set_grad_checkpointing(grad_checkpoint)
        compile_networks(model, parts=parts)
        assert "encode" not in vars(model)
        assert all(block._compiled_call_impl is not None for block in model.blocks)


def test_a_copy_of_a_compiled_network_has_weights_of_its_own(traced):
    model = build_model("mae_vit_micro_patch4", img_size=16)
    compile_networks(model)
    copy = deepcopy(model)
    with torch.no_grad():
        for weight in model.blocks.parameters():
            weight.zero_()
        tokens = torch.randn(2, 3, model.cls_token.shape[-1])
        one, other = model.encode(tokens)[0], copy.encode(tokens)[0]
    assert not torch.equal(one, other)
