"""How the network is computed: attention by a fused kernel or by matrix products, blocks compiled or not, gradient
checkpointing, deterministic algorithms. Measurements: benchmarks/README.md."""

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


def attention_is_fused(setting: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether scaled_dot_product_attention computes attention, for `--attention` `setting`.

    `auto` takes the faster way, forward and backward, for this device and type. It is a fixed rule from measurements: a
    run must not depend on how busy the machine was at its start. In bf16 on a CPU the backward pass of the fused kernel
    is several times slower than two products and a softmax, at every length from 17 to 1025 tokens.
    """
    if setting == "auto":
        return not (device.type == "cpu" and dtype is torch.bfloat16)
    return setting == "fused"


def choose_attention(implementation: str, device: torch.device, dtype: torch.dtype, *made: nn.Module) -> None:
    """Set `--attention` for all models that are built later, and for the `made` ones."""
    fused = attention_is_fused(implementation, device, dtype)
    set_fused_attn(fused)
    for model in made:
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused


def make_deterministic() -> None:
    """`--deterministic`: use only algorithms that give the same bits every time; torch raises an error where it has
    none. To be called before the first matrix product on a GPU, since CUBLAS_WORKSPACE_CONFIG is read then."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True


class GradCheckpointMixin:
    """A transformer with gradient checkpointing: blocks keep only their inputs and are computed again in the backward
    pass."""

    grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off, as in timm."""
        self.grad_checkpointing = enable

    def run_block(self, block, *inputs):
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)


def compile_blocks(*models: nn.Module) -> None:
    """Compile every transformer block of `models` (teachers included) in place; parameter names stay.

    The rest (masks, methods, logs) is not compiled. Raises UserError if torch cannot compile here.
    """
    if not torch._dynamo.is_dynamo_supported():
        raise UserError("--compile: this Python or platform cannot compile (torch.compile); leave it out")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError("--compile needs a C++ compiler: install g++, or name one in the variable CXX; or leave it out")
    # Blocks are compiled for each width, number of tokens, and with or without gradients: often more than 8 times.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._functorch.config.donated_buffer = False  # diagnostics of gradients use a graph twice
    torch._inductor.config.fallback_random = True  # drop path draws the random numbers of an uncompiled run
    for model in models:
        for module in model.modules():
            if isinstance(module, Block):
                module.compile()
