"""`--logger`: the curves, pictures and histograms of a run in TensorBoard, Weights & Biases and trackio.

wandb and trackio are optional packages. A logger that fails while a run trains prints one note; it never ends the run.
"""

import contextlib
import importlib
import importlib.util
import io
import json
import os
import secrets
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from util.checkpoint.atomic import write_atomically
from util.checkpoint.files import LOGGERS
from util.errors import UserError
from util.parallel.distributed import is_main_process
from util.parser import rare
from util.report.tensorboard import Board

ONLINE = ("wandb", "trackio")
MOST_FAILURES = 5  # in a row; then a logger is not called again, because each call may wait for a timeout
FINISH_S = 60  # seconds that the end of a run waits for wandb to send what is left


def add_logger_arguments(group) -> None:
    group.add_argument(
        "--logger",
        nargs="+",
        metavar="NAME",
        choices=["tensorboard", *ONLINE, "none"],
        default=["tensorboard"],
        help="any of tensorboard, wandb, trackio; or none",
    )
    rare(group.add_argument("--log_dir", help="TensorBoard events; without it the output folder"))
    rare(
        group.add_argument(
            "--log_project", metavar="NAME", help="project of wandb and trackio; without it the parent of --output_dir"
        )
    )
    rare(
        group.add_argument(
            "--log_name", metavar="NAME", help="run of wandb and trackio; without it the last part of --output_dir"
        )
    )


def check_loggers(args) -> None:
    """Raise UserError for contradicting loggers, for packages that are not installed, and for wandb's
    `sync_tensorboard`, which does not see the events of `util.report.tensorboard`."""
    names = getattr(args, "logger", None) or []
    if "none" in names and set(names) != {"none"}:
        raise UserError(f"--logger none excludes others: leave out none, or {' '.join(sorted({*names} - {'none'}))}")
    for name in ONLINE:
        if name in names and importlib.util.find_spec(name) is None:
            raise UserError(f"--logger {name} needs the package {name}: pip install {name}")
    for flag in ("log_project", "log_name"):
        if getattr(args, flag, None) and not {*names} & {*ONLINE}:
            raise UserError(f"--{flag} has no effect without --logger wandb or trackio")
    if getattr(getattr(sys.modules.get("wandb"), "run", None), "settings", None) is None:
        return
    if sys.modules["wandb"].run.settings.sync_tensorboard:
        raise UserError(
            "wandb's sync_tensorboard does not see the event files of this project, which it writes itself: "
            "leave sync_tensorboard out, and give --logger tensorboard wandb"
        )


