"""The interface of a pretraining method: the hooks that `methods/pretrainer.py` calls in a training step."""

import argparse

import torch
from torch import nn

from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.data.sources import Images


class Method(nn.Module):
    """A pretraining method: an `nn.Module` that changes the loss or the mask of the masked autoencoder.

    Write a subclass in a file of its own, add it to `METHODS` in `methods/__init__.py`, and give it

    - `name` (its key in checkpoints) and `title` (of its flags in `--help`);
    - `switch`, the flag that turns it on, `options`, its other flags, and `check`, which refuses bad values;
    - whichever of the four core hooks it needs. One training step calls them in this order::

        scores        which patches are removed
        patch_loss    what the predictions are compared with
        terms         what is added to the loss
        after_update  what follows the optimizer step

    Hooks that are not overridden leave plain MAE as it is. The method's networks, buffers and parameters are trained,
    moved between devices and stored in checkpoints (under `methods`) like those of any module.
    docs/adding_a_method.md develops a complete method from nothing.

    Shapes: N images, C channels, (H, W) pixels, L patches, P predicted patches (`MaskedOutput`).
    """

    name: str
    title: str  # of its group of flags in --help, with the paper's name
    summary = ""  # below the title: what it does, when to choose it
    switch: Option
    options: tuple[Option, ...] = ()  # refused when no method that has them is on
    flag: str  # of `switch`, as refusals name it
    # What it decides alone: "target" (what is predicted), "mask" (what is removed), None (it only adds terms). At most
    # one method may hold a slot.
    slot: str | None = None
    excludes: tuple[str, ...] = ()  # names of methods it cannot be combined with
    exclusive = False  # it cannot be combined with any other method

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "switch" in vars(cls):
            cls.flag = f"--{cls.switch.name}"

    # Flags --------------------------------------------------------------------------------------------------------

    @classmethod
    def enabled(cls, args: argparse.Namespace) -> bool:
        """Whether the flags turn it on."""
        return getattr(args, cls.switch.name) != cls.switch.default

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """Called when it is enabled. Raises UserError for a bad value or a flag without effect."""

    # Core hooks ---------------------------------------------------------------------------------------------------

    def scores(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor | None:
        """Scores (N, L) of the patches; those with the highest scores are removed. Slot "mask".

        imgs (N, C, H, W), normalised. `noise` (N, L) is uniform in [0, 1) and a function of (seed, epoch, image): a
        mask that is drawn from it, and not from torch's generator, is the same after a resume and on any number of
        processes. None leaves the mask random (the noise itself is the score).
        """

    def patch_loss(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor | None:
        """The loss of the predictions `out.pred`, a scalar, in place of MAE's on pixels. Slot "target" or "mask".

        None leaves MAE's loss. The scalar is logged under `loss_name`.
        """

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        """Scalars to add to the loss, already multiplied by their weights, by the names they get in the log."""
        return {}

    def after_update(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, step: int, applied: torch.Tensor) -> None:
        """Called after optimizer step number `step` (from 0), with the last micro-batch `imgs` of it.

        `applied` is a scalar on the device: 0 where the step was skipped because of a non-finite gradient, else 1. A
        moving average multiplies its rate by it, so that it need not wait for the device.
        """

    # Further hooks ------------------------------------------------------------------------------------------------
    # Setting up

    def split_images(self, images) -> "tuple[object, Images] | None":
        """Called once, before the loader is made: (images to pretrain on, images for previews and kNN). The second
        replace the validation set, which then is not opened. None: all images, and the validation set."""

    def begin(self, model: MaskedAutoencoderViT, methods: "list[Method]", steps: int) -> None:
        """Called once, when all enabled `methods` are made. `steps`: optimizer steps of the whole run."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Called once with the optimizer of the autoencoder and the methods."""

    def no_weight_decay(self) -> set[str]:
        """Names of its parameters without weight decay, as in timm's models."""
        return set()

    def external_networks(self) -> list[nn.Module]:
        """Networks that it uses but does not own, so that no checkpoint holds them; `--compile` and `--fsdp` reach
        them through this list."""
        return []

    # Training

    loss_name = "reconstruction"  # the name of `patch_loss` in the log
    # Whether `patch_loss` or `terms` reads predictions of visible patches, too. The decoder makes none otherwise.
    needs_all_patches = False

    def blocks(self) -> tuple[int, ...]:
        """Encoder blocks (from 0) whose outputs `patch_loss` and `terms` read from `out.blocks`."""
        return ()

    def prediction_head(self) -> nn.Module | None:
        """Its layer from decoder tokens (N, P, d) to the predictions, in place of the layer for pixels. Slot
        "target"."""

    @property
    def head_in_use(self) -> bool:
        """Whether the loss now compares the output of `prediction_head`, and not pixels."""
        return False

    def first_batch(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> None:
        """Called once in this process, before the first forward pass: a sanity check of a teacher, say."""

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> None:
        """Called at the start of every epoch, once: a resume inside the epoch does not repeat it."""

    # Reporting

    diagnostics_every = 0  # optimizer steps between two calls of `diagnostics` (0: never)

    def metrics(self) -> dict[str, torch.Tensor | float | None]:
        """Cheap values to log after every step. The names may depend on the step, but must be the same on all ranks:
        None where this rank has no value, which then is left out of the mean."""
        return {}

    def diagnostics(self, pretrainer: nn.Module, imgs: torch.Tensor, step: int) -> dict[str, torch.Tensor | None]:
        """Costly values to log, every `diagnostics_every` steps; their time does not count in the run's speed. Names
        as for `metrics`."""
        return {}

    def pictures(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB pictures (3, height, width) in [0, 1] of the preview images, for TensorBoard. `shown` is `imgs` as
        colours in [0, 1]."""
        return {}

    def distributions(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Values of the preview images whose histograms go to TensorBoard."""
        return {}

    # Checkpoints (beside the module's own `state_dict`)

    def rank_state(self) -> object:
        """State of this process alone (its images, say): CPU tensors in lists and dicts, or None. What is the same on
        every rank belongs into `state_dict`."""

    def load_rank_state(self, state: object) -> None:
        """Restore `rank_state`. Not called when another number of processes wrote the checkpoint."""

    def exported(self) -> dict[str, nn.Module]:
        """Whole models of its own (an EMA teacher, say) that are stored beside `model`, under these keys, with the
        tensor names of `model`."""
        return {}
