"""From images to batches: the order of the samples, their division among ranks, and their random numbers.

Everything is a function of (seed, epoch, sample index). So the number of workers makes no difference, a run can resume
at any sample, and the union of the ranks' batches is the batch of a single process.
"""

import atexit
import math
import multiprocessing
import signal
import warnings
import weakref
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, default_collate, get_worker_info

from util.data.samples import Sample, UnreadableData
from util.errors import MORE_SHARED_MEMORY, UserError, worker_failure
from util.parallel import watchdog
from util.parallel.cores import note_many_workers
from util.parallel.distributed import get_rank, get_world_size


def _regroup(batches, size: int, drop_last: bool):
    """Yield batches of `size` from those of a stream's workers, each of which ends with a smaller batch."""
    rest: Sample | None = None
    for batch in batches:
        rest = batch if rest is None else Sample(*(torch.cat(pair) for pair in zip(rest, batch)))
        while len(rest.index) >= size:
            yield Sample(*(column[:size] for column in rest))
            rest = Sample(*(column[size:] for column in rest))
        rest = rest if len(rest.index) else None
    if rest is not None and not drop_last:
        yield rest


class EpochBatches(Sampler):
    """This rank's batches of keys (epoch, index).

    Training: a permutation from (seed, epoch), cut into global batches; rank r of W takes samples r, r + W, r + 2W ...,
    and an incomplete last global batch is dropped. Evaluation (`shuffle=False`): every sample exactly once over all
    ranks, in order; the ranks' numbers of samples may differ by one, and some ranks have none when there are fewer
    samples than ranks. With `split=False` every rank gets all samples.

    With `labels`, training draws with replacement: first a class, then one of its samples, both uniformly, from (seed,
    epoch). A key is then (epoch, index, place in the epoch): a sample that is drawn again gets another augmentation.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        split: bool = True,
        labels: list[int] | None = None,
    ):
        self.labels = None if labels is None else torch.tensor(labels)
        self.length, self.batch_size, self.seed, self.shuffle = length, batch_size, seed, shuffle
        self.rank, self.world = (get_rank(), get_world_size()) if split else (0, 1)
        self.epoch, self.start = 0, 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Begin `epoch` at batch number `start`."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        if self.shuffle:
            return self.length // (self.batch_size * self.world)
        return math.ceil(len(range(self.rank, self.length, self.world)) / self.batch_size)

    def __iter__(self):
        order, places = self._order(), range(self.rank, self.length, self.world)
        for batch in range(self.start, len(self)):
            mine = places[batch * self.batch_size : (batch + 1) * self.batch_size]
            chosen = order[mine.start : mine.stop : mine.step].tolist()
            if self.labels is None:
                yield [(self.epoch, index) for index in chosen]
            else:
                yield [(self.epoch, index, place) for index, place in zip(chosen, mine)]

    def _order(self) -> torch.Tensor:
        """Return the indices of all ranks' samples in this epoch: (N,), which as a list would take four times the
        memory."""
        if not self.shuffle:
            return torch.arange(self.length)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        if self.labels is None:
            return torch.randperm(self.length, generator=generator)
        _, counts = self.labels.unique(return_counts=True)
        by_class, ends = self.labels.argsort(stable=True), counts.cumsum(0)
        chosen = torch.randint(len(counts), (self.length,), generator=generator)
        draws = torch.rand(self.length, generator=generator, dtype=torch.float64)  # below 1
        members = (draws * counts[chosen]).long()
        return by_class[ends[chosen] - counts[chosen] + members]


def _outlive_signals(_worker_id: int) -> None:
    """Let a worker ignore the signals that a scheduler sends to all processes of a job: only the main process handles
    them, and it needs its workers to finish the step. A worker ends 30 s after a SIGTERM, so it can still be stopped.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


_working = weakref.WeakSet()  # iterators that have workers


@atexit.register
def _end_workers() -> None:
    """Stop the workers of iterators that something (for example a traceback) still refers to at exit. Python would end
    them by SIGTERM, which they ignore for 30 s."""
    for iterator in list(_working):
        iterator._shutdown_workers()


def in_shared_memory(batch):
    """Move the tensors of a batch to shared memory, if this process is a data worker. Otherwise torch would do it while
    it sends the batch, in a thread whose errors lose the batch, and the main process would wait for it forever."""
    if get_worker_info() is not None:
        for tensor in _tensors(batch):
            if tensor.numel():
                tensor.share_memory_()
    return batch


def _tensors(value):
    """Yield the tensors in tuples, lists and dicts; anything else, such as a name, is passed over."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def collate(samples: list) -> Sample:
    """Make a batch of samples, as torch does by default, `in_shared_memory`. Images of bytes become floats where others
    have more than 8 bits."""
    if len({sample.image.dtype for sample in samples}) > 1:
        samples = [sample._replace(image=sample.image.float()) for sample in samples]
    return in_shared_memory(default_collate(samples))


def loader_options(seed: int, num_workers: int, pin_mem: bool, persistent: bool = True) -> dict:
    """Return the arguments that every DataLoader gets. `persistent` workers outlive an epoch. Prints a note if there
    are more workers than cores, instead of torch's warning."""
    note_many_workers(num_workers)
    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
    return dict(
        num_workers=num_workers,
        pin_memory=pin_mem and torch.cuda.is_available(),
        persistent_workers=num_workers > 0 and persistent,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator().manual_seed(seed),  # keeps the global one unused
    )


