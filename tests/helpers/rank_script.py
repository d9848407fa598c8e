"""A main for `launch.ranks`: one pretraining with trouble on rank 1 (`nan FLAGS…`), with a metric that rank 1 alone
logs (`metric FLAGS…`), or with every gradient bucket counted (`count FLAGS…`). Prints lines that start with "rank R:".
"""

import hashlib
import os
import sys
from types import SimpleNamespace

import torch

import main_pretrain
import util.parallel.signals
import util.training.run
import util.training.stepping
from methods import Pretrainer
from models_mae import MaskedAutoencoderViT
from util.errors import RunFailed, leave

RANK = int(os.environ["RANK"])


def say(text):
    sys.stdout.write(f"rank {RANK}: {text}\n")  # one write, so that the ranks' lines do not mix
    sys.stdout.flush()


def poison_rank_one():
    """NaN in rank 1's loss of the fourth forward pass."""
    calls, original = [0], MaskedAutoencoderViT.reconstruction_loss

    def reconstruction_loss(self, *args):
        calls[0] += 1
        return original(self, *args) * (float("nan") if RANK == 1 and calls[0] == 4 else 1.0)

    MaskedAutoencoderViT.reconstruction_loss = reconstruction_loss


def log_on_rank_one():
    """Rank 1's second optimizer step logs a metric that rank 0's does not."""
    calls, original = [0], Pretrainer.metrics

    def metrics(self):
        calls[0] += 1
        return original(self) | ({"odd": 1.0} if RANK == 1 and calls[0] == 2 else {})

    Pretrainer.metrics = metrics


def count_buckets():
    """-> a list that grows by one with every gradient bucket that DDP sends."""
    sent, original = [], util.training.stepping.Stepper._wrap

    def hook(_state, bucket):
        sent.append(bucket.index())
        future = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / 2)

    def wrap(self, module):
        wrapped = original(self, module)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    util.training.stepping.Stepper._wrap = wrap
    return sent


def fingerprint_methods():
    """-> a list that will hold a hash of everything the methods own, as it is at the end of the run."""
    found, original = [], util.training.run.Run.close

    def close(self):
        digest = hashlib.sha256()
        for name, value in sorted(self.methods.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
        found.append(digest.hexdigest()[:12])
        original(self)

    util.training.run.Run.close = close
    return found


def count_reductions():
    """-> a list that grows by one with every reduction that python code asks for."""
    seen, original = [], torch.distributed.all_reduce

    def all_reduce(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    util.parallel.signals.StopRequest.poll = lambda *_: (False, False)  # its rhythm follows the clock
    return seen


def get_args_parser():
    return SimpleNamespace(parse_args=list)


def main(words):
    sent = {"count": count_buckets, "nan": poison_rank_one, "metric": log_on_rank_one}[words[0]]()
    methods, reductions = fingerprint_methods(), count_reductions()
    try:
        main_pretrain.main(main_pretrain.get_args_parser().parse_args(words[1:]))
        # The buckets themselves are reduced by the hook above.
        say(f"{sent.count(0)} first buckets, methods {methods[0]}, {len(reductions) - len(sent)} reductions")
    except RunFailed as error:
        say(str(error))
        leave(0)
