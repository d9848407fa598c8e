"""A stand-in for CUDA graphs that works on any device, and is as forgetful as they are.

Like a graph it records the operations of a function with the tensors that they read and write, and replays these alone:
Python code does not run again, numbers stay those of the recording, results go into the memory of the recording. An
operation that would make the host wait for the device raises RuntimeError, as it does while a real graph is recorded.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from helpers.card import BY_VALUE


class Recorded(TorchDispatchMode):
    """A `util.compute.cuda_graph.Recorder`. `replays` counts them; `operations` are those of the last recording."""

    def __init__(self):
        super().__init__()
        self.operations, self.changed, self.replays, self.recordings = [], [], 0, 0

    def warm_up(self, function):
        return function()

    def record(self, function):
        """Record `function`. Here it computes, too, so what it changed is put back."""
        self.operations, self.changed = [], []
        self.recordings += 1
        random = torch.get_rng_state()
        with self:
            result = function()
        with torch.no_grad():
            for tensor, value in reversed(self.changed):
                tensor.copy_(value)
        torch.set_rng_state(random)
        return result

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for function, args, kwargs, results in self.operations:
            for old, new in zip(results, _tensors(function(*args, **kwargs))):
                if old is not new:
                    old.copy_(new, non_blocking=True)  # a graph writes there itself

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.overloadpacket.__name__ in BY_VALUE:
            raise RuntimeError(f"{function} makes the host wait for the device inside a recorded step")
        self._keep_what_changes(function, args, kwargs)
        result = function(*args, **kwargs)
        aliases = [value.alias_info for value in function._schema.returns]
        view = bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)
        if not view:
            in_place = any(alias is not None for alias in aliases)
            self.operations.append((function, args, kwargs, [] if in_place else _tensors(result)))
        return result

    def _keep_what_changes(self, function, args, kwargs):
        for index, argument in enumerate(function._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[index] if index < len(args) else kwargs.get(argument.name)
            self.changed += [(tensor, tensor.detach().clone()) for tensor in _tensors(given)]


def _tensors(values) -> list[torch.Tensor]:
    return [leaf for leaf in tree_flatten(values)[0] if isinstance(leaf, torch.Tensor)]
