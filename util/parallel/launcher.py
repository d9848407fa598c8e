"""Which process of how many this one is, from the environment of torchrun, SLURM (srun) or Open MPI.

An environment that cannot work is refused at once, in a sentence that says what it contains: the process would wait
for others that do not exist, or every process of a job would run alone.
"""

import os
from collections.abc import Mapping

from util.errors import UserError

_TORCHRUN = "start with torchrun --nproc_per_node=GPUS main_….py"
_HOST = 'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'


def read_launcher(args) -> tuple[int, int, int] | None:
    """Return (rank, number of processes, rank on this node); None for a process that runs alone. `--dist_on_itp` sets
    `args.dist_url`. Raises UserError for an incomplete or contradictory environment."""
    env = os.environ
    if args.dist_on_itp and "OMPI_COMM_WORLD_RANK" in env:
        rank, world, local = (_number(env, f"OMPI_COMM_WORLD_{key}") for key in ("RANK", "SIZE", "LOCAL_RANK"))
        _check_address(env, f"OMPI_COMM_WORLD_SIZE={world}", "pass the address of rank 0 by mpirun -x")
        args.dist_url = f"tcp://{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        return rank, world, local
    if env.get("WORLD_SIZE") and (env.get("RANK") or not _in_srun(env)):  # scripts for srun may export WORLD_SIZE
        return _from_torchrun(env, args)
    if (env.get("RANK") or "").isdecimal() and int(env["RANK"]) > 0:  # other programs have a RANK too
        raise UserError(f"the environment has RANK={env['RANK']} but no WORLD_SIZE: {_TORCHRUN}, or unset RANK")
    return _from_slurm(env, args) or _alone(env)


def _from_torchrun(env: Mapping[str, str], args) -> tuple[int, int, int] | None:
    world = _number(env, "WORLD_SIZE")
    if not env.get("RANK") and world > 1:
        raise UserError(
            f"the environment has WORLD_SIZE={world} but no RANK, so this process does not know which one it is: "
            f"{_TORCHRUN}, or unset WORLD_SIZE to run alone"
        )
    rank, local = _number(env, "RANK", 0), _number(env, "LOCAL_RANK", max(args.local_rank, 0))
    if not 0 <= rank < world:
        raise UserError(
            f"the environment has RANK={rank} and WORLD_SIZE={world}, but ranks are 0 to WORLD_SIZE - 1: {_TORCHRUN}"
        )
    if world == 1 and args.dist_url == "env://" and not (env.get("MASTER_ADDR") and env.get("MASTER_PORT")):
        return None
    if args.dist_url == "env://":
        told = f"RANK={rank} WORLD_SIZE={world}"
        _check_address(env, told, f"{_TORCHRUN}, set them, or unset RANK and WORLD_SIZE to run alone")
    return rank, world, local


def _in_srun(env: Mapping[str, str]) -> bool:
    """Whether srun started this process. The script of sbatch has SLURM_PROCID=0 and SLURM_NTASKS too."""
    return "SLURM_PROCID" in env and ("SLURM_STEP_ID" in env or "SLURM_STEPID" in env)


def _from_slurm(env: Mapping[str, str], args) -> tuple[int, int, int] | None:
    tasks = _number(env, "SLURM_NTASKS", 1)
    if "SLURM_PROCID" not in env or tasks == 1:
        return None
    if not _in_srun(env):
        raise UserError(
            f"the SLURM job has {tasks} tasks (SLURM_NTASKS={tasks}), but srun did not start this process, so it is "
            "the only one: write srun python … in the script, or torchrun in a job with one task per node "
            "(--ntasks-per-node=1), or request --ntasks=1 to run alone"
        )
    tasks = _number(env, "SLURM_STEP_NUM_TASKS", tasks)
    if tasks == 1:  # one process of an allocation for several: srun -n 1, an interactive shell
        return None
    if args.dist_url == "env://":
        _check_address(env, f"SLURM_NTASKS={tasks}", f"export {_HOST} and MASTER_PORT=29500 before srun")
    return _number(env, "SLURM_PROCID"), tasks, _number(env, "SLURM_LOCALID", 0)


def _alone(env: Mapping[str, str]) -> None:
    """Raise UserError if mpirun started several processes like this one, each of which would run alone."""
    world = _number(env, "OMPI_COMM_WORLD_SIZE", 1)
    if world > 1 and "SLURM_PROCID" not in env:
        raise UserError(
            f"mpirun started {world} processes (OMPI_COMM_WORLD_SIZE={world}), each of which would run alone: "
            f"give --dist_on_itp, or {_TORCHRUN}"
        )


def _check_address(env: Mapping[str, str], told: str, remedy: str) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise UserError(
            f"the environment has {told} but no {' and no '.join(missing)}, by which the processes find each other: "
            f"{remedy}"
        )


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name) or ("" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        has = f"{name}={text!r}" if name in env else f"no {name}"
        raise UserError(f"the environment has {has}, which must be a whole number: {_TORCHRUN}") from None
