"""What a run says: progress on the terminal, TensorBoard, `log.txt`. Metrics stay on the device until they are read."""

import atexit
import html
import io
import itertools
import json
import os
import socket
import sys
import time
from collections import defaultdict, deque
from pathlib import Path

import torch
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter
from tqdm import tqdm

from util.disk import GrowingFile
from util.distributed import (
    all_reduce_sum,
    gather_objects,
    get_world_size,
    host_device,
    is_main_process,
    same_everywhere,
)
from util.errors import RunFailed


class SmoothedValue:
    """A series with its mean over everything and over a window. Tensors are kept as they are: reading a property is
    what waits for the device."""

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
    """Named series, and a loop that prints them every so often."""

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
        """Yield from `iterable`, printing all series every `print_freq` items."""
        began = time.monotonic()
        total = len(iterable)
        for i, item in enumerate(iterable):
            yield item
            if i % print_freq == 0 or i == total - 1:
                seconds = time.monotonic() - began
                print(self.delimiter.join([f"{header} [{i}/{total}]", str(self), f"time: {seconds / (i + 1):.4f}"]))
        print(f"{header} Total time: {time.monotonic() - began:.1f} s")


class EpochMeter:
    """Means over an epoch and since the last reading, accumulated on the device without waiting for it.

    The state is a dict of python floats, kept in checkpoints, so that an epoch's means survive a resume.
    """

    def __init__(self, device: torch.device, state: dict | None = None):
        self.device = device
        self.epoch: dict[str, list[float]] = {name: list(pair) for name, pair in (state or {}).items()}  # [sum, count]
        self.sums: dict[str, torch.Tensor | float] = {}
        self.counts: dict[str, float] = defaultdict(float)

    def add(self, count: float = 1, **values) -> None:
        """Count each value `count` times. Ranks must add the same names between two readings; None is a name whose
        value this rank does not have, and does not count."""
        for name, value in values.items():
            if value is None:
                self.sums.setdefault(name, 0.0)
                self.counts[name] += 0
                continue
            if isinstance(value, torch.Tensor):  # numbers stay on the host: a copy to the device would wait for it
                value = value.detach().to(torch.float64)
            value = value * count
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] += count

    def read(self) -> dict[str, float]:
        """Means over all ranks since the last reading, of the names that any rank has a value of; this is where the
        host waits for the device. RunFailed, on all ranks, when they added other names than each other."""
        names = sorted(self.sums)
        check_same_names(names)
        if not names:
            return {}
        counts = torch.tensor([self.counts[name] for name in names], dtype=torch.float64, device=self.device)
        sums = [torch.as_tensor(self.sums[name], dtype=torch.float64, device=self.device) for name in names]
        pairs = all_reduce_sum(torch.stack([torch.stack(sums), counts])).tolist()
        self.sums.clear()
        self.counts.clear()
        totals = {name: (total, count) for name, total, count in zip(names, *pairs) if count}
        for name, (total, count) in totals.items():
            kept = self.epoch.setdefault(name, [0.0, 0.0])
            kept[0] += total
            kept[1] += count
        return {name: total / count for name, (total, count) in totals.items()}

    def means(self) -> dict[str, float]:
        """Means over the epoch so far, of what has been read."""
        return {name: total / count for name, (total, count) in self.epoch.items()}


