"""A main for `launch.ranks` on what ranks exchange: process groups after the start (`start`), rows and features
gathered by the main process (`gather`), and the content of checkpoints (`checkpoint FLAGS…`). Output lines start with
"rank R:"."""

import os
import pickle
import sys
from types import SimpleNamespace

import torch
import torch.distributed as dist

import main_pretrain
import util.training.run_state
from evaluation.features import extract
from util.data.samples import Sample
from util.parallel import distributed


def say(text):
    sys.stdout.write(f"rank {os.environ['RANK']}: {text}\n")  # one write, so that lines of different ranks do not mix
    sys.stdout.flush()


def start():
    args = main_pretrain.get_args_parser().parse_args(["--device", "cpu"])
    distributed.init_distributed_mode(args)
    say(f"{len(dist.distributed_c10d._world.pg_map)} groups")


class Batches:
    """The batches of a loader: images numbered from 0, image i on rank i % world, the last one unreadable."""

    def __init__(self, images: int):
        mine = torch.arange(images)[distributed.get_rank() :: distributed.get_world_size()]
        self.batches = [
            Sample(torch.full((1, 1, 1, 1), float(i)), *map(torch.tensor, ([10 * i], [i], [int(i == images - 1)])))
            for i in mine.tolist()
        ]

    def on(self, device):
        return self

    def begin(self, epoch):
        return self.batches


def gather():
    start()
    rank = distributed.get_rank()
    rows = torch.full((rank, 2), float(rank)) if rank != 1 else torch.empty(0, 0)
    whole = distributed.gather_rows(rows)
    say(f"rows {None if whole is None else whole.tolist()}")
    say(f"values {distributed.gather_to_main(rank)}")
    for images in (8, 2, 1):  # fewer images than ranks; none that is readable
        features, labels = extract(
            lambda x: x.flatten(1).expand(-1, 2), Batches(images), torch.device("cpu"), torch.float32
        )
        say(f"features {None if features is None else features[:, 1].tolist()} labels {labels.tolist()}")
    distributed.shut_down()


def write_checkpoint(flags):
    """Run with the content of checkpoints replaced by its size and number of ranks' states."""
    original, received = dist.all_gather_object, []

    def all_gather_object(everyone, value):
        original(everyone, value)
        received.append(len(pickle.dumps(everyone)))

    def save_checkpoint(folder, epoch, position, content, retention):
        states = content.get("methods_by_rank", [])
        sizes = [sum(len(step) for step in state["mlo_mae"]) for state in states]
        say(f"step {content['step']}: batches {sizes}, rng {len(content['rng'] or [])}, received {max(received)}")

    dist.all_gather_object = all_gather_object
    util.training.run_state.save_checkpoint = save_checkpoint
    main_pretrain.main(main_pretrain.get_args_parser().parse_args(flags))


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def main(words):
    if words[0] == "checkpoint":
        write_checkpoint(words[1:])
    else:
        {"start": start, "gather": gather}[words[0]]()
