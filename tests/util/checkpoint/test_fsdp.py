"""--fsdp: the numbers of one process, checkpoints as folders and as one file, and refusals."""

import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.forked import Forked
from helpers.launch import (
    DIGITS,
    ROOT,
    checkpoint,
    finish,
    kill_when,
    largest_difference,
    log_rows,
    ranks,
    same_tensors,
    scalars,
)

import main_pretrain
from models_vit import build_model
from tools import unshard
from util.checkpoint import sharded
from util.checkpoint.files import list_checkpoints
from util.checkpoint.resume import find_resume
from util.errors import UserError
from util.parallel import fsdp
from util.parallel.fsdp import check_sharded
from util.training import run_state
from util.training.run import Run
from util.weights.load import load_into, read_weights

METHODS = "--rc_mae --ema_mae --wse 1 --ema_update step"
SPREAD = f"{METHODS} --batch_size 64 --fsdp --vis_freq 1 --knn_freq 2 --save_steps 4 --save_freq 1"
COMMON = f"{DIGITS} --num_workers 0 --print_freq 1 --lr 1e-3 --amp_dtype fp32"


def pretrain(folder, flags, processes=1, code=0):
    text = f"{COMMON} {flags} --output_dir {folder}"
    if processes == 1 and not code:
        return main_pretrain.main(main_pretrain.get_args_parser().parse_args(text.split()))
    return finish(Forked("main_pretrain", text, processes), code)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs with the same 128 images a step: on one process, and sharded over two."""
    made = tmp_path_factory.mktemp("sharding")
    pretrain(made / "1", f"{METHODS} --batch_size 128 --save_freq 1 --knn_freq 2")
    pretrain(made / "2", SPREAD, 2)
    return made


def same_losses(folder, reference, steps):
    """Compare losses to 1e-5: the sums are in another order."""
    ours, theirs = (scalars(run, "train/loss") for run in (folder, reference))
    return len(ours) == steps and ours == [(step, pytest.approx(value, rel=1e-5)) for step, value in theirs]


@pytest.mark.parametrize("flag", ["--fsdp", ""])
def test_four_processes(image_folder, tmp_path, flag):
    data = f"--dataset imagefolder --data_path {image_folder}"
    pretrain(tmp_path / "1", f"{data} --batch_size 32")
    pretrain(tmp_path / "4", f"{data} --batch_size 8 {flag}", 4)
    assert same_losses(tmp_path / "4", tmp_path / "1", 6)


def test_as_on_one_process(folders):
    """AdamW makes steps of 1e-3 of gradients that are rounding only, hence the tolerance for weights. The main process
    alone draws pictures during the run."""
    assert same_losses(folders / "2", folders / "1", 22)
    one = checkpoint(folders / "1", "checkpoint-1.pth")
    many = sharded.one_file(folders / "2" / "checkpoint-1.dcp")
    for part in ("model", "methods", "model_ema"):
        tensors = {name: value for name, value in one[part].items() if isinstance(value, torch.Tensor)}
        assert list(one[part]) == list(many[part])
        assert largest_difference(tensors, many[part]) < 2e-4
    accuracies = [log_rows(folders / run)[-1]["eval/knn20_acc1"] for run in ("1", "2")]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.6)  # the predictions of two of 360 digits may change
    for name in ("target_std", "target_rank"):
        ((_, first),), ((_, second),) = (scalars(folders / run, f"train/{name}") for run in ("1", "2"))
        assert first == pytest.approx(second, rel=1e-4)  # of the same 128 images
    assert one["step"] == many["step"] and one["methods"]["ema_mae._extra_state"]["ready"]
    assert one["optimizer"]["param_groups"] == many["optimizer"]["param_groups"]
    moments, states = one["optimizer"]["state"], many["optimizer"]["state"]
    assert moments.keys() == states.keys()
    assert all(states[i]["exp_avg"].shape == moments[i]["exp_avg"].shape for i in moments)


def test_encoders_are_written_whole(folders):
    for name in ("encoder", "encoder_ema"):
        sizes = [(folders / run / f"{name}.safetensors").stat().st_size for run in ("1", "2")]
        assert sizes[0] == pytest.approx(sizes[1], abs=200)  # names and flags in the header


def test_killed_and_resumed(folders, tmp_path):
    """Killed inside the second epoch (every fourth step is saved), the run resumes bit-identically."""
    flags = f"{COMMON} {SPREAD} --output_dir {tmp_path}"
    process = Forked("main_pretrain", flags, 2)
    kill_when(process, (tmp_path / "checkpoint-1-5.dcp").exists)
    process.communicate()
    assert "resumed" in ranks("main_pretrain", f"{flags} --resume auto", 2)
    ours, theirs = (sharded.one_file(folder / "checkpoint-1.dcp") for folder in (tmp_path, folders / "2"))
    for key in ("model", "methods", "optimizer", "epoch", "step", "rng"):
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(tmp_path) == log_rows(folders / "2")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1.dcp", "checkpoint-0.dcp"]


def test_a_damaged_folder_is_skipped(folders, tmp_path, capsys):
    for name in ("checkpoint-0.dcp", "checkpoint-1.dcp"):
        shutil.copytree(folders / "2" / name, tmp_path / name)
    shares = sorted((tmp_path / "checkpoint-1.dcp").glob("*.distcp"))
    assert len(shares) == 2  # each process wrote its own
    shares[1].write_bytes(shares[1].read_bytes()[:-100])
    assert find_resume("auto", str(tmp_path)).name == "checkpoint-0.dcp"
    assert "checkpoint-1.dcp: the file is damaged" in capsys.readouterr().out
    (tmp_path / "checkpoint-0.dcp" / sharded.REST).unlink()
    assert find_resume("auto", str(tmp_path)) is None


def test_one_file_resumes_without_fsdp(folders, tmp_path, monkeypatch):
    """tools/unshard.py writes a regular checkpoint: the next epoch runs on one process, and its encoder can be read."""
    out = tmp_path / "checkpoint-0.pth"
    command = [str(ROOT / "tools" / "unshard.py"), str(folders / "2" / "checkpoint-0.dcp"), str(out)]
    assert "MB" in subprocess.run([sys.executable, *command], check=True, text=True, capture_output=True).stdout
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(UserError, match="exists: give another name"):
        unshard.main()
    pretrain(tmp_path, f"{METHODS} --batch_size 128 --resume auto")
    one, other = (checkpoint(folder, "checkpoint-1.pth")["model"] for folder in (tmp_path, folders / "1"))
    assert largest_difference(one, other) < 2e-4  # as above
    report = str(load_into(build_model("vit_micro_patch4", img_size=16), read_weights(out)))
    assert "missing in the file, kept at their initial value: head (2 tensors)\n" in report


def test_mixed_precision_with_recomputation_and_accumulation(image_folder, tmp_path):
    """The losses equal those of DDP up to rounding to bfloat16, also with a teacher from a file."""
    data = f"--dataset imagefolder --data_path {image_folder}"
    pretrain(tmp_path / "teacher", f"{data} --batch_size 32 --epochs 1")
    flags = f"{data} --dmae_teacher {tmp_path}/teacher/checkpoint-0.pth --batch_size 4 --accum_iter 4 --grad_checkpoint"
    flags += " --amp_dtype bf16 --clip_grad 1"
    losses = []
    for name in ("--fsdp", ""):
        pretrain(tmp_path / (name or "ddp"), f"{flags} {name}", 2)
        losses.append([value for _, value in scalars(tmp_path / (name or "ddp"), "train/loss")])
    assert len(losses[0]) == 6 and losses[0] == pytest.approx(losses[1], rel=2e-3)


@pytest.mark.parametrize(
    "flags, processes, words",
    [
        ("--fsdp", 1, "--fsdp shards a model over processes, and this run has one process: start it with torchrun"),
        ("--fsdp --mlo_mae --mlo_labels same", 1, "--mlo_mae needs whole weights"),
        ("--fsdp --rc_mae --log_grad_cosine 5", 1, "--log_grad_cosine needs whole gradients"),
        (
            "--resume {folders}/2/checkpoint-0.dcp",
            1,
            "checkpoint-0.dcp was written with --fsdp: give --fsdp, or one",
        ),
        ("--init_from {folders}/2/checkpoint-0.dcp", 1, "convert it to one file with python tools/unshard.py"),
        ("--fsdp --batch_size 64 --resume {folders}/2/checkpoint-0.dcp", 2, "other methods (ema_mae, rc_mae)"),
    ],
)
def test_refused(folders, tmp_path, flags, processes, words):
    output = pretrain(tmp_path, flags.format(folders=folders), processes, code=2)
    assert words in output and "Traceback" not in output
    assert not list(tmp_path.glob("checkpoint*"))


def test_refused_among_several(folders, monkeypatch):
    monkeypatch.setattr(fsdp, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="--fsdp works in bf16 and fp32, not with the loss scaling of fp16"):
        check_sharded(torch.float16)
    run = Run.__new__(Run)
    run.args, run.sharded = None, True
    with pytest.raises(UserError, match=r"checkpoint-0\.pth is one file, and --fsdp resumes from folders"):
        run_state.resume(run, folders / "1" / "checkpoint-0.pth")


class Payload:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_code_in_a_list_of_tensors_is_not_run(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoint-0.dcp"
    shutil.copytree(folders / "2" / "checkpoint-0.dcp", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="not a complete checkpoint"):
        sharded.one_file(folder)
    assert not (tmp_path / "owned").exists()
