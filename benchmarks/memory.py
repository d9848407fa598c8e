"""Memory at the peak of a training step: what planning/footprint.py predicts, beside what the real code allocates.

python benchmarks/memory.py                                              on the CPU: small models
python benchmarks/memory.py --device cuda --model mae_vit_base_patch16 --batch_size 64 256 --amp_dtype bf16
torchrun --nproc_per_node 2 benchmarks/memory.py --mode fsdp --model mae_vit_small_patch4          or ddp: of rank 0

The steps are those of `engine_pretrain.py`: the passes under autocast, AdamW, the methods' updates. On a CPU the peak
is that of torch's allocator as its profiler records it, every tensor and every buffer inside an operation: the same
number in every run, unlike resident memory. On a GPU it is `torch.cuda.max_memory_allocated`. Ends with an error when
a prediction is off by more than 15 %.
"""

import argparse
import os
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages

import _measure
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from models_mae import MODELS, MaskedAutoencoderViT
from planning.footprint import GIB, Setup, moments, sizes_of
from util.compute.kernels import attention_is_fused
from util.compute.precision import DTYPES
from util.errors import UserError, user_errors
from util.parallel.distributed import setup_for_distributed
from util.parallel.fsdp import shard

METHODS = {"none": "", "encoder": "--mae_k 1", "autoencoder": "--rc_mae"}  # one of each kind of teacher
TOLERANCE = 0.15


class Step(_measure.Variant):
    """A step of `accum` micro-batches as the engine makes it: autocast ends, and its copies of weights with it, after
    the optimizer's step. `config` (constructor arguments) takes the place of the named model."""

    def __init__(self, options, setup: Setup, config: dict | None = None):
        self.setup, self.config = setup, config
        options = argparse.Namespace(**vars(options) | {"batch_size": setup.batch, "mask_ratio": 0.75})
        super().__init__(METHODS[setup.teacher], options)
        self.pretrainer.model.set_grad_checkpointing(setup.grad_checkpoint)
        for module in self.pretrainer.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = setup.fused
        self.called = self.pretrainer
        if setup.fsdp:
            self.shard()
        elif dist.is_initialized():
            self.called = DistributedDataParallel(self.pretrainer, gradient_as_bucket_view=True)

    def shard(self) -> None:
        shard(self.pretrainer, self.pretrainer.model, [], self.device, self.dtype)
        self.optimizer = torch.optim.AdamW(self.pretrainer.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def network(self, options):
        if self.config is None:
            return super().network(options)
        return MaskedAutoencoderViT(**self.config, norm_pix_loss=True)

    def train_step(self) -> None:
        for micro in range(self.setup.accum):
            with _measure.autocast(self.device, self.dtype):
                loss = sum(self.called(self.imgs, mask_ratio=self.ratio).values())
                with torch.autocast(self.device.type, enabled=False):
                    closes = micro + 1 == self.setup.accum
                    self.scaler(loss, self.optimizer, parameters=self.pretrainer.parameters(), update_grad=closes)
                if closes:
                    self.optimizer.zero_grad(set_to_none=True)
                    self.pretrainer.after_update(self.imgs, self.count, self.scaler.applied)
        self.count += 1

    def idle(self) -> int:
        """Bytes between two steps, by counting the tensors there are."""
        held = [*self.pretrainer.parameters(), *self.pretrainer.buffers(), self.imgs]
        for state in self.optimizer.state.values():
            held += [value for value in state.values() if torch.is_tensor(value)]
        return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in held)


def measured(step: Step) -> int:
    """Bytes at the peak of a step, the second one (the first makes the optimizer's moments)."""
    step.step()
    if step.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step.step()
        return torch.cuda.max_memory_allocated()
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        step.train_step()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    level = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()  # negative where memory is given back
        highest = max(highest, level)
    return step.idle() + highest


def compared(options, setup: Setup, config: dict | None = None) -> tuple[str, float, int]:
    """(the moment of the predicted peak, its bytes, those measured)."""
    predicted = moments(sizes_of(config or MODELS[options.model].config), setup)
    predicted.pop("between epochs", None)  # measured are steps
    predicted = {moment: sum(parts.values()) for moment, parts in predicted.items()}
    moment = max(predicted, key=predicted.get)
    return moment, predicted[moment], measured(Step(options, setup, config))


def setups(options) -> list[tuple[str, Setup]]:
    """(type, setup) for every choice."""
    return [
        (
            name,
            Setup(
                batch,
                dist.get_world_size() if dist.is_initialized() else 1,
                fsdp=options.mode == "fsdp",
                element=DTYPES[name].itemsize,
                grad_checkpoint=again,
                teacher=teacher,
                fused=attention_is_fused("auto", torch.device(options.device), DTYPES[name]),
            ),
        )
        for name in options.amp_dtype
        for batch in options.batch_size
        for again in (False, True)
        for teacher in options.teacher
    ]


def join(options) -> None:
    """The process group of `--mode ddp` and `fsdp`. UserError for flags that cannot be."""
    if min(options.batch_size) < 1:
        raise UserError("--batch_size must be positive")
    if (options.mode == "one") != ("RANK" not in os.environ):
        raise UserError("--mode ddp and fsdp need several processes (torchrun), and --mode one has one")
    if options.mode == "fsdp" and "fp16" in options.amp_dtype:
        raise UserError("--mode fsdp works in bf16 and fp32")
    if options.mode != "one":
        setup_for_distributed(int(os.environ["RANK"]) == 0)
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        options.device = "cpu" if options.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"


def main(options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    join(options)
    print("| model | batch | type | grad_checkpoint | teacher | predicted, MiB | measured, MiB | ratio | peak at |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for model in options.model:
        for dtype, setup in setups(options):
            case = argparse.Namespace(**vars(options) | {"model": model, "amp_dtype": dtype})
            moment, predicted, found = _measure.quietly(lambda case=case, setup=setup: compared(case, setup))
            worst = max(worst, abs(predicted / found - 1))
            print(
                f"| {model} | {setup.batch} | {dtype} | {'yes' if setup.grad_checkpoint else 'no'} | {setup.teacher} | "
                f"{predicted / GIB * 1024:.0f} | {found / GIB * 1024:.0f} | {predicted / found:.3f} | {moment} |",
                flush=True,
            )
    if dist.is_initialized():
        dist.destroy_process_group()
    print(f"\nlargest error {100 * worst:.1f} %")
    if worst > TOLERANCE:
        sys.exit(f"error: a prediction is off by more than {100 * TOLERANCE:.0f} %")


def get_args_parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["mae_deit_tiny_patch4", "mae_vit_small_patch16"], choices=MODELS)
    parser.add_argument("--batch_size", nargs="+", type=int, default=[4, 16])
    parser.add_argument("--amp_dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--teacher", nargs="+", default=["none"], choices=METHODS)
    parser.add_argument("--mode", default="one", choices=["one", "ddp", "fsdp"], help="ddp and fsdp through torchrun")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.set_defaults(cpu_time=False)  # what `_measure` asks: nothing is timed here
    return parser


if __name__ == "__main__":
    with user_errors("memory.py"):
        main(get_args_parser().parse_args())
