"""What every training run shares: start, the rhythm of micro-batches and steps, logging, stopping, saving, resuming."""

import contextlib
import inspect
import json
import random
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from util.checkpoint.atomic import write_tensors
from util.checkpoint.files import LEDGER
from util.checkpoint.output_dir import check_output_dir, make_output_dir
from util.checkpoint.retry import GrowingFile, LateFile, Saver
from util.checkpoint.save import abandon_later
from util.compute.kernels import choose_attention, compile_blocks, make_deterministic
from util.compute.precision import NativeScalerWithGradNormCount, autocast, choose_amp_dtype
from util.data.loader import Loader, next_batch
from util.data.samples import Sample
from util.errors import RunFailed, UserError
from util.lr_sched import adjust_learning_rate
from util.parallel import signals, watchdog
from util.parallel.distributed import (
    all_reduce_sum,
    check_same_flags,
    gather_objects,
    get_rank,
    get_world_size,
    init_distributed_mode,
    is_main_process,
    shut_down,
)
from util.parallel.fsdp import whole
from util.parallel.signals import StopRequest
from util.parallel.watchdog import slow_reader
from util.report.ledger import Record, revision
from util.report.log import Clock, Progress, log_line, trim_log
from util.report.mfu import FlopMeter
from util.report.tensorboard import Board
from util.training import run_state
from util.training.meters import EpochMeter
from util.training.numerics import Finite, Overflows, Spikes, broken_state, describe_spike
from util.training.run_length import settle_length


@dataclass
class Micro:
    """One micro-batch of an accumulation window."""

    batch: Sample
    size: int  # micro-batches in this window; the last window of an epoch may be shorter
    closes: bool  # the optimizer steps after this one


def accumulation_window(position: int, total: int, accum_iter: int) -> tuple[int, bool, bool]:
    """(micro-batches in its window, is it the first, is it the last) of micro-batch `position` of `total`."""
    first = position - position % accum_iter
    size = min(accum_iter, total - first)
    return size, position == first, position == first + size - 1


def start(args) -> torch.device:
    """Processes, device, seeds, output folder. UserError when the ranks disagree on their flags."""
    device = init_distributed_mode(args)
    check_same_flags(args)
    check_output_dir(args)
    random.seed(args.seed + get_rank())
    torch.manual_seed(args.seed + get_rank())
    np.random.seed(args.seed + get_rank())
    if args.deterministic:
        make_deterministic()
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not args.deterministic  # what is fastest changes from run to run
        torch.set_float32_matmul_precision("high")  # TF32 where fp32 is asked
    choose_attention(args, device)
    return device


