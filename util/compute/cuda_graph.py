"""CUDA graphs: the kernels of a function, recorded once and launched again together.

A small network is limited by the launches of its kernels, not by their arithmetic. A graph launches them all at once.
"""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")


class Recorder(Protocol):
    """Records a function of tensors that stay where they are, and replays it.

    Replaying repeats the kernels and nothing else: numbers and branches of Python are those of the recording, and the
    results are written into the tensors that `record` returned.
    """

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Call `function` as it is recorded later. Libraries prepare themselves in the first calls."""
        ...

    def record(self, function: Callable[[], Result]) -> Result:
        """Record `function` without computing anything; return its results, which `replay` fills."""

    def replay(self) -> None:
        """Compute what was recorded, with the present values of the tensors."""


class CudaRecorder:
    """A `Recorder` on a GPU."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def warm_up(self, function: Callable[[], Result]) -> Result:
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = function()
        current.wait_stream(self.stream)
        return result

    def record(self, function: Callable[[], Result]) -> Result:
        self.graph = torch.cuda.CUDAGraph()  # the memory of the one before is free now
        # The thread that pins batches may call CUDA meanwhile.
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        assert self.graph is not None, "replay before record"
        self.graph.replay()


def recorder_for(device: torch.device) -> Recorder | None:
    """Return a recorder for `device`, None if it has no graphs."""
    return CudaRecorder(device) if device.type == "cuda" else None
