"""The linear probe on features that are computed once (`--cache_features`): one head per learning rate, of which a
held-out part of the training images chooses one."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.features import extract
from evaluation.publish import Destination, publish
from evaluation.scores import balanced_scores
from util.checkpoint.atomic import write_tensors
from util.checkpoint.output_dir import make_output_dir
from util.checkpoint.retry import GrowingFile, Saver
from util.checkpoint.same_run import plain
from util.compute.precision import choose_amp_dtype
from util.data.build import build_loader
from util.data.labels import balanced_weights
from util.errors import UserError
from util.lars import LARS
from util.lr_sched import adjust_learning_rate
from util.parallel.distributed import barrier, from_main_process, is_main_process, shut_down
from util.report.ledger import Record, hardware
from util.report.log import log_line
from util.training.announcements import Summary, announce, closing, opening
from util.training.losses import build_criterion

CLASSIFIER = "probe.pth"  # the encoder with the chosen head of --cache_features, for --eval and tools/


def probe_head(linear: nn.Linear, *before: nn.Module) -> nn.Sequential:
    """Return `linear` behind a BatchNorm without affine parameters, which standardises the features; the modules
    `before` come first."""
    return nn.Sequential(*before, nn.BatchNorm1d(linear.in_features, affine=False, eps=1e-6), linear)


def hold_out(labels: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return indices (rest, held out). About `share` of each class is held out, drawn at random: at least one image,
    unless it is the only one, which stays in the rest."""
    generator = torch.Generator().manual_seed(seed)
    rest, held = [labels.new_empty(0)], [labels.new_empty(0)]
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)]
        count = min(len(members) - 1, max(1, round(share * len(members))))
        held.append(members[:count])
        rest.append(members[count:])
    return torch.cat(rest), torch.cat(held)


def train_heads(features, labels, args, after_epoch=lambda: None) -> tuple[nn.BatchNorm1d, list[nn.Linear]]:
    """Train one linear head per base rate of `--probe_blrs` on features (M, D) and labels (M,), all on the same
    batches, by LARS. A head's learning rate is its base rate times `--lr`. `after_epoch` is called after each epoch.
    Returns the heads' common BatchNorm, and the heads."""
    device, generator = features.device, torch.Generator().manual_seed(args.seed)
    norm = nn.BatchNorm1d(features.shape[1], affine=False, eps=1e-6).to(device)
    heads = [nn.Linear(features.shape[1], args.nb_classes).to(device) for _ in args.probe_blrs]
    for head in heads:
        nn.init.normal_(head.weight, std=0.01, generator=torch.Generator(device).manual_seed(args.seed))
        nn.init.zeros_(head.bias)
    groups = [{"params": head.parameters(), "lr_scale": blr} for head, blr in zip(heads, args.probe_blrs)]
    optimizer = LARS(groups, weight_decay=args.weight_decay)
    weights = None if args.class_weights == "none" else balanced_weights(labels.tolist(), args.nb_classes)
    criterion = build_criterion(False, "single", 0.0, weights=weights).to(device)
    batch_size = min(args.batch_size, len(features))
    batches = len(features) // batch_size
    for epoch in range(args.epochs):
        order = torch.randperm(len(features), generator=generator).to(device)
        for i in range(batches):
            adjust_learning_rate(optimizer, epoch + i / batches, args)
            batch = order[i * batch_size : (i + 1) * batch_size]
            x = norm(features[batch])
            loss: Any = sum(criterion(head(x), labels[batch]) for head in heads)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        after_epoch()
    return norm.eval(), heads


@torch.no_grad()
def accuracy(norm, head, features, labels) -> tuple[float, float]:
    """Return the top-1 and top-5 accuracy in percent."""
    ranked = head(norm(features)).topk(min(5, head.out_features), dim=1).indices == labels[:, None]
    return 100 * ranked[:, 0].float().mean().item(), 100 * ranked.any(dim=1).float().mean().item()


def encode(model, loader, args, device, split: str) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the features (M, D) of all readable images, on the main process (None on the others), and their labels
    (M,), on all; both on the CPU. `split` names the images beside the progress bar."""
    dtype = choose_amp_dtype(args.amp_dtype, device)
    return extract(model.forward_features, loader, device, dtype, f"encoding {split} images")


def split_and_settle(args, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the images that train the heads, and of those that are held out to choose one. Settles
    `--lr` and freezes the flags. Raises UserError when there are too few images to hold any out."""
    rest, held = hold_out(labels, args.probe_holdout, args.seed)
    if len(rest) < 2 or not len(held):
        raise UserError(
            f"--probe_holdout {args.probe_holdout} of {len(labels)} training images leaves {len(held)} to choose a "
            f"head and {len(rest)} to train it: more images per class are needed"
        )
    args.lr = min(args.batch_size, len(rest)) / 256  # each head multiplies it by its base rate
    args.freeze()
    return rest, held


