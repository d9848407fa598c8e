"""Run by torchrun from test_ranks.py: one pretraining with trouble on rank 1, or with every gradient bucket counted.

usage: rank_script.py {nan,count} FLAGS…     prints lines that start with "rank R:"
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main_pretrain
import util.run
from models_mae import MaskedAutoencoderViT
from util.errors import RunFailed

RANK = int(os.environ["RANK"])


def say(text):
    sys.stdout.write(f"rank {RANK}: {text}\n")  # one write, so that the ranks' lines do not mix
    sys.stdout.flush()


def poison_rank_one():
    """NaN in rank 1's loss of the fourth forward pass."""
    calls, original = [0], MaskedAutoencoderViT.forward_loss

    def forward_loss(self, *args):
        calls[0] += 1
        return original(self, *args) * (float("nan") if RANK == 1 and calls[0] == 4 else 1.0)

    MaskedAutoencoderViT.forward_loss = forward_loss


def count_buckets():
    """-> a list that grows by one with every gradient bucket that DDP sends."""
    sent, original = [], util.run.Run._wrap

    def hook(_state, bucket):
        sent.append(bucket.index())
        future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    def wrap(self, module):
        wrapped = original(self, module)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    util.run.Run._wrap = wrap
    return sent


if __name__ == "__main__":
    sent = count_buckets() if sys.argv[1] == "count" else poison_rank_one()
    try:
        main_pretrain.main(main_pretrain.get_args_parser().parse_args(sys.argv[2:]))
        say(f"{sent.count(0)} first buckets")
    except RunFailed as error:
        say(str(error))
