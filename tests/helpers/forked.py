"""Runs that are forked from a process which has already imported everything: they start faster than the commands of
`launch`, whose imports take most of the time."""

import atexit
import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

import torch

from util.errors import user_errors

ROOT = Path(__file__).resolve().parent.parent.parent
PRELOADED = ["main_pretrain", "main_finetune", "sklearn.datasets", "sklearn.model_selection"]


class Forked:
    """One or several ranks that run `main`, a module with `get_args_parser` and `main`. They share a process group with
    their data workers. The interface is that of `subprocess.Popen`; there is no launcher around the ranks."""

    def __init__(self, main: str, flags: str, processes: int = 1):
        os.environ["PYTHONPATH"] = str(ROOT)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._folder = tempfile.TemporaryDirectory()
        self.ranks, self.pid = [], 0
        port = _free_port()
        for rank in range(processes):
            env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
            if processes > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank)}
                env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            said = f"{self._folder.name}/{rank}"
            self.ranks.append(context.Process(target=_rank, args=(main, flags, env, said, self.pid)))
            self.ranks[-1].start()
            self.pid = self.pid or _group(self.ranks[0].pid)

    @property
    def returncode(self) -> int | None:
        """The exit code of the first rank that failed, else 0; minus the signal's number after a signal."""
        codes = [rank.exitcode for rank in self.ranks]
        return None if None in codes else next((code for code in codes if code), 0)

    def poll(self) -> int | None:
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Wait until all ranks have ended, and return their output, rank by rank."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for rank in self.ranks:
            rank.join(None if deadline is None else max(0.1, deadline - time.monotonic()))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.ranks[0].name, timeout)
        said = [Path(self._folder.name, str(rank)) for rank in range(len(self.ranks))]
        return "".join(path.read_text() for path in said if path.exists()), None


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _group(leader: int) -> int:
    """Return the number of the process group, once it exists."""
    with suppress(ProcessLookupError):
        while os.getpgid(leader) != leader:
            time.sleep(0.001)
    return leader


def _rank(main: str, flags: str, env: dict[str, str], path: str, group: int) -> None:
    os.setpgid(0, group)
    multiprocessing.set_start_method("fork", force=True)  # data workers start as they do in a command
    os.environ.clear()
    os.environ.update(env)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  until the process ends
    torch.set_num_threads(1)
    code = 1
    try:
        module = importlib.import_module(main)
        with user_errors(f"{main}.py"):
            module.main(module.get_args_parser().parse_args(flags.split()))
        code = 0
    except SystemExit as left:
        code = left.code
    except BaseException:
        sys.stderr.write(traceback.format_exc())  # print is silenced on all ranks but 0
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(code)  # gloo may abort during the interpreter's shutdown
