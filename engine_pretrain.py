"""The pretraining loop. It calls one object and gets a loss; which methods are in it, it does not know."""

import torch

from methods import Pretrainer
from util.data.sample_rng import sample_noise
from util.training.run import Run


def mask_ratio_at(step: int, steps: int, args) -> float:
    """Share of removed patches in optimizer step `step` (from 0) of `steps`: `--mask_ratio`, or on a straight line from
    there to `--mask_ratio_end` in the last step."""
    if args.mask_ratio_end is None:
        return args.mask_ratio
    return args.mask_ratio + (args.mask_ratio_end - args.mask_ratio) * min(1.0, step / max(1, steps - 1))


def train_one_epoch(pretrainer: Pretrainer, run: Run, args) -> None:
    """Train for the rest of the current epoch; `run.stopped` says that a signal ended it early."""
    pretrainer.train()
    if run.position == 0:
        pretrainer.before_epoch(run.epoch)
    length = pretrainer.model.patch_embed.num_patches
    for micro in run.micro_batches("pretrain"):
        imgs = micro.batch.image.to(run.device, non_blocking=True)
        indices = micro.batch.index.to(run.device, non_blocking=True)
        noise = sample_noise(args.seed, run.epoch, indices, length)
        pretrainer.first_batch(imgs)
        with run.forward_context(micro):
            loss, _, _ = run.wrapped(imgs, mask_ratio=mask_ratio_at(run.step, run.total_steps, args), noise=noise)
            run.backward(micro, loss, **pretrainer.parts)
        if micro.closes:
            pretrainer.after_update(imgs, run.step, run.scaler.applied)
            run.meter.add(**pretrainer.metrics())
            for method in pretrainer.looking(run.step):
                with run.untimed():
                    run.meter.add(**method.look(pretrainer, imgs, run.step))


@torch.no_grad()
def evaluate_reconstruction(pretrainer: Pretrainer, imgs, noise, mask_ratio: float) -> float:
    """Reconstruction loss of fixed images under fixed masks: comparable between epochs."""
    pretrainer.eval()
    loss, _, _ = pretrainer.model(imgs, mask_ratio=mask_ratio, noise=noise)
    pretrainer.train()
    return loss.item()
