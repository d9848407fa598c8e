"""The pretraining loop: forward, backward, optimizer step, logging, checkpoints.

`pretrainer` is the autoencoder (`pretrainer.model`) with the enabled methods; `run.ddp_model` is the same module,
inside DistributedDataParallel if there are several processes. The loop does not depend on the methods. A new one is a
class in a file of its own in `methods/`, listed in `methods/__init__.py` (docs/adding_a_method.md);
`methods/pretrainer.py` calls its hooks.

A micro-batch is the images of one forward pass. A window of `--accum_iter` micro-batches makes one optimizer step.
"""

from collections.abc import Hashable

import torch

from methods.pretrainer import Pretrainer
from util.compute.cuda_graph import recorder_for
from util.data.sample_rng import noise_of_keys, sample_keys
from util.parallel.distributed import get_world_size
from util.training.graph import GraphedStep
from util.training.run import Run


def mask_ratio_at(step: int, steps: int, start: float, end: float | None) -> float:
    """Return the share of removed patches in optimizer step `step` (from 0) of `steps`: `start`, or linearly from
    `start` to `end`, which is reached in the last step."""
    if end is None:
        return start
    return start + (end - start) * min(1.0, step / max(1, steps - 1))


def train(pretrainer: Pretrainer, run: Run, args, monitor) -> None:
    """Train to the end of the run, or until a signal stops it. `monitor` measures between epochs (kNN accuracy,
    reconstruction loss of the preview images). main_pretrain.py begins and closes the run."""
    graph = graphed_step(pretrainer, run, args) if args.cuda_graph else None
    while not run.ended and not run.stopped:  # ended: all steps are done; stopped: by a signal
        train_one_epoch(pretrainer, run, args, graph)
        if not run.stopped:
            row = monitor.after_epoch(run.epoch)
            run.finish_epoch(row)  # logs the epoch; writes a checkpoint every --save_freq epochs


def train_one_epoch(pretrainer: Pretrainer, run: Run, args, graph: GraphedStep | None = None) -> None:
    """Train for the rest of the current epoch; a signal ends it early and sets `run.stopped`. `graph` takes the steps
    in place of the lines that are written out here (`--cuda_graph`)."""
    pretrainer.train()
    if run.position == 0:  # micro-batch of the epoch; a run that was resumed inside an epoch begins at another one
        for change in pretrainer.before_epoch(run.epoch):
            run.note_change(change)
    patches = pretrainer.model.patch_embed.num_patches
    for batch in run.batches():
        imgs = batch.samples.image  # (N, C, H, W), on the device
        keys = sent(sample_keys(args.seed, run.epoch, batch.samples.index), run.device)  # (N,)
        pretrainer.first_batch(imgs)  # does something in its first call only

        if graph is not None:
            graph.step(batch, imgs, keys)
        else:
            noise = noise_of_keys(keys, patches)  # (N, L): the highest are removed
            mask_ratio = mask_ratio_at(run.step, run.total_steps, args.mask_ratio, args.mask_ratio_end)
            with run.autocast(batch):  # also: DDP averages gradients only after the last micro-batch of a window
                losses = run.ddp_model(imgs, mask_ratio=mask_ratio, noise=noise)  # {name: weighted term}
            run.backward(losses, batch)  # adds the gradients of this micro-batch
            if batch.is_last_of_window:
                applied = run.optimizer_step()  # sets the learning rate, clips; 0 if a gradient was not finite, else 1
                pretrainer.after_update(imgs, run.step, applied)  # EMA teachers, masking networks
        if batch.is_last_of_window:
            log_metrics(pretrainer, run, imgs)
            run.finish_step()  # counts the step; logs; writes a checkpoint every --save_steps steps; notices signals


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `tensor`, of the host, on `device`. Copies from pinned memory do not wait for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def log_metrics(pretrainer: Pretrainer, run: Run, imgs: torch.Tensor) -> None:
    """Collect the methods' metrics and, every `diagnostics_every` steps, their diagnostics; `finish_step` logs them."""
    run.log(pretrainer.metrics())
    if pretrainer.diagnostics_due(run.step):
        with run.measuring():  # the time of this does not count in the speed
            run.log(pretrainer.diagnostics(imgs, run.step))


# CUDA graphs ----------------------------------------------------------------------------------------------------------


class PretrainingWork:
    """The work of a step (`util.training.graph.Work`). Its inputs are images (N, C, H, W) and keys (N,)."""

    def __init__(self, pretrainer: Pretrainer, run: Run, mask_ratio: float):
        self.pretrainer, self.run, self.mask_ratio = pretrainer, run, mask_ratio
        self.schedule, self.use = pretrainer.schedule, pretrainer.use

    def losses(self, imgs: torch.Tensor, keys: torch.Tensor) -> dict[str, torch.Tensor]:
        noise = noise_of_keys(keys, self.pretrainer.model.patch_embed.num_patches)
        return self.pretrainer(imgs, mask_ratio=self.mask_ratio, noise=noise)

    def update(self, applied: torch.Tensor, imgs: torch.Tensor, keys: torch.Tensor) -> None:
        self.pretrainer.update(imgs, self.run.step, applied)

    def branch(self) -> Hashable:
        return self.pretrainer.graph_branch()


def graphed_step(pretrainer: Pretrainer, run: Run, args) -> GraphedStep | None:
    """Return the step of `--cuda_graph`; None, after a note, where a step cannot be recorded."""
    recorder = recorder_for(run.device)
    obstacles = {
        f"{run.device.type} has no CUDA graphs": recorder is None,
        "the collectives of several processes are not recorded": get_world_size() > 1,
        "--accum_iter has several kinds of micro-batches": args.accum_iter > 1,
        "--mask_ratio_end changes the number of tokens": args.mask_ratio_end is not None,
        "--grad_checkpoint saves random states, which a recording cannot": args.grad_checkpoint,
        pretrainer.graph_obstacle(): bool(pretrainer.graph_obstacle()),
    }
    obstacle = next((text for text, holds in obstacles.items() if holds), None)
    if obstacle is None and recorder is not None:
        return GraphedStep(run, PretrainingWork(pretrainer, run, args.mask_ratio), recorder)
    print(f"note: --cuda_graph has no effect: {obstacle}")
    return None
