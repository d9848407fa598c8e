"""The labelled task of MLO-MAE (stages II and III), whose loss trains the masking network: its images, head and loss.

`LabelledTask` is what tasks share, `Classification` the task of the paper; `segmentation_task.py` has another one.
"""

import math
from abc import ABC, abstractmethod

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import train_test_split
from torch import nn
from torchvision import transforms

from models_encoder import encoder_features
from util.data.build import build_loader
from util.data.dense.annotated import Segmented, SegmentedPart
from util.data.file_lists import RealPaths
from util.data.image_folders import image_folder
from util.data.image_format import image_shape, mean_std
from util.data.leak import check_leak
from util.data.loader import Endless, Loader
from util.data.sources import Files, Images, Subset
from util.data.splits import hold_out
from util.data.transforms import eval_transform, pretrain_transform
from util.errors import UserError
from util.parallel.distributed import average, get_world_size


def labelled_images(args, images) -> Images:
    """Return the images of `--mlo_labels`: the pretraining `images`, or the train/ of another image folder. Raises
    UserError when they cannot be read, when they have no labels, and when they are a stream."""
    if args.mlo_labels == "same":
        labelled, source = images, f"--dataset {args.dataset}"
    else:
        source = f"--mlo_labels {args.mlo_labels}"
        labelled = image_folder(args.mlo_labels, train=True, flag="--mlo_labels")
        if args.check_leak:
            held_out = image_folder(args.mlo_labels, train=False, flag="--mlo_labels")
            check_leak(labelled, held_out, "--mlo_labels and --check_leak")
    if not isinstance(labelled, Images):
        raise UserError(f"--mlo_labels same cannot use {source}, a stream: give a folder with train/<class>/")
    if labelled.classes is None:
        raise UserError(f"--mlo_labels needs labels, and {source} has none: give a folder with train/<class>/")
    return labelled


def stratified_split(images: Images, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the images for training and of those held out. About `fraction` of every class is held out,
    drawn at random: whole groups if the images have any. Raises UserError when one of the two would have no image of a
    class."""
    targets = np.asarray(images.targets)
    labels, counts = np.unique(targets, return_counts=True)
    names = [images.classes[label] for label in labels]
    too_small = [name for name, count in zip(names, counts) if count < 2]
    if too_small:
        raise UserError(f"--mlo_labels: class {too_small[0]!r} has fewer than two images, so it cannot be split")
    if len(labels) < 2:
        raise UserError("--mlo_labels: there is only one class, so there is nothing to learn from")
    if images.groups is not None:
        return _split_groups(images, fraction, seed)
    held = max(len(labels), round(fraction * len(targets)))
    if len(targets) - held >= len(labels):
        train, val = train_test_split(np.arange(len(targets)), test_size=held, stratify=targets, random_state=seed)
        present = [len(np.unique(targets[indices])) for indices in (train, val)]
    if len(targets) - held < len(labels) or min(present) < len(labels):
        smallest = 1 / counts.min()
        raise UserError(
            f"--mlo_val_fraction {fraction:g} leaves class {names[counts.argmin()]!r} of {counts.min()} images empty "
            f"on one side: a fraction between {min(smallest, 0.5):.2g} and {max(1 - smallest, 0.5):.2g} fits"
        )
    return sorted(train.tolist()), sorted(val.tolist())


def _split_groups(images: Images, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Divide the images as `stratified_split`, group by group."""
    held = hold_out(images.groups, [(target,) for target in images.targets], fraction, salt=f"{seed} ")
    targets = np.asarray(images.targets)
    for part, chosen in (("stage II", ~held), ("stage III", held)):
        missing = np.setdiff1d(targets, targets[chosen])
        if len(missing):
            raise UserError(
                f"--mlo_val_fraction {fraction:g} leaves no image of class {images.classes[missing[0]]!r} for {part}: "
                f"its images are in too few groups of --group_column"
            )
    return np.flatnonzero(~held).tolist(), np.flatnonzero(held).tolist()


def without(images, others: Subset):
    """Return `images` without the files that are also in `others`, under the same or another path. Prints a note if the
    images are not files and come from different readers, so that they cannot be compared."""
    whole = images.images if isinstance(images, Subset) else images
    if not isinstance(whole, Files) or not isinstance(others.images, Files):
        if whole is not others.images:
            print(
                "note: the images for pretraining and the labelled images come from different readers and cannot be "
                "compared; an image in both may be held out for stage III and yet be used in stage I"
            )
        return images
    real = RealPaths()
    excluded = {real(others.name(index)) for index in range(len(others))}
    indices = [index for index in range(len(images)) if real(images.name(index)) not in excluded]
    part = SegmentedPart if isinstance(images, Segmented) else Subset
    return images if len(indices) == len(images) else part(images, indices)


class StandardizedLinear(nn.Linear):
    """A linear layer on standardised features, like the BatchNorm without affine parameters and the linear layer of
    MAE's linear probe (He et al. 2022, Appendix A.1).

    The statistics are running means over the batches given to `observe`, the same on every rank. No gradient flows
    through them."""

    MOMENTUM, EPS = 0.1, 1e-6
    mean: torch.Tensor
    square: torch.Tensor
    observed: torch.Tensor

    def __init__(self, width: int, classes: int):
        super().__init__(width, classes)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("square", torch.ones(width))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64))

    def observe(self, features: torch.Tensor) -> None:
        """Update the statistics with a batch of features (N, width) from each rank."""
        features = features.detach().to(self.mean.dtype)
        share = torch.where(self.observed == 0, 1.0, self.MOMENTUM).to(self.mean.dtype)
        for buffer, new in zip((self.mean, self.square), average([features.mean(0), features.square().mean(0)])):
            buffer.lerp_(new, share)
        self.observed += 1

    def forward(self, features):
        variance = (self.square - self.mean.square()).clamp_min(0) + self.EPS
        return super().forward((features - self.mean) * variance.rsqrt())


