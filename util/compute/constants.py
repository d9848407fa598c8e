"""Small constant tensors, copied to a device once: each copy of numbers from the host makes it wait for the device."""

from functools import lru_cache

import torch


@lru_cache(maxsize=256)
def constant(values: tuple, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return a tensor of `values`, (nested) tuples of numbers. All callers share it: it must not be changed."""
    with torch.inference_mode(False):  # else a first call during inference makes a tensor that training cannot use
        return torch.tensor(values, device=device, dtype=dtype)
