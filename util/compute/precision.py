"""Mixed precision, gradient clipping, and the guard against optimizer steps with non-finite gradients."""

from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _cpu_multiplies_bf16() -> bool:
    """Return whether this CPU has AVX512-BF16 or AMX; without them it emulates bf16, several times slower than fp32."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def choose_amp_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type for `--amp_dtype`. `auto` is bf16 if the hardware multiplies it fast, fp16 (with loss scaling) on
    older GPUs, else fp32."""
    if name != "auto":
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "mps":
        return torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def autocast(device: torch.device, dtype: torch.dtype):
    """Return a context in which matrix products run in `dtype`; it does nothing for fp32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32)


@contextmanager
def full_precision():
    """Compute float32 products in full float32, without TF32."""
    precision, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = cudnn


def widest(device: torch.device) -> torch.dtype:
    """Return the type for sums and coordinates: float64; on Apple's GPUs (mps), which lack it, float32."""
    return torch.float32 if device.type == "mps" else torch.float64


def widened(x: torch.Tensor) -> torch.Tensor:
    """Return `x` in at least float32, the precision in which losses are computed also under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def get_grad_norm_(parameters, norm_type: float = 2.0) -> torch.Tensor:
    """Return the norm of all gradients together, a scalar on the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients, norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # of sharded gradients (FSDP)


def guarded_step(optimizer, broken: torch.Tensor) -> None:
    """Take an optimizer step if `broken`, a float scalar on the device, is 0; change nothing if it is 1."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False):  # an optimizer without device-side skipping
        if not broken.item():
            optimizer.step()
        return
    optimizer.grad_scale, optimizer.found_inf = None, broken
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


class NativeScalerWithGradNormCount:
    """Backward pass and optimizer step: loss scaling for fp16, gradient clipping, gradient norm, and the guard.

    The guard skips a step whose gradient is not finite. Without fp16 scaling it also skips all later steps, until the
    host reads `broken` and stops: the weights stay those before the bad step, and no step waits for the device. (Under
    fp16 scaling overflows are normal, and the scaler handles them.) Gradients are averaged over ranks before, so all
    ranks decide alike. Optimizers that honour `found_inf` on the device (torch's fused ones, `util.lars.LARS`) are not
    waited for; others are.
    """

    state_dict_key = "amp_scaler"

    def __init__(self, enabled: bool | None = None, device: torch.device | str | None = None):
        # Without arguments as in the official repository: on CUDA with scaling, if available.
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        enabled = self.device.type == "cuda" if enabled is None else enabled
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=enabled)
        self.broken = torch.zeros((), device=self.device)  # 1 after the first non-finite gradient
        self.applied = torch.ones((), device=self.device)  # 0 if the last step was skipped, else 1; changed in place
        self._streak = torch.zeros(2, device=self.device)  # consecutive overflows: longest since read, and current

    def __call__(self, loss, optimizer, clip_grad=None, parameters=None, create_graph=False, update_grad=True):
        """Back-propagate and, with `update_grad`, take a step. Return the step's gradient norm
        (a scalar on the device), or None."""
        self.backward(loss, create_graph)
        return self.step(optimizer, parameters, clip_grad) if update_grad else None

    def backward(self, loss: torch.Tensor, create_graph: bool = False) -> None:
        """Back-propagate the (scaled) loss."""
        self._scaler.scale(loss).backward(create_graph=create_graph)

    def step(self, optimizer, parameters, clip_grad: float | None = None) -> torch.Tensor:
        """Clip the gradients of `parameters` to the norm `clip_grad`, and take a step if they are finite. Return their
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
            self.applied.copy_(1 - bad)
            now = (self._streak[1] + 1) * bad
            self._streak.copy_(torch.stack([torch.maximum(self._streak[0], now), now]))
        else:
            self.broken.copy_(torch.maximum(self.broken, bad))
            self.applied.copy_(1 - self.broken)
            guarded_step(optimizer, self.broken)
        return norm

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors on the device that a step changes, in place, by name."""
        own = {"broken": self.broken, "applied": self.applied, "streak": self._streak}
        scale = {"scale": self._scaler._scale, "growth": self._scaler._growth_tracker} if self.enabled else {}
        return own | {name: tensor for name, tensor in scale.items() if tensor is not None}

    @property
    def enabled(self) -> bool:
        """Whether losses are scaled (fp16)."""
        return self._scaler.is_enabled()

    @property
    def scale(self) -> float:
        """Return the loss scale, 1 without scaling. Waits for the device."""
        return self._scaler.get_scale()

    def overflows(self) -> tuple[int, int]:
        """Return the number of consecutive overflowing steps: the longest streak since the last call, and the current
        one. Waits for the device."""
        longest, now = (int(count) for count in self._streak.tolist())
        self._streak[0] = now
        return longest, now

    def state_dict(self) -> dict:
        """Return the scaler's state; without scaling that of a fresh scaler, because an enabled one, as in the official
        code, refuses the empty state of a disabled one."""
        scaler = self._scaler if self.enabled else torch.amp.GradScaler("cpu", enabled=True)
        return scaler.state_dict()

    def load_state_dict(self, state: dict | None) -> None:
        """Load a state. An empty one, of older checkpoints in bf16 and fp32, changes nothing."""
        if state:
            self._scaler.load_state_dict(state)
