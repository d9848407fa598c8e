"""Random numbers keyed by sample and not by process: functions of (seed, epoch, sample index).

An image gets the same crop and the same mask for any number of workers, ranks or micro-batches, and after a resume.
Masks are drawn by hashing counters (integer arithmetic, so CPU and GPU agree bit for bit).
"""

import random
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.utils.data

MASK32 = 0xFFFFFFFF
GOLDEN = 0x9E3779B9


def mix(x):
    """A bijection of 32-bit integers with good avalanche (constants of C. Wellons' `lowbias32`). `x` is an int, or an
    int64 array of NumPy or torch; so is the result."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def sample_keys(seed: int, epoch: int, indices: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Return a key for each sample, from which `noise_of_keys` draws: (N,) int64 in [0, 2**32), on the device of
    `indices` (N,). Keys of indices on the CPU are computed there, which saves a GPU launching 50 tiny kernels."""
    host = indices.device.type == "cpu"
    words: Any = indices.to(torch.int64)
    words = words.numpy() if host else words
    key: Any = seed & MASK32
    for word in (epoch, stream, words >> 32, words):  # the first two are plain numbers
        key = mix((key + GOLDEN) & MASK32 ^ mix(word & MASK32))
    return torch.from_numpy(key) if host else key


@lru_cache(maxsize=64)
def _counters(length: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # shared by all callers, as in `util.compute.constants`
        return mix(torch.arange(1, length + 1, device=device))


def noise_of_keys(keys: torch.Tensor, length: int) -> torch.Tensor:
    """Return uniform numbers in [0, 1), one row per key of `sample_keys`: (N, length) float32 on the device of `keys`
    (N,)."""
    keys = keys[:, None]
    bits = mix(mix(keys ^ _counters(length, keys.device)) + keys & MASK32)  # (N, length)
    return (bits >> 8).to(torch.float32) * 2.0**-24


def sample_noise(seed: int, epoch: int, indices: torch.Tensor, length: int, stream: int = 0) -> torch.Tensor:
    """Return uniform numbers in [0, 1), one row per sample: (N, length) float32 on the device of `indices` (N,) int64.

    `stream` separates independent draws for the same sample (for example a second mask).
    """
    return noise_of_keys(sample_keys(seed, epoch, indices, stream), length)


def redrawn(noise: torch.Tensor, stream: int = 0) -> torch.Tensor:
    """Return new uniform numbers in the shape of `noise` (float32) by hashing its bits: a second, independent mask for
    the same samples. Each `stream` gives other numbers."""
    bits = noise.to(torch.float32).view(torch.int32).to(torch.int64) & MASK32
    return (mix(mix(bits) ^ (GOLDEN + stream)) >> 8).to(torch.float32) * 2.0**-24


@contextmanager
def seeded(*words: int):
    """Seed the CPU generators of Python, NumPy and torch from `words` inside the block, and restore them afterwards."""
    with generators_seeded(*np.random.SeedSequence(words).generate_state(3).tolist()):
        yield


@contextmanager
def generators_seeded(python: int, numpy: int, pytorch: int):
    """Give the CPU generators these seeds (of 32 bits) inside the block, and restore them afterwards.

    A data worker draws only inside such blocks, so there the states are not restored, which saves 0.3 ms.
    """
    in_worker = torch.utils.data.get_worker_info() is not None
    before = None if in_worker else (random.getstate(), np.random.get_state(), torch.get_rng_state())
    random.seed(python)
    np.random.seed(numpy)
    torch.default_generator.manual_seed(pytorch)
    try:
        yield
    finally:
        if before is not None:
            random.setstate(before[0])
            np.random.set_state(before[1])
            torch.set_rng_state(before[2])


def get_rng_state(device: torch.device) -> dict:
    """Return the state of every generator of this process, in types that `torch.load(weights_only=True)` reads."""
    legacy: Any = np.random.get_state()
    name, keys, *rest = legacy
    version, words, gauss = random.getstate()
    state = {
        "python": [version, list(words), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict, device: torch.device) -> None:
    """Restore a state that `get_rng_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
