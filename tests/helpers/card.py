"""A pretended GPU: tensors that say they are on `cuda:0`, are computed on the CPU, and refuse what CUDA refuses.

    with Card() as card:
        main_pretrain.main(args)        # with --device cuda
    card.waits                          # places at which the host would have waited for the device

A tensor on the device is a `Held`, around a tensor of the CPU. An operation on tensors of both devices raises, as on a
GPU. Reading a number, results whose size depends on values, and blocking copies are where the host waits; they are
counted while `card.watching`. Numbers are those of the CPU, so a run must give what it gives there.

torch's own FakeTensorMode has no values, and its backward pass needs a driver; here the mains run as they are. What
needs a real GPU cannot be seen: kernels, their order in streams, memory, graphs, compiled code, and NCCL.
"""

import traceback
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

ROOT = Path(__file__).resolve().parent.parent.parent
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
READS = {"item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__", "__array__", "__contains__"}
BY_VALUE = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "unique_dim",
    "_unique",
    "_unique2",
}
BY_VALUE |= {"unique_consecutive", "repeat_interleave", "bincount", "histc"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Held(torch.Tensor):
    """A tensor on the pretended GPU; `host` holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        held = torch.Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=host.device,
            requires_grad=host.requires_grad,
        )
        held.host = host.detach()
        return held

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def get_device(self):
        return 0

    def __repr__(self, *, tensor_contents=None):
        return f"Held({self.host!r})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Held(self.host.clone())
            memo[id(self)] = torch.nn.Parameter(copy, self.requires_grad) if self._is_param else copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        """Checkpoints hold plain tensors, as those of a GPU do."""
        return self.host.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        card, kwargs = Card.now, kwargs or {}
        card.check(function, args, kwargs)
        inner_args, inner_kwargs = tree_map_only(Held, lambda held: held.host, (args, kwargs))
        out = function(*inner_args, **inner_kwargs)
        if function.overloadpacket.__name__ == "copy_" and not isinstance(args[0], Held):
            return args[0]
        out = tree_map_only(torch.Tensor, Held, out)
        return return_and_correct_aliasing(function, args, kwargs, out)


def _is_cuda(value) -> bool:
    if isinstance(value, str):
        return value.split(":")[0] == "cuda"
    return isinstance(value, torch.device) and value.type == "cuda"


class Card(TorchFunctionMode):
    """While entered, `cuda` is a device, and everything in `torch.cuda` that the project asks for has an answer."""

    now = None

    def __init__(self):
        super().__init__()
        self.waits: list[str] = []
        self.watching = False
        self._patches = ExitStack()

    def __enter__(self):
        Card.now = self
        autocast, generator = torch.autocast, torch.Generator
        answers = dict(
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            set_device=lambda device: None,
            get_device_capability=lambda device=None: (9, 0),
            get_device_name=lambda device=None: "pretended GPU",
            mem_get_info=lambda device=None: (80 << 30, 80 << 30),
            max_memory_allocated=lambda device=None: 0,
            reset_peak_memory_stats=lambda device=None: None,
            synchronize=lambda device=None: self.wait("torch.cuda.synchronize"),
            Event=lambda: SimpleNamespace(record=lambda: None, synchronize=lambda: self.wait("Event.synchronize")),
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: torch.set_rng_state(state),
        )
        for name, answer in answers.items():
            self._patches.enter_context(patch.object(torch.cuda, name, answer))
        for where in (torch, torch.amp, torch.amp.autocast_mode):
            self._patches.enter_context(patch.object(where, "autocast", _on_cpu(autocast)))
        self._patches.enter_context(patch.object(torch, "Generator", lambda device="cpu": generator()))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # torch 2.14, 2.11
            if hasattr(torch.optim.Optimizer, name):
                self._patches.enter_context(patch.object(torch.optim.Optimizer, name, lambda optimizer: None))
        group = torch._C._group_tensors_by_device_and_dtype  # of optimizers and of clipping
        self._patches.enter_context(patch.object(torch._C, group.__name__, _by_own_device(group)))
        # A moved parameter stays the same object, which optimizers may hold already.
        swap = torch.__future__.get_swap_module_params_on_conversion()
        self._patches.callback(torch.__future__.set_swap_module_params_on_conversion, swap)
        torch.__future__.set_swap_module_params_on_conversion(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patches.close()
        Card.now = None

    def watch(self, on: bool) -> None:
        self.watching = on

    def wait(self, why: str) -> None:
        """Note that the host waits here, with the innermost place in the project."""
        if not self.watching:
            return
        places = [frame for frame in traceback.extract_stack() if _ours(frame.filename)]
        place = f"{Path(places[-1].filename).relative_to(ROOT)}:{places[-1].lineno}" if places else "?"
        self.waits.append(f"{place} {why}")

    def check(self, function, args, kwargs) -> None:
        """Raise RuntimeError for tensors of both devices; note a wait for an operation that needs values."""
        name = function.overloadpacket.__name__
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        if name == "copy_":
            if not all(isinstance(tensor, Held) for tensor in tensors) and not (args[2:] or (False,))[0]:
                self.wait("blocking copy between devices")
            return
        indexing = name in INDEXING
        if indexing:
            indices = [index for index in args[1] if index is not None]
            if any(not isinstance(index, Held) for index in indices):
                self.wait("index on the host")
            if any(index.dtype is torch.bool for index in indices):
                self.wait("boolean index")
            tensors = [args[0], *args[2:3]]
        elif name in BY_VALUE:
            self.wait(name)
        if torch._C._current_graph_task_id() != -1:  # torch's backward formulas make zeros out of reach of this class
            return
        strange = [tensor for tensor in tensors if not isinstance(tensor, Held) and (tensor.dim() or name == "stack")]
        if strange:
            raise RuntimeError(f"{name}: expected all tensors on the same device, but got cuda:0 and cpu")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        held = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Held)]
        if name == "pin_memory":
            return args[0]
        kwargs.pop("pin_memory", None)
        if name in ("to", "cuda", "cpu") and isinstance(args[0], torch.Tensor):
            return self._move(name, args, kwargs)
        if name in READS and held:
            self.wait(name)
            return function(args[0].host, *args[1:], **kwargs)
        if name == "__format__" and held:
            self.wait(name)
            return function(args[0].host, *args[1:])
        device = kwargs.get("device")
        if name in ("tensor", "as_tensor", "asarray") and held and device is None:
            if name == "tensor":
                self.wait("torch.tensor of numbers on the device")
            elif isinstance(args[0], Held):
                return args[0]
        if _is_cuda(device):
            kwargs["device"] = CPU
            if name in ("tensor", "as_tensor", "asarray", "from_numpy"):
                if isinstance(args[0], Held):
                    return args[0] if name != "tensor" else args[0].clone()
                self.wait("numbers of the host copied to the device")
            with torch.no_grad():
                out = function(*tree_map_only(Held, lambda held: held.host, args), **kwargs)
            return tree_map_only(torch.Tensor, lambda made: Held(made), out)
        if device is not None and torch.device(device).type == "cpu" and held:
            return function(*tree_map_only(Held, lambda held: held.host, args), **kwargs)
        return function(*args, **kwargs)

    def _move(self, name: str, args, kwargs):
        """`Tensor.to`, `.cuda()` and `.cpu()`."""
        tensor = args[0]
        if name == "to":
            device, dtype, non_blocking, memory_format = _parse(args, kwargs)
        else:
            device, dtype, memory_format = CUDA if name == "cuda" else CPU, None, None
            non_blocking = kwargs.get("non_blocking", False)
        if device is None or device.type == tensor.device.type or "cuda" not in (device.type, tensor.device.type):
            if isinstance(tensor, Held) and device is not None:  # it is there, perhaps in another type
                kept = {} if memory_format is None else {"memory_format": memory_format}
                return (
                    tensor.to(dtype, copy=kwargs.get("copy", False), **kept) if dtype or kwargs.get("copy") else tensor
                )
            return getattr(torch.Tensor, name)(*args, **kwargs)
        if not non_blocking:
            self.wait(f"blocking copy to {device.type}")
        if tensor.requires_grad and torch.is_grad_enabled():
            return _Moved.apply(tensor, device, dtype)
        return _moved(tensor, device, dtype)


class _Moved(torch.autograd.Function):
    """A copy to the other device whose gradient is copied back."""

    @staticmethod
    def forward(ctx, tensor, device, dtype):
        ctx.back = tensor.device, tensor.dtype
        return _moved(tensor, device, dtype)

    @staticmethod
    def backward(ctx, gradient):
        return _moved(gradient, *ctx.back), None, None


def _moved(tensor: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    with torch.no_grad():
        host = tensor.host if isinstance(tensor, Held) else tensor.detach()
        host = host.clone() if dtype is None else host.to(dtype, copy=True)
        return Held(host) if device.type == "cuda" else host


def _parse(args, kwargs):
    rest = args[1:]
    if rest and isinstance(rest[0], torch.Tensor):
        return rest[0].device, rest[0].dtype, kwargs.get("non_blocking", False), None
    kwargs = {name: value for name, value in kwargs.items() if name != "copy"}
    return torch._C._nn._parse_to(*rest, **kwargs)


def _on_cpu(autocast):
    """`torch.autocast` whose device type is the CPU's."""

    class Autocast(autocast):
        def __init__(self, device_type, *args, **kwargs):
            super().__init__("cpu", *args, **kwargs)

    return Autocast


def _by_own_device(group):
    """`group` with the device that the tensors of a group say."""

    def grouped(tensors, with_indices=False):
        return {
            (CUDA if any(isinstance(first, Held) for first in lists[0][:1]) else device, dtype): (lists, indices)
            for (device, dtype), (lists, indices) in group(tensors, with_indices).items()
        }

    return grouped


def _ours(path: str) -> bool:
    here = Path(path)
    inside = here.is_relative_to(ROOT) and "site-packages" not in here.parts  # an environment may lie in the repository
    return inside and not here.is_relative_to(ROOT / "tests")
