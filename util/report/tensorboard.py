"""TensorBoard event files that stay complete when the disk is full for a while."""

import atexit
import html
import io
import itertools
import os
import socket
import time
from pathlib import Path

import torch
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from util.checkpoint.retry import GrowingFile
from util.parallel.distributed import is_main_process

FLAGS = ".hparams"  # ending of the event file with the flags of the HPARAMS tab
_event_files = itertools.count()


class EventFile:
    """A TensorBoard event file. When the disk is full, TensorBoard's writer thread ends in the middle of a record and
    writes no more; here whole records wait in memory until they can be written."""

    def __init__(self, folder: str, ending: str = ""):
        suffix = f"{socket.gethostname()}.{os.getpid()}.{next(_event_files)}{ending}"
        self.folder = folder
        self.file = GrowingFile(Path(folder) / f"events.out.tfevents.{int(time.time()):010d}.{suffix}")
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
    """torch's SummaryWriter with an `EventFile`."""

    def _get_file_writer(self):
        if self.file_writer is None:
            self.file_writer = _FileWriter(self.log_dir)
            self.all_writers = {self.log_dir: self.file_writer}
            if self.purge_step is not None:
                log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
                self.file_writer.add_event(event_pb2.Event(step=self.purge_step, session_log=log))
        return self.file_writer


class _FileWriter(FileWriter):
    def __init__(self, folder: str, ending: str = ""):
        self.event_writer = EventFile(folder, ending)  # in place of TensorBoard's


class Board:
    """TensorBoard on the main process; does nothing on other ranks or without a folder. The x axis is epoch * 1000, so
    that runs with different batch sizes are aligned. A scalar is written at most once for each x. A full disk does not
    stop the run."""

    def __init__(self, log_dir: str | None, purge_step: int | None = None):
        self.writer = None
        self.flags_file: _FileWriter | None = None
        self.last: dict[str, int] = {}
        if log_dir and is_main_process():
            os.makedirs(log_dir, exist_ok=True)
            self.writer = Events(log_dir, purge_step=purge_step)
            atexit.register(self.writer.close)  # so that the last points of a failed run are written

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        x = int(epoch * 1000)
        for name, value in values.items():
            if self.writer is not None and x > self.last.get(name, -1):
                self.writer.add_scalar(name, value, x)
                self.last[name] = x
        self.flush()

    def image(self, name: str, image, epoch: float) -> None:
        """Add an RGB picture `image` (3, H, W) in [0, 1]."""
        if self.writer is not None:
            self.writer.add_image(name, image, int(epoch * 1000))

    def histogram(self, name: str, values: torch.Tensor, epoch: float) -> None:
        if self.writer is not None:
            self.writer.add_histogram(name, values.detach().float().cpu(), int(epoch * 1000))

    def flags(self, args: dict, epoch: float = 0) -> None:
        """Add a table of the flags, which hold from `epoch` on, to the TEXT tab."""
        if self.writer is not None:
            # Flags contain file names, in which markup, "|" and "`" would break the table, and so are escaped.
            escaped = {
                name: html.escape(str(value)).translate({ord("|"): "&#124;", ord("`"): "&#96;", 10: " "})
                for name, value in args.items()
            }
            rows = "\n".join(f"| {name} | <code>{value}</code> |" for name, value in sorted(escaped.items()))
            self.writer.add_text("flags", f"| flag | value |\n|---|---|\n{rows}", int(epoch * 1000))

    def hparams(self, args: dict, metrics: dict[str, float]) -> None:
        """Write flags and final metrics for the HPARAMS tab, which then has no earlier ones."""
        if self.writer is None:
            return
        simple = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in args.items()}
        self._begin_flags_file()
        for summary in hparams(simple, {f"final/{name}": value for name, value in metrics.items()}):
            self.flags_file.add_summary(summary)
        for name, value in metrics.items():
            self.writer.add_scalar(f"final/{name}", value)

    def _begin_flags_file(self) -> None:
        """Write flags for the HPARAMS tab into an event file of their own, in place of an earlier one: of several flags
        in a folder TensorBoard shows the first ones, beside the last metrics."""
        folder = self.writer.log_dir
        for old in Path(folder).glob(f"*.tfevents.*{FLAGS}"):
            old.unlink()
        self.flags_file = _FileWriter(folder, FLAGS)

    def flush(self) -> None:
        if self.writer is not None:
            self.writer.flush()
        if self.flags_file is not None:
            self.flags_file.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.flush()
            self.writer.close()
            atexit.unregister(self.writer.close)
