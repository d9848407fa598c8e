"""Labels beside a reader's own: sets of labels from a list file (weak supervision by hashtags, Singh et al. 2023, "The
effectiveness of MAE pre-pretraining for billion-scale pretraining"), and made-up label noise for studies."""

import os
from collections import Counter

import numpy as np
import torch

from util.data.file_lists import read_lines, read_list, sorted_labels
from util.data.readers import need_path, read_images
from util.data.sources import Files, Images, Subset
from util.errors import UserError

NOISE = 0x6E6F6973  # a stream of random numbers of its own beside --seed


class Relabelled(Subset):
    """Another list's images with other labels."""

    def __init__(self, images: Images, targets: list):
        super().__init__(images, range(len(images)))
        self.targets = targets

    def target(self, index):
        return self.targets[index]


class LabelSets(Relabelled):
    """Images with several labels: `targets` are tuples of places in `classes`, rising and never empty."""

    def __init__(self, images: Images, targets: list[tuple[int, ...]], classes: list[str]):
        super().__init__(images, targets)
        self.classes = classes

    def target(self, index) -> torch.Tensor:
        """(classes,) float32: equal shares that sum to one, for the image's labels."""
        row = torch.zeros(len(self.classes))
        row[list(self.targets[index])] = 1 / len(self.targets[index])
        return row


def read_labelled(args, train: bool, vocabulary: list[str] | None = None):
    """The images of one split, with what `--targets` asks for. `vocabulary` (of a checkpoint) is used where
    `--label_vocab` gives none. UserError for lists without labels, and labels outside the vocabulary."""
    if args.targets == "single":
        return read_images(args, train)
    path = args.train_list if train else args.val_list
    images, names = _read_label_sets(args, path)
    source = f"--label_vocab {args.label_vocab}" if args.label_vocab else "the checkpoint's vocabulary"
    if args.label_vocab:
        vocabulary = read_vocabulary(args.label_vocab)
    elif vocabulary is None:
        source = args.train_list
        known = names if train else _read_label_sets(args, args.train_list)[1]
        vocabulary = sorted_labels(label for labels in known for label in labels)
    index = {label: place for place, label in enumerate(vocabulary)}
    unknown = next((label for labels in names for label in labels if label not in index), None)
    if unknown is not None:
        raise UserError(f"the list file {path} has the label {unknown!r}, which {source} has not")
    return LabelSets(images, [tuple(sorted(index[label] for label in labels)) for labels in names], vocabulary)


def _read_label_sets(args, path: str) -> tuple[Images, list[set[str]]]:
    root = need_path(args)
    paths, lines = read_list(path, root, args.allow_outside)
    if lines is None:
        raise UserError(f"the list file {path} has no labels; --targets multilabel wants path<TAB>label,label,...")
    names = [{label.strip() for label in line.split(",")} - {""} for line in lines]
    if not all(names):
        raise UserError(f"the list file {path} has no label for {paths[names.index(set())]}: leave that line out")
    return Files(paths, [-1] * len(paths), None, "" if args.allow_outside else os.path.realpath(root)), names


def read_vocabulary(path: str) -> list[str]:
    """The lines of `--label_vocab`: place in the file is place in the head. UserError when they are not different
    names."""
    names = [line.strip() for line in read_lines(path, "--label_vocab")]
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None or len(names) < 2:
        what = f"names {twice!r} twice" if twice is not None else f"has {len(names)} labels"
        raise UserError(f"--label_vocab {path} {what}: two or more different labels are needed, one per line")
    return names


# Noise ----------------------------------------------------------------------------------------------------------------


def with_noise(images, args):
    """Training images with `--label_noise`; drawn once from `--seed`, so it is the same for any workers and ranks."""
    if not args.label_noise:
        return images
    if not isinstance(images, Images) or min(map(_first, images.targets), default=-1) < 0:
        raise UserError(f"--label_noise needs labels that are known beforehand; --dataset {args.dataset} has none")
    rng = np.random.default_rng([args.seed, NOISE])
    several = isinstance(images, LabelSets)
    noisy = (hashtag_noise if several else uniform_noise)(images.targets, len(images.classes), args.label_noise, rng)
    changed = sum(before != after for before, after in zip(images.targets, noisy))
    print(f"--label_noise {args.label_noise:g}: {changed} of {len(noisy)} training images have other labels")
    return LabelSets(images, noisy, images.classes) if several else Relabelled(images, noisy)


def _first(target) -> int:
    return target if isinstance(target, int) else target[0]


def uniform_noise(targets: list[int], classes: int, share: float, rng: np.random.Generator) -> list[int]:
    """With probability `share` a label is replaced by one of the others, all equally likely."""
    replaced = rng.random(len(targets)) < share
    shifts = rng.integers(1, max(2, classes), len(targets))
    return [int((target + shift * hit) % classes) for target, shift, hit in zip(targets, shifts, replaced)]


def hashtag_noise(targets: list[tuple], classes: int, share: float, rng: np.random.Generator) -> list[tuple]:
    """As hashtags are wrong: each label is forgotten with probability `share`, and for each another one is added with
    probability `share`, drawn by how often labels occur, as popular ones spread. A set that would be empty gets one
    drawn like that, if need be a right one."""
    counts = np.bincount(np.concatenate(targets), minlength=classes)
    flat = np.cumsum(counts / counts.sum())
    noisy = []
    for labels in targets:
        kept = [label for label, forgotten in zip(labels, rng.random(len(labels)) < share) if not forgotten]
        extra = int((rng.random(len(labels)) < share).sum())
        drawn = np.searchsorted(flat, rng.random(max(extra, 0 if kept else 1)), side="right")
        noisy.append(tuple(sorted({*kept, *(min(int(label), classes - 1) for label in drawn)})))
    return noisy
