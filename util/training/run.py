"""A training run: its position in the data, and when it steps, logs, saves and stops.

The engines call a `Run` in the order of a training step: `batches`, `autocast`, `backward`, `optimizer_step`,
`finish_step`; and after each epoch `finish_epoch`. Three parts do the work: `Stepper` (forward, backward, optimizer),
`Reporter` (metrics and logs), `Checkpointer` (checkpoint files).
"""

import contextlib
import json
import random
import time
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from util.checkpoint.atomic import write_atomically
from util.checkpoint.files import LEDGER
from util.checkpoint.output_dir import check_output_dir, check_resumed_here, make_output_dir
from util.checkpoint.save import abandon_later
from util.compute.kernels import choose_attention, make_deterministic
from util.compute.precision import autocast, choose_amp_dtype
from util.data.loader import Loader, next_batch
from util.data.samples import Sample
from util.errors import RunFailed, UserError
from util.lr_sched import adjust_learning_rate
from util.memory import flags_in_use
from util.parallel import signals, watchdog
from util.parallel.cores import default_workers
from util.parallel.distributed import (
    all_reduce_sum,
    check_same_flags,
    from_main_process,
    gather_objects,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    shut_down,
)
from util.parallel.fsdp import whole
from util.parallel.signals import StopRequest
from util.report.blocks import counted
from util.report.ledger import Record, hardware
from util.report.log import trim_log
from util.report.loggers import Loggers, open_loggers
from util.training import run_state
from util.training.announcements import NO_SUMMARY, Summary, announce, end_block, start_block
from util.training.batches import MicroBatch, accumulation_window
from util.training.checkpointing import Checkpointer
from util.training.meters import EpochMeter
from util.training.reporting import Reporter
from util.training.run_length import run_length
from util.training.stepping import Stepper


def start(args) -> torch.device:
    """Join the process group, choose the device, seed the random numbers, check the output folder. Settles --log_dir,
    --num_workers and the launcher's flags (rank, gpu, world_size, distributed). Raises UserError if the ranks have
    different flags, or if the folder cannot be used."""
    args.log_dir = args.output_dir if args.log_dir is None else args.log_dir
    device = init_distributed_mode(args)
    check_same_flags(args)
    if args.num_workers is None:  # after the comparison, since the nodes may have different numbers of cores
        args.num_workers = default_workers(args.dataset)
    flags_in_use.update(vars(args))
    check_output_dir(args)
    random.seed(args.seed + get_rank())
    torch.manual_seed(args.seed + get_rank())
    np.random.seed(args.seed + get_rank())
    if args.deterministic:
        make_deterministic()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not args.deterministic  # the fastest algorithm may change between runs
        torch.set_float32_matmul_precision("high")  # TF32 in matrix products of float32
    choose_attention(args.attention, device, choose_amp_dtype(args.amp_dtype, device))
    return device


