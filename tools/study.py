"""Run the missing pieces of a study one after the other, and write its tables.

    bash scripts/study.sh OUT --data DIR            DIR: the data set as train/<class>/ and val/<class>/
    bash scripts/study.sh OUT --list                what is finished, what is left, and how long it takes
    bash scripts/study.sh OUT --table               the tables and the figure of what is finished

It can be stopped at any time and started again: a run that was stopped goes on at its last checkpoint. Several queues
on one folder share the pieces. What a piece measured is kept in --keep, and stays finished when OUT is lost.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from evaluation.study import Kept, Piece, Study, check_unchanged, hours_left, missing, ready
from evaluation.study_tables import write_results
from util.checkpoint.files import LEDGER
from util.errors import UserError, user_errors
from util.parser import Parser
from util.report import ledger

ROOT = Path(__file__).resolve().parent.parent
TIMES = ("seconds", "speed/", "gpu_memory", "data_wait")
Job = tuple[Piece, subprocess.Popen, IO, float]


class Sets:
    """The parts of the data set: whole (`data`), with a tenth of the training images held out in place of those for
    evaluation, and with few labels. The parts are folders of links in `out`."""

    def __init__(self, data: str, out: Path, config: dict):
        self.data, self.out, self.config = Path(data), out, config

    def flags(self) -> dict[str, str]:
        stats = self.config.get("stats", "")
        folders = {"images": self.data, "held_out": self.out / "data/held_out", "tenth": self.out / "data/few"}
        return {name: f"--data_path {shlex.quote(str(path))} {stats}" for name, path in folders.items()}

    def make(self) -> None:
        """Make the folders of links. Raises UserError where the data set has no train/<class>/ and val/<class>/."""
        classes = sorted(path.name for path in (self.data / "train").glob("*/"))
        if not classes or not (self.data / "val").is_dir():
            raise UserError(f"--data {self.data} has no train/<class>/ and val/<class>/")
        for part in ("held_out", "few"):
            target = self.out / "data" / part
            if target.exists():
                continue
            unfinished = self.out / "data" / f"{part}.{os.getpid()}"
            for name in classes:
                files = sorted((self.data / "train" / name).resolve().iterdir())
                chosen = {"train": files[: self.config["few"]]}
                if part == "held_out":
                    cut = max(1, len(files) // 10)
                    chosen = {"train": files[cut:], "val": files[:cut]}
                for split, links in chosen.items():
                    folder = unfinished / split / name
                    folder.mkdir(parents=True)
                    for file in links:
                        (folder / file.name).symlink_to(file)
            if part == "few":
                (unfinished / "val").symlink_to((self.data / "val").resolve())
            with suppress(OSError):  # another queue was first
                unfinished.rename(target)


class Queue:
    """Runs the pieces of a study, `jobs` at a time."""

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
            if not self.stopping:
                self.start_more()
            if not self.running:
                break
            time.sleep(0.2)
        if self.stopping:
            print("stopped; the same command goes on", flush=True)
            return 130
        return 1 if self.failed else 0

    def stop(self, *_) -> None:
        """Let runs finish their step and save."""
        self.stopping = True
        for _, process, *_ in self.running:
            process.terminate()

    # Starting ---------------------------------------------------------------------------------------------------------

    def start_more(self) -> None:
        self.study.kept.read()
        pieces = list(self.study.pieces())
        check_unchanged(pieces, self.study.kept)
        left = missing(pieces, self.study.kept, self.out)
        waiting = {piece.name for piece in left}
        busy = {piece.name for piece, *_ in self.running}
        for piece in left:
            if len(self.running) >= self.args.jobs:
                return
            if piece.name not in busy | self.failed and ready(piece, waiting):
                self.start(piece, left)

    def start(self, piece: Piece, left: list[Piece]) -> None:
        """Start a piece unless another queue runs it."""
        locks = self.out / "locks"
        locks.mkdir(exist_ok=True)
        lock = (locks / piece.name).open("w")  # closed when the piece has ended
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return
        hours = hours_left(left, self.study.kept)
        rest = f", about {hours:.1f} hours of a core" if hours is not None else ""
        print(f"{time.strftime('%H:%M')} {piece.name}   ({len(left)} left{rest})", flush=True)
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
        self.running.append((piece, process, lock, time.monotonic()))

    def command(self, piece: Piece) -> list[str]:
        folder = self.out / piece.name
        words = piece.words
        for name, value in {**self.sets.flags(), "out": str(self.out), "folder": str(folder)}.items():
            words = words.replace(f"{{{name}}}", value)
        program, *flags = shlex.split(words)
        if program == "main_pretrain.py":
            flags += ["--output_dir", str(folder)]
        return ["nice", "-n", "10", sys.executable, str(ROOT / program), *flags]

    # Finishing --------------------------------------------------------------------------------------------------------

    def collect(self) -> None:
        """Keep the results of pieces that have ended."""
        for job in [job for job in self.running if job[1].poll() is not None]:
            piece, process, lock, _ = job
            row = self.result(piece) if process.returncode == 0 else None
            if row is not None:
                seconds = row.get("seconds") or time.monotonic() - job[3]
                self.study.kept.add(piece, row, seconds, rows_of(self.out / piece.name / "log.txt"))
            elif not self.stopping:
                self.failed.add(piece.name)
                output = self.out / piece.name / "output.txt"
                print(f"{piece.name} failed with exit code {process.returncode}: see {output}", file=sys.stderr)
            self.running.remove(job)
            lock.close()

    def result(self, piece: Piece) -> dict | None:
        """Return the last line of a piece's ledger if it has finished."""
        path = self.out / piece.name / LEDGER
        rows = ledger.read(path) if path.exists() else []
        return rows[-1] if rows else None


