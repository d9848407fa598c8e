"""Detection of non-finite values, loss spikes, and repeated fp16 overflows.

Values are recorded on the device in every step, and `read` at the steps where the host waits for the device anyway.
These steps are the same on all ranks, so all ranks stop together, with the same message.
"""

from collections import deque
from statistics import median

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from util.compute.precision import widest
from util.data.images import printable
from util.errors import RunFailed
from util.parallel.distributed import all_reduce_sum, gather_objects, get_world_size, is_main_process

OVERFLOWS = 50  # consecutive overflows that are reported
USUAL_STEPS = 100  # steps whose median loss is the usual loss
MIN_STEPS = 20  # steps before the first spike can be detected
MIN_SCALE = 2.0**-14  # 30 halvings of the initial scale: no step was applied for a long time


class NonFiniteDetector:
    """Records, for each of several named values, the first step in which it was not finite."""

    def __init__(self, device: torch.device):
        self.device = device
        self._first: dict[str, torch.Tensor] = {}

    def add(self, step: int, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            first = self._first.get(name)
            if first is None:
                first = torch.full((), torch.inf, device=self.device, dtype=widest(self.device))
            bad = ~torch.isfinite(value)
            self._first[name] = torch.where(bad, first.clamp(max=step), first)

    def read(self, epoch: int, module: nn.Module) -> None:
        """Raise RunFailed on all ranks if a value of one of them was not finite. The message names the value, and the
        first tensor of `module` that is not finite."""
        names = sorted(self._first)
        firsts = torch.stack([-self._first[name] for name in names]) if names else torch.empty(0)
        if get_world_size() > 1 and names:
            torch.distributed.all_reduce(firsts, op=torch.distributed.ReduceOp.MAX)
        firsts = dict(zip(names, (-firsts).tolist()))
        step = min(firsts.values(), default=torch.inf)
        if step == torch.inf:
            return
        terms = [f"train/{name}" for name in names if firsts[name] == step and name not in ("loss", "gradient")]
        total = "train/loss" if firsts.get("loss") == step else "gradient"
        where = broken_state({"weight": module.state_dict()})
        raise RunFailed(
            f"{' and '.join(terms) or total} became non-finite at step {int(step)} (epoch {epoch}); "
            + (f"{where} is non-finite, too; " if where else "")
            + "the weights were not changed by it and the last checkpoint is good: try --clip_grad 1, a lower --blr or "
            "--amp_dtype fp32"
        )


def broken_state(states: dict[str, dict]) -> str:
    """Return the first non-finite tensor of `states` ({"weight": {name: tensor}}, possibly nested), as text that also
    names the ranks which have it; "" if all are finite. All ranks must call it, and get the same text."""
    names = gather_objects(_broken_here(states))
    ranks = [rank for rank, name in enumerate(names) if name]
    if not ranks:
        return ""
    everywhere = len(ranks) == get_world_size()
    return names[ranks[0]] + ("" if everywhere else f" on rank {', '.join(map(str, ranks))}")


@torch.no_grad()
def _broken_here(states: dict[str, dict]) -> str:
    named = [(f"{label} {name}", tensor) for label, state in states.items() for name, tensor in _floats(state)]
    if not named:
        return ""
    device = named[0][1].device
    ends = torch.stack(
        [torch.stack(torch.aminmax(t)).to(device, widest(device)) for _, t in named]
    )  # NaN if it contains one
    finite = torch.isfinite(ends).all(1).tolist()
    return named[finite.index(False)][0] if not all(finite) else ""


def _floats(state, prefix: str = ""):
    for name, value in state.items():
        value = value.to_local() if isinstance(value, DTensor) else value
        if isinstance(value, dict):
            yield from _floats(value, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
            yield f"{prefix}{name}", value


class SpikeDetector:
    """Detects steps whose loss is more than `factor` times the usual loss (the median of the 100 steps before); None:
    never."""

    def __init__(self, factor: float | None):
        self.factor = factor
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self._steps: list[tuple[int, list[torch.Tensor], list[torch.Tensor]]] = []  # since the last reading

    def add(self, step: int, loss: torch.Tensor, indices: torch.Tensor) -> None:
        """Add a micro-batch of this rank: its loss (a scalar on the device) and the indices of its images in the data
        set (N,)."""
        if self.factor is None:
            return
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append((step, [], []))
        self._steps[-1][1].append(loss.detach())
        self._steps[-1][2].append(indices)

    def read(self, name_of) -> list[dict]:
        """Return the spikes since the last reading, on the main process ([] on others); all ranks must call it. The
        loss of a step is the mean over ranks. `name_of(index)` returns an image's name."""
        if not self._steps:
            return []
        steps, self._steps = self._steps, []
        means = torch.stack([torch.stack(losses).mean() for _, losses, _ in steps])
        means = all_reduce_sum(means.to(widest(means.device)))
        spikes = []
        for (step, _, indices), loss in zip(steps, (means / get_world_size()).tolist()):
            usual = median(self._usual) if len(self._usual) >= MIN_STEPS else torch.inf
            self._usual.append(loss)
            if loss > self.factor * usual:
                images = [index for rank in gather_objects(torch.cat(indices).tolist()) for index in rank]
                names = [name_of(index) for index in images] if is_main_process() else []
                spikes.append({"step": step, "loss": loss, "usual": usual, "indices": images, "images": names})
        return spikes if is_main_process() else []


def describe_spike(spike: dict, written: str) -> str:
    """Return a message about a spike; `written` is the end of the sentence about its list of images."""
    names = ", ".join(map(printable, spike["images"][:2]))
    return (
        f"loss spike at step {spike['step']}: {spike['loss']:.4g}, {spike['loss'] / spike['usual']:.3g} times the "
        f"usual {spike['usual']:.4g}; its {len(spike['images'])} images ({names}, ...) {written}"
    )


class OverflowDetector:
    """Reports fp16 overflows in many consecutive steps, once per streak; fails if the loss scale becomes too small."""

    def __init__(self, scaler):
        self.scaler, self._reported = scaler, False

    def read(self, step: int) -> None:
        if not self.scaler.enabled:
            return
        longest, current = self.scaler.overflows()
        if longest >= OVERFLOWS and not self._reported:
            print(
                f"note: fp16 gradients overflowed in {longest} steps in a row (until step {step}), none of which "
                f"changed a weight; the scale of the loss is now {self.scaler.scale:.3g}: use --amp_dtype bf16 or "
                f"fp32, or --clip_grad 1, if this goes on"
            )
        self._reported = current >= OVERFLOWS
        if self.scaler.scale < MIN_SCALE:
            raise RunFailed("fp16 overflows at every scale of the loss: use --amp_dtype bf16 or fp32, or --clip_grad 1")
