"""The pretraining loop: one training step, and what follows a step and an epoch.

The loop calls `run.ddp_model`, which returns the terms of the loss, and does not depend on the methods that compute
them. A new method is a file in `methods/` (docs/adding_a_method.md); `methods/pretrainer.py` calls its hooks.
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


def train(pretrainer: Pretrainer, run: Run, args, monitor) -> dict[str, float]:
    """Train to the end of the run, or until a signal stops it; return the last row of `monitor` (previews and kNN)."""
    row = {}
    while not run.ended and not run.stopped:
        train_one_epoch(pretrainer, run, args)
        if not run.stopped:
            row = monitor.after_epoch(run.epoch)
            run.finish_epoch(row)  # logs the epoch; writes a checkpoint every --save_freq epochs
    return row


def train_one_epoch(pretrainer: Pretrainer, run: Run, args) -> None:
    """Train for the rest of the current epoch; a signal ends it early and sets `run.stopped`."""
    pretrainer.train()
    if run.position == 0:
        pretrainer.before_epoch(run.epoch)
    patches = pretrainer.model.patch_embed.num_patches
    for batch in run.batches("pretrain"):
        imgs = batch.samples.image.to(run.device, non_blocking=True)  # (N, C, H, W)
        indices = batch.samples.index.to(run.device, non_blocking=True)
        noise = sample_noise(args.seed, run.epoch, indices, patches)  # (N, L), determines the masks
        mask_ratio = mask_ratio_at(run.step, run.total_steps, args.mask_ratio, args.mask_ratio_end)
        pretrainer.first_batch(imgs)

        with run.autocast(batch):
            losses = run.ddp_model(imgs, mask_ratio=mask_ratio, noise=noise)  # weighted terms by name
        run.backward(losses, batch)
        if batch.is_last_of_window:
            applied = run.optimizer_step()
            pretrainer.after_update(imgs, run.step, applied)  # teachers, masking networks
            log_metrics(pretrainer, run, imgs)
            run.finish_step()  # logs; writes a checkpoint every --save_steps steps; notices signals


def log_metrics(pretrainer: Pretrainer, run: Run, imgs: torch.Tensor) -> None:
    """Log the methods' metrics, and their diagnostics if due, after a step."""
    run.log(**pretrainer.metrics())
    for method in pretrainer.diagnostics_due(run.step):
        with run.diagnostics():
            run.log(**method.diagnostics(pretrainer, imgs, run.step))