class Run:
    """A training run: `model` (upstream tensor names), `module` (what is called: the model, or the model with its
    methods), the optimizer, and everything that a checkpoint must hold to continue bit for bit. `classes` are the names
    of a classifier's outputs."""

    def __init__(
        self,
        args,
        device,
        loader: Loader,
        model: nn.Module,
        optimizer,
        module=None,
        resume=None,
        record=None,
        classes=None,
    ):
        self.record = record or Record("", args)
        self.args, self.device, self.loader, self.model, self.optimizer = args, device, loader, model, optimizer
        self.module, self.classes = module or model, classes
        self.sharded = getattr(args, "fsdp", False)
        self.methods = getattr(self.module, "methods", None)
        self.amp_dtype = choose_amp_dtype(args.amp_dtype, device)
        self.scaler = NativeScalerWithGradNormCount(self.amp_dtype is torch.float16, device)
        self.stop, self.stopped, self.board = StopRequest(), False, Board(None)
        self.steps_per_epoch = ceil(len(loader) / args.accum_iter)
        self.total_steps = settle_length(args, len(loader))
        self.epoch, self.position = args.start_epoch, 0  # next micro-batch
        self.meter = EpochMeter(device)
        self.best = 0.0
        self._bad = 0  # unreadable images since the last reading
        self.last_means: dict[str, float] = {}  # of the last finished epoch
        self.finite, self.spikes, self.overflows = Finite(device), Spikes(args.spike_factor), Overflows(self.scaler)
        self.saver = Saver(args.output_dir, args.save_patience)
        folder = Path(args.output_dir)
        self.log, self.spike_log = GrowingFile(folder / "log.txt"), GrowingFile(folder / "spikes.jsonl")
        self.best_file = LateFile(folder / "checkpoint-best.pth", write_tensors)
        self.saver.files = [self.log, self.spike_log, self.best_file]
        self.lr, self.resumed = 0.0, resume
        if resume is not None:
            run_state.resume(self, resume)
        # Optimizer steps of the run so far, not from the file: right also with --start_epoch or other batch flags.
        self.step = self.epoch * self.steps_per_epoch + self.position // args.accum_iter
        self._same_place_everywhere()
        self.resumed_at_end = resume is not None and self.ended  # then `util.training.finished` follows, not `begin`

    def begin(self) -> None:
        """Prepare for training, and make the folders and the first files; no file changes before this."""
        args, resume = self.args, self.resumed
        if args.compile:
            compile_blocks(self.module, *(n for method in self.all_methods() for n in method.external_networks()))
        self.flops = FlopMeter(self.device, self.amp_dtype) if args.log_mfu else None
        self.wrapped = self._wrap(self.module) if get_world_size() > 1 and not self.sharded else self.module
        make_output_dir(args)
        if resume is not None and args.output_dir:
            trim_log(args.output_dir, self.epoch)
            abandon_later(args.output_dir, resume)
        first = self.epoch + self.position / len(self.loader)
        self.board = Board(args.log_dir, purge_step=None if resume is None else int(first * 1000) + 1)
        self._describe()
        watchdog.moved(self.step)

    def _wrap(self, module):
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        # Buffers are not sent around in every step: teachers get the same updates on every rank, and running statistics
        # are taken from rank 0 before an evaluation (`sync_buffers`). torch 2.14 renamed the switch.
        names = inspect.signature(DistributedDataParallel).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        # Every step has the same graph (methods see to that); torch cannot know it where windows end without a message.
        fixed = dict(gradient_as_bucket_view=True, static_graph=self.args.accum_iter == 1)
        return DistributedDataParallel(module, device_ids=device_ids, **fixed, **{switch: False})

    def _describe(self):
        args = self.args
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        print(f"{args.model}: {millions:.1f} M parameters on {self.device}, {str(self.amp_dtype).split('.')[-1]}")
        flags = {**vars(args), "revision": revision(), "torch": torch.__version__}
        self.board.flags(flags)
        if args.output_dir and is_main_process():
            (Path(args.output_dir) / "args.json").write_text(json.dumps(flags, indent=2, default=str) + "\n")

    def _same_place_everywhere(self) -> None:
        places = gather_objects((self.epoch, self.position, self.step))
        if len(set(places)) > 1:
            raise UserError(
                f"the ranks resumed at different (epoch, batch, step) {places}: share --output_dir among nodes"
            )

    @property
    def ended(self) -> bool:
        """Whether the last step is done. With a fraction of an epoch that is inside one: the place stays there."""
        return self.step >= self.total_steps

    # One epoch -----------------------------------------------------------------------------------------------------

    def _last_position(self) -> int:
        """Where this epoch ends: behind all its micro-batches, or behind the run's last step."""
        left = self.total_steps - self.epoch * self.steps_per_epoch
        return min(len(self.loader), left * self.args.accum_iter)

    def micro_batches(self, header: str):
        """Yield the rest of this epoch's micro-batches; keeps the learning rate, logs, saves, and ends early after a
        signal (`stopped`). UserError when too many images are unreadable, RunFailed when the loss is not finite."""
        args, total, last = self.args, len(self.loader), self._last_position()
        progress = Progress(f"{header} {self.epoch}", last, self.position)
        self._clock, self._waited = Clock(), 0.0
        watchdog.moved(self.step)
        self._batches = iter(self.loader.begin(self.epoch, self.position))
        if self.flops:
            self.flops.begin()
        try:
            for position in range(self.position, last):
                batch = self._next()
                size, opens, closes = accumulation_window(position, total, args.accum_iter)
                if opens:
                    self.lr = adjust_learning_rate(self.optimizer, self.epoch + position / total, args)
                yield Micro(batch, size, closes)
                self._bad += int(batch.bad.sum())  # a number on the host: nothing waits
                self.position = position + 1
                progress.advance(self.position)
                if closes:
                    self._after_step(progress)
                    if self.stopped:
                        return
        finally:
            self._batches = None  # a traceback must not keep the data workers alive
            progress.close()

    def _next(self) -> Sample:
        began = time.perf_counter()
        try:
            batch = next_batch(self._batches)
        except StopIteration:
            raise RunFailed(f"the data ended after {self.position} of {len(self.loader)} batches of an epoch") from None
        self._clock.waited += time.perf_counter() - began
        self._clock.images += len(batch.target) * get_world_size()
        return batch

    def forward_context(self, micro: Micro):
        """Autocast, and under DDP no communication before the window closes."""
        stack = contextlib.ExitStack()
        if not micro.closes and self.wrapped is not self.module:
            stack.enter_context(self.wrapped.no_sync())
        stack.enter_context(autocast(self.device, self.amp_dtype))
        if self.flops:
            stack.enter_context(self.flops.counting(len(micro.batch.target)))
        return stack

    @contextlib.contextmanager
    def untimed(self):
        """A look at the model, whole and under autocast, whose time is not counted in the run's speed."""
        synchronize = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        synchronize()
        began = time.perf_counter()
        with whole(self.module), autocast(self.device, self.amp_dtype):
            yield
        synchronize()
        self._clock.pause(time.perf_counter() - began)

    def backward(self, micro: Micro, loss: torch.Tensor, **parts: torch.Tensor) -> None:
        """Back-propagate this micro-batch's share and, where the window closes, step. Call it inside
        `forward_context`; `parts` are logged beside `loss`."""
        named = {"loss": loss.detach(), **parts}
        with torch.autocast(self.device.type, enabled=False):
            norm = self.scaler(
                loss / micro.size,
                self.optimizer,
                clip_grad=self.args.clip_grad,
                parameters=self.module.parameters(),
                update_grad=micro.closes,
            )
        self.meter.add(len(micro.batch.target), **named)
        checked = {**named, "gradient": norm} if norm is not None and not self.scaler.enabled else named
        self.finite.watch(self.step, checked)
        self.spikes.watch(self.step, loss, micro.batch.index)
        if micro.closes:
            if self.scaler.enabled:  # a step that overflowed has no norm, and is counted instead
                norm = torch.where(self.scaler.applied > 0, norm, torch.zeros_like(norm))
                self.meter.add(skipped_steps=1 - self.scaler.applied)
            self.meter.add(grad_norm=norm)
            self.optimizer.zero_grad(set_to_none=True)

    # Between steps -------------------------------------------------------------------------------------------------

    def _after_step(self, progress: Progress) -> None:
        self.step += 1
        watchdog.moved(self.step)
        args, last = self.args, self._last_position()
        ends = self.position == last
        due = self.step % args.print_freq == 0 or ends
        save = bool(args.save_steps) and self.step % args.save_steps == 0 and not ends
        seconds = self._clock.seconds_per_step()
        stop, again = self.stop.poll(self.step, seconds, args.print_freq, self.saver.due)
        save = save or (again and not ends)
        if due or save or stop:
            self._read(progress, last)
        if stop and not ends:  # at the end of an epoch, `finish_epoch` saves and stops
            self.stopped = True
        if save or self.stopped:
            self.save(last=self.stopped)

    def _read(self, progress: Progress, last: int) -> None:
        """Where the host waits for the device: read the metrics, look for trouble, log."""
        self.meter.add(bad_images=self._bad)
        self._bad = 0
        values = self.meter.read()
        self._say_spikes()
        self.overflows.read(self.step)
        self.finite.read(self.epoch, self.module)
        self._check_images(last)
        bad = values.pop("bad_images")
        self._waited += self._clock.waited
        rates = self._clock.read()
        if self.flops:
            rates["mfu_percent"] = self.flops.utilisation(rates["images_per_s"] / get_world_size())
        self.meter.epoch["seconds"] = [self.meter.epoch.get("seconds", [0.0])[0] + rates.pop("seconds"), 1]
        shown = {"loss": values["loss"], "lr": self.lr, **rates}
        per_batch = self.meter.epoch["seconds"][0] / max(1, self.position)
        progress.say(shown, per_batch * (last - self.position))
        if self.device.type == "cuda":
            rates["gpu_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        points = {f"train/{name}": value for name, value in values.items()}
        points |= {"train/lr": self.lr, **{f"speed/{name}": value for name, value in rates.items()}}
        if bad:
            points["data/bad_images"] = bad
        self.board.scalars(points, self.epoch + self.position / len(self.loader))

    def _say_spikes(self) -> None:
        for spike in self.spikes.read(self._name_of):
            if self.args.output_dir:
                self.spike_log.append(log_line({"epoch": self.epoch, **spike}))
            print(describe_spike(spike, f"are in {self.spike_log.path}" if self.args.output_dir else "are not written"))

    def _name_of(self, index: int) -> str:
        images = getattr(self.loader.dataset, "images", None)
        return images.name(index) if hasattr(images, "name") else f"image {index}"

    def _check_images(self, batches: int) -> None:
        count = self.meter.epoch.get("bad_images", [0.0])[0]
        images = batches * self.args.batch_size * get_world_size()
        if count > self.args.max_bad_fraction * images:
            raise UserError(
                f"{int(count)} of {images} images of this epoch are unreadable, more than --max_bad_fraction "
                f"{self.args.max_bad_fraction:g} allows; their names are above"
            )

    def finish_epoch(self, row: dict) -> None:
        """Log the epoch that has just ended (`row` on top of the means), save when due, and go to the next."""
        args = self.args
        means = self.meter.means()
        seconds, bad = means.pop("seconds"), self.meter.epoch.get("bad_images", [0.0])[0]
        means.pop("bad_images", None)
        stats = {f"train_{name}": value for name, value in {**means, "lr": self.lr}.items()}
        self.last_means = stats
        if args.output_dir and is_main_process():
            place = {"epoch": self.epoch, "step": self.step, "seconds": seconds, "bad_images": int(bad)}
            self.log.append(log_line({**stats, **row, **place}))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in {**stats, **row}.items())
        print(f"epoch {self.epoch}: {shown}  {seconds:.1f} s" + (f"  unreadable images {int(bad)}" if bad else ""))
        slow = slow_reader(gather_objects(self._waited), seconds)
        if slow:
            print(f"note: {slow}")
        self.board.scalars(row, self.epoch + self.position / len(self.loader))
        self.board.flush()
        number = self.epoch
        if self.position == len(self.loader):
            self.epoch, self.position, self.meter = self.epoch + 1, 0, EpochMeter(self.device)
        stop = self.stop.received is not None
        if get_world_size() > 1:
            stop = bool(all_reduce_sum(torch.tensor(float(stop), device=self.device)).item())
        self.stopped = stop and not self.ended
        if number % args.save_freq == 0 or self.ended or self.stopped:
            self.save(last=self.ended or self.stopped)

    def close(self) -> None:
        """Say why it ended early, if it did; close the event file, give back the signals, leave the process group."""
        signals.stopped_by = self.stop.received if self.stopped else None
        if self.stopped:
            self._announce_stop()
        self.board.close()
        self.stop.close()
        shut_down()

    def _announce_stop(self) -> None:
        where = f"epoch {self.epoch}, batch {self.position}"
        print(f"stopped by {self.stop.received} at {where}; --resume auto continues exactly there")

    def images_seen(self) -> int:
        batches = self.epoch * len(self.loader) + self.position
        return batches * self.args.batch_size * get_world_size()

    def enter(self) -> None:
        """The line in the ledger of a run that has reached its end."""
        if not self.stopped:
            place = self.args.output_dir, self.images_seen(), self.device, self.amp_dtype
            self.saver.insist(LEDGER, lambda: self.record.finish(*place))

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def content(self) -> dict:
        """What a checkpoint holds (`util.training.run_state`)."""
        return run_state.content(self)

    def save(self, last: bool = False) -> None:
        """A checkpoint, if the disk takes it (`util.checkpoint.retry.Saver`), which the `last` one of a run must. RunFailed instead
        of one with numbers that are not finite."""
        if not self.args.output_dir:
            return
        moments = {name: self.optimizer.state.get(p, {}) for name, p in self.module.named_parameters()}
        broken = broken_state({"weight": self.module.state_dict(), "optimizer state": moments})
        if broken:
            raise RunFailed(f"{broken} is non-finite after step {self.step}: not saved, the last checkpoint is good")
        self.saver.save(lambda: run_state.save(self), last)

    def exported(self) -> dict[str, nn.Module]:
        """Further whole models that the methods own (an EMA teacher), by their key in the checkpoint."""
        return {key: model for method in self.all_methods() for key, model in method.exported().items()}

    def all_methods(self):
        return self.methods.values() if self.methods is not None else ()


__all__ = ["Micro", "Run", "accumulation_window", "start"]