class Online(ABC):
    """A run of a logging service. Subclasses begin, send and finish; this class counts what fails. `epoch` is a
    fraction of an epoch, `names` are the project, name and id of the run, `config` its flags."""

    def __init__(self, service: str, names: dict[str, str], folder: str, config: dict):
        self.name, self.failures, self.noted = service, 0, False
        self.last: dict[str, int] = {}
        self.api = importlib.import_module(service)
        self.run: Any = None  # of the service, after it has begun
        self.attempt(lambda: self.begin(names, folder, config))
        if self.run is None:
            self.failures = MOST_FAILURES

    def attempt(self, send: Callable[[], object]) -> None:
        """Call `send()`; print a note when it fails for the first time."""
        if self.failures >= MOST_FAILURES:
            return
        try:
            send()
            self.failures = 0
        except UserError:
            raise
        except Exception as error:  # whatever a service and its network raise: the run is worth more than its curves
            self.failures += 1
            if not self.noted:
                lines = f"{type(error).__name__}: {error}".strip().splitlines()
                print(
                    f"note: --logger {self.name} failed ({lines[0]}); the run goes on, and some points are lost there"
                )
            self.noted = True

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        x = int(epoch * 1000)
        fresh = {name: value for name, value in values.items() if x > self.last.get(name, -1)}
        if fresh:
            self.last |= dict.fromkeys(fresh, x)
            self.attempt(lambda: self.send(fresh, epoch))

    def image(self, name: str, image: torch.Tensor, epoch: float) -> None:
        """Send an RGB picture `image` (3, H, W) in [0, 1]."""
        pixels = (image.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        self.attempt(lambda: self.send({name: self.api.Image(pixels)}, epoch))

    def histogram(self, name: str, values: torch.Tensor, epoch: float) -> None:
        numbers = values.detach().float().flatten().cpu().numpy()
        self.attempt(lambda: self.send({name: self.api.Histogram(numbers)}, epoch))

    def text(self, name: str, text: str, epoch: float) -> None:
        self.attempt(lambda: self.send({name: text}, epoch))

    def close(self) -> None:
        self.attempt(self.finish)
        self.failures = MOST_FAILURES

    def settle(self, values: dict) -> None:  # noqa: B027  trackio takes flags at the start only
        """Add values to the flags of the run."""

    @abstractmethod
    def begin(self, names: dict[str, str], folder: str, config: dict) -> None:
        """Start `run`. Raises UserError for a mistake of the user's."""

    @abstractmethod
    def send(self, values: dict, epoch: float) -> None: ...

    @abstractmethod
    def finish(self) -> None: ...


class Wandb(Online):
    """A run of Weights & Biases, whose x axis is the epoch. Environment variables such as WANDB_MODE hold."""

    def begin(self, names: dict[str, str], folder: str, config: dict) -> None:
        settings = self.api.Settings(console="off", quiet=True, finish_timeout=FINISH_S, finish_timeout_raises=False)
        options = {"dir": folder or None, "resume": "allow", "settings": settings, "reinit": "finish_previous"}
        try:
            self.run = self.api.init(**names, **options)
        except self.api.errors.UsageError as error:
            raise UserError("--logger wandb: give a key with `wandb login`, or set WANDB_MODE=offline") from error
        self.run.config.update(config, allow_val_change=True)
        self.run.define_metric("epoch")
        self.run.define_metric("*", step_metric="epoch")

    def send(self, values: dict, epoch: float) -> None:
        self.run.log({**values, "epoch": epoch})

    def settle(self, values: dict) -> None:
        self.attempt(lambda: self.run.config.update(values, allow_val_change=True))

    def finish(self) -> None:
        self.run.finish()


class Trackio(Online):
    """A run of trackio, whose x axis is epoch * 1000. Environment variables such as TRACKIO_DIR hold."""

    def begin(self, names: dict[str, str], folder: str, config: dict) -> None:
        plain = json.loads(json.dumps(config, default=str))
        name = f"{names['name']}-{names['id']}"  # trackio finds a run by its name
        with contextlib.redirect_stdout(io.StringIO()):
            self.run = self.api.init(names["project"], name=name, config=plain, resume="allow", embed=False)

    def send(self, values: dict, epoch: float) -> None:
        self.run.log(values, step=int(epoch * 1000))

    def finish(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self.api.finish()


SERVICES = {"wandb": Wandb, "trackio": Trackio}


class Loggers:
    """The interface of `Board` for all loggers of a run; on other ranks than 0 it does nothing."""

    def __init__(self, board: Board, online: list[Online]):
        self.board, self.online = board, online

    def scalars(self, values: dict[str, float], epoch: float) -> None:
        for each in (self.board, *self.online):
            each.scalars(values, epoch)

    def image(self, name: str, image: torch.Tensor, epoch: float) -> None:
        for each in (self.board, *self.online):
            each.image(name, image, epoch)

    def histogram(self, name: str, values: torch.Tensor, epoch: float) -> None:
        for each in (self.board, *self.online):
            each.histogram(name, values, epoch)

    def text(self, name: str, text: str, epoch: float) -> None:
        for each in (self.board, *self.online):
            each.text(name, text, epoch)

    def explain(self) -> None:
        self.board.explain()

    def flags(self, args: dict, epoch: float = 0) -> None:
        self.board.flags(args, epoch)

    def hparams(self, values: dict, columns: dict[str, type]) -> None:
        self.board.hparams(values, columns)
        for each in self.online:
            each.settle({name: value for name, value in values.items() if name in ("method", "command")})

    def flush(self) -> None:
        self.board.flush()

    def close(self) -> None:
        for each in (self.board, *self.online):
            each.close()


def open_loggers(
    args, log_dir: str | None, config: dict, purge_step: int | None = None, job: str = "", resumed: bool = False
) -> Loggers:
    """Return the loggers that `--logger` names; TensorBoard for a command without that flag. `config` are the flags of
    the run. A `job` ("eval") is a run of its own in wandb and trackio; without one, and if `resumed`, the run that is
    noted in the output folder is continued."""
    names = getattr(args, "logger", None) or ["tensorboard"]
    board = Board(log_dir if "tensorboard" in names else None, purge_step=purge_step)
    if not is_main_process():
        return Loggers(board, [])
    folder = args.output_dir if {*names} & {*ONLINE} else ""
    known = _noted(folder) if resumed and not job else {}
    runs = {name: known.get(name) or _names(args, name, job) for name in ONLINE if name in names}
    online = [SERVICES[name](name, run, folder, config) for name, run in runs.items()]
    for name in [each.name for each in online if each.run is not None]:
        print(f"{name}: run {runs[name]['name']}, id {runs[name]['id']}, project {runs[name]['project']}")
    if folder and not job and online:
        online[0].attempt(lambda: _note(folder, {**_noted(folder), **runs}))
    return Loggers(board, online)


def _names(args, logger: str, job: str) -> dict[str, str]:
    """Return the project, name and id of a new run."""
    folder = Path(args.output_dir).absolute() if args.output_dir else None
    project = args.log_project or os.environ.get(f"{logger.upper()}_PROJECT")
    project = project or (folder and folder.parent.name) or "masked-autoencoders"
    name = args.log_name or (folder and folder.name) or "run"
    sweep = "" if job else os.environ.get("WANDB_RUN_ID", "") * (logger == "wandb")  # of a sweep
    # `secrets` leaves the random numbers of the run as they are.
    return {"project": project, "name": f"{name}-{job}" if job else name, "id": sweep or secrets.token_hex(4)}


def _noted(folder: str) -> dict:
    """Return {logger: names} of the run in this folder, {} if there are none."""
    try:
        content = json.loads((Path(folder) / LOGGERS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    keys = {"project", "name", "id"}
    return {
        name: run for name, run in content.items() if name in ONLINE and isinstance(run, dict) and run.keys() == keys
    }


def _note(folder: str, runs: dict) -> None:
    text = json.dumps(runs, indent=2) + "\n"
    write_atomically(Path(folder) / LOGGERS, lambda file: file.write(text.encode()))
