"""The task that guides a masking network (stages II and III of MLO-MAE): its labelled images, its head, its loss.

Another task (a label per patch, say) is another class with the methods of `Classification`.
"""

import copy
import math
import os

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import nn

from models_encoder import encoder_features
from util.data.build import build_loader
from util.data.image_format import input_size, mean_std
from util.data.leak import check_leak
from util.data.loader import Endless
from util.data.readers import read_images
from util.data.sources import Files, Images, Subset
from util.data.transforms import eval_transform, pretrain_transform
from util.errors import UserError
from util.parallel.distributed import average, get_world_size


def labelled_images(args, images) -> Images:
    """The images of `--mlo_labels`: those that are pretrained on, or the train/ of another image folder."""
    if args.mlo_labels == "same":
        found, where = images, f"--dataset {args.dataset}"
    else:
        other = copy.copy(args)
        other.dataset, other.data_path, where = "imagefolder", args.mlo_labels, f"--mlo_labels {args.mlo_labels}"
        try:
            found = read_images(other, train=True)
            if args.check_leak:
                check_leak(found, read_images(other, train=False), "--mlo_labels and --check_leak")
        except UserError as error:
            raise UserError(str(error).replace("--data_path", "--mlo_labels")) from None
    if not isinstance(found, Images):
        raise UserError(f"--mlo_labels same cannot use {where}, a stream: give a folder with train/<class>/")
    if found.classes is None:
        raise UserError(f"--mlo_labels needs labels, and {where} has none: give a folder with train/<class>/")
    return found


def stratified_split(images: Images, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Places (for training, held out), `fraction` of every class held out. UserError where a class would be empty."""
    targets = np.asarray(images.targets)
    labels, counts = np.unique(targets, return_counts=True)
    names = [images.classes[label] for label in labels]
    scarce = [name for name, count in zip(names, counts) if count < 2]
    if scarce:
        raise UserError(f"--mlo_labels: class {scarce[0]!r} has fewer than two images, so it cannot be split")
    if len(labels) < 2:
        raise UserError("--mlo_labels: there is only one class, so there is nothing to learn from")
    held = max(len(labels), round(fraction * len(targets)))
    if len(targets) - held >= len(labels):
        train, val = train_test_split(np.arange(len(targets)), test_size=held, stratify=targets, random_state=seed)
        left = [len(np.unique(targets[places])) for places in (train, val)]
    if len(targets) - held < len(labels) or min(left) < len(labels):
        fits = 1 / counts.min()
        raise UserError(
            f"--mlo_val_fraction {fraction:g} leaves class {names[counts.argmin()]!r} of {counts.min()} images empty "
            f"on one side: a fraction between {min(fits, 0.5):.2g} and {max(1 - fits, 0.5):.2g} fits"
        )
    return sorted(train.tolist()), sorted(val.tolist())


def without(images, others: Subset):
    """`images` less those that are the same files as `others`; a printed note where that cannot be told."""
    whole = images.images if isinstance(images, Subset) else images
    if not isinstance(whole, Files) or not isinstance(others.images, Files):
        if whole is not others.images:
            print(
                "note: images for pretraining and labelled ones come from different readers: if they share images, "
                "stage I sees what stage III holds out"
            )
        return images
    taken = {os.path.realpath(others.name(place)) for place in range(len(others))}
    places = [place for place in range(len(images)) if os.path.realpath(images.name(place)) not in taken]
    return images if len(places) == len(images) else Subset(images, places)


class StandardizedLinear(nn.Linear):
    """Of features that are standardised first, as by the BatchNorm without scale of MAE's linear probe (A.1).

    The statistics are running ones, the same on every rank, and constants wherever this is differentiated: a step of
    the head sees what `observe` saw last."""

    MOMENTUM, EPS = 0.1, 1e-6

    def __init__(self, width: int, classes: int):
        super().__init__(width, classes)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.ones(width))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))

    def observe(self, features: torch.Tensor) -> None:
        """Count a batch of features (N, width) of every rank in."""
        features = features.detach().to(self.mean.dtype)
        share = torch.where(self.observed == 0, 1.0, self.MOMENTUM).to(self.mean.dtype)
        for buffer, new in zip((self.mean, self.square), average([features.mean(0), features.square().mean(0)])):
            buffer.lerp_(new, share)
        self.observed += 1

    def forward(self, features):
        spread = (self.square - self.mean.square()).clamp_min(0) + self.EPS
        return super().forward((features - self.mean) * spread.rsqrt())


class Classification:
    """Classify the whole image from one feature vector, with a linear head."""

    standardized = False  # the head's features

    def __init__(self, args, images):
        self.pool, self.standardized, self.args = args.mlo_feature, args.mlo_head_norm, args
        labelled = labelled_images(args, images)
        self.classes = len(labelled.classes)
        train, self.held_out = stratified_split(labelled, args.mlo_val_fraction, args.seed)
        self.val_images = Subset(labelled, self.held_out)
        # Stages I and II see nothing of stage III, neither a file that is listed twice nor one under another path.
        self.train_images = without(Subset(labelled, train), self.val_images)
        self.pretrain_images = self.train_images if labelled is images else without(images, self.val_images)

    def batches(self, every: tuple[int, int]) -> tuple[Endless, Endless]:
        """Of stage II (augmented like the pretraining) and of stage III (as images are evaluated), which are asked for
        one batch in so many steps."""
        args, size, (mean, std) = self.args, input_size(self.args), mean_std(self.args)
        kinds = (
            pretrain_transform(args.aug, size, mean, std, args.crop_pct),
            eval_transform(size, mean, std, args.crop_pct),
        )
        batch_size = args.mlo_batch_size or args.batch_size
        found = []
        for stage, images, transform in zip((2, 3), (self.train_images, self.val_images), kinds):
            if len(images) < batch_size * get_world_size():
                raise UserError(
                    f"--mlo_batch_size {batch_size} is more than the {len(images)} labelled images of stage "
                    f"{'I' * stage} on {get_world_size()} process(es): lower it"
                )
            here = copy.copy(args)
            here.seed += 1_000_003 * stage  # other crops than stage I's
            here.num_workers = math.ceil(args.num_workers / every[stage - 2])
            found.append(Endless(build_loader(images, transform, here, batch_size, train=True)))
        return found[0], found[1]

    def head(self, width: int) -> nn.Module:
        """From features (N, width) to logits."""
        head = (StandardizedLinear if self.standardized else nn.Linear)(width, self.classes)
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def observe(self, head: nn.Module, features: torch.Tensor) -> None:
        """What a head must know of its features before it takes a step on them."""
        if self.standardized:
            head.observe(features)

    def features(self, encoder, imgs: torch.Tensor) -> torch.Tensor:
        """Of the whole image, every patch visible: (N, D) float32 or wider."""
        return encoder_features(encoder, imgs, self.pool)

    @staticmethod
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, targets)

    @staticmethod
    def score(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Top-1 in percent, on the device."""
        return 100.0 * (logits.argmax(dim=-1) == targets).float().mean()

    def logged(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is said of stage III."""
        return {"stage3_loss": loss.detach(), "stage3_top1": self.score(logits.detach(), targets)}
