"""Semantic segmentation as the labelled task of MLO-MAE (Guo et al., Section 4.5, Table 9), with a linear head on patch
tokens.

The head predicts one distribution over the classes per patch. With logits that are constant within a patch, the
cross-entropy of all pixels depends on the labels only through the number of pixels that each class has in each patch,
so these counts are the targets: no logits are made at the resolution of the image.

Shapes: N images, L patches, D encoder width, C classes.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from methods.mlo.labelled_task import LabelledTask, without
from models_encoder import encoder_features
from util.compute.precision import widened
from util.data.dense.annotated import Segmented, SegmentedPart
from util.data.dense.paired import build_paired_loader
from util.data.dense.patch_labels import PatchLabels
from util.data.dense.segmentation import read_segmentation
from util.data.image_format import image_shape
from util.data.images import BROKEN_IMAGE, printable
from util.data.leak import check_leak
from util.data.readers import read_images
from util.data.samples import BadAnnotation
from util.data.sources import Files
from util.errors import UserError
from util.parallel.distributed import all_reduce_sum, from_main_process_or_error

UNKNOWNS = 100_000  # of a head that is solved: conjugate gradients in float64, on the tokens of a whole batch
SURVEYED = 2000  # masks of each side of the split that are read to find classes without pixels


def segmented_images(args) -> Segmented:
    """Return the images and masks of `--mlo_labels`: those of the training split of `--dataset`, or of the data set
    `--mlo_dataset` in another folder. Settles `args.zero_is_ignored`. Raises UserError when they cannot be read."""
    same = args.mlo_labels == "same"
    own = {} if same else {"dataset": args.mlo_dataset or "masks", "data_path": args.mlo_labels}
    flags = argparse.Namespace(**vars(args) | own)
    try:
        labelled = read_segmentation(flags, train=True)
        if args.check_leak and not same:
            check_leak(labelled, read_images(flags, train=False), "--mlo_labels and --check_leak")
    except UserError as error:  # the readers name the flags of other commands
        message = str(error) if same else str(error).replace("--data_path", "--mlo_labels")
        raise type(error)(message if same else message.replace("--dataset", "--mlo_dataset")) from error
    args.zero_is_ignored = flags.zero_is_ignored
    if len(labelled.categories) < 2:
        raise UserError("--mlo_labels: the masks have only one class, so there is nothing to learn from")
    return labelled


def random_split(count: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Return the indices of the images for training and of those held out, a random `fraction` of all. Raises UserError
    when one of the two would be empty."""
    held = round(fraction * count)
    if count < 2:
        raise UserError("--mlo_labels: there is only one image, so it cannot be split")
    if not 0 < held < count:
        side = "III" if held < 1 else "II"
        raise UserError(
            f"--mlo_val_fraction {fraction:g} leaves none of the {count} labelled images for stage {side}: a fraction "
            f"between {1 / count:.2g} and {1 - 1 / count:.2g} fits"
        )
    order = np.random.default_rng(seed).permutation(count).tolist()
    return sorted(order[held:]), sorted(order[:held])


def missing_classes(images: Segmented, limit: int = SURVEYED) -> tuple[list[str], int]:
    """Return the classes that no mask has, and the number of masks that were read: all, or `limit` evenly spaced ones,
    or fewer if they have all classes."""

    def labels_of(index: int) -> np.ndarray:
        try:
            return np.unique(images.annotation(index, images.open(index).size))
        except BadAnnotation:
            raise
        except BROKEN_IMAGE:  # counted when it is used
            return np.zeros(0, int)

    indices = np.unique(np.linspace(0, len(images) - 1, min(limit, len(images))).astype(int)).tolist()
    missing, read = set(range(len(images.categories))), 0
    with ThreadPoolExecutor() as pool:  # decoding releases the GIL
        while missing and read < len(indices):
            some = indices[read : read + 64]
            missing -= set(np.concatenate(list(pool.map(labels_of, some))).tolist())
            read += len(some)
    return [images.categories[label] for label in sorted(missing)], read