def chosen_head(train, test, rest, held, args, device) -> tuple[nn.Sequential, list[float], int, dict]:
    """Train the heads on the images `rest` of `train` and choose one on the images `held`; `train` and `test` are
    (features, labels). Returns the chosen head on the CPU, the held-out accuracies of all heads in percent, the index
    of the chosen one, and its scores on `test`. All ranks call it; the main process, which holds the features, trains,
    and the others receive the results."""

    def choose():
        (features, labels), (test_features, test_labels) = train, test
        norm, heads = train_heads(features[rest].to(device), labels[rest].to(device), args, after_epoch=barrier)
        held_x, held_y = features[held].to(device), labels[held].to(device)
        held_acc1 = [accuracy(norm, head, held_x, held_y)[0] for head in heads]
        best = max(range(len(heads)), key=held_acc1.__getitem__)
        top1, top5 = accuracy(norm, heads[best], test_features.to(device), test_labels.to(device))
        with torch.no_grad():
            logits = heads[best](norm(test_features.to(device))).cpu().numpy()
        scores = {"acc1": top1, "acc5": top5, **balanced_scores(logits, test_labels.numpy())}
        head = probe_head(heads[best])
        head[0].load_state_dict(norm.state_dict())
        return head.cpu(), held_acc1, best, scores

    if not is_main_process():  # the ranks stay in step, so that none times out
        for _ in range(args.epochs):
            barrier()
    return from_main_process(choose)


def train_and_choose(train, test, rest, held, args, device) -> tuple[nn.Sequential, dict]:
    """Return the head of `chosen_head`, on `device`, and the scores; print how the heads compare."""
    head, held_acc1, best, scores = chosen_head(train, test, rest, held, args, device)
    for blr, value in zip(args.probe_blrs, held_acc1):
        print(f"blr {blr:g}: {value:.2f} % on {len(held)} held-out training images")
    if len(held_acc1) > 1 and best in (0, len(held_acc1) - 1):
        print(f"note: the best rate, {args.probe_blrs[best]:g}, is at the end of --probe_blrs; try a wider list")
    scores = {f"eval/{name}": value for name, value in scores.items()}
    scores |= {"eval/holdout_acc1": held_acc1[best], "train/blr": args.probe_blrs[best]}
    return head.to(device), scores


def probe_cached(model, train_loader, test_loader, args, device) -> dict:
    """Encode both splits, train the heads, choose one on the held-out images, and make it the head of `model`. Returns
    its test accuracy in percent, its base rate, and the numbers of images. Raises UserError when too few images can be
    read."""
    model.to(device).eval()
    loaders = ((train_loader, "training"), (test_loader, "test"))
    train, test = (encode(model, loader, args, device, split) for loader, split in loaders)
    rest, held = split_and_settle(args, train[1])
    if not len(test[1]):
        raise UserError(f"none of the {len(test_loader.dataset)} test images could be read; their names are above")
    model.head, scores = train_and_choose(train, test, rest, held, args, device)
    return {**scores, "data/train_images": len(rest), "data/test_images": len(test[1])}


def run_cached(
    args, model, images, test_loader, transform, device, record: Record, summary: Summary, classifier: bool = True
) -> dict:
    """Probe with `--cache_features`, write the results, and return them; `summary` is what is printed about it. The
    images have the `transform` of those of `test_loader`. Without `classifier` no file of the encoder with its head is
    written."""
    dtype = choose_amp_dtype(args.amp_dtype, device)
    record.hardware = hardware(device, dtype)
    announce(opening(args, record, summary, device, dtype), args)
    train_loader = build_loader(images, transform, args, args.batch_size, train=False)
    result = probe_cached(model, train_loader, test_loader, args, device)
    make_output_dir(args.output_dir, args.log_dir, args.overwrite)
    top1, top5, blr = (result[name] for name in ("eval/acc1", "eval/acc5", "train/blr"))
    print(f"linear probe: top-1 {top1:.2f} %  top-5 {top5:.2f} %  (blr {blr:g})")
    saver = Saver(args.output_dir or ".", args.save_patience)
    images_seen = len(train_loader.dataset) + len(test_loader.dataset)
    if args.output_dir and is_main_process():
        log = GrowingFile(Path(args.output_dir) / "log.txt")
        log.add(log_line(result))
        saver.insist(log.path.name, log.write)
        if classifier:
            write_classifier(args, model, record.state(images_seen), saver, getattr(images, "classes", None))
    to = Destination(
        Path(args.output_dir) / "probe.json" if args.output_dir else None, args.log_dir, args.output_dir, ""
    )
    publish(record, result, images_seen, to, attempt=saver.insist)
    print(closing(args.output_dir, summary, str(Path(args.output_dir) / CLASSIFIER)))
    shut_down()
    return result


def write_classifier(args, model, origin: dict, saver: Saver, names: list[str] | None) -> None:
    """Write the encoder with the chosen head."""
    content = {
        "model": model.state_dict(),
        "args": {name: plain(value) for name, value in vars(args).items()},
        "origin": origin,
        **({"classes": list(names)} if names else {}),
    }
    saver.insist(CLASSIFIER, lambda: write_tensors(Path(args.output_dir) / CLASSIFIER, content))
