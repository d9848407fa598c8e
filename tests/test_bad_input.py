"""Bad input: one sentence on stderr that names the flag or the file, exit code 2, and not a file touched.

Every case runs with `--overwrite` into the folder of another run, which must stay as it is; those of pretraining also
into a folder that does not exist, which must not be created. Most run inside this process, a few are real commands.
"""

import builtins
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

import main_finetune
import main_linprobe
import main_pretrain
from models_mae import MaskedAutoencoderViT
from util.errors import user_errors
from util.signals import SIGNALS

ROOT = Path(__file__).resolve().parent.parent
MAINS = {"pretrain": main_pretrain, "finetune": main_finetune, "linprobe": main_linprobe}
# four pictures of four patches each: an epoch is two steps
COMMON = "--data_path {box}/data/good --input_size 8 --epochs 1 --warmup_epochs 0 --batch_size 2 --num_workers 0"
COMMON += " --device cpu --amp_dtype fp32"
BASE = {
    "pretrain": f"{COMMON} --model mae_vit_micro_patch4 --vis_freq 0".split(),
    "finetune": f"{COMMON} --model vit_micro_patch4".split(),
    "linprobe": f"{COMMON} --model vit_micro_patch4".split(),
}
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK")


# --- the box: everything a test may name, and everything that must stay as it is


@contextmanager
def isolated(folder: Path):
    """A main in this process leaves no trace: its signal handlers, `print`, random state and folder are undone."""
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


def command(program: str, box: Path, *flags: str) -> list[str]:
    """A valid command line and `flags`, in which {box} is the box."""
    return [flag.replace("{box}", str(box)) for flag in [*BASE[program], *flags]]


def call(program: str, argv: list[str], folder: Path) -> None:
    """`python main_<program>.py argv` in this process, started in `folder`."""
    with isolated(folder):
        sys.argv = [f"main_{program}.py"]
        with user_errors(f"main_{program}.py"):
            MAINS[program].main(MAINS[program].get_args_parser().parse_args(argv))


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Change time and size of everything below; a folder's time tells of files that came and went."""
    found = {}
    for parent, _, files in os.walk(folder):
        for path in (parent, *(os.path.join(parent, name) for name in files)):
            status = os.lstat(path)
            found[path] = status.st_mtime_ns, status.st_size
    return found


def put_images(folder: Path, count: int = 2) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(folder / f"{i}.png")


def put_data(data: Path) -> None:
    for name in ("empty", "hollow/train/a", "hollow/train/b", "flat/val"):
        (data / name).mkdir(parents=True)
    for name in ("good/train/a", "good/train/b", "good/val/a", "good/val/b", "no_train/val/a", "no_val/train/a",
                 "flat/train", "stranger/train/a", "stranger/val/c", "tiny/train/n1/images"):  # fmt: skip
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
    """What a hostile pickle asks for."""

    def __reduce__(self):
        return os.system, ("true",)