def check_same_names(names: list[str]) -> None:
    """RunFailed, on all ranks, when they log metrics of different `names`: a reduction would mix them up, or hang.
    Names are gathered only when they differ; otherwise this is one small reduction on the host."""
    if same_everywhere("\n".join(names)):
        return
    everyone = gather_objects(names)
    name = min(name for theirs in everyone for name in theirs if any(name not in others for others in everyone))
    logged = [name in theirs for theirs in everyone]
    raise RunFailed(
        f"the metric {name!r} was logged on rank {logged.index(True)} and not on rank {logged.index(False)}: every "
        f"rank must log the same names in the same steps, with None where it has no value"
    )


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; silent on the other ranks."""

    def __init__(self, header: str, total: int, start: int = 0):
        self.header, self.total, self.position = header, total, start
        self.bar = None
        if is_main_process() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=header, unit="batch", dynamic_ncols=True, leave=False)

    def advance(self, position: int) -> None:
        if self.bar is not None:
            self.bar.update(position - self.position)
        self.position = position

    def say(self, values: dict[str, float], seconds_left: float) -> None:
        text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif is_main_process():
            width = len(str(self.total))
            left = f"{int(seconds_left) // 60}:{int(seconds_left) % 60:02d}"
            print(f"{self.header} [{self.position:{width}d}/{self.total}]  {text}  left {left}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Clock:
    """Wall time, images and time spent waiting for data since the last reading."""

    def __init__(self):
        self.began = self.started = time.perf_counter()
        self.images, self.waited, self.steps = 0, 0.0, 0

    def seconds_per_step(self) -> float:
        self.steps += 1
        return (time.perf_counter() - self.started) / self.steps

    def pause(self, seconds: float) -> None:
        """Do not count this much of the time that has passed."""
        self.began += seconds
        self.started += seconds

    def read(self) -> dict[str, float]:
        seconds = max(time.perf_counter() - self.began, 1e-9)
        rates = {
            "images_per_s": self.images / seconds,
            "data_wait_percent": 100 * self.waited / seconds,
            "seconds": seconds,
        }
        self.began, self.images, self.waited = time.perf_counter(), 0, 0.0
        return rates


_event_files = itertools.count()


class EventFile:
    """A TensorBoard event file. tensorboard's own is written by a thread that ends for good at the first full disk, in
    the middle of a record; here whole records wait in memory until they can be written."""

    def __init__(self, folder: str):
        place = f"{socket.gethostname()}.{os.getpid()}.{next(_event_files)}"
        self.folder = folder
        self.file = GrowingFile(Path(folder) / f"events.out.tfevents.{int(time.time()):010d}.{place}")
        self.add_event(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))
        self.file.write()

    def get_logdir(self) -> str:
        return self.folder

    def add_event(self, event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        self.file.add(record.getvalue())

    def flush(self) -> None:
        self.file.append()

    close = flush


class Events(SummaryWriter):
    """torch's writer of pictures, texts and numbers, into an `EventFile`."""

    def _get_file_writer(self):
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:
                log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self.file_writer.add_event(event_pb2.Event(step=self.purge_step, session_log=log))
        return self.file_writer


class _FileWriter(FileWriter):
    def __init__(self, folder: str):
        self.event_writer = EventFile(folder)  # and no other


class Board:
    """TensorBoard on the main process, nothing on the others. The x axis is epoch * 1000, so that runs with different
    batch sizes lie over each other; several values on one x are never written. A full disk does not end it."""

    def __init__(self, log_dir: str | None, purge_step: int | None = None):
        self.writer = None
        self.last: dict[str, int] = {}
        if log_dir and is_main_process():
            os.makedirs(log_dir, exist_ok=True)
            self.writer = Events(log_dir, purge_step=purge_step)
            atexit.register(self.writer.close)  # a run that fails shows its last points too

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        x = int(epoch * 1000)
        for name, value in values.items():
            if self.writer is not None and x > self.last.get(name, -1):
                self.writer.add_scalar(name, value, x)
                self.last[name] = x
        self.flush()

    def image(self, name: str, image, epoch: float) -> None:
        """`image` is (3, H, W) in [0, 1]."""
        if self.writer is not None:
            self.writer.add_image(name, image, int(epoch * 1000))

    def histogram(self, name: str, values: torch.Tensor, epoch: float) -> None:
        if self.writer is not None:
            self.writer.add_histogram(name, values.detach().float().cpu(), int(epoch * 1000))

    def flags(self, args: dict) -> None:
        if self.writer is not None:
            # Flags hold names of files, which may hold anything: neither markup nor the end of a cell or of code.
            shown = {
                name: html.escape(str(value)).translate({ord("|"): "&#124;", ord("`"): "&#96;", 10: " "})
                for name, value in args.items()
            }
            rows = "\n".join(f"| {name} | <code>{value}</code> |" for name, value in sorted(shown.items()))
            self.writer.add_text("flags", f"| flag | value |\n|---|---|\n{rows}")

    def hparams(self, args: dict, metrics: dict[str, float]) -> None:
        """Flags and final metrics for the HPARAMS tab, in the run's own event file."""
        if self.writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        simple = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in args.items()}
        for summary in hparams(simple, {f"final/{name}": value for name, value in metrics.items()}):
            self.writer.file_writer.add_summary(summary)
        for name, value in metrics.items():
            self.writer.add_scalar(f"final/{name}", value)

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            atexit.unregister(self.writer.close)


def log_line(row: dict) -> bytes:
    """One JSON object in a line, as upstream's `log.txt`."""
    return json.dumps(row).encode() + b"\n"


def trim_log(output_dir: str, epoch: int) -> None:
    """Drop the lines of `epoch` and later: a resumed run writes them again."""
    path = Path(output_dir) / "log.txt"
    if not is_main_process() or not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("epoch", -1) < epoch:
                kept.append(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run died
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