def note_missing(images: Segmented, stages: str) -> None:
    """Print a note if a class occurs in none of the masks of these stages."""
    names, read = from_main_process_or_error(lambda: missing_classes(images))
    if names:
        part = "" if read == len(images) else " that were read"
        print(
            f"note: {len(names)} classes occur in none of the {read} masks of {stages}{part}, among them "
            f"{printable(names[0])!r}"
        )


class Segmentation(LabelledTask):
    """Segmentation by a linear head on patch tokens: features (N·L, D), logits (N·L, C), targets (N, L, C + 1) int32,
    the pixels of each class in each patch, and in the last column those that are ignored."""

    def __init__(self, args, images, model):
        super().__init__(args)
        self.patch, self.solved = tuple(model.patch_embed.patch_size), args.mlo_stage2 == "solve"
        labelled = segmented_images(args)
        self.classes = len(labelled.categories)
        train, self.held_out = random_split(len(labelled), args.mlo_val_fraction, args.seed)
        self.val_images = SegmentedPart(labelled, self.held_out)
        self.train_images = without(SegmentedPart(labelled, train), self.val_images)
        # Made-up scenes have no files to compare: both lists are the same.
        own = args.mlo_labels == "same" and not isinstance(labelled, Files)
        self.pretrain_images = self.train_images if own else without(images, self.val_images)
        note_missing(self.train_images, "stage II")
        note_missing(self.val_images, "stage III")

    def loader(self, images, transform, batch_size, num_workers, seed):
        size = image_shape(self.args.input_size)
        paired = PatchLabels(transform, size, images.ignore_label, self.patch, self.classes)
        return build_paired_loader(images, paired, self.args, batch_size, True, num_workers, seed)

    def head(self, width):
        unknowns = (width + 1) * self.classes
        if self.solved and unknowns > UNKNOWNS:
            raise UserError(
                f"--mlo_stage2 solve: the head has {unknowns:,} weights for {self.classes} classes, more than the "
                f"{UNKNOWNS:,} that can be solved for: take --mlo_stage2 linear, or a narrower --model"
            )
        return super().head(width)

    @staticmethod
    def features(encoder, imgs: torch.Tensor) -> torch.Tensor:
        """Return the tokens (N·L, D) of whole images, every patch visible, in float32 or wider."""
        return encoder_features(encoder, imgs, "none").flatten(0, 1)

    @staticmethod
    def loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the cross-entropy of the labelled pixels, divided by the number of all pixels: then the mean over
        ranks is the loss of one process with the whole batch."""
        logs = widened(logits).log_softmax(dim=-1)
        counts = targets.flatten(0, 1).to(logs.dtype)
        return -(counts[:, :-1] * logs).sum() / counts.sum()

    def logged(self, loss: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the metrics of a batch of stage III, scores over the labelled pixels of all ranks in percent: pixel
        accuracy, and the mean intersection over union of the classes that occur or are predicted in the batch."""
        matrix = all_reduce_sum(confusion(logits.detach(), targets)).double()
        right = matrix.diagonal()
        unions = matrix.sum(dim=0) + matrix.sum(dim=1) - right
        ious = right / unions.clamp_min(1)
        return {
            "stage3_loss": loss.detach(),
            "stage3_pixel_acc": (100 * right.sum() / matrix.sum().clamp_min(1)).float(),
            "stage3_mIoU": (100 * ious.sum() / (unions > 0).sum().clamp_min(1)).float(),
        }


def confusion(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the number of pixels (C, C) int64 for each predicted class (rows) and each true class, from logits (N·L,
    C) and targets (N, L, C + 1)."""
    counts = targets.flatten(0, 1)[:, :-1].long()
    return counts.new_zeros(counts.shape[1], counts.shape[1]).index_add(0, logits.argmax(dim=-1), counts)
