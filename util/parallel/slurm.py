"""Runs a main as a SLURM job through submitit. Shortly before the time limit the run saves, and the job is requeued."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from util.errors import RunFailed, UserError, user_errors
from util.memory import flags_in_use
from util.parallel import signals

WARNING_SECONDS = 120  # before the time limit: enough to finish a step and write a checkpoint


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ngpus", default=8, type=int, help="GPUs, and processes, per node")
    parser.add_argument("--nodes", default=2, type=int, help="nodes of the job")
    parser.add_argument(
        "--timeout",
        default=4320,
        type=int,
        help="time limit in minutes; shortly before it the job saves and is requeued",
    )
    parser.add_argument(
        "--job_dir", default="", help="folder of logs and results, without it jobs/%%j; %%j is the job's number"
    )
    parser.add_argument("--partition", default="learnfair", help="SLURM partition")
    parser.add_argument("--use_volta32", action="store_true", help="request 32 GB V100s")
    parser.add_argument("--comment", default="", help="passed to the scheduler")
    parser.add_argument("--cluster", default="slurm", choices=["slurm", "local"], help="local: on this machine")


class Trainer:
    """The callable that submitit runs in every process of the job. It always resumes: a requeued job continues from its
    own checkpoints."""

    def __init__(self, main, args: argparse.Namespace):
        self.main, self.args = main, args

    def __call__(self):
        import submitit

        job = submitit.JobEnvironment()
        os.environ.update(
            RANK=str(job.global_rank),
            WORLD_SIZE=str(job.num_tasks),
            LOCAL_RANK=str(job.local_rank),
            MASTER_ADDR=job.hostnames[0],
            MASTER_PORT=str(20000 + int(str(job.job_id).split("_")[0]) % 20000),
        )
        self.args.output_dir = self.args.output_dir.replace("%j", str(job.job_id))
        print(f"process {job.global_rank} of {job.num_tasks} on {job.hostname}")
        if os.environ["WORLD_SIZE"] == "1":
            del os.environ["RANK"], os.environ["WORLD_SIZE"]
        flags_in_use.update(vars(self.args))
        with user_errors(sys.argv[0]):
            self.main(self.args)
            if signals.stopped_by not in (None, "SIGINT") and job.global_rank == 0:  # Ctrl-C is meant to end it
                requeue(str(job.job_id))


def requeue(job_id: str) -> None:
    """Requeue this job under its number. Raises RunFailed if the scheduler refuses."""
    print(f"stopped by {signals.stopped_by}: requeueing job {job_id}", flush=True)
    try:
        subprocess.run(["scontrol", "requeue", job_id], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RunFailed(
            f"the run is saved, but job {job_id} could not be requeued ({error}): submit it again with the same "
            "--job_dir"
        ) from error


def _parameters(job: argparse.Namespace) -> dict:
    """Return submitit's parameters for the job's flags."""
    return dict(
        name="mae",
        nodes=job.nodes,
        tasks_per_node=job.ngpus,
        gpus_per_node=job.ngpus if job.cluster == "slurm" else 0,
        cpus_per_task=10,
        timeout_min=job.timeout,
        slurm_partition=job.partition,
        slurm_signal_delay_s=WARNING_SECONDS,
        **({"slurm_constraint": "volta32gb"} if job.use_volta32 else {}),
        **({"slurm_comment": job.comment} if job.comment else {}),
    )


def _executor(folder: str, job: argparse.Namespace):
    """Return submitit's executor for the job's flags. Raises UserError without SLURM."""
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=job.cluster, slurm_max_num_timeout=30)
    except RuntimeError as error:  # it has found no srun
        raise UserError(
            f"this machine has no SLURM ({error}): start the job on a login node of the cluster, give --cluster local "
            "to run it as a job on this machine, or start main_….py (with torchrun for several GPUs)"
        ) from error
    executor.update_parameters(**_parameters(job))
    return executor


def _submit(executor, trainer: Trainer, job: argparse.Namespace):
    """Submit `trainer` and return submitit's job. Raises UserError if sbatch is missing or refuses the job."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        return executor.submit(trainer)
    except FileNotFoundError as error:
        raise UserError(
            f"the job cannot be submitted, because this machine has no {error.filename or 'sbatch'}: start it on a "
            "login node of the cluster, or give --cluster local to run it as a job on this machine"
        ) from error
    except (FailedJobError, FailedSubmissionError) as error:
        reason = " ".join(str(error).split()) or "sbatch gave no reason"
        raise UserError(
            f"SLURM refused the job (--partition {job.partition}, --nodes {job.nodes}, --ngpus {job.ngpus}, --timeout "
            f"{job.timeout}): {reason}"
        ) from error


def launch(main, main_parser, argv: list[str] | None = None):
    """Submit `main` with the job's flags and the main's flags from `argv`; return submitit's job. Raises UserError for
    a `--resume` that names a file, on a machine without SLURM, and for a job that SLURM refuses."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_job_arguments(parser)
    main_parser.description += " As a SLURM job."
    add_job_arguments(main_parser.add_argument_group("job"))
    args = main_parser.parse_args(argv)
    names = vars(parser.parse_args([]))
    job = argparse.Namespace(**{name: getattr(args, name) for name in names})
    for name in names:
        delattr(args, name)
    folder = job.job_dir or str(Path("jobs") / "%j")
    if args.output_dir == main_parser.get_default("output_dir"):
        args.output_dir = folder
    if not getattr(args, "eval", False):
        if args.resume not in ("", "auto"):
            raise UserError(
                "--resume of a job must be 'auto', since it may be requeued; start from a file with --init_from"
            )
        args.resume = "auto"
    executor = _executor(folder, job)
    # The job unpickles `Trainer`, so this project must be importable there.
    root = str(Path(__file__).resolve().parents[2])
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    submitted = _submit(executor, Trainer(main, args), job)
    print(f"job {submitted.job_id}, logs and results in {folder.replace('%j', str(submitted.job_id))}")
    return submitted
