"""The supervised loop, for fine-tuning and linear probing, and an evaluation that counts every image once."""

import torch
import torch.nn.functional as F

from util.amp import autocast
from util.distributed import all_reduce_sum
from util.run import Run


def train_one_epoch(model, criterion, run: Run, mixup_fn=None) -> None:
    """Train for the rest of the current epoch. `mixup_fn` turns (imgs, labels) into mixed images and soft targets."""
    model.train()
    for micro in run.micro_batches("train"):
        imgs = micro.batch.image.to(run.device, non_blocking=True)
        targets = micro.batch.target.to(run.device, non_blocking=True)
        if mixup_fn is not None:
            imgs, targets = mixup_fn(imgs, targets)
        with run.forward_context(micro):
            loss = criterion(run.wrapped(imgs), targets)
            run.backward(micro, loss)


@torch.no_grad()
def evaluate(loader, model, device, amp_dtype=torch.float32) -> dict[str, float]:
    """Top-1 and top-5 in percent and the mean cross-entropy per image, over all ranks.

    `loader` is made with `train=False`: every image is on exactly one rank, none is padded in. Unreadable images are
    left out, and counted under `skipped`.
    """
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=device)  # loss, top-1, top-5, images, skipped
    for batch in loader.begin(0):
        targets, good = batch.target.to(device, non_blocking=True), (batch.bad == 0).to(device)
        with autocast(device, amp_dtype):
            logits = model(batch.image.to(device, non_blocking=True)).float()
        loss = F.cross_entropy(logits, targets.clamp(min=0), reduction="none")
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        columns = [loss, ranked[:, 0].float(), ranked.any(dim=1).float(), torch.ones_like(loss)]
        sums[:4] += torch.stack([(column * good).sum() for column in columns])
        sums[4] += (~good).sum()
    loss, top1, top5, count, skipped = all_reduce_sum(sums).tolist()
    count = max(count, 1.0)
    return {"loss": loss / count, "acc1": 100 * top1 / count, "acc5": 100 * top5 / count, "skipped": skipped}
