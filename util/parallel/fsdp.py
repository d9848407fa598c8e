"""Weights, gradients and optimizer states sharded over the processes (FSDP2), for models that do not fit on one GPU.

Every transformer block is gathered when it is used and resharded after it; what is left (embeddings, norms, heads) is
the outermost unit. Source: Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al. 2020 (ZeRO, stage 3).
"""

import warnings
from contextlib import contextmanager, nullcontext

import torch
from timm.models.vision_transformer import Block
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from util.compute.precision import autocast
from util.errors import UserError
from util.parallel.distributed import get_world_size, is_main_process


def check_sharded(dtype: torch.dtype) -> None:
    """Raise UserError where `--fsdp` cannot work: in one process, or in float16."""
    if get_world_size() < 2:
        raise UserError("--fsdp spreads a model over processes, and this run has one: start it with torchrun")
    if dtype is torch.float16:
        raise UserError("--fsdp works in bf16 and fp32, not with the loss scaling of fp16: give --amp_dtype")


def shard(module: nn.Module, student: nn.Module, aside: list[nn.Module], device: torch.device, dtype) -> None:
    """Spread `module` in place, each block a unit; `student` is the part that learns. Of the networks `aside`, which
    nobody calls as a whole, the blocks alone. On GPUs blocks are gathered in bfloat16 where that is what they compute
    in (a CPU's layer norm takes no mixed types); gradients are averaged in float32."""
    mesh = init_device_mesh(device.type, (get_world_size(),))
    low = dtype if dtype is torch.bfloat16 and device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in (module, *aside):
        for block in network.modules():
            if isinstance(block, Block):
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # The rest stays in float32: it is small, and pixels and targets pass through it.
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    # The backward pass gathers a block while the one behind it is at work. Said here, because by itself FSDP goes by
    # the forward passes it has seen, and the main process alone also draws pictures.
    units = [module, *(unit for unit in student.modules() if is_sharded(unit))]
    for before, unit in zip([units[-1], *units], units):
        unit.set_modules_to_backward_prefetch([before])
    # The predictions, of which nobody changes anything in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextmanager
def whole(module: nn.Module):
    """Inside, every process holds all weights (for looking: no gradients), and what one of them does alone needs no
    other. All of them must enter. Does nothing for a module that is not spread.

    Blocks that are gathered in bfloat16 take inputs of that type alone unless autocast is on, so it is on inside; where
    all weights are float32, nothing changes."""
    units = [unit for unit in module.modules() if is_sharded(unit)] if is_sharded(module) else []
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    low = next((p for unit in units for p in unit.parameters() if p.dtype is torch.bfloat16), None)
    try:
        with nullcontext() if low is None else autocast(low.device, low.dtype):
            yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not module, recurse=False)
            unit.reshard()


def gathered(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with whole tensors, on the CPU of the main process ({} elsewhere). All processes must call it."""
    found = {}
    for name, tensor in state.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main_process():
            found[name] = tensor.detach().cpu()
    return found
