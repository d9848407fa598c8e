"""Implementations of the network's operations: fused or unfused attention, compiled networks, gradient checkpointing,
deterministic algorithms. Measurements: benchmarks/README.md."""

import os
import shutil
from types import MethodType

import torch
import torch._functorch.config
import torch._inductor.config
from timm.layers import set_fused_attn
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from util.errors import UserError

ATTENTION = ["auto", "fused", "matmul"]


def attention_is_fused(setting: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether attention is computed by scaled_dot_product_attention. `setting` is the value of `--attention`.

    `auto` selects the implementation whose forward and backward passes together are faster on this device in this type.
    It is a fixed rule from measurements, not a measurement at the start, which would depend on the load of the machine.
    In bf16 on a CPU the backward pass of the fused kernel is several times slower than two matrix products and a
    softmax, at every length from 17 to 1025 tokens.
    """
    if setting == "auto":
        return not (device.type == "cpu" and dtype is torch.bfloat16)
    return setting == "fused"


def choose_attention(implementation: str, device: torch.device, dtype: torch.dtype, *models: nn.Module) -> None:
    """Apply `--attention` to `models` and to all models that are built later."""
    fused = attention_is_fused(implementation, device, dtype)
    set_fused_attn(fused)
    for model in models:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused


def make_deterministic() -> None:
    """Apply `--deterministic`: allow only algorithms that give the same bits every time. torch raises an error for an
    operation without one. Call this before the first matrix product on a GPU, which reads CUBLAS_WORKSPACE_CONFIG."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


class GradCheckpointMixin:
    """Gradient checkpointing for a transformer: of each block only the inputs are kept, and its activations are
    recomputed in the backward pass."""

    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off, as in timm."""
        self.grad_checkpointing = enable

    def run_block(self, block, *inputs):
        """Return `block(*inputs)`, checkpointed if that is enabled and gradients are recorded."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def compile_networks(*models: nn.Module, parts: bool = True, dynamic: bool | None = False) -> None:
    """Compile `models` in place. Parameter names do not change.

    With `parts`, the methods that a network lists in `compiled_parts` are compiled whole: of an autoencoder, all blocks
    of the encoder as one function, and all of the decoder. Other blocks are compiled one by one: with `parts=False`,
    which lets DDP and FSDP communicate between blocks, and where `--grad_checkpoint` is on. The code around them
    (masks, losses, logs) is not compiled. `dynamic=False` compiles anew for each number of tokens, None soon for all.

    Raises UserError if torch.compile does not support this platform, or if there is no C++ compiler.
    """
    if not torch._dynamo.is_dynamo_supported():
        raise UserError("--compile: torch.compile does not support this Python or platform; leave it out")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile needs a C++ compiler: install g++, set the variable CXX, or leave it out")
    # The code is compiled for each network, width and number of tokens, with and without gradients: often more times
    # than torch's default limit of 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._functorch.config.donated_buffer = False  # gradient diagnostics run backward twice through one graph
    torch._inductor.config.fallback_random = True  # drop path draws the same random numbers as without --compile
    covered: set[nn.Module] = set()
    for network in (module for model in models for module in model.modules()):
        names = getattr(network, "compiled_parts", ()) if parts else ()
        if names and not getattr(network, "grad_checkpointing", False):
            for name in names:  # bound to the network as its own method is, also in a copy of it
                compiled = torch.compile(getattr(type(network), name), dynamic=dynamic)
                setattr(network, name, MethodType(compiled, network))
            covered.update(network.modules())
        if isinstance(network, Block) and network not in covered:
            network.compile(dynamic=None if parts else dynamic)
