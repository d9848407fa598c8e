"""What a scheduler's job does, for test_slurm.py: the run as submitit sends it, in a job that the arguments describe.

usage: job_script.py JOB_ID FLAGS…
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import submitit

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_pretrain
from util import slurm

if __name__ == "__main__":
    job = SimpleNamespace(
        global_rank=0, num_tasks=1, local_rank=0, hostnames=["here"], hostname="here", job_id=sys.argv[1]
    )
    submitit.JobEnvironment = lambda: job
    slurm.Trainer(main_pretrain.main, main_pretrain.get_args_parser().parse_args(sys.argv[2:]))()
