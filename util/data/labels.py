"""Labels that replace a reader's own: sets of labels from a list file (weak supervision by hashtags, Singh et al. 2023,
"The effectiveness of MAE pre-pretraining for billion-scale pretraining"), and synthetic label noise for studies."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from util.data.compact import IntList, compact
from util.data.file_lists import class_indices, read_lines, sorted_labels
from util.data.list_files import ImageList
from util.data.list_flags import open_split
from util.data.list_labels import label_sets, numbers
from util.data.readers import need_path, read_images
from util.data.sources import Files, Images, Subset
from util.errors import UserError

NOISE = 0x6E6F6973  # seeds the noise together with --seed, independently of other random numbers


class Relabelled(Subset):
    """The images of another list with different labels."""

    def __init__(self, images: Images, targets: list):
        super().__init__(images, range(len(images)))
        self.targets = targets

    def target(self, index):
        return self.targets[index]


class LabelSets(Relabelled):
    """Images with any number of labels: `targets` are ascending tuples of indices in `classes`."""

    def __init__(self, images: Images, targets: list[tuple[int, ...]], classes: list[str]):
        super().__init__(images, targets)
        self.classes = classes

    def target(self, index) -> torch.Tensor:
        """Return (classes,) float32: equal weights for the image's labels, which sum to one; zeros without labels."""
        row, labels = torch.zeros(len(self.classes)), list(self.targets[index])
        row[labels] = 1 / max(1, len(labels))
        return row


class Numbers(Relabelled):
    """Images with numbers to predict: `targets` are tuples, one number for each of the `classes`, which are the names
    of the columns. They are standardised with `mean` and `std`, one each per column."""

    def __init__(self, images: Images, targets: list[tuple[float, ...]], classes: list[str], mean, std):
        super().__init__(images, targets)
        self.classes, self.mean, self.std = classes, np.array(mean), np.array(std)

    def target(self, index) -> torch.Tensor:
        """Return the standardised numbers, (columns,) float32."""
        return torch.from_numpy((np.array(self.targets[index]) - self.mean) / self.std).float()


def read_labelled(args, train: bool, vocabulary: list[str] | None = None):
    """Return the images of one split with the labels that `--targets` selects. `vocabulary` (of a checkpoint) is used
    when `--label_vocab` is not given. Raises UserError for lists without labels and for labels not in the vocabulary.
    """
    if args.targets == "single":
        return read_images(args, train, vocabulary)
    if args.targets == "regression":
        return _read_numbers(args, train, vocabulary)
    images, names, listed = _read_label_sets(args, train)
    source = f"--label_vocab {args.label_vocab}" if args.label_vocab else "the checkpoint's vocabulary"
    if args.label_vocab:
        vocabulary = read_vocabulary(args.label_vocab)
    elif vocabulary is None:
        source = args.train_list
        known = listed if listed.source == source else _read_label_sets(args, True, announce=False)[2]
        columns = listed.columns if len(listed.columns) > 1 else []
        vocabulary = columns or sorted_labels(label for labels in _label_sets(args, known) for label in labels)
    flat = [label for labels in names for label in labels]
    index = dict(zip(flat, class_indices(flat, vocabulary, listed.source, f"in {source}")))
    return LabelSets(images, [tuple(sorted(index[label] for label in labels)) for labels in names], vocabulary)


def _read_numbers(args, train: bool, columns: list[str] | None) -> Numbers:
    """Return the images and numbers of one split. The training split settles `--targets regression`'s mean and standard
    deviation, unless a checkpoint has (`settle_units`). Raises UserError for others than the `columns` of a checkpoint.
    """
    listed, chosen = open_split(args, train, need_path(args))
    if columns and len(columns) > 1 and listed.columns != columns:
        raise UserError(
            f"the checkpoint predicts {' '.join(columns)}, but the columns here are {' '.join(listed.columns)}: give "
            f"--label_column {' '.join(columns)}"
        )
    of_split = set(chosen)
    known = {row: value for row, value in zip(*numbers(listed)) if row in of_split}
    if not known:
        part = "training" if train else "evaluation"
        raise UserError(f"the list file {listed.source} has no number for any {part} image")
    rows, values = list(known), list(known.values())
    if train and not hasattr(args, "target_mean"):
        mean, std = np.mean(values, axis=0), np.std(values, axis=0)
        if not std.all():
            raise UserError(f"the list file {listed.source} has the same number for all images: nothing can be learned")
        args.target_mean, args.target_std = mean.tolist(), std.tolist()
        print(f"targets {' '.join(listed.columns)}: mean {_shown(mean)}, standard deviation {_shown(std)}")
    return Numbers(_unlabelled(args, listed, rows), values, listed.columns, args.target_mean, args.target_std)


