"""Progress on the terminal, speeds, and the lines of `log.txt`."""

import json
import os
import sys
import time
from pathlib import Path

from tqdm import tqdm

from util.errors import RunFailed
from util.parallel.distributed import gather_objects, is_main_process, same_everywhere


def check_same_names(names: list[str]) -> None:
    """Raise RunFailed on all ranks if they log metrics of different `names`: a reduction would mix them up, or hang.
    Names are gathered only if they differ; otherwise this is one small all-reduce on the host."""
    if same_everywhere("\n".join(names)):
        return
    everyone = gather_objects(names)
    name = min(name for names in everyone for name in names if any(name not in others for others in everyone))
    logged = [name in names for names in everyone]
    raise RunFailed(
        f"the metric {name!r} was logged on rank {logged.index(True)} and not on rank {logged.index(False)}: every "
        f"rank must log the same names in the same steps, with None where it has no value"
    )


COLUMNS = 80  # of a terminal; longer lines are broken


def duration(seconds: float) -> str:
    """Return a time as 0:03:25, or 2 d 03:12:25."""
    days, rest = divmod(int(seconds), 86_400)
    clock = f"{rest // 3600:{'02d' if days else 'd'}}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days} d {clock}" if days else clock


def in_lines(header: str, values: list[str]) -> str:
    """Return `header` and `values` in lines of at most 80 columns; no value is broken, and later lines are indented."""
    lines = [header]
    for value in values:
        if len(lines[-1]) + 2 + len(value) > COLUMNS and lines[-1].strip():
            lines.append("  ")
        lines[-1] += f"  {value}"
    return "\n".join(lines)


class Progress:
    """A progress bar on a terminal, plain lines elsewhere; silent on ranks other than the main one."""

    def __init__(self, header: str, total: int, start: int = 0):
        self.header, self.total, self.position = header, total, start
        self.bar = None
        if is_main_process() and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=start, desc=header, unit="batch", dynamic_ncols=True, leave=False)

    def advance(self, position: int) -> None:
        if self.bar is not None:
            self.bar.update(position - self.position)
        self.position = position

    def show(self, values: list[str], seconds_left: float) -> None:
        """Show `values`, such as "loss 0.52", and the time that is left of the whole run."""
        text = "  ".join([*values, f"left {duration(seconds_left)}"])
        if self.bar is not None:
            self.bar.set_postfix_str(text)
        elif is_main_process():
            width = len(str(self.total))
            print(f"{self.header}  {self.position:{width}d}/{self.total}  {text}", flush=True)

    def note(self, text: str) -> None:
        """Print a line of its own."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Clock:
    """Wall time, number of images, and time spent waiting for data since the last reading."""

    def __init__(self):
        self.began = self.started = time.perf_counter()
        self.images, self.waited, self.steps = 0, 0.0, 0

    def seconds_per_step(self) -> float:
        self.steps += 1
        return (time.perf_counter() - self.started) / self.steps

    def pause(self, seconds: float) -> None:
        """Exclude `seconds` that have passed from the measured time."""
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


def log_line(row: dict) -> bytes:
    """Return a line with one JSON object, as in the official repository's `log.txt`."""
    return json.dumps(row).encode() + b"\n"


def trim_log(path: Path, name: str, first: int) -> None:
    """Remove the lines of a log file whose entry `name` (epoch or step) is `first` or later, which a resumed run writes
    again. Main process only."""
    if not is_main_process() or not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get(name, -1) < first:
                kept.append(line)
        except json.JSONDecodeError:
            continue  # a line that a crash cut off
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
