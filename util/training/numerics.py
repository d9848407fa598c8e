"""Trouble with numbers: values that are not finite, losses that leap, fp16 steps that overflow again and again.

All of it is noted on the device while steps run and read where the host waits for the device anyway (`read`), at the
same step on all ranks: they stop together and say the same.
"""

from collections import deque
from statistics import median

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from util.data.images import printable
from util.errors import RunFailed
from util.parallel.distributed import all_reduce_sum, gather_objects, get_world_size, is_main_process

OVERFLOWS = 50  # steps in a row that overflow, from which on it is said
USUAL = 100  # steps whose median loss is the usual one
FEWEST = 20  # of them, before any loss is judged
NO_SMALLER_SCALE = 2.0**-14  # 30 halvings of the initial one: nothing has been learned for a long time


class Finite:
    """The first step at which each of several named values was not finite."""

    def __init__(self, device: torch.device):
        self.device = device
        self._first: dict[str, torch.Tensor] = {}

    def watch(self, step: int, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            first = self._first.get(name)
            if first is None:
                first = torch.full((), torch.inf, device=self.device, dtype=torch.float64)
            bad = ~torch.isfinite(value)
            self._first[name] = torch.where(bad, first.clamp(max=step), first)

    def read(self, epoch: int, module: nn.Module) -> None:
        """RunFailed, on all ranks, when one of them met such a value; names weights of `module` that are not finite."""
        names = sorted(self._first)
        firsts = torch.stack([-self._first[name] for name in names]) if names else torch.empty(0)
        if get_world_size() > 1 and names:
            torch.distributed.all_reduce(firsts, op=torch.distributed.ReduceOp.MAX)
        firsts = dict(zip(names, (-firsts).tolist()))
        step = min(firsts.values(), default=torch.inf)
        if step == torch.inf:
            return
        parts = [name for name in names if firsts[name] == step and name not in ("loss", "gradient")]
        culprit = parts or [name for name in ("loss", "gradient") if firsts.get(name) == step][:1]
        where = broken_state({"weight": module.state_dict()})
        raise RunFailed(
            f"{' and '.join(culprit)} became non-finite at step {int(step)} (epoch {epoch}); "
            + (f"{where} is non-finite, too; " if where else "")
            + "the weights were not changed by it and the last checkpoint is good: try --clip_grad 1, a lower --blr or "
            "--amp_dtype fp32"
        )


def broken_state(states: dict[str, dict]) -> str:
    """The first tensor of `states` (kind -> names and tensors, perhaps nested) that is not finite, in words, with the
    rank that has it; "" where all are. All ranks must call it, and get the same."""
    found = gather_objects(_broken_here(states))
    ranks = [rank for rank, name in enumerate(found) if name]
    if not ranks:
        return ""
    everywhere = len(ranks) == get_world_size()
    return found[ranks[0]] + ("" if everywhere else f" on rank {', '.join(map(str, ranks))}")


@torch.no_grad()
def _broken_here(states: dict[str, dict]) -> str:
    named = [(f"{kind} {name}", tensor) for kind, state in states.items() for name, tensor in _floats(state)]
    if not named:
        return ""
    device = named[0][1].device
    ends = torch.stack([torch.stack(torch.aminmax(t)).to(device, torch.float64) for _, t in named])  # NaN where one is
    finite = torch.isfinite(ends).all(1).tolist()
    return named[finite.index(False)][0] if not all(finite) else ""


def _floats(state, prefix: str = ""):
    for name, value in state.items():
        value = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(value, dict):
            yield from _floats(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            yield f"{prefix}{name}", value


class Spikes:
    """Steps whose loss is more than `factor` times the usual one (the median of the 100 before), with their images."""

    def __init__(self, factor: float | None):
        self.factor = factor
        self._usual: deque[float] = deque(maxlen=USUAL)
        self._steps: list[tuple[int, list[torch.Tensor], list[torch.Tensor]]] = []  # since the last reading

    def watch(self, step: int, loss: torch.Tensor, indices: torch.Tensor) -> None:
        """One micro-batch of this rank: its loss (device scalar) and the places of its images in the data set (N,)."""
        if self.factor is None:
            return
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append((step, [], []))
        self._steps[-1][1].append(loss.detach())
        self._steps[-1][2].append(indices)

    def read(self, name_of) -> list[dict]:
        """The spikes since the last reading (on the main process; all must call it); `name_of(index)` is an image's
        name. All ranks' losses count, so all find the same."""
        if not self._steps:
            return []
        steps, self._steps = self._steps, []
        means = all_reduce_sum(torch.stack([torch.stack(losses).mean() for _, losses, _ in steps]).double())
        found = []
        for (step, _, indices), loss in zip(steps, (means / get_world_size()).tolist()):
            usual = median(self._usual) if len(self._usual) >= FEWEST else torch.inf
            self._usual.append(loss)
            if loss > self.factor * usual:
                images = [index for rank in gather_objects(torch.cat(indices).tolist()) for index in rank]
                names = [name_of(index) for index in images] if is_main_process() else []
                found.append({"step": step, "loss": loss, "usual": usual, "indices": images, "images": names})
        return found if is_main_process() else []


def describe_spike(spike: dict, written: str) -> str:
    """A line about it, and where its images are listed."""
    names = ", ".join(map(printable, spike["images"][:2]))
    return (
        f"loss spike at step {spike['step']}: {spike['loss']:.4g}, {spike['loss'] / spike['usual']:.3g} times the "
        f"usual {spike['usual']:.4g}; its {len(spike['images'])} images ({names}, ...) {written}"
    )


class Overflows:
    """Says once when fp16 overflows in many steps in a row, and fails when no scale of the loss is small enough."""

    def __init__(self, scaler):
        self.scaler, self._said = scaler, False

    def read(self, step: int) -> None:
        if not self.scaler.enabled:
            return
        longest, current = self.scaler.overflows()
        if longest >= OVERFLOWS and not self._said:
            print(
                f"note: fp16 gradients overflowed in {longest} steps in a row (until step {step}), none of which "
                f"changed a weight; the scale of the loss is now {self.scaler.scale:.3g}: use --amp_dtype bf16 or "
                f"fp32, or --clip_grad 1, if this goes on"
            )
        self._said = current >= OVERFLOWS
        if self.scaler.scale < NO_SMALLER_SCALE:
            raise RunFailed("fp16 overflows at every scale of the loss: use --amp_dtype bf16 or fp32, or --clip_grad 1")