def _shown(values: np.ndarray) -> str:
    return " ".join(f"{value:.6g}" for value in values)


def settle_units(args, weights) -> None:
    """With `--targets regression`, take mean and standard deviation of the targets from the checkpoint (`Weights`) that
    is evaluated or resumed, if there is one: they give its outputs their units. Raises UserError if it has none."""
    if args.targets != "regression" or weights is None:
        return
    stored = [weights.args.get(name) for name in ("target_mean", "target_std")]
    if None in stored:
        raise UserError(f"{weights.path} was not trained with --targets regression: it does not predict numbers")
    args.target_mean, args.target_std = map(list, stored)


def _read_label_sets(args, train: bool, announce: bool = True) -> tuple[Images, list[set[str]], ImageList]:
    """Return the images of one split, the labels of each, and the list that they are in."""
    root = need_path(args)
    listed, rows = open_split(args, train, root, announce)
    if not listed.columns:
        raise UserError(
            f"the list file {listed.source} has no labels; --targets multilabel needs path<TAB>label,label,..."
        )
    names = _label_sets(args, listed)
    empty = sum(not labels for labels in names)
    if empty == len(names):
        raise UserError(f"the list file {listed.source} has no label for any image; --targets multilabel needs labels")
    if empty and announce:
        print(f"{listed.source}: {empty} of {len(names)} images have no label")
    return _unlabelled(args, listed, rows), [names[row] for row in rows], listed


def _label_sets(args, listed: ImageList) -> list[set[str]]:
    return label_sets(listed, "," if args.label_sep is None else args.label_sep, args.no_finding)


def _unlabelled(args, listed: ImageList, rows: Sequence[int]) -> Files:
    """Return the images in some rows of a list, without labels."""
    paths, groups = listed.of(rows)
    within = "" if args.allow_outside else os.path.realpath(need_path(args))
    return Files(paths, [-1] * len(paths), None, within, groups)


def read_vocabulary(path: str) -> list[str]:
    """Return the lines of `--label_vocab`; their order is that of the head's outputs. Raises UserError unless they are
    two or more distinct names."""
    names = [line.strip() for line in read_lines(path, "--label_vocab")]
    repeated = next((name for name, count in Counter(names).items() if count > 1), None)
    if repeated is not None or len(names) < 2:
        problem = f"repeats {repeated!r}" if repeated is not None else f"has {len(names)} labels"
        raise UserError(f"--label_vocab {path} {problem}: two or more different labels are needed, one per line")
    return names


# Balance --------------------------------------------------------------------------------------------------------------

MAJORITY = 0.8  # share of one class from which a note is printed


def note_imbalance(images, split: str) -> None:
    """Print a note if the images of a split have only one class, or if most are of one class: the top-1 accuracy then
    says little. Images whose labels are not known in advance, and other targets than classes, are passed over."""
    if not isinstance(images, Images) or not images.classes or isinstance(images, (LabelSets, Numbers)):
        return
    targets = np.asarray(images.targets, np.int64)
    counts = np.bincount(targets[targets >= 0])
    most, total = int(counts.max(initial=0)), int(counts.sum())
    label = int(counts.argmax()) if most else 0
    if most and most == total:
        print(
            f"note: all {most} {split} images are of one class, {images.classes[label]!r}: always answering it has a "
            f"top-1 of 100 %"
        )
    elif most > MAJORITY * total:
        share = 100 * most / total
        print(
            f"note: {share:.1f} % of the {total} {split} images are of the class {images.classes[label]!r}: "
            f"always answering it has a top-1 of {share:.1f} %; compare balanced_acc, and consider --class_weights "
            f"balanced or --balanced_sampler in fine-tuning and probing"
        )


