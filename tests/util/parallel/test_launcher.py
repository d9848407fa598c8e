"""The environments of launchers: read, run alone, or refused at once in a sentence that says what they contain."""

import os
import time

import pytest

import main_pretrain
from util.errors import UserError
from util.parallel.distributed import init_distributed_mode
from util.parallel.launcher import read_launcher

ADDRESS = "MASTER_ADDR=here MASTER_PORT=29500 "
SBATCH = "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_LOCALID=0 "  # in the script; srun adds the numbers of its step
SRUN = "SLURM_JOB_ID=7 SLURM_PROCID=2 SLURM_LOCALID=1 SLURM_STEP_ID=0 "
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def environment(monkeypatch):
    def set_only(text):
        for name in list(os.environ):
            if name in NAMES or name.startswith(("SLURM_", "OMPI_")):
                monkeypatch.delenv(name)
        for pair in text.split():
            monkeypatch.setenv(*pair.split("=", 1))

    return set_only


def flags(*given):
    return main_pretrain.get_args_parser().parse_args(given)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", None),
        ("RANK=0", None),
        ("RANK=0 WORLD_SIZE=1", None),
        ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0", None),
        ("WORLD_SIZE=1", None),
        (ADDRESS + "RANK=0 WORLD_SIZE=1", (0, 1, 0)),  # torchrun with one process
        (ADDRESS + "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1", (3, 4, 1)),
        (SBATCH, None),
        (SBATCH + "SLURM_NTASKS=1", None),
        (SRUN + "SLURM_NTASKS=1 SLURM_STEP_NUM_TASKS=1", None),
        (SRUN + "SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1", None),  # an interactive shell
        (ADDRESS + SRUN + "SLURM_NTASKS=4", (2, 4, 1)),
        (ADDRESS + SRUN + "SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=3", (2, 3, 1)),
        (ADDRESS + SRUN + "SLURM_NTASKS=4 WORLD_SIZE=4", (2, 4, 1)),
        (ADDRESS + SBATCH + "SLURM_NTASKS=2 RANK=1 WORLD_SIZE=2 LOCAL_RANK=1", (1, 2, 1)),  # torchrun in a job
        ("OMPI_COMM_WORLD_SIZE=1 OMPI_COMM_WORLD_RANK=0", None),
    ],
)
def test_environments_that_work(environment, text, expected):
    environment(text)
    assert read_launcher(flags()) == expected


@pytest.mark.parametrize(
    "text, words",
    [
        (SBATCH + "SLURM_NTASKS=4", "SLURM_NTASKS=4 | srun | --ntasks=1 | torchrun"),
        (SRUN + "SLURM_NTASKS=4", "SLURM_NTASKS=4 | no MASTER_ADDR and no MASTER_PORT | scontrol show hostnames"),
        ("RANK=0 WORLD_SIZE=4", "RANK=0 WORLD_SIZE=4 | no MASTER_ADDR | torchrun | unset"),
        ("RANK=0 WORLD_SIZE=4 MASTER_ADDR=here", "no MASTER_PORT"),
        ("RANK= WORLD_SIZE=4", "no RANK"),
        ("WORLD_SIZE=4", "WORLD_SIZE=4 | no RANK | torchrun"),
        (ADDRESS + "WORLD_SIZE=4", "WORLD_SIZE=4 | no RANK"),
        ("RANK=3", "RANK=3 | no WORLD_SIZE"),
        (ADDRESS + "RANK=4 WORLD_SIZE=4", "RANK=4 and WORLD_SIZE=4"),
        (ADDRESS + "RANK=one WORLD_SIZE=4", "RANK='one'"),
        (ADDRESS + "RANK=0 WORLD_SIZE=two", "WORLD_SIZE='two'"),
        ("OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2", "OMPI_COMM_WORLD_SIZE=4 | --dist_on_itp"),
    ],
)
def test_environments_that_cannot_work(environment, text, words):
    """At once, by the function that joins the group: no default of 1800 seconds."""
    environment(text)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        init_distributed_mode(flags("--device", "cpu"))
    message = str(caught.value)
    assert time.monotonic() - began < 5 and "\n" not in message and "timed out" not in message
    assert all(word in message for word in words.split(" | ")), message


def test_open_mpi_without_an_address(environment):
    environment("OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_LOCAL_RANK=0")
    with pytest.raises(UserError, match="OMPI_COMM_WORLD_SIZE=4 but no MASTER_ADDR"):
        read_launcher(flags("--dist_on_itp"))
    environment(ADDRESS + "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_LOCAL_RANK=0")
    args = flags("--dist_on_itp")
    assert read_launcher(args) == (2, 4, 0) and args.dist_url == "tcp://here:29500"


def test_an_address_on_the_command_line(environment):
    environment("RANK=1 WORLD_SIZE=2")
    assert read_launcher(flags("--dist_url", "tcp://here:29500")) == (1, 2, 0)


def test_an_address_that_cannot_be_used_is_no_timeout(environment):
    environment("RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=99999999")
    with pytest.raises(UserError, match="rank 0 of 2 cannot join the other ranks at MASTER_ADDR="):
        init_distributed_mode(flags("--device", "cpu"))


def test_one_task_alone_trains(environment, tmp_path):
    environment("RANK=0 WORLD_SIZE=1")
    data = "--dataset digits --model mae_vit_micro_patch4 --input_size 16 --in_chans 1 --epochs 1 --warmup_epochs 0"
    args = flags(*f"{data} --batch_size 256 --num_workers 0 --device cpu --output_dir {tmp_path}/run".split())
    main_pretrain.main(args)
    assert (tmp_path / "run" / "encoder.safetensors").exists() and not args.distributed
