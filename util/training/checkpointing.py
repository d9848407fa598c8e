"""Writing of a training run's checkpoints and of its best weights.

`Run.finish_step` and `Run.finish_epoch` call `Checkpointer.save`. It writes through `util.checkpoint.retry.Saver`,
which retries after a failure, `util.training.run_state.save`, which collects the content, and `util.checkpoint.save`.
"""

import math
from pathlib import Path

from util.checkpoint.atomic import write_tensors
from util.checkpoint.retry import GrowingFile, LateFile, Saver
from util.checkpoint.save import Retention
from util.errors import RunFailed
from util.parallel.distributed import from_main_process, is_main_process
from util.training import run_state
from util.training.numerics import broken_state


class Checkpointer:
    """Writes the checkpoints of a run and the file of its best weights. The `logs` are written before every
    checkpoint."""

    def __init__(self, output_dir: str, save_patience: float, logs: list[GrowingFile]):
        self.writes = bool(output_dir)
        self.saver = Saver(output_dir, save_patience)
        self.best_file = LateFile(Path(output_dir) / "checkpoint-best.pth", write_tensors)
        self.saver.files = [*logs, self.best_file]
        self.best: float | None = None  # best score so far
        self.temporary: Path | None = None  # the last checkpoint, if it is to be deleted after the next one

    def save(self, run, last: bool = False, temporary: bool = False) -> None:
        """Write a checkpoint of `run`; a `temporary` one is deleted after the next one. A failed save is retried later
        (`util.checkpoint.retry.Saver`), unless it is the `last` one, which must succeed. Raises RunFailed, and writes
        nothing, if a weight or optimizer state is not finite."""
        if not self.writes:
            return
        moments = {name: run.optimizer.state.get(p, {}) for name, p in run.train_module.named_parameters()}
        broken = broken_state({"weight": run.train_module.state_dict(), "optimizer state": moments})
        if broken:
            raise RunFailed(f"{broken} is non-finite after step {run.step}: not saved, the last checkpoint is good")
        self.saver.save(lambda: self._write(run, temporary), last)

    def _write(self, run, temporary: bool) -> None:
        path = run_state.save(run, Retention(run.args.keep, temporary, self.temporary))
        self.temporary = path if temporary else None

    def forget_lost_best(self) -> None:
        """After a resume, forget the best score if its weights are not in the folder, because they were abandoned or
        are in another one: else no later weights would be kept unless they were better. All ranks must call it."""
        if not from_main_process(self.best_file.path.is_file):
            self.best = None

    def save_best(self, run, score: float | None, lower: bool = False) -> None:
        """Write the weights of `run` to checkpoint-best.pth if their `score` is the best so far: the highest, or with
        `lower` the lowest. A score that is None or NaN is never the best."""
        if score is None or math.isnan(score):
            return
        if self.best is not None and not (score < self.best if lower else score > self.best):
            return
        self.best = score
        if self.writes:
            content = run_state.content(run)
            best = {key: content[key] for key in ("model", "epoch", "args", "origin", "classes") if key in content}
            if is_main_process():
                self.best_file.put(best)