def known_labels(images, flag: str) -> Any:
    """Return the labels of training images. Raises UserError, which names `flag`, if they are not known in advance."""
    if not isinstance(images, Images) or _lowest(images.targets) < 0:
        raise UserError(f"{flag} needs labels that are known in advance, which shards and streams do not have")
    return images.targets


def balanced_weights(targets: list, classes: int) -> torch.Tensor:
    """Return the weights (classes,) of `--class_weights balanced`, float32. For one label per image: images / (classes
    with images * images of the class), as in scikit-learn; 0 for a class without images. For sets of labels: images
    without the label / images with it; 1 for a label that no image has."""
    if targets and isinstance(targets[0], tuple):
        counts = np.bincount([label for labels in targets for label in labels], minlength=classes)
        return torch.from_numpy(np.where(counts, (len(targets) - counts) / np.maximum(counts, 1), 1.0)).float()
    counts = np.bincount(targets, minlength=classes)
    weights = len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return torch.from_numpy(np.where(counts, weights, 0.0)).float()


def class_weights(args, images) -> torch.Tensor | None:
    """Return the weights (classes,) of the training loss for `--class_weights`, None without any. Raises UserError if
    the labels are not known in advance."""
    if args.class_weights == "none":
        return None
    return balanced_weights(known_labels(images, "--class_weights"), args.nb_classes)


# Noise ----------------------------------------------------------------------------------------------------------------


def with_noise(images, args):
    """Return training images with `--label_noise`. The noise is drawn once, from `--seed`, so it does not depend on the
    number of workers and ranks."""
    if not args.label_noise:
        return images
    known_labels(images, "--label_noise")
    rng = np.random.default_rng([args.seed, NOISE])
    multilabel = isinstance(images, LabelSets)
    draw_noise = hashtag_noise if multilabel else uniform_noise
    noisy = draw_noise(images.targets, len(images.classes), args.label_noise, rng)
    changed = sum(before != after for before, after in zip(images.targets, noisy))
    print(f"--label_noise {args.label_noise:g}: the labels of {changed} of {len(noisy)} training images were changed")
    return LabelSets(images, noisy, images.classes) if multilabel else Relabelled(images, noisy)


def _lowest(targets: Sequence) -> int:
    """Return the lowest label of all images, -1 without images; sets of labels may be empty."""
    if isinstance(targets, IntList):
        return int(np.asarray(targets).min()) if targets else -1
    return min((target if isinstance(target, int) else min(target, default=0) for target in targets), default=-1)


def uniform_noise(targets: Sequence[int], classes: int, share: float, rng: np.random.Generator) -> Sequence[int]:
    """Replace each label with probability `share` by one of the other classes, drawn uniformly."""
    replaced = rng.random(len(targets)) < share
    shifts = rng.integers(1, max(2, classes), len(targets))
    return compact((np.asarray(targets, np.int64) + shifts * replaced) % classes)


def hashtag_noise(targets: list[tuple], classes: int, share: float, rng: np.random.Generator) -> list[tuple]:
    """Imitate the errors of hashtags: each label is dropped with probability `share`, and for each label another one is
    added with probability `share`, drawn in proportion to the labels' frequencies. A set that would become empty gets
    one label drawn in the same way, which may be a correct one; one that was empty stays so."""
    counts = np.bincount([label for labels in targets for label in labels], minlength=classes)
    cumulative = np.cumsum(counts / counts.sum())
    noisy = []
    for labels in targets:
        kept = [label for label, dropped in zip(labels, rng.random(len(labels)) < share) if not dropped]
        extra = int((rng.random(len(labels)) < share).sum())
        drawn = np.searchsorted(cumulative, rng.random(max(extra, 0 if kept or not labels else 1)), side="right")
        noisy.append(tuple(sorted({*kept, *(min(int(label), classes - 1) for label in drawn)})))
    return noisy
