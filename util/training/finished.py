"""Resuming a run that is already finished: nothing is trained, and its files stay unchanged.

If the run was killed after its last checkpoint, some results are missing. These are written now, with the flags and the
record of the checkpoint; the flags of the present command are ignored.
"""

from collections.abc import Callable
from pathlib import Path

from util.checkpoint.files import LEDGER
from util.checkpoint.output_dir import make_output_dir
from util.parallel.distributed import from_main_process
from util.report.ledger import metrics_of
from util.report.loggers import open_loggers


def end_again(run, files: list[Path], write: Callable[[], None]) -> None:
    """End `run` (`util.training.run.Run`), which was resumed at its end. `files` are its results besides the ledger's
    line; `write()` writes them. All ranks must call it."""
    metrics, names = from_main_process(lambda: _unwritten(run, files))
    done = run.epoch + run.position / len(run.loader)
    state = (
        f"already finished: {run.resumed_from} is the state after {done:g} epochs, and the run has {run.args.epochs:g}"
    )
    print(f"{state}; nothing is trained{'; its results are written: ' + ', '.join(names) if names else ' or written'}")
    if names:
        run.record.restore()
        make_output_dir(run.args.output_dir, run.args.log_dir, run.args.overwrite)
        run.reporter.board = open_loggers(run.args, run.args.log_dir, run.record.flags_json(), resumed=True)
        write()
    if LEDGER in names:
        line = run.args.output_dir, metrics, run.images_seen()
        run.checkpoints.saver.insist(LEDGER, lambda: run.record.enter(*line))
    run.close()


def _unwritten(run, files: list[Path]) -> tuple[dict[str, float], list[str]]:
    """Return the log's metrics for the checkpoint's epoch, and the names of the results to write: [] if all exist. Runs
    whose checkpoint has no record (older than the ledger) get no line."""
    if not run.args.output_dir:
        return {}, []
    log, epoch = Path(run.args.output_dir) / "log.txt", run.last_epoch
    metrics = metrics_of(log.read_text(encoding="utf-8"), epoch) if log.is_file() else None
    line = bool(run.record.stored) and metrics is not None and not run.record.is_entered(run.args.output_dir)
    if not line and all(path.is_file() for path in files):
        return {}, []
    return metrics or {}, [path.name for path in files] + [LEDGER] * line
