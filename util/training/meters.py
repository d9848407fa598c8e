"""Means of metrics over steps, epochs and ranks. Values stay on the device until they are read."""

import time
from collections import defaultdict, deque
from collections.abc import Mapping

import torch

from util.compute.precision import widest
from util.parallel.distributed import all_reduce_sum, get_world_size, host_device
from util.report.log import check_same_names


class SmoothedValue:
    """A series of values, with statistics of the last `window_size` ones and the mean over all. Tensors stay on the
    device: reading a property waits for it."""

    def __init__(self, window_size: int = 20, fmt: str | None = None):
        self.deque = deque(maxlen=window_size)
        self.total, self.count = 0.0, 0
        self.fmt = fmt or "{median:.4f} ({global_avg:.4f})"

    def update(self, value, n: int = 1) -> None:
        if isinstance(value, torch.Tensor):
            value = value.detach()
        self.deque.append(value)
        self.count += n
        self.total = self.total + value * n

    def synchronize_between_processes(self) -> None:
        """Make `global_avg` the mean over all ranks."""
        if get_world_size() > 1:
            total = torch.as_tensor(self.total, dtype=torch.float64, device=host_device())
            pair = all_reduce_sum(torch.stack([total, torch.full_like(total, self.count)]))
            self.total, self.count = pair[0].item(), int(pair[1].item())

    def _window(self) -> torch.Tensor:
        return torch.tensor([float(value) for value in self.deque])

    @property
    def median(self) -> float:
        return self._window().median().item()

    @property
    def avg(self) -> float:
        return self._window().mean().item()

    @property
    def global_avg(self) -> float:
        return float(self.total) / max(self.count, 1)

    @property
    def max(self) -> float:
        return self._window().max().item()

    @property
    def value(self) -> float:
        return float(self.deque[-1])

    def __str__(self) -> str:
        names = ("median", "avg", "global_avg", "max", "value")
        return self.fmt.format(**{name: getattr(self, name) for name in names if "{" + name in self.fmt})


class MetricLogger:
    """Named series, and an iterator that prints them."""

    def __init__(self, delimiter: str = "\t"):
        self.meters: dict[str, SmoothedValue] = defaultdict(SmoothedValue)
        self.delimiter = delimiter

    def add_meter(self, name: str, meter: SmoothedValue) -> None:
        self.meters[name] = meter

    def update(self, **values) -> None:
        for name, value in values.items():
            if value is not None:
                self.meters[name].update(value)

    def __getattr__(self, name):
        if name in self.__dict__.get("meters", {}):
            return self.meters[name]
        raise AttributeError(name)

    def __str__(self) -> str:
        return self.delimiter.join(f"{name}: {meter}" for name, meter in self.meters.items())

    def synchronize_between_processes(self) -> None:
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq: int, header: str = ""):
        """Yield from `iterable`, and print all series every `print_freq` items."""
        start = time.monotonic()
        total = len(iterable)
        for i, item in enumerate(iterable):
            yield item
            if i % print_freq == 0 or i == total - 1:
                seconds = time.monotonic() - start
                print(self.delimiter.join([f"{header} [{i}/{total}]", str(self), f"time: {seconds / (i + 1):.4f}"]))
        print(f"{header} Total time: {time.monotonic() - start:.1f} s")


class EpochMeter:
    """Means over an epoch and since the last reading, accumulated on the device without waiting for it. `epoch` holds
    {name: [sum, count]} as Python floats. It is stored in checkpoints, so that the epoch's means survive a resume."""

    def __init__(self, device: torch.device, state: dict | None = None):
        self.device = device
        self.epoch: dict[str, list[float]] = {name: list(pair) for name, pair in (state or {}).items()}
        self.sums: dict[str, torch.Tensor | float] = {}
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, values: Mapping[str, torch.Tensor | float | None], count: float = 1) -> None:
        """Add values by name, each with the weight `count`. All ranks must add the same names between two readings;
        None stands for a value that this rank does not have."""
        for name, value in values.items():
            if value is None:
                self.sums.setdefault(name, 0.0)
                self.counts[name] += 0
                continue
            if isinstance(value, torch.Tensor):  # numbers stay on the host: copying them would wait for the device
                value = value.detach().to(widest(value.device))
            value = value * count
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += count

    def read(self) -> dict[str, float]:
        """Return the means over all ranks since the last reading, without names for which no rank has a value. Waits
        for the device. Raises RunFailed on all ranks if they added different names."""
        names = sorted(self.sums)
        check_same_names(names)
        if not names:
            return {}
        wide = dict(dtype=widest(self.device), device=self.device)
        counts = torch.tensor([self.counts[name] for name in names], **wide)
        sums = [torch.as_tensor(self.sums[name], **wide) for name in names]
        pairs = all_reduce_sum(torch.stack([torch.stack(sums), counts])).tolist()
        self.sums.clear()
        self.counts.clear()
        totals = {name: (total, count) for name, total, count in zip(names, *pairs) if count}
        for name, (total, count) in totals.items():
            pair = self.epoch.setdefault(name, [0.0, 0.0])
            pair[0] += total
            pair[1] += count
        return {name: total / count for name, (total, count) in totals.items()}

    def means(self) -> dict[str, float]:
        """Return the means over the epoch so far; values that have not been read yet are not included."""
        return {name: total / count for name, (total, count) in self.epoch.items()}