def put_files(files: Path, run: Path) -> None:
    """Files that are no checkpoint of the micro model."""
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
def pristine(tmp_path_factory):
    """The box as it must be before and after every test: three finished runs, data folders, files of every kind."""
    box = tmp_path_factory.mktemp("bad_input") / "box"
    (box / "here").mkdir(parents=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is large enough to share
    put_data(box / "data")
    for program in MAINS:
        call(program, command(program, box, "--output_dir", f"{{box}}/{program}"), box / "here")
    put_lists(box / "lists")
    put_files(box / "files", box / "pretrain")
    (box / "file").write_text("a file\n")
    shutil.copytree(box, box.with_name("kept"))
    yield box
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def untouched(pristine):
    return listing(pristine)


@pytest.fixture
def box(pristine, untouched):
    """The box, restored if a test that failed has touched it. Cases name paths in it as `{box}/...`."""
    yield pristine
    if listing(pristine) != untouched:
        shutil.rmtree(pristine)
        shutil.copytree(pristine.with_name("kept"), pristine)


def refusal(capsys, program: str, flags: str | list[str], box: Path, *common: str) -> str:
    """The one line with which `program` refuses `flags` (on top of a valid command line), after which the box is as
    it was."""
    flags = flags.split() if isinstance(flags, str) else flags
    argv = command(program, box, *common, *flags)
    before = listing(box)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call(program, argv, box / "here")
    error = capsys.readouterr().err
    assert caught.value.code == 2, error
    assert error.endswith("\n") and error.count("\n") == 1, f"not one line:\n{error}"
    assert f"main_{program}.py: error: " in error
    assert len(error) < 900, f"no sentence but {len(error)} characters"
    assert listing(box) == before, "files were touched"
    return error.strip()


def assert_names(line: str, words: str) -> None:
    for word in words.split(" | "):
        assert word in line, f"{word!r} is not named: {line}"


# --- the cases: flags, and what the sentence must name (alternated by " | ")

NUMBERS = [
    *(f"--{name} {value}" for name in ("batch_size", "epochs", "accum_iter", "save_freq", "print_freq")
      for value in (0, -1)),
    *(f"--{name} -1" for name in ("warmup_epochs", "num_workers", "save_steps", "keep", "start_epoch", "weight_decay",
                                  "min_lr", "blr", "lr", "clip_grad", "dist_timeout", "max_bad_fraction", "seed")),
    *(f"--{name} nan" for name in ("weight_decay", "min_lr", "blr", "lr", "clip_grad", "dist_timeout",
                                   "max_bad_fraction")),
    "--blr inf", "--lr inf", "--clip_grad 0", "--max_bad_fraction 1.5", "--seed 5000000000",
    "--crop_pct 0", "--crop_pct -1", "--crop_pct nan", "--crop_pct 1.5",
    "--batch_size many", "--epochs 1,5", "--lr fast", "--seed x", "--in_chans RGB",
    "--input_size 0", "--input_size -8", "--input_size 10", "--input_size 8 8 8", "--input_size 2",
    "--patch_size 0", "--patch_size -4", "--patch_size 3", "--patch_size 16",
    "--in_chans 5", "--in_chans 0", "--in_chans -1",
]  # fmt: skip
SHARED = {
    **{flags: flags.split()[0] for flags in NUMBERS},
    "--bogus 1": "--bogus",
    "--batch 4": "--batch",
    "--epochs": "--epochs",
    "--amp_dtype fp8": "--amp_dtype | fp8",
    "--dist_backend mpi": "--dist_backend | mpi",
    "--start_epoch 1": "--start_epoch",
    "--mean 0.5 0.5 --std 0.5 0.5": "--mean",
    "--mean 0.5 0.5 0.5": "--mean | --std",
    "--std 0.5 0.5 0.5": "--mean | --std",
    "--mean 0.5 0.5 0.5 --std 0.5 0 0.5": "--std",
    "--mean 0.5 0.5 0.5 --std 0.5 nan 0.5": "--std",
    "--mean 0.5 inf 0.5 --std 0.5 0.5 0.5": "--mean",
    "--model vit_enormous": "--model | vit_enormous | vit_micro_patch4 | vit_base_patch16",
    "--device nonsense": "--device | nonsense",
    "--device mps": "--device | mps",
    "--device cpu:x": "--device | cpu:x",
    "--resume {box}/files/truncated.pth --overwrite": "--resume | --overwrite",
    # data
    "--dataset imagenet21": "--dataset | imagenet21 | imagefolder | digits",
    "--dataset nobody/knows": "--dataset | nobody/knows",
    "--dataset torch/nothing": "--dataset | torch/nothing",
    "--data_path ": "--data_path",
    "--data_path {box}/data/missing": "--data_path | data/missing",
    "--data_path {box}/file": "--data_path | {box}/file",
    "--data_path {box}/data/empty": "data/empty | train/",
    "--data_path {box}/data/no_train": "data/no_train | train/",
    "--data_path {box}/data/flat": "data/flat/train",
    "--data_path {box}/data/hollow": "data/hollow/train",
    "--dataset folder --data_path ": "--data_path",
    "--dataset folder --data_path {box}/data/missing": "data/missing",
    "--dataset folder --data_path {box}/data/empty": "data/empty",
    "--dataset folder --data_path {box}/data/texts": "data/texts",
    "--dataset filelist --data_path ": "--data_path",
    "--dataset filelist --data_path {box}/data/good": "--train_list",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/no.txt": "--train_list | lists/no.txt",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists": "--train_list | {box}/lists",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/empty.txt": "lists/empty.txt",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/mixed.txt": "lists/mixed.txt",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/files/pictures/0.png": "pictures/0.png",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/ghosts.txt":
        "lists/ghosts.txt | nowhere/0.png",
    "--dataset cifar10 --data_path {box}/data/empty": "--data_path | data/empty | --download",
    "--dataset cifar100 --data_path {box}/data/missing": "--data_path | data/missing | --download",
    "--dataset tiny_imagenet --data_path ": "--data_path",
    "--dataset tiny_imagenet --data_path {box}/data/empty": "data/empty | train/",
    "--dataset tiny_imagenet --data_path {box}/data/hollow": "data/hollow/train",
    "--dataset digits --batch_size 1438": "--batch_size | 1437 images",
    "--data_path {box}/data/good --batch_size 5": "--batch_size | 4 images",
    f"--data_path {'{box}'}/{'x' * 300}": "--data_path",
    # folders
    "--output_dir {box}/file": "--output_dir | {box}/file",
    "--output_dir {box}/file/below": "--output_dir | {box}/file/below",
    "--output_dir /proc/nothing": "--output_dir | /proc/nothing",
    f"--output_dir {'{box}'}/{'x' * 300}": "--output_dir",
    "--log_dir {box}/file": "--log_dir | {box}/file",
    "--log_dir {box}/file/below": "--log_dir | {box}/file/below",
}  # fmt: skip
PRETRAIN = {
    **{f"--mask_ratio {value}": "--mask_ratio" for value in (0, 1, 1.5, -0.5, 0.9, "nan", 1e-20, "most")},
    "--aug sepia": "--aug | sepia",
    "--vis_freq -1": "--vis_freq",
    "--cache_size 32": "--cache_size | --data_cache",
    "--data_cache ram --cache_size 0": "--cache_size",
    "--data_cache device --batch_size 1000": "fewer than one batch | --batch_size",
    "--knn_freq -1": "--knn_freq",
    "--knn_freq 1 --knn_images 0": "--knn_images",
    "--decoder_embed_dim 30": "--decoder_embed_dim",
    "--decoder_embed_dim 0": "--decoder_embed_dim",
    "--decoder_num_heads 5": "--decoder_embed_dim | --decoder_num_heads",
    "--decoder_num_heads 0": "--decoder_num_heads",
    "--decoder_num_heads -4": "--decoder_num_heads",
    "--decoder_depth -1": "--decoder_depth",
    "--model vit_micro_patch4": "--model | mae_vit_micro_patch4",
    "--model ": "--model",
    "--knn_freq 1 --dataset folder --data_path {box}/data/good": "--knn_freq",
    "--knn_freq 1 --data_path {box}/data/no_val": "data/no_val | val/",
    "--vis_freq 1 --dataset filelist --data_path {box}/data/good "
    "--train_list {box}/lists/labelled.txt --val_list {box}/lists/stranger.txt --knn_freq 1": "lists/stranger.txt",
    "--init_from {box}/missing.pth": "{box}/missing.pth",
    "--init_from {box}/files": "{box}/files",
    "--init_from {box}/files/pictures/0.png": "pictures/0.png",
    "--init_from {box}/files/decoder.pth": "decoder.pth | --decoder_embed_dim",
    "--init_from {box}/pretrain/checkpoint-0.pth --resume {box}/pretrain/checkpoint-0.pth": "--init_from | --resume",
}
TRANSFER = {
    "--nb_classes 7": "--nb_classes 7 | 2",
    "--dataset digits --nb_classes 7": "--nb_classes 7 | 10",
    "--nb_classes 0": "--nb_classes 0",
    "--nb_classes -3": "--nb_classes -3",
    "--dataset folder --data_path {box}/data/good": "--dataset folder | labels",
    "--dataset folder --data_path {box}/data/good --nb_classes 2": "--dataset folder | labels",
    "--data_path {box}/data/no_val": "data/no_val | val/",
    "--data_path {box}/data/stranger": "data/stranger/val | 'c'",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/labelled.txt": "--val_list",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/labelled.txt "
    "--val_list {box}/lists/stranger.txt": "lists/stranger.txt | 'c'",
    "--dataset filelist --data_path {box}/data/good --train_list {box}/lists/labelled.txt "
    "--val_list {box}/lists/unlabelled.txt": "labels",
    "--dataset tiny_imagenet --data_path {box}/data/tiny_plain": "val_annotations.txt",
    "--dataset tiny_imagenet --data_path {box}/data/tiny_foreign": "val_annotations.txt | n9",
    "--dataset tiny_imagenet --data_path {box}/data/tiny_cut": "val_annotations.txt",
    "--finetune {box}/missing.pth": "{box}/missing.pth",
    "--finetune {box}/files": "{box}/files",
    "--finetune {box}/files/pictures/0.png": "pictures/0.png",
    "--finetune {box}/pretrain/checkpoint-0.pth --checkpoint_key teacher": "checkpoint-0.pth | 'teacher' | model",
    "--finetune {box}/pretrain/checkpoint-0.pth --checkpoint_key epoch": "checkpoint-0.pth | 'epoch' | model",
    "--finetune {box}/pretrain/checkpoint-0.pth --checkpoint_key optimizer": "checkpoint-0.pth",
    "--finetune {box}/files/odd_flags.pth --model ": "odd_flags.pth",
    "--finetune {box}/pretrain/checkpoint-0.pth --model vit_enormous": "--model | vit_enormous",
    "--eval": "--eval | --resume",
    "--eval --resume auto --output_dir {box}/new": "--resume auto | {box}/new",
    "--eval --resume {box}/missing.pth": "{box}/missing.pth",
    "--eval --resume {box}/files/truncated.pth": "truncated.pth",
    "--eval --resume {box}/pretrain/checkpoint-0.pth": "checkpoint-0.pth | classifier",
    "--eval --resume {box}/{program}/checkpoint-0.pth --dataset digits": "checkpoint-0.pth | 2 classes | 10",
}
FINETUNE = {
    "--eval --finetune {box}/pretrain/checkpoint-0.pth --compile": "--compile has no effect with --eval",
    "--eval --finetune {box}/pretrain/checkpoint-0.pth --grad_checkpoint": "--grad_checkpoint has no effect",
    **{f"--{name} {value}": f"--{name}" for name in ("drop_path", "smoothing", "reprob", "layer_decay")
       for value in (-0.1, 1.1, "nan")},
    **{f"--{name} 2 --mixup 0.8": f"--{name}" for name in ("mixup_prob", "mixup_switch_prob")},
    "--layer_decay 0": "--layer_decay",
    "--mixup -1": "--mixup",
    "--mixup nan": "--mixup",
    "--cutmix -1": "--cutmix",
    "--cutmix nan": "--cutmix",
    "--cutmix_minmax 0.2": "--cutmix_minmax",
    "--cutmix_minmax 0.2 0.8 0.9": "--cutmix_minmax",
    "--cutmix_minmax 0.8 0.2": "--cutmix_minmax",
    "--mixup 0.8 --batch_size 3": "--batch_size 3 | --mixup",
    "--cutmix 1.0 --batch_size 3": "--batch_size 3 | --cutmix",
    "--aug_preset full --batch_size 3": "--batch_size 3",
    "--mixup 0.8 --mixup_mode sum": "--mixup_mode",
    "--aug_preset huge": "--aug_preset",
    "--aug none": "--aug",
    "--aa nonsense": "--aa | nonsense",
    "--color_jitter -1": "--color_jitter",
    "--color_jitter -1 --aa ": "--color_jitter",
    "--remode stripes": "--remode | stripes",
    "--recount 0": "--recount",
    "--recount -1": "--recount",
    "--eval --finetune {box}/pretrain/checkpoint-0.pth": "checkpoint-0.pth | classifier",
    "--eval --resume {box}/linprobe/checkpoint-0.pth": "checkpoint-0.pth | classifier",
    "--eval --resume {box}/finetune/checkpoint-0.pth --cls_token": "checkpoint-0.pth | classifier | pooled",
}  # fmt: skip
LINPROBE = {
    "--cache_features --compile": "--compile has no effect",
    "--cache_features --log_mfu": "--log_mfu has no effect",
    **{f"--probe_holdout {value}": "--probe_holdout" for value in (0, 1, -0.5, "nan")},
    **{f"--probe_blrs 0.1 {value}": "--probe_blrs" for value in (0, -1, "nan", "inf")},
    "--probe_blrs": "--probe_blrs",
    "--batch_size 1": "--batch_size 1 | BatchNorm",
    "--aug sepia": "--aug | sepia",
    "--eval --cache_features --finetune {box}/pretrain/checkpoint-0.pth": "--eval | --resume",
    "--cache_features --data_path {box}/data/single": "--probe_holdout",
    "--cache_features --resume {box}/linprobe/checkpoint-0.pth": "--cache_features | --resume",
    "--eval --cache_features --resume {box}/linprobe/checkpoint-0.pth": "--eval | --cache_features",
    "--eval --resume {box}/finetune/checkpoint-0.pth": "checkpoint-0.pth | classifier",
}
CASES = [(program, flags, names) for program in MAINS for flags, names in SHARED.items()]
CASES += [("pretrain", *case) for case in PRETRAIN.items()]
CASES += [(program, *case) for program in ("finetune", "linprobe") for case in TRANSFER.items()]
CASES += [("finetune", *case) for case in FINETUNE.items()] + [("linprobe", *case) for case in LINPROBE.items()]
# what every flag that takes weights refuses
FOREIGN_FILES = {
    "truncated.pth": "truncated",
    "empty.pth": "empty",
    "text.pth": "not a checkpoint",
    "list.pth": "list",
    "no_weights.pth": "weights",
    "cnn.pth": "ViT",
    "evil.pth": "system",
    "narrow.pth": "width 64 | width 128 | --model",
    "grey.pth": "--in_chans 1",
    "cut.safetensors": "damaged",
}
CASES += [
    (program, f"{flag} {{box}}/files/{name}", f"{name} | {words}")
    for program, flag in (("pretrain", "--init_from"), ("finetune", "--finetune"), ("linprobe", "--finetune"))
    for name, words in FOREIGN_FILES.items()
]

# what may not differ from the run that is resumed
RESUMED = {
    "pretrain": {
        "--model mae_deit_tiny_patch4": "--model mae_vit_micro_patch4 | mae_deit_tiny_patch4",
        "--norm_pix_loss": "--norm_pix_loss False | True",
        "--patch_size 2": "--patch_size | 2",
        "--input_size 12": "--input_size 8 | 12",
        "--input_size 8 12": "--input_size 8 | [8, 12]",
        "--in_chans 1": "--in_chans 3 | 1",
        "--decoder_embed_dim 48": "--decoder_embed_dim | 48",
        "--decoder_depth 1": "--decoder_depth | 1",
        "--decoder_num_heads 2": "--decoder_num_heads | 2",
    },
    "finetune": {
        "--cls_token": "--global_pool True | False",
        "--model deit_tiny_patch4": "--model vit_micro_patch4 | deit_tiny_patch4",
    },
    "linprobe": {"--global_pool": "--global_pool False | True"},
}
for program in ("finetune", "linprobe"):
    RESUMED[program] |= {
        "--patch_size 2": "--patch_size 4 | 2",
        "--input_size 12": "--input_size 8 | 12",
        "--in_chans 1": "--in_chans 3 | 1",
        "--dataset digits": "--nb_classes 2 | 10",
    }
CASES += [
    (
        program,
        f"--resume {{box}}/{program}/checkpoint-0.pth {flags}",
        f"--resume | {program}/checkpoint-0.pth | {names}",
    )
    for program, cases in RESUMED.items()
    for flags, names in cases.items()
]
# what no main resumes
NO_RUN = {
    **{f"files/{name}": f"{name} | {words}" for name, words in FOREIGN_FILES.items() if name[:-4] not in
       ("no_weights", "cnn", "narrow", "grey")},
    "missing.pth": "{box}/missing.pth",
    "files": "{box}/files",
    "files/pictures/0.png": "pictures/0.png",
    "files/no_weights.pth": "no_weights.pth | 'model'",
    "files/weights_only.pth": "--resume | weights_only.pth | 'optimizer' | --init_from",
    "files/odd_model.pth": "odd_model.pth",
    "files/odd_epoch.pth": "odd_epoch.pth",
    "files/no_optimizer_state.pth": "no_optimizer_state.pth",
    "pretrain/encoder.safetensors": "encoder.safetensors",
}  # fmt: skip
CASES += [(program, f"--resume {{box}}/{name}", names) for program in MAINS for name, names in NO_RUN.items()]
CASES += [
    ("pretrain", "--resume {box}/finetune/checkpoint-0.pth", "finetune/checkpoint-0.pth | --model vit_micro_patch4"),
    (
        "finetune",
        "--resume {box}/pretrain/checkpoint-0.pth",
        "pretrain/checkpoint-0.pth | --model mae_vit_micro_patch4",
    ),
    ("finetune", "--resume {box}/finetune/checkpoint-best.pth", "checkpoint-best.pth | 'optimizer'"),
    ("linprobe", "--resume {box}/finetune/checkpoint-0.pth", "finetune/checkpoint-0.pth | --global_pool"),
    ("linprobe", "--resume {box}/finetune/checkpoint-0.pth --global_pool", "finetune/checkpoint-0.pth"),
    ("finetune", "--resume {box}/files/odd_args.pth", "odd_args.pth"),
    ("linprobe", "--resume {box}/files/odd_args.pth", "odd_args.pth"),
    *((program, "--resume auto --output_dir ", "--resume auto | --output_dir") for program in MAINS),
    # whatever else is wrong, the log of the resumed run was not trimmed
    ("pretrain", "--resume {box}/pretrain/checkpoint-0.pth --epochs 2 --knn_freq 1 --dataset folder", "--knn_freq"),
    ("pretrain", "--resume {box}/pretrain/checkpoint-0.pth --epochs 2 --log_dir {box}/file", "--log_dir | {box}/file"),
]


def split_flags(flags: str) -> list[str]:
    """Like a shell, but a trailing space is an empty value."""
    return flags.split(" ") if flags.endswith(" ") else flags.split()


def parameters():
    for program, flags, names in CASES:
        text = f"{program} {flags}"
        yield pytest.param(program, flags, names, id=text.replace("x" * 300, "xxx"))


@pytest.mark.parametrize("program, flags, names", parameters())
def test_is_refused(program, flags, names, box, capsys):
    flags = split_flags(flags.replace("{program}", program))
    names = names.replace("{box}", str(box))
    folders = [["--output_dir", "{box}/new"], ["--output_dir", f"{{box}}/{program}", "--overwrite"]]
    if "--resume" in flags:
        folders[1].pop()
    if program != "pretrain" or "--output_dir" in flags:  # what makes the folder is common to all of them
        folders.pop(0)
    for folder in folders:
        assert_names(refusal(capsys, program, flags, box, *folder), names)


# --- the folder of another run


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize("other", MAINS)
def test_the_folder_of_another_run_is_refused(program, other, box, capsys):
    line = refusal(capsys, program, "", box, "--output_dir", f"{{box}}/{other}")
    assert_names(line, f"--output_dir {box / other} | --resume | --overwrite")


@pytest.mark.parametrize("left", ["log.txt", "args.json", "checkpoint-3-7.pth", ".checkpoint-0.pth.tmp",
                                  "events.out.tfevents.1.host", "encoder.safetensors",
                                  "probe.json"])  # fmt: skip
def test_one_file_of_another_run_is_enough(left, box, tmp_path, capsys):
    (tmp_path / left).write_text("of another run\n")
    assert left in refusal(capsys, "pretrain", "", box, "--output_dir", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [left]


def test_a_cached_probe_respects_another_run(box, capsys):
    assert "--output_dir" in refusal(capsys, "linprobe", "--cache_features", box, "--output_dir", "{box}/pretrain")


def test_overwrite_deletes_the_run_and_nothing_else(box, tmp_path):
    shutil.copytree(box / "pretrain", tmp_path / "run")
    for stale in ("checkpoint-7.pth", "checkpoint-7-3.pth"):
        shutil.copy(box / "pretrain/checkpoint-0.pth", tmp_path / "run" / stale)
    for kept in ("notes.txt", "checkpoint-mine.pth", "checkpoint-0.pth.backup"):
        (tmp_path / "run" / kept).write_text("mine\n")
    call("pretrain", command("pretrain", box, "--output_dir", f"{tmp_path}/run", "--overwrite"), box / "here")
    events = {path.name for path in (tmp_path / "run").glob("events*")}
    assert len(events) == 1
    assert {path.name for path in (tmp_path / "run").iterdir()} - events == {
        "notes.txt", "checkpoint-mine.pth", "checkpoint-0.pth.backup", "log.txt", "args.json", "checkpoint-0.pth",
        "encoder.safetensors", "results.jsonl",
    }  # fmt: skip
    assert (tmp_path / "run/log.txt").read_text().count("\n") == 1


def test_a_folder_that_cannot_be_written(box, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be root
    assert "--output_dir" in refusal(capsys, "pretrain", "", box, "--output_dir", str(tmp_path))
    assert not list(tmp_path.iterdir())


# --- what depends on the machine


@pytest.mark.parametrize("program", MAINS)
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_cuda(program, device, box, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    line = refusal(capsys, program, f"--device {device}", box, "--output_dir", f"{{box}}/{program}", "--overwrite")
    assert_names(line, f"--device {device} | --device cpu")


def test_a_gpu_that_is_not_there(box, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    line = refusal(capsys, "pretrain", "--device cuda:7", box, "--output_dir", "{box}/pretrain", "--overwrite")
    assert_names(line, "--device cuda:7 | 1 GPU")


@pytest.mark.parametrize("error", [URLError("no route to host"), PermissionError(13, "Permission denied")])
def test_a_download_that_fails(error, box, capsys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", fail)
    flags = "--dataset cifar10 --data_path {box}/data/empty --download"
    line = refusal(capsys, "pretrain", flags, box, "--output_dir", "{box}/pretrain", "--overwrite")
    assert_names(line, f"{box}/data/empty | {error.args[-1]}")


def test_unreadable_images_end_the_run_by_name(box, capsys, tmp_path):
    """Only reading shows it, so this run has begun: its folder is there, every image is named, and the end is ours."""
    flags = ["--data_path", "{box}/data/corrupt", "--output_dir", f"{tmp_path}/new"]
    with pytest.raises(SystemExit) as caught:
        call("pretrain", command("pretrain", box, *flags), box / "here")
    *named, last = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert all(line.startswith("unreadable image ") and "corrupt/train/a" in line for line in named) and named
    assert last.startswith("main_pretrain.py: error: ") and "corrupt/train/a" in last


# --- what must not be refused

ACCEPTED = {
    "labels that only look like numbers": "--dataset filelist --train_list {box}/lists/odd.txt",
    "resume with nothing to resume": "--resume auto",
    "overwrite with nothing to overwrite": "--overwrite",
}


@pytest.mark.parametrize("flags", ACCEPTED.values(), ids=ACCEPTED)
def test_is_accepted(flags, box, tmp_path):
    call("pretrain", command("pretrain", box, *flags.split(), "--output_dir", f"{tmp_path}/new"), box / "here")
    assert (tmp_path / "new/encoder.safetensors").is_file()


def test_resuming_with_a_flag_at_the_models_own_value_is_accepted(box, tmp_path):
    flags = ["--resume", "{box}/pretrain/checkpoint-0.pth", "--patch_size", "4", "--output_dir", f"{tmp_path}/new"]
    call("pretrain", command("pretrain", box, *flags), box / "here")


# --- real processes


def clean_environment(**variables) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}


def run_command(argv: list[str], folder: Path, seconds: float = 120) -> subprocess.CompletedProcess:
    """A command with all its descendants, which end with it however it ends."""
    process = subprocess.Popen(
        argv, cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        out, error = process.communicate(timeout=seconds)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(argv, process.returncode, out, error)


COMMANDS = {
    "pretrain": ("--resume auto --mask_ratio 0.99", "--mask_ratio"),
    "finetune": ("--overwrite --dataset digits --finetune {box}/files/truncated.pth", "files/truncated.pth"),
    "linprobe": ("", "--output_dir | --overwrite"),
}


@pytest.mark.parametrize("program", COMMANDS)
def test_a_real_command(program, box):
    flags, names = COMMANDS[program]
    argv = command(program, box, "--output_dir", f"{{box}}/{program}", *flags.split())
    before = listing(box)
    done = run_command([sys.executable, str(ROOT / f"main_{program}.py"), *argv], box / "here")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and done.stderr.startswith(f"main_{program}.py: error: "), done.stderr
    assert_names(done.stderr, names)
    assert listing(box) == before


WRAPPER = """
import os, runpy, sys
sys.argv = ["main_pretrain.py", *sys.argv[1:], "--mask_ratio", ["0.75", "0.5"][int(os.environ["RANK"])]]
runpy.run_path(os.path.join(os.environ["PYTHONPATH"], sys.argv[0]), run_name="__main__")
"""


def test_ranks_that_disagree(box, tmp_path):
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER)
    argv = command("pretrain", box, "--output_dir", "{box}/pretrain", "--overwrite", "--dist_timeout", "1")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    before = listing(box)
    done = run_command([*launcher, str(wrapper), *argv], box / "here", seconds=100)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "main_pretrain.py: error: " in line]
    assert 1 <= len(said) <= 2, done.stderr
    for line in said:  # the other rank may have been ended by the launcher before it spoke
        assert_names(line, "--mask_ratio is 0.75 on rank 0 and 0.5 on rank 1")
    assert "exitcode  : 2" in done.stderr, done.stderr
    assert listing(box) == before
