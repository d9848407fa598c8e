"""Commands to paste after a run, with the data flags of that run."""

import argparse
import os
import shlex
import shutil
import sys
from pathlib import Path

from util.arguments import add_data_arguments
from util.checkpoint.files import LEDGER
from util.data.label_flags import add_label_arguments
from util.parser import Parser, default_of

ROOT = Path(__file__).resolve().parent.parent
# Data flags of a run that the next one does not need: they are stored in its checkpoint, or matter for training only.
LEFT_OUT = {"num_workers", "download", "jpeg_draft", "pixel_range", "shuffle_buffer", "max_bad_fraction", "label_noise"}


def command(script: str, *words: str) -> str:
    """Return the command that starts a script of the project with `words`, quoted for a shell: a main script on as many
    processes as this one has on this machine."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    start = [_python(), *(launcher if processes > 1 and script.startswith("main_") else []), _script(script)]
    return shlex.join([*start, *words])


def tensorboard(output_dir: str, log_dir: str | None = None) -> str:
    """Return the command that shows the curves of the run in `output_dir`, together with those of finished runs in the
    same parent folder; or those in a `log_dir` of its own."""
    folder = os.path.normpath(output_dir)
    if log_dir and os.path.abspath(log_dir) != os.path.abspath(output_dir):
        folder = os.path.normpath(log_dir)
    elif any(path.parent != Path(folder) for path in Path(folder).parent.glob(f"*/{LEDGER}")):
        folder = str(Path(folder).parent)
    program = [_python(), "-m", "tensorboard.main"]
    if _same(shutil.which("tensorboard"), Path(sys.executable).with_name("tensorboard")):
        program = ["tensorboard"]
    return shlex.join([*program, "--logdir", folder])


def _python() -> str:
    """Return `python` if that is this interpreter, else its path: the environment of a run need not be activated."""
    return "python" if _same(shutil.which("python"), sys.executable) else _short(sys.executable)


def _same(one: str | None, other: str | Path) -> bool:
    return one is not None and os.path.abspath(one) == os.path.abspath(other)  # links of environments stay apart


def _script(name: str) -> str:
    return _short(str(ROOT / name))


def _short(path: str) -> str:
    """Return `path` relative to the working directory if it is below it."""
    relative = os.path.relpath(path)
    return path if relative.startswith(os.pardir) else relative


def data_words(args: argparse.Namespace, labels: bool = False, extra=lambda group: None) -> list[str]:
    """Return the words of the data flags of `args` that differ from their defaults; with `labels`, also those of the
    labels of fine-tuning; and those of the flags that `extra(group)` adds."""
    parser = Parser("")
    known = {id(action) for action in parser._actions}
    add_data_arguments(parser)
    extra(parser.add_argument_group("more"))
    if labels:
        add_label_arguments(parser.add_argument_group("labels"))
    words = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if id(action) in known or action.dest in LEFT_OUT or value in (None, "", [], default_of(action)):
            continue
        if action.nargs == 0 and action.const != value:
            continue  # the other of two switches
        words += [action.option_strings[0], *([] if action.nargs == 0 else _texts(value))]
    return words


def _texts(value) -> list[str]:
    return [str(part) for part in value] if isinstance(value, (list, tuple)) else [str(value)]
