"""A training step that is simulated: its FLOPs, and the memory of its tensors at every moment.

The real code of the model runs on torch's fake tensors: they have shapes, types and storages, but no values, so nothing
is computed, and a step of ViT-L takes seconds. Not seen are buffers inside an operation, such as a convolution's
workspace.
"""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from util.report.mfu import flop_counter

Build = Callable[[], nn.Module]
Losses = Callable[[nn.Module, torch.Tensor], torch.Tensor]  # (model, images) -> the loss


@contextlib.contextmanager
def _as_on_gpu(widen: bool):
    """Do what a GPU does in another way than a CPU. Its autocast computes layer and group norms in float32 (`widen`).
    Its fused attention takes a bias that is trained; a CPU keeps the attention weights then."""
    originals = {name: getattr(F, name) for name in ("layer_norm", "group_norm", "scaled_dot_product_attention")}

    def norm(name: str):
        return lambda x, *args, **kwargs: originals[name](x.float() if widen else x, *args, **kwargs)

    def attention(*args, attn_mask=None, **kwargs):
        attend = originals["scaled_dot_product_attention"]
        if attn_mask is None or not attn_mask.requires_grad:
            return attend(*args, attn_mask=attn_mask, **kwargs)
        return attend(*args, attn_mask=attn_mask.detach(), **kwargs) + 0 * attn_mask.sum()  # the bias has a gradient

    F.layer_norm, F.group_norm, F.scaled_dot_product_attention = norm("layer_norm"), norm("group_norm"), attention
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


class _Allocations(TorchDispatchMode):
    """Records when storages appear and disappear: `events` of (number of the storage, its bytes, or minus its bytes).

    Those of the tensors `held` are not recorded. `copies` are the storages of weights in another type.
    """

    def __init__(self, held: Iterable[torch.Tensor], weights: Iterable[torch.Tensor]):
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self.numbers: dict[int, int] = {}
        self.copies: set[int] = set()
        self.count = 0
        self._known = {_key(tensor) for tensor in held}
        self._weights = {_key(tensor) for tensor in weights}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        is_copy = function is torch.ops.aten._to_copy.default and _key(args[0]) in self._weights
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._record(tensor.untyped_storage(), is_copy)
        return outputs

    def _record(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        key = storage._cdata
        if key in self._known or key in self.numbers:
            return
        number, size = self.count, storage.nbytes()
        self.count, self.numbers[key] = number + 1, number
        self.events.append((number, size))
        if is_copy:
            self.copies.add(number)
        weakref.finalize(storage, self._forget, key, number, size).atexit = False

    def _forget(self, key: int, number: int, size: int) -> None:
        del self.numbers[key]
        self.events.append((number, -size))


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


@dataclass(frozen=True)
class Trace:
    """What a simulated step of one micro-batch of `images` did. Of every event, in their order: the bytes that are
    allocated (negative: freed), and whether they belong to a weight's gradient or to its copy in another type."""

    images: int
    flops: int  # of matrix products, forward and backward pass
    sizes: np.ndarray
    gradients: np.ndarray
    copies: np.ndarray
    forward: int  # number of events before the backward pass


def trace(
    build: Build, losses: Losses, shape: tuple[int, int, int], images: int, element: int, like_gpu: bool = True
) -> Trace:
    """Simulate a step of the model that `build` makes, on `images` of `shape` (C, H, W). `element` are the bytes of a
    number in matrix products: 2 for autocast to bf16, 4 for float32. `like_gpu`: with a GPU's norms and attention."""
    with torch.device("meta"):
        model = build()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_no_garbage_collection())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        model = model.to_empty(device="cpu").train()
        imgs = torch.empty(images, *shape)
        parameters = list(model.parameters())
        counter = stack.enter_context(flop_counter())
        seen = stack.enter_context(_Allocations([*parameters, *model.buffers(), imgs], parameters))
        if like_gpu:
            stack.enter_context(_as_on_gpu(widen=element < 4))
        with torch.autocast("cpu", torch.bfloat16, enabled=element < 4):
            loss = losses(model, imgs)
        forward = len(seen.events)
        loss.backward()
        numbers = {seen.numbers[_key(p.grad)] for p in parameters if p.grad is not None}
        events = list(seen.events)
        flops = counter.get_total_flops()
    order, sizes = (np.array(column) for column in zip(*events))
    gradients, copies = (np.isin(order, list(chosen)) for chosen in (numbers, seen.copies))
    return Trace(images, flops, sizes.astype(float), gradients, copies, forward)


@contextlib.contextmanager
def _no_garbage_collection():
    """The collector may drop the Python object of a storage that exists, which would look as if it were freed."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True)
class Simulation:
    """Two traces of the same step with other numbers of images, from which the memory for any number follows: the
    operations are the same, so the bytes of every event are linear in the number of images."""

    few: Trace
    more: Trace

    def flops(self) -> int:
        """Return the FLOPs of matrix products for each image, forward and backward pass."""
        return self.few.flops // self.few.images

    def peak(self, images: int, gradients_persist: bool) -> tuple[str, dict[str, float]]:
        """Return (moment, bytes by content) at the peak of a step with so many `images`, without weights, optimizer and
        images. `gradients_persist`: the gradients exist before the step (accumulation, DDP's buckets)."""
        few, more = self.few, self.more
        slope = (more.sizes - few.sizes) / (more.images - few.images)
        sizes = few.sizes + (images - few.images) * slope
        gradients, copies = (np.cumsum(sizes * mask) for mask in (few.gradients, few.copies))
        other = np.cumsum(sizes) - gradients - copies
        largest = max(sizes[few.gradients], default=0.0)
        if gradients_persist:  # a new gradient exists for a moment beside the sum
            gradients = np.full_like(other, gradients[-1])
        at = int(np.argmax(other + gradients + copies))
        kept = min(other[few.forward - 1], other[at])
        contents = {
            "activations": kept,
            "temporary": other[at] - kept + (largest if gradients_persist else 0.0),
            "gradients": gradients[at],
            "bf16 weights": copies[at],
        }
        return "forward" if at < few.forward else "backward", contents


def simulate(build: Build, losses: Losses, shape: tuple[int, int, int], element: int, **options) -> Simulation:
    """Return the simulation of a step on images of `shape` (C, H, W); see `trace`."""
    return Simulation(*(trace(build, losses, shape, images, element, **options) for images in (2, 3)))
