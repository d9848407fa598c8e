"""SIGTERM, SIGUSR1, SIGUSR2 (a scheduler's warning) and SIGINT (Ctrl-C): the run finishes its step, saves, and exits
with code 0. A second Ctrl-C ends it at once with code 130."""

import os
import signal
import threading

import torch

from util import interrupts
from util.parallel.distributed import all_reduce_max, get_world_size, host_device

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

# Name of the signal that ended the last run of this process early, else None; `util.parallel.slurm` requeues the job.
stopped_by: str | None = None


class StopRequest:
    """Remembers that a signal was received. All ranks stop after the same step: about every two seconds, at steps that
    follow from shared numbers, they compare what they received. Python allows handlers in the main thread only; in
    another one (a notebook's server, Ray) signals keep their effect on the process.

    `current` is the work that is finished before the run stops, as the answer to Ctrl-C names it."""

    def __init__(self):
        self.received: str | None = None
        self.next_poll = 1
        self.current = "this step"
        self._interrupted, self._pid = False, os.getpid()
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        else:
            names = ", ".join(number.name for number in SIGNALS)
            print(f"note: the run is not in the main thread, so it does not save when it receives {names}")

    def _handle(self, number, _frame):
        if os.getpid() != self._pid:  # a data worker that has just been forked
            return
        if number == signal.SIGINT:
            if not interrupts.new_press():
                return
            if self._interrupted:
                interrupts.write_line("ended at once; the checkpoints already written are complete")
                interrupts.end_now()
            self._interrupted = True
            interrupts.write_line(f"stopping after {self.current}; press Ctrl-C again to end at once")
        self.received = signal.Signals(number).name

    def close(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._before.items():
            if handler is not None:  # one that was not set from Python cannot be restored
                signal.signal(number, handler)

    def poll(self, step: int, seconds_per_step: float, max_steps: int, retry: bool = False) -> tuple[bool, bool]:
        """Return whether to stop now, and whether a rank wants to retry a failed save (`retry`). Several processes
        communicate only every few steps, at most `max_steps`."""
        if get_world_size() == 1:
            return self.received is not None, retry
        if step < self.next_poll:
            return False, False
        received = torch.tensor(
            [float(self.received is not None), float(retry), seconds_per_step], device=host_device()
        )
        stop, retry, seconds = all_reduce_max(received).tolist()
        self.next_poll = step + max(1, min(max_steps, int(2.0 / max(seconds, 1e-6))))
        if stop:
            self.received = self.received or "a signal to another rank"
        return bool(stop), bool(retry)