def read_batches(loader: DataLoader):
    """Start the workers of `loader` and return its batches. Raises UserError if the system cannot start them, and
    RunFailed if one of them fails later."""
    if not loader.num_workers:
        return iter(loader)
    try:
        multiprocessing.Lock()  # a half-made iterator of torch would report further errors when it is deleted
        iterator = iter(loader)
    except OSError as error:  # of the locks, which are files in /dev/shm
        raise UserError(
            f"--num_workers {loader.num_workers}: data workers cannot be started ({error.strerror or error}): "
            f"{MORE_SHARED_MEMORY}"
        ) from error
    _working.add(iterator)
    return _explained(iterator)


def _explained(batches):
    try:
        yield from batches
    except UnreadableData as error:
        # Frames of torch in its traceback refer to the error: such a cycle would keep the data workers alive.
        raise type(error)(_last_line(error.with_traceback(None))) from None
    except RuntimeError as error:
        failure = worker_failure(error)
        if failure is None:
            raise
        raise failure from error


class Loader:
    """A DataLoader with `begin(epoch, batch)`; iterating starts there, `len` is the whole epoch. `split=False` gives
    every rank all samples (not of a stream). With `labels` every class is drawn equally often (`EpochBatches`). A
    data set with a function `collate` makes its batches by it.

    `normalise` (`util.data.pixels.Normaliser`) makes the images of the batches that are iterated over from those of the
    data set; None: they are normalised already. `on(device)` says where."""

    device = torch.device("cpu")

    def __init__(
        self,
        dataset,
        batch_size: int,
        shuffle: bool,
        seed: int,
        num_workers: int,
        pin_mem: bool = False,
        split: bool = True,
        labels: list[int] | None = None,
        normalise: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.dataset, self.batch_size, self.normalise = dataset, batch_size, normalise
        self.stream, self.shuffle = isinstance(dataset, IterableDataset), shuffle
        self.start = 0
        common = loader_options(seed, num_workers, pin_mem, persistent=not self.stream)
        common["collate_fn"] = getattr(dataset, "collate", collate)
        if self.stream:
            self.loader = DataLoader(dataset, batch_size=batch_size, **common)
        else:
            self.batches = EpochBatches(len(dataset), batch_size, seed, shuffle, split, labels)
            self.loader = DataLoader(dataset, batch_sampler=self.batches, **common)

    def begin(self, epoch: int, start: int = 0) -> "Loader":
        """Set the epoch and the batch at which the next iteration starts."""
        self.start = start
        if self.stream:
            self.dataset.epoch = epoch
            self.loader.generator.manual_seed(self.dataset.seed * 1_000_003 + epoch)  # timm shuffles by worker seeds
            if hasattr(self.dataset.stream, "set_epoch"):
                self.dataset.stream.set_epoch(epoch)
        else:
            self.batches.set_epoch(epoch, start)
        return self

    def on(self, device: torch.device) -> "Loader":
        """Move the images of all batches to `device` before they are normalised; until this is called, they stay on the
        CPU."""
        self.device = device
        return self

    def __len__(self) -> int:
        if not self.stream:
            return len(self.batches)
        size = self.batch_size * get_world_size()
        return len(self.dataset) // size if self.shuffle else math.ceil(len(self.dataset) / size)

    def order(self) -> str:
        """Return a description of what the order of an epoch depends on besides the seed, "" when that is all."""
        return "" if self.stream or self.batches.labels is None else "each class equally often"

    def __iter__(self):
        return self._normalised(watchdog.reading(self.skip_to_start(read_batches(self.loader))))

    def _normalised(self, batches) -> Iterator[Sample]:
        for batch in batches:
            image = batch.image.to(self.device, non_blocking=True)
            yield batch._replace(image=image if self.normalise is None else self.normalise(image))

    def skip_to_start(self, iterator):
        """Return the batches of a DataLoader's iterator from `self.start` on."""
        if not self.stream:
            return iterator
        # A stream can only be read from its beginning: a resumed run reads and skips the batches it has seen.
        batches = _regroup(iterator, self.batch_size, drop_last=self.shuffle)
        return islice(batches, self.start, len(self) if self.shuffle else None)


def next_batch(batches) -> Sample:
    """Return the next batch. Raises UserError when too many images in a row are unreadable, or an annotation does not
    fit."""
    try:
        return next(batches)
    except UnreadableData as error:
        raise UserError(_last_line(error)) from None


def _last_line(error: UnreadableData) -> str:
    """Return what an error says; the message of one that a data worker raised begins with the worker's traceback."""
    return str(error).strip().splitlines()[-1].split(f"{type(error).__name__}: ", 1)[-1]


class Endless:
    """The batches of a training loader over all epochs, by number."""

    def __init__(self, loader: Loader):
        self.loader, self._next, self._batches = loader, -1, None

    def on(self, device: torch.device) -> "Endless":
        """Make the images of all batches on `device` (`Loader.on`)."""
        self.loader.on(device)
        return self

    def batch(self, number: int) -> Sample:
        """Return batch `number`, counted from 0 over all epochs. Consecutive numbers let the workers read ahead."""
        epoch, start = divmod(number, len(self.loader))
        if number != self._next or not start:
            self._batches = iter(self.loader.begin(epoch, start))
        self._next = number + 1
        return next_batch(self._batches)
