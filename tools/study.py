"""Run the missing pieces of a study one after the other, and write its tables.

    bash scripts/study.sh OUT --data DIR            DIR: the data set as train/<class>/ and val/<class>/
    bash scripts/study.sh OUT --list                what is finished, what is left, and how long it takes
    bash scripts/study.sh OUT --table               the tables and the figure of what is finished

    bash scripts/study.sh OUT --rehearse            all of this in minutes: a tiny study of digits

It can be stopped at any time and started again: a run that was stopped goes on at its last checkpoint. Several queues
on one folder share the pieces. What a piece measured is kept in --keep, and stays finished when OUT is lost.
"""

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.study import (
    PRETRAINING,
    Kept,
    Piece,
    Study,
    check_unchanged,
    expected_seconds,
    hours_left,
    missing,
    ready,
)
from evaluation.study_folders import Sets, add_time, epochs_in, rows_of, whole_time, write_digits
from evaluation.study_tables import BEGIN, END, RECONSTRUCTIONS, write_results
from util.checkpoint.files import LEDGER
from util.errors import UserError, user_errors
from util.parser import Parser
from util.report import ledger

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs/study"


@dataclass
class Job:
    """A piece that runs, since `started`; its log had `epochs` lines before."""

    piece: Piece
    process: subprocess.Popen
    lock: IO
    started: float
    epochs: int


class Queue:
    """Runs the pieces of a study, `jobs` at a time."""

    poll_seconds = 1.0  # five times as long while other queues run what is left

    def __init__(self, args, study: Study):
        self.args, self.study, self.out = args, study, Path(args.out)
        self.sets = Sets(args.data, self.out, study.config)
        self.running: list[Job] = []
        self.failed: set[str] = set()
        self.stopping = False

    def run(self) -> int:
        """Run until nothing is left -> exit code."""
        self.out.mkdir(parents=True, exist_ok=True)
        self.sets.make()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.stop)
        while True:
            self.collect()
            elsewhere = False if self.stopping else self.start_more()
            if not self.running and not elsewhere:
                break
            time.sleep(self.poll_seconds if self.running else 5 * self.poll_seconds)
        if self.stopping:
            print("stopped; the same command goes on", flush=True)
            return 130
        left = len(missing(list(self.study.pieces()), self.study.kept, self.out))
        print(f"{left} pieces are left, which need those that failed" if left else "nothing is left", flush=True)
        return 1 if self.failed else 0

    def stop(self, *_) -> None:
        """Let runs finish their step and save."""
        self.stopping = True
        for job in self.running:
            job.process.terminate()

    # Starting ---------------------------------------------------------------------------------------------------------

    def start_more(self) -> bool:
        """Start what there is room for -> whether other queues run what could be started here."""
        if len(self.running) >= self.args.jobs:
            return False
        _, left = self.state()
        waiting, busy = {piece.name for piece in left}, {job.piece.name for job in self.running}
        elsewhere = False
        for piece in left:
            if len(self.running) >= self.args.jobs:
                break
            if piece.name not in busy | self.failed and ready(piece, waiting):
                elsewhere |= not self.start(piece)
        return elsewhere

    def state(self) -> tuple[list[Piece], list[Piece]]:
        """Return all pieces and those that are left, by the results of all queues. Raises UserError for other flags
        than those of a result."""
        self.study.kept.read()
        pieces = list(self.study.pieces())
        check_unchanged(pieces, self.study.kept)
        return pieces, missing(pieces, self.study.kept, self.out)

    def start(self, piece: Piece) -> bool:
        """Start a piece, unless another queue runs it or has just finished it -> whether it was not running there."""
        lock = try_lock(self.out, piece.name)
        if lock is None:
            return False
        pieces, left = self.state()
        if piece not in left:
            lock.close()
            return True
        hours = hours_left(left, pieces, self.study)
        print(f"{time.strftime('%H:%M')} {piece.name}   ({len(left)} left, about {hours:.1f} core hours)", flush=True)
        folder = self.out / piece.name
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "output.txt", "ab") as output:
            # The piece inherits the lock, so that it stays locked when this queue is killed and the piece is not.
            process = subprocess.Popen(
                self.command(piece),
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[lock.fileno()],
            )
        self.running.append(Job(piece, process, lock, time.monotonic(), epochs_in(folder)))
        return True

    def command(self, piece: Piece) -> list[str]:
        folder = self.out / piece.name
        words = piece.words
        for name, value in {**self.sets.flags(), "out": str(self.out), "folder": str(folder)}.items():
            words = words.replace(f"{{{name}}}", value)
        program, *flags = shlex.split(words)
        if program == "main_pretrain.py":
            flags += ["--output_dir", str(folder)] + ["--resume", "auto"] * ("--resume" not in flags)
        return ["nice", "-n", "10", sys.executable, str(ROOT / program), *flags]

    # Finishing --------------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Keep the results of pieces that have ended."""
        for job in list(self.running):
            core_seconds = ended(job.process)
            if core_seconds is None:
                continue
            folder = self.out / job.piece.name
            add_time(folder, core_seconds, epochs_in(folder) - job.epochs)
            row = self.result(job.piece) if job.process.returncode == 0 else None
            if row is not None:
                seconds = row.get("seconds") or time.monotonic() - job.started
                self.study.kept.add(job.piece, row, seconds, rows_of(folder / "log.txt"), whole_time(folder))
            elif not self.stopping:
                self.failed.add(job.piece.name)
                where = folder / "output.txt"
                print(f"{job.piece.name} failed with exit code {job.process.returncode}: see {where}", file=sys.stderr)
            self.running.remove(job)
            job.lock.close()

    def result(self, piece: Piece) -> dict | None:
        """Return the last line of a piece's ledger if it has finished."""
        path = self.out / piece.name / LEDGER
        rows = ledger.read(path) if path.exists() else []
        written = not piece.checkpoint or (self.out / piece.checkpoint).exists()
        return rows[-1] if rows and written else None


