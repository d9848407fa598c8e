"""The supervised loop, for fine-tuning and linear probing, and an evaluation that counts every image once."""

from pathlib import Path

import torch
import torch.nn.functional as F

from util.amp import autocast, choose_amp_dtype
from util.distributed import all_reduce_sum, is_main_process, shut_down, sync_buffers
from util.ledger import Record
from util.misc import save_on_master
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


def evaluate_once(args, model, loader, device, record: Record) -> dict[str, float]:
    """`--eval`: `evaluate`, said on the terminal and in the ledger; nothing else is written."""
    dtype = choose_amp_dtype(args.amp_dtype, device)
    stats = evaluate(loader, model, device, dtype)
    report(stats, len(loader.dataset))
    record.enter(args.output_dir, {f"test_{k}": v for k, v in stats.items()}, len(loader.dataset), device, dtype)
    shut_down()
    return stats


def report(stats: dict, count: int) -> None:
    skipped = f", {int(stats['skipped'])} unreadable ones left out" if stats["skipped"] else ""
    print(
        f"top-1 {stats['acc1']:.2f} %  top-5 {stats['acc5']:.2f} %  loss {stats['loss']:.4f} on {count} images{skipped}"
    )


def train(args, run: Run, val_loader, criterion, mixup_fn=None) -> dict[str, float]:
    """All epochs; every `--eval_freq` of them and the last are followed by an evaluation, and the best weights among
    those are kept in `checkpoint-best.pth`."""
    stats = {}
    while not run.ended and not run.stopped:
        train_one_epoch(run.module, criterion, run, mixup_fn)
        if run.stopped:
            break
        if (run.epoch + 1) % args.eval_freq and not run.ended:
            run.finish_epoch({})
            continue
        sync_buffers(run.module)
        stats = evaluate(val_loader, run.module, run.device, run.amp_dtype)
        report(stats, len(val_loader.dataset))
        if stats["acc1"] > run.best:
            run.best = stats["acc1"]
            if args.output_dir:
                content = run.content()
                best = {key: content[key] for key in ("model", "epoch", "args", "origin")}
                save_on_master(best, Path(args.output_dir) / "checkpoint-best.pth")
        run.finish_epoch({f"test_{name}": value for name, value in stats.items()} | {"best_acc1": run.best})
    if not run.stopped and is_main_process():
        run.board.hparams(vars(args), {**run.last_means, **stats})
    run.enter()
    run.close()
    return stats
