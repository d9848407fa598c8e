"""The pretraining loop: forward, backward, optimizer step, logging, checkpoints.

`pretrainer` is the autoencoder (`pretrainer.model`) with the enabled methods; `run.ddp_model` is the same module,
inside DistributedDataParallel if there are several processes. The loop does not depend on the methods. A new one is a
class in a file of its own in `methods/`, listed in `methods/__init__.py` (docs/adding_a_method.md);
`methods/pretrainer.py` calls its hooks.

A micro-batch is the images of one forward pass. A window of `--accum_iter` micro-batches makes one optimizer step.
"""

import torch

from methods.pretrainer import Pretrainer
from util.data.sample_rng import sample_noise
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
    while not run.ended and not run.stopped:  # ended: all steps are done; stopped: by a signal
        train_one_epoch(pretrainer, run, args)
        if not run.stopped:
            row = monitor.after_epoch(run.epoch)
            run.finish_epoch(row)  # logs the epoch; writes a checkpoint every --save_freq epochs


def train_one_epoch(pretrainer: Pretrainer, run: Run, args) -> None:
    """Train for the rest of the current epoch; a signal ends it early and sets `run.stopped`."""
    pretrainer.train()
    if run.position == 0:  # micro-batch of the epoch; a run that was resumed inside an epoch begins at another one
        for change in pretrainer.before_epoch(run.epoch):
            run.note_change(change)
    patches = pretrainer.model.patch_embed.num_patches
    for batch in run.batches():
        imgs = batch.samples.image  # (N, C, H, W), on the device
        indices = batch.samples.index.to(run.device, non_blocking=True)
        noise = sample_noise(args.seed, run.epoch, indices, patches)  # (N, L): the highest are removed
        mask_ratio = mask_ratio_at(run.step, run.total_steps, args.mask_ratio, args.mask_ratio_end)
        pretrainer.first_batch(imgs)  # does something in its first call only

        with run.autocast(batch):  # also: DDP averages gradients only after the last micro-batch of a window
            losses = run.ddp_model(imgs, mask_ratio=mask_ratio, noise=noise)  # {name: weighted term}
        run.backward(losses, batch)  # adds the gradients of this micro-batch
        if batch.is_last_of_window:
            applied = run.optimizer_step()  # sets the learning rate, clips; 0 if a gradient was not finite, else 1
            pretrainer.after_update(imgs, run.step, applied)  # EMA teachers, masking networks
            log_metrics(pretrainer, run, imgs)
            run.finish_step()  # counts the step; logs; writes a checkpoint every --save_steps steps; notices signals


def log_metrics(pretrainer: Pretrainer, run: Run, imgs: torch.Tensor) -> None:
    """Collect the methods' metrics and, every `diagnostics_every` steps, their diagnostics; `finish_step` logs them."""
    run.log(pretrainer.metrics())
    if pretrainer.diagnostics_due(run.step):
        with run.measuring():  # the time of this does not count in the speed
            run.log(pretrainer.diagnostics(imgs, run.step))
