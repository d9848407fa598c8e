"""Forward pass, backward pass and optimizer step: mixed precision, accumulation, clipping, DDP, FLOPs."""

import contextlib
import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.compute.kernels import compile_networks
from util.compute.precision import NativeScalerWithGradNormCount, autocast, choose_amp_dtype
from util.parallel.distributed import get_world_size
from util.report.mfu import FlopMeter
from util.training.batches import MicroBatch


class Stepper:
    """Backward passes and optimizer steps on the parameters of `train_module`. Forward passes call `ddp_model`, which
    is `train_module`, wrapped if there are several processes (`util.training.run.Run` lists the names of the network).
    """

    def __init__(
        self,
        device: torch.device,
        amp_dtype: str,
        train_module: nn.Module,
        optimizer: torch.optim.Optimizer,
        accum_iter: int = 1,
        clip_grad: float | None = None,
    ):
        self.device, self.train_module, self.optimizer = device, train_module, optimizer
        self.amp_dtype = choose_amp_dtype(amp_dtype, device)
        self.accum_iter, self.clip_grad = accum_iter, clip_grad
        self.scaler = NativeScalerWithGradNormCount(self.amp_dtype is torch.float16, device)
        self.ddp_model = train_module  # wrapped by `prepare`
        self.flops: FlopMeter | None = None

    def prepare(self, compiled: list[nn.Module], log_mfu: bool, sharded: bool, lengths_vary: bool = False) -> None:
        """Prepare the first step: compile the networks `compiled`, whose number of tokens may change during the run
        (`lengths_vary`), measure the device for `--log_mfu`, and wrap the module for DDP unless it is `sharded` by
        FSDP."""
        if compiled:
            compile_networks(*compiled, parts=get_world_size() == 1, dynamic=None if lengths_vary else False)
        self.flops = FlopMeter(self.device, self.amp_dtype) if log_mfu else None
        if get_world_size() > 1 and not sharded:
            self.ddp_model = self._wrap(self.train_module)

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are not broadcast in every step: teachers get the same updates on every rank, and rank 0's running
        # statistics are broadcast before an evaluation (`sync_buffers`). torch 2.14 renamed the argument.
        parameters = inspect.signature(DistributedDataParallel).parameters
        broadcast = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        # Methods guarantee that every step has the same graph. With accumulation, micro-batches with and without a
        # gradient reduction differ.
        options: dict[str, Any] = dict(gradient_as_bucket_view=True, static_graph=self.accum_iter == 1)
        return DistributedDataParallel(module, device_ids=device_ids, **options | {broadcast: False})

    @contextlib.contextmanager
    def autocast(self, batch: MicroBatch):
        """Return the context of the forward pass: mixed precision, and gradients that are reduced over ranks only in
        the window's last micro-batch."""
        with contextlib.ExitStack() as stack:
            if not batch.is_last_of_window and self.ddp_model is not self.train_module:
                stack.enter_context(self.ddp_model.no_sync())
            stack.enter_context(autocast(self.device, self.amp_dtype))
            stack.enter_context(self._counting())
            yield

    def backward(self, loss: torch.Tensor, batch: MicroBatch) -> None:
        """Back-propagate `loss` (scalar), divided by the number of micro-batches in the window."""
        with self._counting():
            self.scaler.backward(loss / batch.window)
        if self.flops:
            self.flops.counted_images(len(batch.samples.target))

    def _counting(self):
        return self.flops.counting() if self.flops else contextlib.nullcontext()

    def step(self) -> torch.Tensor:
        """Clip the gradients, take a step if they are finite, and clear them. Return their norm before clipping, a
        scalar on the device."""
        norm = self.scaler.step(self.optimizer, self.train_module.parameters(), self.clip_grad)
        self.optimizer.zero_grad(set_to_none=True)
        return norm
