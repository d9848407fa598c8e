"""A job of a scheduler, for test_slurm.py: the run that submitit would start, inside a job with the number JOB_ID.

A main for `forked.Forked` with the arguments JOB_ID FLAGS…
"""

from types import SimpleNamespace

import submitit

import main_pretrain
from util.parallel import slurm


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def main(words):
    here = dict(local_rank=0, hostnames=["here"], hostname="here")
    job = SimpleNamespace(global_rank=0, num_tasks=1, job_id=words[0], **here)
    submitit.JobEnvironment = lambda: job
    slurm.Trainer(main_pretrain.main, main_pretrain.get_args_parser().parse_args(words[1:]))()
