"""Mixed precision, and the one place where a gradient becomes an optimizer step (or does not)."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _cpu_multiplies_bf16() -> bool:
    """AVX512-BF16 or AMX: without them a CPU emulates bf16, several times slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 where the hardware multiplies it fast, fp16 (with a scaler) on older GPUs, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Context in which matrix products run in `dtype`; does nothing for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


@contextmanager
def full_precision():
    """Float32 products in float32, without TF32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def widened(x: torch.Tensor) -> torch.Tensor:
    """At least float32: what a loss is computed in, whatever autocast made of its arguments."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def get_grad_norm_(parameters, norm_type: float = 2.0) -> torch.Tensor:
    """Norm of all gradients together, a device scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of gradients that are spread over the processes


def guarded_step(optimizer, broken: torch.Tensor) -> None:
    """Step where `broken`, a float scalar on the device, is 0; where it is 1 nothing changes."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):  # somebody's own optimizer: look, then step
        if not broken.item():
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, broken
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


class NativeScalerWithGradNormCount:
    """Backward pass and optimizer step: loss scaling for fp16, gradient clipping, gradient norm, and the guard.

    The guard: a step whose gradient is not finite never changes a weight, and (except under fp16 scaling, where
    overflow is normal and the scaler deals with it) neither does any later one, until the host reads `broken` and
    stops. So the weights are those before the bad step, without the host waiting for the device in every step. Under
    DDP gradients are averaged before they get here, so all ranks see the same and agree without a further message.
    Optimizers that honour `found_inf` on the device (torch's fused ones, our LARS) are not waited for, others are.
    """

    state_dict_key = "amp_scaler"

    def __init__(self, enabled: bool | None = None, device: torch.device | str | None = None):
        # Without arguments as upstream's: scaling, on CUDA where there is one.
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        enabled = self.device.type == "cuda" if enabled is None else enabled
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        self.broken = torch.zeros((), device=self.device)  # 1 from the first non-finite gradient on
        self.applied = torch.ones((), device=self.device)  # 0 where the last step was skipped
        self._streak = torch.zeros(2, device=self.device)  # steps in a row that overflowed: longest lately, and now

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, update_grad=True):
        """Back-propagate; with `update_grad` also step. Returns the gradient norm (a device scalar) of a step."""
        self.backward(loss, create_graph)
        return self.step(optimizer, parameters, clip_grad) if update_grad else None

    def backward(self, loss: torch.Tensor, create_graph: bool = False) -> None:
        """Back-propagate the (scaled) loss."""
        self._scaler.scale(loss).backward(create_graph=create_graph)

    def step(self, optimizer, parameters, clip_grad: float | None = None) -> torch.Tensor:
        """Clip the gradients of `parameters` to the norm `clip_grad`, and step where they are finite. Returns their
        norm before clipping, a scalar on the device."""
        parameters = [p for p in parameters if p.grad is not None]
        self._scaler.unscale_(optimizer)
        norm = get_grad_norm_(parameters)
        if clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_grad, norm)
        bad = (~torch.isfinite(norm)).to(torch.float32)
        if self.enabled:
            self._scaler.step(optimizer)
            self._scaler.update()
            self.applied = 1 - bad
            now = (self._streak[1] + 1) * bad
            self._streak = torch.stack([torch.maximum(self._streak[0], now), now])
        else:
            self.broken = torch.maximum(self.broken, bad)
            self.applied = 1 - self.broken
            guarded_step(optimizer, self.broken)
        return norm

    @property
    def enabled(self) -> bool:
        """Whether losses are scaled (fp16)."""
        return self._scaler.is_enabled()

    @property
    def scale(self) -> float:
        """Factor of the loss, 1 without scaling. Waits for the device."""
        return self._scaler.get_scale()

    def overflows(self) -> tuple[int, int]:
        """Steps in a row that overflowed: the longest such row since the last call, and the one that lasts. Waits for
        the device."""
        longest, now = (int(count) for count in self._streak.tolist())
        self._streak[0] = now
        return longest, now

    def state_dict(self):
        return self._scaler.state_dict()

    def load_state_dict(self, state):
        self._scaler.load_state_dict(state)
