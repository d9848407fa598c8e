"""Weights, gradients and optimizer states sharded over processes (FSDP2), for models that do not fit on one GPU.

Every transformer block is gathered when it is used and resharded afterwards; the rest (embeddings, norms, heads) is the
outermost unit. Sources: Zhao et al. 2023, "PyTorch FSDP"; Rajbhandari et al. 2020 (ZeRO, stage 3).
"""

import warnings
from contextlib import contextmanager, nullcontext
from typing import Any

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
    """Raise UserError if `--fsdp` cannot be used: in one process, or in float16."""
    if get_world_size() < 2:
        raise UserError("--fsdp shards a model over processes, and this run has one process: start it with torchrun")
    if dtype is torch.float16:
        raise UserError(
            "--fsdp works in bf16 and fp32, not with the loss scaling of fp16: give --amp_dtype bf16 or fp32"
        )


def shard(module: nn.Module, student: nn.Module, external: list[nn.Module], device: torch.device, dtype) -> None:
    """Shard `module` in place, with every block as a unit. `student` is its trained part. Of the `external` networks,
    whose `forward` is not called, only the blocks are sharded.

    On GPUs, blocks that compute in bfloat16 are gathered in bfloat16 (layer norm on a CPU does not accept mixed types).
    Gradients are averaged in float32.
    """
    mesh = init_device_mesh(device.type, (get_world_size(),))
    low = dtype if dtype is torch.bfloat16 and device.type == "cuda" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for network in (module, *external):
        for block in network.modules():
            if isinstance(block, Block):
                fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    # The rest stays in float32: it is small, and pixels and targets pass through it.
    fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    # The backward pass gathers a block while the next one computes. The order is set explicitly: FSDP would derive it
    # from forward passes, and only the main process runs those of previews.
    units: list[Any] = [module, *(unit for unit in student.modules() if is_sharded(unit))]
    for before, unit in zip([units[-1], *units], units):
        unit.set_modules_to_backward_prefetch([before])
    # The warning is about in-place changes of outputs; predictions are not changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextmanager
def whole(module: nn.Module):
    """Let every process hold all weights inside the context (without gradients), so that one process can run the
    network alone. All processes must enter. Does nothing for a module that is not sharded.

    Blocks that are gathered in bfloat16 need autocast, which is on inside. With float32 weights nothing changes.
    """
    units: list[Any] = [unit for unit in module.modules() if is_sharded(unit)] if is_sharded(module) else []
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
    """Return `state` with whole tensors, on the CPU of the main process ({} on other ranks). All processes must call
    it."""
    whole_state = {}
    for name, tensor in state.items():
        tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_main_process():
            whole_state[name] = tensor.detach().cpu()
    return whole_state
