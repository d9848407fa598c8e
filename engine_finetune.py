"""The supervised loop for fine-tuning and linear probing: forward, backward, optimizer step, logging, checkpoints; and
the evaluation, which counts every readable image once.

`run.train_module` is the model; `run.ddp_model` is the same module, inside DistributedDataParallel if there are several
processes. A micro-batch is the images of one forward pass. A window of `--accum_iter` micro-batches makes one optimizer
step.
"""

from pathlib import Path
from typing import Any

import torch

from evaluation.publish import Destination, publish, write_confusion, write_scores
from evaluation.runs import columns, hparams_of
from evaluation.scores import TopK
from util.compute.precision import autocast, choose_amp_dtype
from util.data.samples import Sample
from util.parallel.distributed import shut_down, sync_buffers
from util.report.ledger import Record, hardware
from util.training.announcements import NO_SUMMARY, Summary, announce, closing, opening
from util.training.best_metric import LOWER
from util.training.finished import end_again
from util.training.losses import LOSS_NAMES
from util.training.run import Run


class Classification:
    """The task of the mains that have one target for each image: a label, a set of labels, or numbers.

    A task says what is learned and how it is scored; `train` and `evaluate_once` do the rest. `engine_dense` has those
    of segmentation and detection. `targets` is the value of `--targets`; `criterion(outputs, targets)` is the loss;
    `mixup_fn` turns (imgs, labels) into mixed images and soft targets; `score_type(device)` makes the scores.
    """

    def __init__(self, criterion: Any = None, mixup_fn=None, score_type: Any = TopK, targets: str = "single"):
        self.criterion, self.mixup_fn, self.score_type = criterion, mixup_fn, score_type
        self.loss_name = LOSS_NAMES[targets]

    def losses(self, model, samples: Sample, device: torch.device) -> dict[str, torch.Tensor]:
        """Return the losses of a micro-batch by name: scalars, whose sum is minimised. `model` is in training mode."""
        imgs = samples.image  # (N, C, H, W), on the device
        targets = samples.target.to(device, non_blocking=True)
        if self.mixup_fn is not None:
            imgs, targets = self.mixup_fn(imgs, targets)
        return {self.loss_name: self.criterion(model(imgs), targets)}

    def score(self, loader, model, device: torch.device, amp_dtype: torch.dtype):
        """Return the scores of all images of this rank, as `evaluation.scores` has them."""
        return score(loader, model, device, amp_dtype, self.score_type)

    def pictures(self) -> dict[str, torch.Tensor]:
        """Return pictures (3, H, W) of the last evaluation by name, only on the main process."""
        return {}


def train_one_epoch(run: Run, task) -> None:
    """Train for the rest of the current epoch."""
    run.train_module.train()
    for batch in run.batches():
        with run.autocast(batch):
            losses = task.losses(run.ddp_model, batch.samples, run.device)  # {name: weighted scalar}
        run.backward(losses, batch)  # adds the gradients of this micro-batch
        if batch.is_last_of_window:
            run.optimizer_step()  # sets the learning rate, clips; skips the step if a gradient is not finite
            run.finish_step()  # counts the step; logs; writes a checkpoint every --save_steps steps; notices signals


@torch.no_grad()
def score(loader, model, device, amp_dtype=torch.float32, score_type=TopK):
    """Return the scores of all images of this rank, made by `score_type(device)`, for example a class of
    `evaluation.scores`.

    `loader` must be made with `train=False`: every image is then on exactly one rank, without padding. Unreadable
    images are left out and counted as `skipped`.
    """
    model.eval()
    scores = score_type(device)
    for samples in loader.on(device).begin(0):
        targets, good = samples.target.to(device, non_blocking=True), (samples.bad == 0).to(device)
        with autocast(device, amp_dtype):
            logits = model(samples.image).float()
        scores.add(logits, targets, good)
    return scores


def evaluate(loader, model, device, amp_dtype=torch.float32, score_type=TopK) -> dict[str, float]:
    """Return the metrics of `score` over all ranks (`TopK`: top-1 and top-5 in percent, mean cross-entropy, ...)."""
    return score(loader, model, device, amp_dtype, score_type).read()


DEFAULT_TASK = Classification()


