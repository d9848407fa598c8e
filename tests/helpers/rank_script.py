"""A main for `launch.ranks`: a pretraining with a NaN loss on rank 1 (`nan FLAGS…`), with a metric that only rank 1
logs (`metric FLAGS…`), or with a count of gradient buckets (`count FLAGS…`). Output lines start with "rank R:".
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
    sys.stdout.write(f"rank {RANK}: {text}\n")  # one write, so that lines of different ranks do not mix
    sys.stdout.flush()


def poison_rank_one():
    """Make the loss of rank 1's fourth forward pass NaN."""
    calls, original = [0], MaskedAutoencoderViT.reconstruction_loss

    def reconstruction_loss(self, *args):
        calls[0] += 1
        return original(self, *args) * (float("nan") if RANK == 1 and calls[0] == 4 else 1.0)

    MaskedAutoencoderViT.reconstruction_loss = reconstruction_loss


def log_on_rank_one():
    """Make rank 1 log a metric in its second optimizer step that rank 0 does not log."""
    calls, original = [0], Pretrainer.metrics

    def metrics(self):
        calls[0] += 1
        return original(self) | ({"odd": 1.0} if RANK == 1 and calls[0] == 2 else {})

    Pretrainer.metrics = metrics


def count_buckets():
    """Return a list that grows by one with every gradient bucket that DDP sends."""
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
    """Return a list that will hold a hash of all state of the methods at the end of the run."""
    result, original = [], util.training.run.Run.close

    def close(self):
        digest = hashlib.sha256()
        for name, value in sorted(self.methods.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
        result.append(digest.hexdigest()[:12])
        original(self)

    util.training.run.Run.close = close
    return result


def count_reductions():
    """Return a list that grows by one with every all-reduce that Python code starts."""
    seen, original = [], torch.distributed.all_reduce

    def all_reduce(*args, **kwargs):
        seen.append(1)
        return original(*args, **kwargs)

    torch.distributed.all_reduce = all_reduce
    util.parallel.signals.StopRequest.poll = lambda *_, **__: (False, False)  # its calls depend on the clock
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
