"""Checks that invalid commands are refused: one sentence on stderr that names the flag or file, exit code 2, and no
file changed.

Every case runs with `--overwrite` in the output folder of another run, which must remain unchanged. Pretraining cases
also run with an output folder that does not exist, which must not be created. Most cases run in this process, a few as
real commands.
"""

import builtins
import os
import random
import shutil
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main_detect
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from models_mae import MaskedAutoencoderViT
from util.errors import user_errors
from util.parallel.signals import SIGNALS

LABELLED = {"finetune": main_finetune, "linprobe": main_linprobe}  # one label for each image
DENSE = {"segment": main_segment, "detect": main_detect}
MAINS = {"pretrain": main_pretrain, **LABELLED, **DENSE}
# Four images of four patches each: an epoch has two steps.
COMMON = "--data_path {dir}/data/good --input_size 8 --epochs 1 --warmup_epochs 0 --batch_size 2 --num_workers 0"
COMMON += " --device cpu --amp_dtype fp32"
SCENES = "--dataset scenes --scene_size 24 --scene_count 4 2 --model vit_micro_patch4 --head_width 8"
BASE = {
    "pretrain": f"{COMMON} --model mae_vit_micro_patch4 --vis_freq 0".split(),
    "finetune": f"{COMMON} --model vit_micro_patch4".split(),
    "linprobe": f"{COMMON} --model vit_micro_patch4".split(),
    "segment": f"{COMMON} {SCENES} --head_norm layer".split(),
    "detect": f"{COMMON} {SCENES} --detector faster --window 0".split(),
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK")


# --- refusal_dir: a folder with all files that a case may name, none of which may change


@contextmanager
def isolated(folder: Path):
    """Restore signal handlers, `print`, random states and the working folder after a main in this process."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    states, printer = (random.getstate(), np.random.get_state()), builtins.print
    precision, benchmark = torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark
    argv, here = sys.argv, Path.cwd()
    environment = {name: os.environ.pop(name) for name in LAUNCHERS if name in os.environ}
    os.chdir(folder)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        os.chdir(here)
        os.environ.update(environment)
        sys.argv, builtins.print = argv, printer
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.benchmark = benchmark
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(program: str, refusal_dir: Path, *flags: str) -> list[str]:
    """Return a valid command line followed by `flags`, with {dir} replaced."""
    return [flag.replace("{dir}", str(refusal_dir)) for flag in [*BASE[program], *flags]]


def call(program: str, argv: list[str], folder: Path) -> None:
    """Run `python main_<program>.py argv` in this process, in `folder`."""
    with isolated(folder):
        sys.argv = [f"main_{program}.py"]
        with user_errors(f"main_{program}.py"):
            MAINS[program].main(MAINS[program].get_args_parser().parse_args(argv))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Return modification time and size of all files and folders. Creating or deleting a file changes its folder's
    time."""
    entries = {}
    for parent, _, files in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in files)):
            status = os.lstat(path)
            entries[path] = status.st_mtime_ns, status.st_size
    return entries