def try_lock(out: Path, name: str) -> IO | None:
    """Lock a piece -> the lock, which is held until it is closed; None if another process has it."""
    folder = out / "locks"
    folder.mkdir(exist_ok=True)
    lock = (folder / name).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def ended(process: subprocess.Popen) -> float | None:
    """Return the seconds of a core that a process took, with its data workers; None while it runs."""
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if not pid:
        return None
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


def state_of(piece: Piece, study: Study, left: set[str], out: Path) -> str:
    """Return what `--list` says of a piece."""
    folder = out / piece.name
    if piece.name not in left:
        return "finished"
    lock = try_lock(out, piece.name) if (out / "locks" / piece.name).exists() else None
    if lock is None and (out / "locks" / piece.name).exists():
        return f"running, {epochs_in(folder)} of {piece.epochs:g} epochs" if epochs_in(folder) else "running"
    if lock is not None:
        lock.close()
    if piece.name in study.kept.results:
        return "again: its checkpoint is lost"
    return f"stopped after {epochs_in(folder)} of {piece.epochs:g} epochs" if epochs_in(folder) else "left"


def show(study: Study, out: Path) -> None:
    pieces = list(study.pieces())
    check_unchanged(pieces, study.kept)
    left = missing(pieces, study.kept, out)
    names = {piece.name for piece in left}
    for piece in pieces:
        minutes = expected_seconds(piece, pieces, study) / 60
        about = f"   about {minutes:.0f} minutes" if piece.name in names else ""
        print(f"{piece.name:<32} {state_of(piece, study, names, out)}{about}")
    for name in study.skipped:
        uses = study.config["methods"][name]["uses"]
        print(f"{name:<32} skipped: this version has no method {uses}")
    hours = hours_left(left, pieces, study)
    print(
        f"{len(pieces) - len(left)} of {len(pieces)} finished; {len(left)} left, about {hours:.1f} core hours; further "
        "seeds may follow"
    )


def draw_reconstructions(study: Study, out: Path, picture: Path) -> None:
    """Draw reconstructions of the first seed of the rows `reconstructed`, of the checkpoints that are there. Without
    any, an earlier picture stays."""
    first, rows = study.config["seeds"][0], study.config.get("reconstructed", [])
    pieces = {piece.name: piece for piece in study.pieces() if piece.kind == PRETRAINING}
    wanted = [pieces[f"{row}-seed{first}"] for row in rows if f"{row}-seed{first}" in pieces]
    files = [out / piece.checkpoint for piece in wanted if piece.name in study.kept.results]
    files = [str(file) for file in files if file.exists()]
    if not files:
        return
    flags = ["--data_path", str(out / "data/few"), "--count", "4", "--num_workers", "0", "--out", str(picture)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/visualize.py"), *files, *flags], capture_output=True, text=True
    )
    if done.returncode:
        print(f"note: {picture} was not drawn: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)


def get_args_parser() -> Parser:
    parser = Parser(__doc__.split("\n")[0], usual="OUT --data DIR")
    parser.add_argument("out", metavar="OUT", help="folder for checkpoints and logs")
    parser.add_argument("--data", default="", help="the data set as train/<class>/ and val/<class>/")
    parser.add_argument("--study", default=str(CONFIGS / "cifar10.yaml"), help="YAML file with the pieces")
    parser.add_argument("--keep", default=str(ROOT / "docs/logs/study"), help="folder for results of finished pieces")
    parser.add_argument("--results", default=str(ROOT / "docs/results.md"), help="page for the tables of --table")
    parser.add_argument("--jobs", type=int, default=1, help="pieces at a time, with one thread each")
    parser.add_argument("--list", action="store_true", help="print the pieces and their state, and end")
    parser.add_argument("--table", action="store_true", help="write the tables and the figures, and end")
    parser.add_argument(
        "--rehearse",
        action="store_true",
        help="a tiny study of scikit-learn's digits, all of whose files are in OUT, then its tables",
    )
    return parser


def settle_rehearsal(args) -> None:
    """Set the flags of a rehearsal. Raises UserError for flags that it does not have."""
    if args.data:
        raise UserError("--rehearse makes its own data set: leave out --data")
    out = Path(args.out)
    args.data, args.keep, args.results = str(out / "digits"), str(out / "kept"), str(out / "results.md")
    args.study = str(CONFIGS / "rehearsal.yaml")
    if not args.list:
        write_digits(Path(args.data))
        if not Path(args.results).exists():
            Path(args.results).write_text(f"# A rehearsal\n\n{BEGIN}\n{END}\n", encoding="utf-8")


def main(args) -> int:
    args.out = str(Path(args.out).absolute())
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be positive")
    if args.rehearse:
        settle_rehearsal(args)
    study = Study(Path(args.study), Kept(Path(args.keep)))
    if args.list:
        show(study, Path(args.out))
        return 0
    code = 0
    if not args.table:
        if not args.data:
            raise UserError("--data is needed: the data set as train/<class>/ and val/<class>/")
        code = Queue(args, study).run()
    if args.table or (args.rehearse and code == 0):
        draw_reconstructions(study, Path(args.out), Path(args.results).with_name(RECONSTRUCTIONS))
        write_results(study, Path(args.results))
    return code


if __name__ == "__main__":
    with user_errors("study.py"):
        sys.exit(main(get_args_parser().parse_args()))
