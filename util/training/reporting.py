"""Reports of a training run: progress on the terminal, the loggers, `log.txt`, `spikes.jsonl`; and the checks that end
a run: non-finite losses, too many unreadable images, fp16 overflows."""

from datetime import datetime, timedelta
from math import ceil
from pathlib import Path
from typing import Any

import torch

from util.checkpoint.retry import GrowingFile
from util.data.samples import Sample
from util.errors import UserError
from util.parallel.distributed import gather_objects, get_world_size, is_main_process
from util.parallel.watchdog import slow_reader
from util.report.blocks import block, row
from util.report.log import Clock, Progress, duration, in_lines, log_line
from util.report.loggers import Loggers
from util.report.tensorboard import Board
from util.training.batches import MicroBatch
from util.training.meters import EpochMeter
from util.training.numerics import NonFiniteDetector, OverflowDetector, SpikeDetector, describe_spike


class Reporter:
    """Metrics of a run. They are accumulated on the device in every step, and read and written every `--print_freq`
    steps; only reading waits for the device. `run` is the `util.training.run.Run` whose metrics these are."""

    def __init__(self, output_dir: str, device: torch.device, scaler, spike_factor: float | None = None):
        self.device, self.scaler = device, scaler
        self.meter = EpochMeter(device)
        self.non_finite, self.spikes = NonFiniteDetector(device), SpikeDetector(spike_factor)
        self.overflows = OverflowDetector(scaler)
        folder = Path(output_dir)
        self.log, self.spike_log = GrowingFile(folder / "log.txt"), GrowingFile(folder / "spikes.jsonl")
        self.logs, self.writes = [self.log, self.spike_log], bool(output_dir)
        self.board = Loggers(Board(None), [])  # replaced when training begins
        self.clock, self.waited = Clock(), 0.0
        self.progress: Any = None  # `Progress`, from the first epoch on
        self.announced = False  # the expected duration
        self.unreadable = 0  # unreadable images since the last reading
        self.terms: list[str] = []  # names of the terms of the loss

    # Every step: nothing here waits for the device ------------------------------------------------------------------

    def begin_epoch(self, run) -> None:
        """Start the progress bar and the clock of an epoch."""
        self.progress = Progress(f"epoch {_number(run)}", run.last_position(), run.position)
        self.clock, self.waited = Clock(), 0.0

    def count_batch(self, samples: Sample, seconds_waited: float) -> None:
        """Count the images of a micro-batch that was read, and the time spent waiting for it."""
        self.clock.waited += seconds_waited
        self.clock.images += len(samples.target) * get_world_size()
        self.unreadable += int(samples.bad.sum())  # on the CPU: this does not wait for the device

    def add_losses(self, step: int, losses: dict[str, torch.Tensor], batch: MicroBatch) -> None:
        """Add the losses of one micro-batch: the total, named "loss", and its terms."""
        self.terms = [name for name in losses if name != "loss"]
        self.meter.add(losses, len(batch.samples.target))
        self.non_finite.add(step, losses)
        self.spikes.add(step, losses["loss"], batch.samples.index)

    def add_step(self, step: int, norm: torch.Tensor) -> None:
        """Add the gradient norm of an optimizer step."""
        if self.scaler.enabled:  # an overflow has no finite norm: 0 is added, and the step counts as skipped
            norm = torch.where(self.scaler.applied > 0, norm, torch.zeros_like(norm))
            self.meter.add({"skipped_steps": 1 - self.scaler.applied})
        else:
            self.non_finite.add(step, {"gradient": norm})
        self.meter.add({"grad_norm": norm})

    # Every --print_freq steps ---------------------------------------------------------------------------------------

    def check_and_log(self, run) -> None:
        """Read the metrics, check them, and log them. Waits for the device. Raises RunFailed for non-finite values and
        for persistent fp16 overflows, UserError for too many unreadable images."""
        self.meter.add({"bad_images": self.unreadable})
        self.unreadable = 0
        values = self.meter.read()
        self._report_spikes(run)
        self.overflows.read(run.step)
        self.non_finite.read(run.epoch, run.train_module)
        self._check_unreadable(run)
        bad = values.pop("bad_images")
        rates = self._rates(run)
        seconds_left = self.meter.epoch["seconds"][0] / max(1, run.position) * run.batches_left()
        self._announce_duration(seconds_left, run.batches_left())
        self.progress.show(_speeds(values["loss"], run.lr, rates), seconds_left)
        if self.device.type == "cuda":
            rates["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        points = {f"train/{name}": value for name, value in values.items()}
        points |= {"train/lr": run.lr, **{f"speed/{name}": value for name, value in rates.items()}}
        if bad:
            points["data/bad_images"] = bad
        self.board.scalars(points, run.fractional_epoch())

    def _announce_duration(self, seconds: float, batches: int) -> None:
        """Print the expected duration of the rest of the run, once."""
        if self.announced or not batches:
            return
        self.announced = True
        days = " %d %b" if seconds > 86_400 else ""
        end = (datetime.now() + timedelta(seconds=seconds)).strftime(f"%a{days} %H:%M")
        self.progress.note(
            block([row("duration", f"about {duration(seconds)} without evaluation, until {end}")]) + "\n"
        )

    def _rates(self, run) -> dict[str, float]:
        """Return the speeds since the last reading, and add the elapsed time to the epoch's total."""
        self.waited += self.clock.waited
        rates = self.clock.read()
        if run.stepper.flops:
            rates["mfu_percent"] = run.stepper.flops.utilisation(rates["images_per_s"] / get_world_size())
        # A sum among the means, because checkpoints store these.
        self.meter.epoch["seconds"] = [self.meter.epoch.get("seconds", [0.0])[0] + rates.pop("seconds"), 1]
        return rates

    def _report_spikes(self, run) -> None:
        for spike in self.spikes.read(run.image_name):
            if self.writes:
                self.spike_log.append(log_line({"epoch": run.epoch, **spike}))
            print(describe_spike(spike, f"are in {self.spike_log.path}" if self.writes else "are not written"))

    def _check_unreadable(self, run) -> None:
        count = self.meter.epoch.get("bad_images", [0.0])[0]
        images = run.last_position() * run.args.batch_size * get_world_size()
        if count > run.args.max_bad_fraction * images:
            raise UserError(
                f"{int(count)} of {images} images of this epoch are unreadable, more than --max_bad_fraction "
                f"{run.args.max_bad_fraction:g} allows; their names are above"
            )

    # Every epoch ----------------------------------------------------------------------------------------------------

    def finish_epoch(self, run, row: dict[str, float]) -> None:
        """Log the means over the epoch that has ended, and the additional metrics `row`."""
        means = self.meter.means()
        seconds, bad = means.pop("seconds"), self.meter.epoch.get("bad_images", [0.0])[0]
        means.pop("bad_images", None)
        stats = {f"train/{name}": value for name, value in {**means, "lr": run.lr}.items()}
        if self.writes and is_main_process():
            counts = {"epoch": run.epoch, "step": run.step, "seconds": seconds, "data/bad_images": int(bad)}
            self.log.append(log_line({**stats, **row, **counts}))
        print(in_lines(f"epoch {_number(run)}:", [*_shown(means, self.terms, row), *_counted(bad), f"{seconds:.1f} s"]))
        slow = slow_reader(gather_objects(self.waited), seconds)
        if slow:
            print(f"note: {slow}")
        self.board.scalars(row, run.fractional_epoch())
        self.board.flush()


def _number(run) -> str:
    """Return the epoch as 3/200, counted from 1 (the names of checkpoints count from 0)."""
    return f"{run.epoch + 1}/{ceil(run.args.epochs)}"


def _shown(means: dict[str, float], terms: list[str], row: dict[str, float]) -> list[str]:
    """Return the numbers of an epoch for the terminal, the loss first. A loss of one of the `terms` is shown once."""
    hidden = terms if len(terms) == 1 else ()
    others = {name: value for name, value in means.items() if name not in hidden}
    return [f"{name} {value:.4g}" for name, value in {"loss": means["loss"], **others, **row}.items()]


def _speeds(loss: float, lr: float, rates: dict[str, float]) -> list[str]:
    """Return the numbers of a progress line. Long waits for data take the place of the learning rate: there are 80
    columns."""
    wait, images = rates["data_wait_percent"], f"{rates['images_per_s']:.0f} img/s"
    shown = [f"loss {loss:.4g}", f"waits {wait:.0f}%" if wait >= 20 else f"lr {lr:.1e}", images]
    return [*shown, f"MFU {rates['mfu_percent']:.0f}%"] if "mfu_percent" in rates else shown


def _counted(bad: float) -> list[str]:
    return [f"unreadable images {int(bad)}"] if bad else []
