"""Forward pass, backward pass and optimizer step: mixed precision, accumulation, clipping, DDP, FLOPs."""

import contextlib
import inspect

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.compute.kernels import compile_blocks
from util.compute.precision import NativeScalerWithGradNormCount, autocast, choose_amp_dtype
from util.parallel.distributed import get_world_size
from util.report.mfu import FlopMeter
from util.training.batches import MicroBatch


class Stepper:
    """Takes steps of `optimizer` on the parameters of `train_module`; `ddp_model` is the module to call for forward
    passes (the three names of the network: `util.training.run.Run`)."""

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

    def prepare(self, compiled: list[nn.Module], log_mfu: bool, sharded: bool) -> None:
        """Prepare the first step: compile the blocks of the networks `compiled`, measure the device for `--log_mfu`,
        and wrap the module for DDP (`sharded` modules, FSDP, need none)."""
        if compiled:
            compile_blocks(*compiled)
        self.flops = FlopMeter(self.device, self.amp_dtype) if log_mfu else None
        if get_world_size() > 1 and not sharded:
            self.ddp_model = self._wrap(self.train_module)

    def _wrap(self, module: nn.Module) -> DistributedDataParallel:
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are not broadcast in every step: teachers get the same updates on every rank, and evaluations first
        # broadcast rank 0's running statistics (`sync_buffers`). torch 2.14 renamed the argument.
        names = inspect.signature(DistributedDataParallel).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        # Every step has the same graph, as methods guarantee; with accumulation, steps without a reduction differ.
        fixed = dict(gradient_as_bucket_view=True, static_graph=self.accum_iter == 1)
        return DistributedDataParallel(module, device_ids=device_ids, **fixed, **{switch: False})

    @contextlib.contextmanager
    def autocast(self, batch: MicroBatch):
        """Return the context of the forward pass: mixed precision, and no gradient reduction before the window's last
        micro-batch."""
        with contextlib.ExitStack() as stack:
            if not batch.is_last_of_window and self.ddp_model is not self.train_module:
                stack.enter_context(self.ddp_model.no_sync())
            stack.enter_context(autocast(self.device, self.amp_dtype))
            stack.enter_context(self._counting())
            yield

    def backward(self, loss: torch.Tensor, batch: MicroBatch) -> None:
        """Back-propagate the micro-batch's share of `loss` (scalar): divided by the size of the window."""
        with self._counting():
            self.scaler.backward(loss / batch.window)
        if self.flops:
            self.flops.counted_images(len(batch.samples.target))

    def _counting(self):
        return self.flops.counting() if self.flops else contextlib.nullcontext()

    def step(self) -> torch.Tensor:
        """Clip, step if the gradients are finite, and clear them. Return their norm before clipping, a scalar on the
        device."""
        norm = self.scaler.step(self.optimizer, self.train_module.parameters(), self.clip_grad)
        self.optimizer.zero_grad(set_to_none=True)
        return norm
