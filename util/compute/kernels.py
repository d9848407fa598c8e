"""How the same numbers are computed: attention by one fused kernel or by matrix products, blocks plain or compiled.

Measured in benchmarks/README.md.
"""

import os
import shutil

import torch
import torch._functorch.config
import torch._inductor.config
from timm.layers import set_fused_attn
from timm.models.vision_transformer import Block
from torch import nn
from torch.utils.checkpoint import checkpoint

from util.errors import UserError

ATTENTION = ["auto", "fused", "matmul"]


def attention_is_fused(kind: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether scaled_dot_product_attention computes attention. `auto` takes what is faster forward and backward for
    this device and type (a rule from measurements, not a measurement: a run must not depend on how busy the machine
    was when it began). In bf16 on a CPU the fused kernel's backward is several times slower than two products and a
    softmax, at every length from 17 to 1025 tokens."""
    if kind == "auto":
        return not (device.type == "cpu" and dtype is torch.bfloat16)
    return kind == "fused"


def choose_attention(kind: str, device: torch.device, dtype: torch.dtype, *made: nn.Module) -> None:
    """Apply `--attention` to all models to come, and to those that are `made`."""
    fused = attention_is_fused(kind, device, dtype)
    set_fused_attn(fused)
    for model in made:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused


def make_deterministic() -> None:
    """`--deterministic`: only algorithms that give the same bits every time; torch raises where it has none. Before the
    first product on a GPU, whose workspace CUBLAS_WORKSPACE_CONFIG bounds."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


class GradCheckpointMixin:
    """A transformer whose blocks may keep only their inputs for the backward pass and compute the rest again there."""

    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As in timm."""
        self.grad_checkpointing = enable

    def run_block(self, block, *inputs):
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def compile_blocks(*models: nn.Module) -> None:
    """Compile every transformer block, teachers among them, each kind once: all else (masks, methods, what is logged)
    stays as it is. Works in place, so parameter names stay. UserError where torch cannot compile."""
    if not torch._dynamo.is_dynamo_supported():
        raise UserError("--compile: this Python or platform cannot compile (torch.compile); leave it out")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile needs a C++ compiler: install g++, or name one in the variable CXX; or leave it out")
    # One kind of block for each width, number of tokens and with or without gradients; the default of 8 is few.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._functorch.config.donated_buffer = False  # a look at gradients walks a graph twice
    torch._inductor.config.fallback_random = True  # drop path's random numbers are those of an uncompiled run
    for model in models:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