class LabelledTask(ABC):
    """What the tasks share: batches of both stages, and a linear head.

    A subclass sets `classes`, `held_out` (the indices of the images of stage III among the labelled ones), and the
    images of the stages: `pretrain_images`, `train_images` and `val_images`. M is the number of features of a batch.
    """

    standardized = False  # whether the head standardises its features
    classes: int
    held_out: list[int]
    pretrain_images: Images
    train_images: Images
    val_images: Images

    def __init__(self, args):
        self.args, self.standardized = args, args.mlo_head_norm

    def batches(self, every: tuple[int, int]) -> tuple[Endless, Endless]:
        """Return the batches of stage II (augmented as in pretraining) and of stage III (transformed as in evaluation).
        `every` is the number of training steps per batch of either stage; that stage gets `--num_workers` divided by
        it. Raises UserError when a stage has too few images for a batch."""
        args, size = self.args, image_shape(self.args.input_size)
        mean, std = mean_std(args.dataset, args.in_chans, args.mean, args.std)
        stages = (
            (2, self.train_images, pretrain_transform(args.aug, size, mean, std, args.crop_pct)),
            (3, self.val_images, eval_transform(size, mean, std, args.crop_pct)),
        )
        batch_size = args.mlo_batch_size or args.batch_size
        loaders = []
        for (stage, images, transform), steps in zip(stages, every):
            if len(images) < batch_size * get_world_size():
                raise UserError(
                    f"--mlo_batch_size {batch_size} is more than the {len(images)} labelled images of stage "
                    f"{'I' * stage} allow on {get_world_size()} process(es): lower it"
                )
            workers = math.ceil(args.num_workers / steps)
            seed = args.seed + 1_000_003 * stage  # crops other than those of stage I
            loaders.append(Endless(self.loader(images, transform, batch_size, workers, seed)))
        return loaders[0], loaders[1]

    @abstractmethod
    def loader(self, images, transform: transforms.Compose, batch_size: int, num_workers: int, seed: int) -> Loader:
        """Return the training loader of labelled images; `transform` is that of images alone."""

    @abstractmethod
    def features(self, encoder, imgs: torch.Tensor) -> torch.Tensor:
        """Return the features (M, D) of whole images, every patch visible, in float32 or wider."""

    @staticmethod
    @abstractmethod
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the loss of logits (M, classes). It is convex in them, and the mean of its values on equal parts of a
        batch is its value on the batch."""

    @abstractmethod
    def logged(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the metrics of a batch of stage III."""

    def head(self, width: int) -> nn.Module:
        """Return a new head, from features (M, width) to logits (M, classes)."""
        head = (StandardizedLinear if self.standardized else nn.Linear)(width, self.classes)
        nn.init.trunc_normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)
        return head

    def observe(self, head: nn.Module, features: torch.Tensor) -> None:
        """Update the statistics of a standardised head, before it takes a step on `features`."""
        if isinstance(head, StandardizedLinear):
            head.observe(features)


class Classification(LabelledTask):
    """Classification of whole images from one feature vector, with a linear head."""

    def __init__(self, args, images, model):
        super().__init__(args)
        self.pool = args.mlo_feature
        labelled = labelled_images(args, images)
        self.classes = len(labelled.classes)
        train, self.held_out = stratified_split(labelled, args.mlo_val_fraction, args.seed)
        self.val_images = Subset(labelled, self.held_out)
        # Stages I and II use no image of stage III, also not one that is listed twice or under another path.
        self.train_images = without(Subset(labelled, train), self.val_images)
        self.pretrain_images = self.train_images if labelled is images else without(images, self.val_images)

    def loader(self, images, transform, batch_size, num_workers, seed):
        return build_loader(images, transform, self.args, batch_size, train=True, num_workers=num_workers, seed=seed)

    def features(self, encoder, imgs):
        return encoder_features(encoder, imgs, self.pool)

    @staticmethod
    def loss(logits, targets):
        return F.cross_entropy(logits, targets)

    @staticmethod
    def score(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the top-1 accuracy in percent, a scalar on the device."""
        return 100.0 * (logits.argmax(dim=-1) == targets).float().mean()

    def logged(self, loss, logits, targets):
        return {"stage3_loss": loss.detach(), "stage3_top1": self.score(logits.detach(), targets)}