def put_images(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")


def put_data(data: Path) -> None:
    for name in ("empty", "hollow/train/a", "hollow/train/b", "flat/val"):
        (data / name).mkdir(parents=True)
    for name in (
        "good/train/a",
        "good/train/b",
        "good/val/a",
        "good/val/b",
        "no_train/val/a",
        "no_val/train/a",
        "flat/train",
        "stranger/train/a",
        "stranger/val/c",
        "tiny/train/n1/images",
    ):
        put_images(data / name)
    for name in ("a", "b"):
        put_images(data / "single/train" / name, 1)
        put_images(data / "single/val" / name, 1)
    (data / "texts").mkdir()
    (data / "texts/readme.txt").write_text("no image\n")
    for name, annotations in {"foreign": "0.png\tn9\t0\t0\t8\t8\n", "cut": "0.png\n", "plain": None}.items():
        shutil.copytree(data / "tiny/train", data / f"tiny_{name}/train")
        if annotations:
            put_images(data / f"tiny_{name}/val/images")
            (data / f"tiny_{name}/val/val_annotations.txt").write_text(annotations)
    (data / "corrupt/train/a").mkdir(parents=True)
    for i in range(4):
        (data / f"corrupt/train/a/{i}.png").write_bytes(b"no image")


def put_lists(lists: Path) -> None:
    lists.mkdir()
    labelled = "".join(f"train/{name}/{i}.png\t{name}\n" for name in "ab" for i in range(2))
    contents = {
        "labelled": labelled,
        "unlabelled": "train/a/0.png\ntrain/a/1.png\n",
        "empty": "\n",
        "mixed": "train/a/0.png\t1\ntrain/a/1.png\n",
        "stranger": "val/a/0.png\tc\n",
        "ghosts": "nowhere/0.png\nnowhere/1.png\n",
        "odd": "train/a/0.png\t²\ntrain/a/1.png\t3\n",
    }
    for name, text in contents.items():
        (lists / f"{name}.txt").write_text(text, encoding="utf-8")


class Evil:
    """The payload of a hostile pickle."""

    def __reduce__(self):
        return os.system, ("true",)


def put_files(files: Path, run: Path) -> None:
    """Write files that are not checkpoints of the micro model."""
    files.mkdir()
    put_images(files / "pictures", 1)
    whole = (run / "checkpoint-0.pth").read_bytes()
    (files / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (files / "empty.pth").write_bytes(b"")
    (files / "text.pth").write_text("no checkpoint\n")
    small = MaskedAutoencoderViT(8, 4, 3, 64, 1, 4, 32, 1, 4)
    decoder = MaskedAutoencoderViT(8, 4, 3, 128, 4, 4, 32, 1, 4)
    grey = MaskedAutoencoderViT(8, 4, 1, 128, 4, 4, 96, 2, 4)
    contents = {
        "narrow": {"model": small.state_dict()},
        "decoder": {"model": decoder.state_dict()},
        "grey": {"model": grey.state_dict()},
        "list": [1, 2],
        "no_weights": {"epoch": 3},
        "evil": Evil(),
        "cnn": {"model": {"conv1.weight": torch.zeros(2, 3, 7, 7)}},
    }
    state = torch.load(run / "checkpoint-0.pth", weights_only=True)
    contents |= {
        "weights_only": {"model": state["model"]},
        "odd_args": {**state, "args": 5},
        "odd_model": {**state, "model": [1, 2]},
        "odd_epoch": {**state, "epoch": "last", "data": None},
        "odd_flags": {"model": state["model"], "args": {"model": 5, "input_size": "big"}},
        "no_optimizer_state": {**state, "optimizer": {}},
    }
    for name, content in contents.items():
        torch.save(content, files / f"{name}.pth")
    (files / "cut.safetensors").write_bytes((run / "encoder.safetensors").read_bytes()[:1000])


@pytest.fixture(scope="session")
def shared_refusal_dir(tmp_path_factory):
    """The folder of `refusal_dir`, made once: three finished runs, data folders, and valid and invalid files."""
    refusal_dir = tmp_path_factory.mktemp("bad_input") / "refusals"
    (refusal_dir / "here").mkdir(parents=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # all tensors here are small
    put_data(refusal_dir / "data")
    for program in MAINS:
        call(program, command(program, refusal_dir, "--output_dir", f"{{dir}}/{program}"), refusal_dir / "here")
    put_lists(refusal_dir / "lists")
    put_files(refusal_dir / "files", refusal_dir / "pretrain")
    (refusal_dir / "file").write_text("a file\n")
    shutil.copytree(refusal_dir, refusal_dir.with_name("original"))
    yield refusal_dir
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def original_listing(shared_refusal_dir):
    """The listing of `refusal_dir` before the first test."""
    return listing(shared_refusal_dir)


@pytest.fixture
def refusal_dir(shared_refusal_dir, original_listing):
    """A folder of runs, data and files, restored if a failed test has changed it. Cases write its paths as
    `{dir}/...`."""
    yield shared_refusal_dir
    if listing(shared_refusal_dir) != original_listing:
        shutil.rmtree(shared_refusal_dir)
        shutil.copytree(shared_refusal_dir.with_name("original"), shared_refusal_dir)


def refusal(capsys, program: str, flags: str | list[str], refusal_dir: Path, *common: str) -> str:
    """Return the line with which `program` refuses a valid command line with `flags` added. Checks that no file of
    `refusal_dir` has changed."""
    flags = flags.split() if isinstance(flags, str) else flags
    argv = command(program, refusal_dir, *common, *flags)
    before = listing(refusal_dir)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(program, argv, refusal_dir / "here")
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert error.endswith("\n") and error.count("\n") == 1, f"not one line:\n{error}"
    assert f"main_{program}.py: error: " in error
    assert len(error) < 900, f"no sentence but {len(error)} characters"
    assert listing(refusal_dir) == before, "files were changed"
    return error.strip()


def assert_names(line: str, words: str) -> None:
    for word in words.split(" | "):
        assert word in line, f"{word!r} is not named: {line}"


def split_flags(flags: str) -> list[str]:
    """Split flags as a shell does; a trailing space is an empty value."""
    return flags.split(" ") if flags.endswith(" ") else flags.split()


def cases(shared=(), images=(), transfer=(), dense=(), **tables) -> list[tuple[str, str, str]]:
    """Return (program, flags, names) of tables {flags: names}. `shared` is for all mains, `images` for those whose
    images need no masks or boxes, `transfer` for fine-tuning and linear probing, `dense` for segmentation and
    detection, the other tables for the main of that name."""
    groups = (
        (shared, MAINS),
        (images, [name for name in MAINS if name not in DENSE]),
        (transfer, LABELLED),
        (dense, DENSE),
    )
    rows = [(program, *case) for table, programs in groups for program in programs for case in dict(table).items()]
    return rows + [(program, *case) for program, table in tables.items() for case in table.items()]


def parameters(rows):
    """Return the cases as parameters of a test, with the command line as id."""
    for program, flags, names in rows:
        text = f"{program} {flags}"
        yield pytest.param(program, flags, names, id=text.replace("x" * 300, "xxx"))


def assert_refused(capsys, program: str, flags: str, names: str, refusal_dir: Path) -> None:
    """Check one case with a new output folder and with that of another run, as far as they apply."""
    flags = split_flags(flags.replace("{program}", program))
    names = names.replace("{dir}", str(refusal_dir))
    folders = [["--output_dir", "{dir}/new"], ["--output_dir", f"{{dir}}/{program}", "--overwrite"]]
    if "--resume" in flags:
        folders[1].pop()
    if program != "pretrain" or "--output_dir" in flags:  # the code that makes the folder is the same for all mains
        folders.pop(0)
    for folder in folders:
        assert_names(refusal(capsys, program, flags, refusal_dir, *folder), names)
