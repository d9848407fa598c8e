"""SIGTERM, SIGUSR1 and SIGUSR2 (a scheduler's warning): finish the step, save, exit 0."""

import signal

import torch

from util.parallel.distributed import all_reduce_max, get_world_size, host_device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)

# What ended the last run of this process early, for whoever started it and may want to queue it again.
stopped_by: str | None = None


class StopRequest:
    """Remembers that a signal came. All ranks stop after the same step: they compare notes every few steps, about
    every two seconds, at steps that follow from numbers they share."""

    def __init__(self):
        self.received: str | None = None
        self.next_poll = 1
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number, _frame):
        self.received = signal.Signals(number).name

    def close(self) -> None:
        """Give the signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def poll(self, step: int, seconds_per_step: float, most: int, retry: bool = False) -> tuple[bool, bool]:
        """Whether to stop now, and whether a rank wants to try again to save (`retry`). One process looks at its own
        note; several ask each other every `most` steps or more."""
        if get_world_size() == 1:
            return self.received is not None, retry
        if step < self.next_poll:
            return False, False
        note = torch.tensor([float(self.received is not None), float(retry), seconds_per_step], device=host_device())
        wanted, retry, seconds = all_reduce_max(note).tolist()
        self.next_poll = step + max(1, min(most, int(2.0 / max(seconds, 1e-6))))
        if wanted:
            self.received = self.received or "a signal to another rank"
        return bool(wanted), bool(retry)
