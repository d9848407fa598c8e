"""Peak memory of a training step: the prediction of planning/footprint.py beside the allocations of the real code.

python benchmarks/memory.py                                              on the CPU: small models
python benchmarks/memory.py --device cuda --model mae_vit_base_patch16 --batch_size 64 256 --amp_dtype bf16
torchrun --nproc_per_node 2 benchmarks/memory.py --mode fsdp --model mae_vit_small_patch4          or ddp: of rank 0

The steps are those of `engine_pretrain.py`: the passes under autocast, AdamW, the methods' updates. On a CPU the
profiler records the allocations of all tensors and of buffers inside operations: unlike resident memory, the number is
the same in every run. On a GPU it is `torch.cuda.max_memory_allocated`. Exits with an error when a prediction is wrong
by more than 15 %.
"""

import argparse
import os
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # messages of the profiler

import _measure
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from models_mae import MODELS, MaskedAutoencoderViT
from planning.footprint import GIB, Setup, moments, sizes_of
from util.compute.kernels import attention_is_fused
from util.compute.precision import DTYPES
from util.compute.recompute import recompute_cheap
from util.errors import UserError, user_errors
from util.parallel.distributed import setup_for_distributed
from util.parallel.fsdp import shard

METHODS = {"none": "", "encoder": "--mae_k 1", "autoencoder": "--rc_mae"}  # one method for each type of teacher
TOLERANCE = 0.15


class Step(_measure.Variant):
    """A step of `accum` micro-batches as in the engine: autocast, with its copies of weights, ends after the
    optimizer's step. `config` (constructor arguments) replaces the named model."""

    def __init__(self, options, setup: Setup, config: dict | None = None):
        self.setup, self.config = setup, config
        options = argparse.Namespace(**vars(options) | {"batch_size": setup.batch, "mask_ratio": 0.75})
        super().__init__(METHODS[setup.teacher], options)
        self.pretrainer.model.set_grad_checkpointing(setup.grad_checkpoint)
        if setup.recompute:
            recompute_cheap(self.pretrainer.model)
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
        """Return the bytes of all existing tensors between two steps."""
        held = [*self.pretrainer.parameters(), *self.pretrainer.buffers(), self.imgs]
        for state in self.optimizer.state.values():
            held += [value for value in state.values() if torch.is_tensor(value)]
        return sum(getattr(tensor, "_local_tensor", tensor).nbytes for tensor in held)


def measured(step: Step) -> int:
    """Return the peak bytes of the second step (the first one makes the optimizer's moments)."""
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
        level += event.nbytes()  # negative when memory is freed
        highest = max(highest, level)
    return step.idle() + highest


def compared(options, setup: Setup, config: dict | None = None) -> tuple[str, float, int]:
    """Return (time of the predicted peak, predicted bytes, measured bytes)."""
    predicted = moments(sizes_of(config or MODELS[options.model].config), setup)
    predicted.pop("between epochs", None)  # only steps are measured
    predicted = {moment: sum(parts.values()) for moment, parts in predicted.items()}
    moment = max(predicted, key=predicted.get)
    return moment, predicted[moment], measured(Step(options, setup, config))


def setups(options) -> list[tuple[str, Setup]]:
    """Return (type, setup) for every combination of options."""
    return [
        (
            name,
            Setup(
                batch,
                dist.get_world_size() if dist.is_initialized() else 1,
                fsdp=options.mode == "fsdp",
                element=DTYPES[name].itemsize,
                grad_checkpoint=again == "blocks",
                recompute=again == "cheap",
                teacher=teacher,
                fused=attention_is_fused("auto", torch.device(options.device), DTYPES[name]),
            ),
        )
        for name in options.amp_dtype
        for batch in options.batch_size
        for again in options.recompute
        for teacher in options.teacher
    ]


def join(options) -> None:
    """Start the process group of --mode ddp and fsdp. Raises UserError for invalid flags."""
    if min(options.batch_size) < 1:
        raise UserError("--batch_size must be positive")
    if (options.mode == "one") != ("RANK" not in os.environ):
        raise UserError("--mode ddp and fsdp need several processes (torchrun), --mode one needs one")
    if options.mode == "fsdp" and "fp16" in options.amp_dtype:
        raise UserError("--mode fsdp works in bf16 and fp32")
    if options.mode != "one":
        setup_for_distributed(int(os.environ["RANK"]) == 0)
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        options.device = "cpu" if options.device == "cpu" else f"cuda:{os.environ['LOCAL_RANK']}"


def recomputed(setup: Setup) -> str:
    return "blocks" if setup.grad_checkpoint else "cheap" if setup.recompute else "no"


def main(options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    join(options)
    print("| model | batch | type | recomputed | teacher | predicted, MiB | measured, MiB | ratio | peak at |")
    print("|---|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for model in options.model:
        for dtype, setup in setups(options):
            case = argparse.Namespace(**vars(options) | {"model": model, "amp_dtype": dtype})
            moment, predicted, actual = _measure.quietly(lambda case=case, setup=setup: compared(case, setup))
            worst = max(worst, abs(predicted / actual - 1))
            print(
                f"| {model} | {setup.batch} | {dtype} | {recomputed(setup)} | {setup.teacher} | "
                f"{predicted / GIB * 1024:.0f} | {actual / GIB * 1024:.0f} | {predicted / actual:.3f} | {moment} |",
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
    parser.add_argument(
        "--recompute",
        nargs="+",
        default=["no", "cheap", "blocks"],
        choices=["no", "cheap", "blocks"],
        help="what the backward pass recomputes: nothing, norms and GELUs (--recompute cheap), --grad_checkpoint",
    )
    parser.add_argument("--mode", default="one", choices=["one", "ddp", "fsdp"], help="ddp and fsdp through torchrun")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice")
    parser.set_defaults(cpu_time=False)  # read by `_measure`; nothing is timed here
    return parser


if __name__ == "__main__":
    with user_errors("memory.py"):
        main(get_args_parser().parse_args())