def rows_of(log: Path) -> str:
    """Return the lines of a log without times; "" without a log."""
    if not log.exists():
        return ""
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    kept = [{name: value for name, value in row.items() if not name.startswith(TIMES)} for row in rows]
    return "".join(json.dumps(row) + "\n" for row in kept)


def show(study: Study, out: Path) -> None:
    pieces = list(study.pieces())
    left = {piece.name for piece in missing(pieces, study.kept, out)}
    for piece in pieces:
        result = study.kept.results.get(piece.name)
        state = "finished" if result else "left"
        if result and piece.name in left:
            state = "again: its checkpoint is lost"
        print(f"{piece.name:<32} {state}")
    hours = hours_left([piece for piece in pieces if piece.name in left], study.kept)
    time_left = f"about {hours:.1f} hours of a core" if hours is not None else "for a time that is not known yet"
    print(
        f"{len(pieces) - len(left)} of {len(pieces)} finished; {len(left)} left, {time_left}; further seeds may follow"
    )


def get_args_parser() -> Parser:
    parser = Parser(__doc__.split("\n")[0], usual="OUT --data DIR")
    parser.add_argument("out", metavar="OUT", help="folder for checkpoints and logs")
    parser.add_argument("--data", default="", help="the data set as train/<class>/ and val/<class>/")
    parser.add_argument("--study", default=str(ROOT / "configs/study/cifar10.yaml"), help="YAML file with the pieces")
    parser.add_argument("--keep", default=str(ROOT / "docs/logs/study"), help="folder for results of finished pieces")
    parser.add_argument("--results", default=str(ROOT / "docs/results.md"), help="page for the tables of --table")
    parser.add_argument("--jobs", type=int, default=1, help="pieces at a time, with one thread each")
    parser.add_argument("--list", action="store_true", help="print the pieces and their state, and end")
    parser.add_argument("--table", action="store_true", help="write the tables and the figure, and end")
    return parser


def main(args) -> int:
    args.out = str(Path(args.out).absolute())
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs} must be positive")
    study = Study(Path(args.study), Kept(Path(args.keep)))
    if args.list:
        show(study, Path(args.out))
    elif args.table:
        write_results(study, Path(args.results))
    else:
        if not args.data:
            raise UserError("--data is needed: the data set as train/<class>/ and val/<class>/")
        return Queue(args, study).run()
    return 0


if __name__ == "__main__":
    with user_errors("study.py"):
        sys.exit(main(get_args_parser().parse_args()))
