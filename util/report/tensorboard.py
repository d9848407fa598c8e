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
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import hparams

from util.checkpoint.retry import GrowingFile
from util.parallel.distributed import is_main_process

FLAGS = ".hparams"  # ending of the event file with the flags of the HPARAMS tab
_event_files = itertools.count()

HOW_TO_READ = """
The x axis (step) of all tabs is epoch \u00d7 1000, so that runs with different batch sizes are aligned.

- `train/loss` is the sum that is minimised. The losses of `train/` beside it are its parts, weighted: `pixels` is MAE's
  loss, `features` that of a feature target; `classification`, `multilabel` and `regression` are those of labels. Losses
  of different kinds cannot be compared: the text `changes` says where a run switches from one to another.
- `train/lr` is the learning rate, `train/grad_norm` the norm of the gradient. Other names of `train/` belong to the
  method (docs/methods). A point is the mean since the point before; log.txt has the means of whole epochs.
- `eval/` is measured on held-out images: `acc1` and `acc5` are accuracies in percent, `knn20_acc1` that of the 20
  nearest neighbours of frozen features, `fixed_images_loss` the pixel loss of the pictures in the IMAGES tab.
  `best_acc1` is that of the best epoch so far, which was chosen on these same images. `--eval` and the commands in
  tools/ write one point, at the epoch of the checkpoint.
- `speed/` is the speed: images a second, and the share of time in which training waits for images.
- `data/` counts images, for example those that cannot be read.
- The tab CUSTOM SCALARS shows loss, accuracy, learning rate and speed side by side. HPARAMS shows the flags of a run
  and the last point of each of its curves.
"""

LAYOUT = {
    "overview": {
        "loss": ["Multiline", [r"^(train|eval)/loss$"]],
        "accuracy on held-out images": ["Multiline", [r"^eval/(acc1|mAP|r2|knn\d+_acc1|probe_acc1)$"]],
        "learning rate": ["Multiline", [r"^train/lr$"]],
        "images a second": ["Multiline", [r"^speed/images_per_s$"]],
    }
}

# The HPARAMS tab shows five flags and five metrics; the others can be ticked.
SHOWN_FLAGS = {"method", "lr", "mask_ratio", "model", "seed"}
METRICS = [
    "eval/acc1",
    "eval/best_acc1",
    "eval/knn20_acc1",
    "eval/loss",
    "train/loss",
    "eval/acc5",
    "eval/balanced_acc",
]
METRICS += ["eval/auc", "eval/mAP", "eval/precision1", "eval/r2", "eval/mae", "eval/rmse", "eval/holdout_acc1"]
METRICS += ["eval/fixed_images_loss", "eval/probe_acc1", *(f"eval/knn{k}_acc1" for k in (1, 5, 10))]
METRICS += [*(f"eval/fewshot{k}_acc1" for k in (1, 2, 5, 10)), "eval/ratio", "eval/clean_error", "eval/corrupted_error"]
METRICS += ["train/pixels", "train/features", "train/grad_norm", "speed/images_per_s"]


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

    def text(self, name: str, text: str, epoch: float) -> None:
        if self.writer is not None:
            self.writer.add_text(name, text, int(epoch * 1000))

    def explain(self) -> None:
        """Add the page `HOW_TO_READ` to the TEXT tab, and the layout of the CUSTOM SCALARS tab."""
        if self.writer is not None:
            self.writer.add_text("How to read these", HOW_TO_READ)  # a capital: sorted first, and so unfolded
            self.writer.add_custom_scalars(LAYOUT)

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

    def hparams(self, values: dict, columns: dict[str, type]) -> None:
        """Write the `values` of a run for the HPARAMS tab, which shows them beside the last points of the curves
        `METRICS`; the tab then has no earlier ones. `columns` are the names that any run may have, float or str: the
        tab takes them from one run only."""
        if self.writer is None:
            return
        names = {name: kind() for name, kind in columns.items()}
        experiment, *_ = hparams(names, dict.fromkeys(METRICS))
        data = experiment.value[0].metadata.plugin_data
        content = HParamsPluginData.FromString(data.content)
        for info in content.experiment.hparam_infos:  # sorted by this, then by name; the first five are shown
            info.differs = info.name in SHOWN_FLAGS
        data.content = content.SerializeToString()
        simple = {k: float(v) if columns[k] is float else str(v) for k, v in values.items()}
        self._begin_flags_file()
        for summary in (experiment, *hparams(simple, {})[1:]):
            self.flags_file.add_summary(summary)

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
