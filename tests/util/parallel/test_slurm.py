"""Jobs: flags reach the job or the run, and a run that a signal ended is queued again under its own number."""

import os
import signal

import pytest
from helpers.forked import Forked
from helpers.launch import DIGITS, checkpoint, finish, kill_when, log_rows, same_tensors, scalars

import main_finetune
import main_pretrain
from util.data.presets import settle_preset
from util.errors import RunFailed, UserError
from util.parallel import signals, slurm


class FakeExecutor:
    submitted: tuple = ()

    def __init__(self, folder, cluster, **_):
        FakeExecutor.folder = folder

    def update_parameters(self, **parameters):
        FakeExecutor.parameters = parameters

    def submit(self, trainer):
        FakeExecutor.trainer = trainer
        return type("Job", (), {"job_id": "17"})()


@pytest.fixture
def executor(monkeypatch):
    import submitit

    monkeypatch.setattr(submitit, "AutoExecutor", FakeExecutor)
    monkeypatch.setenv("PYTHONPATH", "")
    return FakeExecutor


def test_official_command_line(executor):
    """The command of the official pretraining page, word for word."""
    flags = "--job_dir /jobs/%j --nodes 8 --use_volta32 --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss "
    flags += "--mask_ratio 0.75 --epochs 800 --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05 --data_path /imagenet"
    slurm.launch(main_pretrain.main, main_pretrain.get_args_parser(), flags.split())
    assert executor.parameters["nodes"] == 8 and executor.parameters["tasks_per_node"] == 8
    assert executor.parameters["slurm_constraint"] == "volta32gb"
    args = executor.trainer.args
    assert (args.batch_size, args.blr, args.norm_pix_loss) == (64, 1.5e-4, True)
    assert args.output_dir == "/jobs/%j" and args.resume == "auto"
    assert not hasattr(args, "nodes")  # flags of the job are not flags of the run


def test_presets_hold_in_jobs(executor):
    slurm.launch(main_finetune.main, main_finetune.get_args_parser(), "--aug_preset full --mixup 0.2".split())
    args = executor.trainer.args
    args.input_size = 224
    settle_preset(args)  # as the job does
    assert (args.mixup, args.cutmix) == (0.2, 1.0)


def test_a_job_resumes_itself_only(executor):
    with pytest.raises(UserError, match="--resume"):
        slurm.launch(main_pretrain.main, main_pretrain.get_args_parser(), ["--resume", "x.pth"])


PARTITION = "sbatch: error: invalid partition specified: learnfair"
REFUSING = {"srun": "exit 0", "sbatch": f"echo '{PARTITION}' >&2; exit 1"}


@pytest.mark.parametrize(
    "programs, words",
    [
        ({}, "no SLURM | --cluster local | main_"),
        ({"srun": "exit 0"}, "no sbatch | --cluster local"),
        (
            {"srun": "exit 0", "sbatch": f"echo '{PARTITION}' >&2; exit 1"},
            f"SLURM refused the job | --partition | {PARTITION}",
        ),
    ],
)
def test_without_slurm(tmp_path, monkeypatch, programs, words):
    """submitit itself, on a machine with only these programs: a sentence each, and the same from the command."""
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(UserError) as caught:
        slurm.launch(main_pretrain.main, main_pretrain.get_args_parser(), ["--job_dir", str(tmp_path / "job")])
    assert all(word in str(caught.value) for word in words.split(" | ")) and "\n" not in str(caught.value)


@pytest.mark.parametrize("script", ["exit 1", None])
def test_a_scheduler_that_does_not_requeue(tmp_path, monkeypatch, script):
    if script:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunFailed, match="the run is saved, but job 17 could not be requeued"):
        slurm.requeue("17")


@pytest.mark.parametrize("stopped", [None, "SIGUSR2"])
def test_requeue_after_a_signal(tmp_path, monkeypatch, stopped):
    """Rank 0 calls `scontrol requeue` with the job's number, only if a signal ended the run."""
    import submitit

    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job = dict(global_rank=0, num_tasks=1, local_rank=0, hostnames=["here"], hostname="here", job_id="17")
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: type("Env", (), job)())
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    seen = []

    def main(args):
        seen.append(args.output_dir)
        signals.stopped_by = stopped

    args = main_pretrain.get_args_parser().parse_args(["--output_dir", "/jobs/%j"])
    slurm.Trainer(main, args)()
    monkeypatch.setattr(signals, "stopped_by", None)
    assert seen == ["/jobs/17"]
    called = tmp_path / "called"
    assert called.exists() is bool(stopped)
    assert not stopped or called.read_text().strip() == "requeue 17"


def test_a_scheduler_that_ends_the_job_twice(tmp_path, monkeypatch):
    """Two time limits and requeues: the finished job has the weights, log and curve of an undisturbed run, bit for bit
    and with the same samples."""
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/queue\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    flags = f"{DIGITS} --num_workers 1 --save_steps 3 --print_freq 1 --save_freq 1 --resume auto"
    finish(Forked("main_pretrain", f"{flags} --output_dir {tmp_path}/alone"))
    run, queue = tmp_path / "job17", tmp_path / "queue"
    job = f"17 {flags} --output_dir {tmp_path}/job%j"
    for times, moment in enumerate(("checkpoint-0-3.pth", "checkpoint-1-*.pth"), start=1):
        process = Forked("helpers.job_script", job)
        kill_when(process, lambda moment=moment: list(run.glob(moment)), number=0)
        os.killpg(process.pid, signal.SIGUSR2)  # to every process of the job, data workers too
        finish(process)
        assert queue.read_text().splitlines() == ["requeue 17"] * times
    finish(Forked("helpers.job_script", job))
    assert len(queue.read_text().splitlines()) == 2  # a finished run is not queued again
    ours, theirs = (checkpoint(folder, "checkpoint-1.pth") for folder in (run, tmp_path / "alone"))
    for key in ("model", "optimizer", "epoch", "step", "rng"):
        assert same_tensors(ours[key], theirs[key]), key
    assert log_rows(run) == log_rows(tmp_path / "alone")
    assert scalars(run, "train/loss") == scalars(tmp_path / "alone", "train/loss")