class Run:
    """A training run.

    Three names for the trained network: `saved_model` is the network that checkpoints store under `model`;
    `train_module` is what the optimizer trains (`saved_model`, alone or inside the `Pretrainer` with the methods);
    `ddp_model` is what the engine calls (`train_module`, inside DistributedDataParallel if there are several
    processes).

    `epoch` and `position` are those of the next micro-batch; `step` counts optimizer steps, skipped ones included.
    `classes` are the
    names of a classifier's outputs, `summary` what the texts at start and end say besides. Call `begin` before
    training, `close` at the end.
    """

    def __init__(
        self,
        args,
        device: torch.device,
        loader: Loader,
        saved_model: nn.Module,
        optimizer: torch.optim.Optimizer,
        train_module: nn.Module | None = None,
        resume: Path | None = None,
        record: Record | None = None,
        classes: list[str] | None = None,
        summary: Summary = NO_SUMMARY,
    ):
        self.args, self.device, self.loader, self.classes = args, device, loader.on(device), classes
        self.summary = summary
        self.saved_model, self.train_module, self.optimizer = saved_model, train_module or saved_model, optimizer
        self.methods: Any = getattr(self.train_module, "methods", nn.ModuleDict())  # of `Method`s by name
        self.sharded = getattr(args, "fsdp", False)
        self.record, self.resumed_from = record or Record("", args), resume
        self.stepper = Stepper(device, args.amp_dtype, self.train_module, optimizer, args.accum_iter, args.clip_grad)
        self.reporter = Reporter(args.output_dir, device, self.stepper.scaler, args.spike_factor)
        self.record.hardware = hardware(device, self.amp_dtype)
        self.checkpoints = Checkpointer(args.output_dir, args.save_patience, self.reporter.logs)
        self.stop_request, self.stopped = StopRequest(), False  # `stopped`: a signal ends the run early
        self.steps_per_epoch = ceil(len(loader) / args.accum_iter)
        self.total_steps, _ = run_length(len(loader), args.accum_iter, args.epochs, args.max_steps)
        self.epoch, self.position, self.window_start = args.start_epoch, 0, 0
        self.lr, self.save_due = 0.0, False
        self.resumed_step = 0  # as the checkpoint counts it, whose batch flags may have been others
        self.images_before, self.batches_before = 0, self.batches_done()  # where this process begins
        if resume is not None:
            run_state.resume(self, resume)
            check_resumed_here(args.output_dir, resume)
            self.batches_before = self.batches_done()
            self.images_before = self.record.stored.get("images_seen", self._images(self.batches_before))
        # Computed from the position, not read from the file: correct with --start_epoch and other batch flags, too.
        self.step = self.epoch * self.steps_per_epoch + self.position // args.accum_iter
        self.check_ranks_in_sync()
        self.resumed_at_end = resume is not None and self.ended  # then call `finished.end_again` instead of `begin`

    def check_ranks_in_sync(self) -> None:
        """Raise UserError if the ranks resumed at different positions."""
        positions = gather_objects((self.epoch, self.position, self.step))
        if len(set(positions)) > 1:
            raise UserError(
                f"the ranks resumed at different (epoch, batch, step) {positions}: all nodes must share --output_dir"
            )

    def begin(self) -> None:
        """Prepare for training: compile, wrap for DDP, create the folders and the first files. No file changes before
        this."""
        args, resume = self.args, self.resumed_from
        announce(start_block(self, self.summary), args)
        external = [network for method in self.methods.values() for network in method.external_networks()]
        compiled = [self.train_module, *external] if args.compile else []
        lengths_vary = getattr(args, "mask_ratio_end", None) is not None
        self.stepper.prepare(compiled, args.log_mfu, self.sharded, lengths_vary)
        make_output_dir(args.output_dir, args.log_dir, args.overwrite)
        if resume is not None and args.output_dir:
            trim_log(self.reporter.log.path, "epoch", self.epoch)
            trim_log(self.reporter.spike_log.path, "step", self.resumed_step)
            if from_main_process(lambda: abandon_later(args.output_dir, resume)):
                self.checkpoints.best = None  # its weights are lost: the best of those that follow are kept
        purge_step = 0 if args.overwrite else None  # of an overwritten run, in a --log_dir of its own
        if resume is not None:
            purge_step = int(self.fractional_epoch() * 1000) + 1
        flags, resumed = self.record.flags_json(), resume is not None
        self.reporter.board = open_loggers(args, args.log_dir, flags, purge_step, resumed=resumed)
        self.board.explain()
        self._describe()
        watchdog.progress(self.step)

    def _describe(self) -> None:
        """Write the flags to args.json and the loggers."""
        args = self.args
        flags = self.record.flags_json()
        self.board.flags(flags, self.fractional_epoch())
        if args.output_dir and is_main_process():
            text = json.dumps(flags, indent=2, default=str) + "\n"
            write_atomically(Path(args.output_dir) / "args.json", lambda file: file.write(text.encode()))

    # Position -------------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the last step is done. The position then stays there; with a fraction of an epoch, that is inside an
        epoch."""
        return self.step >= self.total_steps

    @property
    def last_epoch(self) -> int:
        """The epoch of the last finished batch, by which checkpoints are named."""
        return self.epoch if self.position else self.epoch - 1

    def last_position(self) -> int:
        """Return the position at which this epoch ends: after all micro-batches, or after the run's last step."""
        left = self.total_steps - self.epoch * self.steps_per_epoch
        return min(len(self.loader), left * self.args.accum_iter)

    def batches_left(self) -> int:
        """Return the number of micro-batches until the end of the run."""
        ends = self.total_steps // self.steps_per_epoch * len(self.loader)
        ends += self.total_steps % self.steps_per_epoch * self.args.accum_iter
        return max(0, ends - self.epoch * len(self.loader) - self.position)

    def fractional_epoch(self) -> float:
        """Return epoch and position as one number, the x axis of TensorBoard."""
        return self.epoch + self.position / len(self.loader)

    def position_text(self) -> str:
        """Return the position for the terminal, whose progress counts epochs from 1: "3 epochs", "29 batches of epoch
        4"."""
        if self.position:
            return f"{self.position} {'batch' if self.position == 1 else 'batches'} of epoch {self.epoch + 1}"
        return counted(self.epoch, "epoch")

    def batches_done(self) -> int:
        """Return the number of micro-batches before the position, `--start_epoch` included."""
        return self.epoch * len(self.loader) + self.position

    def _images(self, batches: int) -> int:
        return batches * self.args.batch_size * get_world_size()

    def images_seen(self) -> int:
        """Return the number of images that the run was trained on, with repetitions; without the epochs that
        `--start_epoch` skipped, and with earlier batch sizes of a resumed run."""
        return self.images_before + self._images(self.batches_done() - self.batches_before)

    # One step, in the order of the calls ----------------------------------------------------------------------------

    def batches(self):
        """Yield the remaining micro-batches of this epoch; end early if the run is `stopped`."""
        total, last = len(self.loader), self.last_position()
        self.reporter.begin_epoch(self)
        watchdog.progress(self.step)
        if self.stepper.flops:
            self.stepper.flops.begin()
        samples = iter(self.loader.begin(self.epoch, self.position))
        try:
            for position in range(self.position, last):
                if self.stopped:
                    return
                yield MicroBatch(
                    self._next(samples), position, *accumulation_window(position, total, self.args.accum_iter)
                )
        finally:
            del samples  # otherwise a traceback would keep the data workers alive
            self.reporter.progress.close()

    def _next(self, samples) -> Sample:
        began = time.perf_counter()
        try:
            batch = next_batch(samples)
        except StopIteration:
            raise RunFailed(f"the data ended after {self.position} of {len(self.loader)} batches of an epoch") from None
        self.reporter.count_batch(batch, time.perf_counter() - began)
        return batch

    def autocast(self, batch: MicroBatch):
        """Return the context of the forward pass (`Stepper.autocast`): mixed precision and gradient accumulation."""
        return self.stepper.autocast(batch)

    def backward(self, losses: dict[str, torch.Tensor], batch: MicroBatch) -> None:
        """Back-propagate the sum of `losses` (weighted scalars by name), record them, and count the micro-batch as
        done."""
        total: Any = sum(losses.values())
        self.stepper.backward(total, batch)
        self.count_batch({"loss": total.detach(), **{name: loss.detach() for name, loss in losses.items()}}, batch)

    def count_batch(self, losses: dict[str, torch.Tensor], batch: MicroBatch) -> None:
        """Record the losses of a micro-batch, of which "loss" is the sum, and count it as done."""
        self.reporter.add_losses(self.step, losses, batch)
        if batch.is_first_of_window:
            self.window_start = batch.position
        self.position = batch.position + 1

    def optimizer_step(self) -> torch.Tensor:
        """Set the learning rate, clip, and step; `finish_step` must follow. Return a scalar on the device: 1 if the
        step was applied, 0 if it was skipped because of a non-finite gradient."""
        self.set_learning_rate(self.window_start)
        self.reporter.add_step(self.step, self.stepper.step())
        return self.stepper.scaler.applied

    def set_learning_rate(self, position: int) -> None:
        """Set the learning rate of the step whose window begins at micro-batch `position`."""
        self.lr = adjust_learning_rate(self.optimizer, self.epoch + position / len(self.loader), self.args)

    def log(self, values: Mapping[str, torch.Tensor | float | None]) -> None:
        """Add values of this step, by name, to the means that are logged next; all ranks must give the same names
        (None: no value on this rank)."""
        self.reporter.meter.add(values)

    def note_change(self, text: str) -> None:
        """Print what changes in training from here on, and show it at this step in TensorBoard's TEXT tab."""
        print(f"note: {text}")
        self.board.text("changes", text, self.fractional_epoch())

    def finish_step(self) -> None:
        """Count the step. Log every --print_freq steps, save every --save_steps steps, save and stop after a signal."""
        self.step += 1
        watchdog.progress(self.step)
        self.reporter.progress.advance(self.position)
        args, ends = self.args, self.position == self.last_position()
        seconds = self.reporter.clock.seconds_per_step()
        # All ranks get the same answers.
        stop, retry = self.stop_request.poll(
            self.step, seconds, max_steps=args.print_freq, retry=self.checkpoints.saver.due
        )
        self.save_due = retry or (bool(args.save_steps) and self.step % args.save_steps == 0)
        if ends or self.save_due or stop or self.step % args.print_freq == 0:
            self.reporter.check_and_log(self)
        if ends:  # `finish_epoch` saves and stops: the epoch is not logged yet
            self.stop_request.current = "this epoch's evaluation"
            return
        self.stopped = stop
        if self.save_due or self.stopped:
            self.save(last=self.stopped)

    @contextlib.contextmanager
    def measuring(self):
        """Return the context of costly measurements: whole weights (FSDP), autocast, and their time excluded from the
        speed."""
        with self.untimed(), whole(self.train_module), autocast(self.device, self.amp_dtype):
            yield

    @contextlib.contextmanager
    def untimed(self):
        """Return a context whose time is excluded from the speed. Waits for the device at its start and end."""
        waits = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
        synchronize = waits.get(self.device.type, lambda: None)
        synchronize()
        began = time.perf_counter()
        yield
        synchronize()
        self.reporter.clock.pause(time.perf_counter() - began)

    # Between epochs -------------------------------------------------------------------------------------------------

    def finish_epoch(self, row: dict[str, float]) -> None:
        """Log the epoch that has ended, with the values of `row`; save every --save_freq epochs, and where
        --save_steps is due; go to the next epoch, unless the run ended inside this one."""
        self.reporter.finish_epoch(self, row)
        self.stop_request.current = "this step"
        number = self.epoch
        if self.position == len(self.loader):
            self.epoch, self.position, self.reporter.meter = self.epoch + 1, 0, EpochMeter(self.device)
        stop = self.stop_request.received is not None
        if get_world_size() > 1:
            stop = bool(all_reduce_sum(torch.tensor(float(stop), device=self.device)).item())
        self.stopped = stop and not self.ended
        scheduled = number % self.args.save_freq == 0 or self.ended or self.stopped
        if scheduled or self.save_due:
            self.checkpoints.save(self, last=self.ended or self.stopped, temporary=not scheduled)

    def save(self, last: bool = False) -> None:
        """Write a checkpoint (`Checkpointer.save`)."""
        self.checkpoints.save(self, last)

    def append_to_ledger(self) -> None:
        """Append this run's line to results.jsonl, if it has reached its end."""
        if not self.stopped:
            line = self.args.output_dir, self.images_seen()
            self.checkpoints.saver.insist(LEDGER, lambda: self.record.finish(*line))

    def close(self) -> None:
        """End the run: print how it ended, close the event file, restore the signal handlers, leave the process
        group."""
        signals.stopped_by = self.stop_request.received if self.stopped else None
        if self.stopped:
            reason = self.stop_request.received
            print(f"stopped by {reason} after {self.position_text()}; --resume auto continues exactly there")
        self.board.close()
        self.stop_request.close()
        if not self.stopped and not self.resumed_at_end and is_main_process():
            print(end_block(self, self.summary), flush=True)
        shut_down()

    # Access to the parts --------------------------------------------------------------------------------------------

    @property
    def ddp_model(self) -> nn.Module:
        return self.stepper.ddp_model

    @property
    def amp_dtype(self) -> torch.dtype:
        return self.stepper.amp_dtype

    @property
    def board(self) -> Loggers:
        return self.reporter.board

    def exported(self) -> dict[str, nn.Module]:
        """Return complete models that the methods own (an EMA teacher, say), by their keys in checkpoints."""
        return {key: model for method in self.methods.values() for key, model in method.exported().items()}

    def image_name(self, index: int) -> str:
        images: Any = getattr(self.loader.dataset, "images", None)
        return images.name(index) if hasattr(images, "name") else f"image {index}"