def evaluate_once(
    args,
    model,
    loader,
    device,
    record: Record,
    task: Any = DEFAULT_TASK,  # `Classification` or one of `engine_dense`
    names: list[str] | None = None,
    summary: Summary = NO_SUMMARY,
) -> dict[str, float]:
    """Run `--eval`: evaluate once, and publish the scores on the terminal, in eval.json (with details by class),
    eval_confusion.png, TensorBoard (in tensorboard-eval/ below --log_dir) and the ledger, results.jsonl. Return them.
    Leaves the process group. `names` are those of the classes; `summary` is what is printed about the evaluation."""
    dtype = choose_amp_dtype(args.amp_dtype, device)
    record.hardware = hardware(device, dtype)
    announce(opening(args, record, summary, device, dtype), args)
    with torch.no_grad():
        scores = task.score(loader, model, device, dtype)
    stats = scores.read()
    print_scores(scores, stats, len(loader.dataset))
    metrics = {f"eval/{name}": value for name, value in stats.items()}
    to = Destination(
        json=Path(args.output_dir) / "eval.json" if args.output_dir else None,
        board=Path(args.log_dir) / "tensorboard-eval" if args.log_dir else None,
        ledger=args.output_dir,
    )
    details = scores.details(names)
    pictures = write_confusion(scores, names, args.output_dir, "eval_confusion.png") | task.pictures()
    pictures = {f"eval/{name}": picture for name, picture in pictures.items()}
    publish(record, metrics, len(loader.dataset), to, pictures=pictures, details=details)
    print(closing(args.output_dir, summary, evaluated_file(args, record)))
    shut_down()
    return stats


def evaluated_file(args, record: Record) -> str:
    """Return the file whose weights were evaluated; `--resume auto` has chosen one."""
    return (record.source or {}).get("path") or args.finetune


def print_scores(scores, stats: dict, count: int) -> None:
    skipped = f", {int(stats['skipped'])} unreadable ones left out" if stats["skipped"] else ""
    print(f"{scores.summary(stats)} on {count} images{skipped}")


def save_best(run: Run, stats: dict[str, float], metric: str) -> dict[str, float]:
    """Keep the weights if their `metric` is the best so far. Return the best value for the log, {} before there is
    one."""
    if stats.get(metric) is None:
        print(f"note: these evaluation images give no {metric}, so checkpoint-best.pth is not written")
    run.checkpoints.save_best(run, stats.get(metric), lower=metric in LOWER)
    return {} if run.checkpoints.best is None else {f"eval/best_{metric}": run.checkpoints.best}


def write_last(run: Run, task, scores, stats: dict[str, float]) -> None:
    """Write the last evaluation by class: scores.json, and the confusion matrix as a picture."""
    folder, attempt = run.args.output_dir, run.checkpoints.saver.insist
    at = {"epoch": run.last_epoch, "revision": run.record.revisions[-1]}
    write_scores(scores, run.record.args, stats, run.classes, folder, attempt, **at)
    pictures = write_confusion(scores, run.classes, folder, attempt=attempt) | task.pictures()
    for name, picture in pictures.items():
        run.board.image(f"eval/{name}", picture, run.fractional_epoch())


def train(args, run: Run, val_loader, task) -> dict[str, float]:
    """Begin the run, train to its end or until a signal stops it, and close it; return the last evaluation.

    The model is evaluated every `--eval_freq` epochs and after the last one. The weights with the best score
    (`--best_metric`, else the `headline` of the scores, e.g. top-1) are kept in checkpoint-best.pth. For a run that was
    resumed at its end, only missing result files are written, and {} is returned.
    """
    stats = {}
    if run.resumed_at_end:
        end_again(run, [], lambda: run.board.hparams(hparams_of(run.record), columns()))
        return stats
    run.begin()
    while not run.ended and not run.stopped:  # ended: all steps are done; stopped: by a signal
        train_one_epoch(run, task)
        if run.stopped:
            break
        row = {}
        if (run.epoch + 1) % args.eval_freq == 0 or run.ended:
            sync_buffers(run.train_module)  # running statistics of rank 0: all ranks evaluate the same model
            with torch.no_grad():
                scores = task.score(val_loader, run.train_module, run.device, run.amp_dtype)
            stats = scores.read()
            print_scores(scores, stats, len(val_loader.dataset))
            row = {f"eval/{name}": value for name, value in stats.items()}
            row |= save_best(run, stats, args.best_metric or scores.headline)
        if run.ended:
            write_last(run, task, scores, stats)  # before the last checkpoint, after which nothing is evaluated again
        run.finish_epoch(row)  # logs the epoch; writes a checkpoint every --save_freq epochs
    if not run.stopped:
        run.board.hparams(hparams_of(run.record), columns())
    run.append_to_ledger()  # its line in results.jsonl, unless a signal stopped it
    run.close()
    return stats
