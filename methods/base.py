"""The seam between the engine and a pretraining method: what a method may do, and the module that the engine calls."""

import argparse

import torch
from torch import nn

from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput, masked_mean
from util.datasets import Images
from util.errors import UserError


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


class Pretrainer(nn.Module):
    """The autoencoder and the enabled methods as one module: what DDP and FSDP wrap and the engine calls.

    `pretrainer(imgs, mask_ratio, noise)` gives the terms of the loss; their sum is back-propagated.
    """

    def __init__(self, model: MaskedAutoencoderViT, methods: list[Method] | tuple = (), steps: int = 1):
        super().__init__()
        self.model = model
        self.methods = nn.ModuleDict({method.name: method for method in methods})
        self._seen_a_batch = False
        for method in methods:
            method.begin(model, list(methods), steps)

    def forward(self, imgs, mask_ratio=0.75, noise=None) -> dict[str, torch.Tensor]:
        """imgs (N, C, H, W), noise (N, L) or None (drawn here) -> the weighted terms of the loss, scalars by name. The
        first one is the loss of the predictions."""
        return self.forward_with_output(imgs, mask_ratio, noise)[0]

    def forward_with_output(self, imgs, mask_ratio=0.75, noise=None) -> tuple[dict[str, torch.Tensor], MaskedOutput]:
        """The same, with everything that the terms were computed from."""
        methods = self.methods.values()
        self.first_batch(imgs)
        if noise is None:
            noise = torch.rand(len(imgs), self.model.patch_embed.num_patches, device=imgs.device)
        scores = _first(method.scores(self.model, imgs, noise) for method in methods)
        blocks = tuple({block for method in methods for block in method.blocks()})
        head = next((method for method in methods if method.head_in_use), None)
        out = self.model.forward_pretrain(
            imgs,
            mask_ratio,
            noise if scores is None else scores,
            blocks,
            head and head.prediction_head(),
            any(method.needs_all_patches for method in methods),
        )
        out.head = head.name if head else ""
        named = ((method.loss_name, method.patch_loss(self.model, imgs, out)) for method in methods)
        losses = {name: loss for name, loss in named if loss is not None}
        losses = losses or {"reconstruction": self.model.reconstruction_loss(out)}
        for method in methods:
            losses |= method.terms(self.model, imgs, out)
        return losses, out

    def first_batch(self, imgs) -> None:
        """Show the first batch to the methods, once in this process."""
        if not self._seen_a_batch:
            self._seen_a_batch = True
            for method in self.methods.values():
                method.first_batch(self.model, imgs)

    def attach(self, optimizer) -> None:
        for method in self.methods.values():
            method.attach(optimizer)

    def before_epoch(self, epoch: int) -> None:
        for method in self.methods.values():
            method.before_epoch(self.model, epoch)

    def after_update(self, imgs, step: int, applied: torch.Tensor) -> None:
        for method in self.methods.values():
            method.after_update(self.model, imgs, step, applied)

    @property
    def shows_pixels(self) -> bool:
        """Whether the decoder is now trained to predict pixels, so that pictures of its output mean something."""
        return not any(method.head_in_use for method in self.methods.values())

    def metrics(self) -> dict[str, torch.Tensor | float | None]:
        return {name: value for method in self.methods.values() for name, value in method.metrics().items()}

    def pictures(self, imgs, shown) -> dict[str, torch.Tensor]:
        return {k: v for method in self.methods.values() for k, v in method.pictures(self.model, imgs, shown).items()}

    def distributions(self, imgs) -> dict[str, torch.Tensor]:
        return {k: v for method in self.methods.values() for k, v in method.distributions(self.model, imgs).items()}

    def diagnostics_due(self, step: int) -> list[Method]:
        """The methods whose diagnostics are due after this step."""
        return [m for m in self.methods.values() if m.diagnostics_every and step % m.diagnostics_every == 0]

    def no_weight_decay(self) -> set[str]:
        return {f"methods.{key}.{name}" for key, method in self.methods.items() for name in method.no_weight_decay()}

    def external_networks(self) -> list[nn.Module]:
        return [network for method in self.methods.values() for network in method.external_networks()]


def _first(values):
    """The first value that is not None: slots guarantee that there is at most one."""
    return next((value for value in values if value is not None), None)


def add_method_arguments(parser: argparse.ArgumentParser, known: list[type[Method]]) -> None:
    """One titled group of flags per method; an option that several methods share is in the group of the first."""
    added = set()
    for method in known:
        group = parser.add_argument_group(method.title, method.summary or None)
        method.switch.add_to(group, always=True)
        for option in method.options:
            if option.name not in added:
                option.add_to(group)
                added.add(option.name)


def enabled_methods(args: argparse.Namespace, known: list[type[Method]]) -> list[type[Method]]:
    """The methods that the flags ask for; UserError when two of them cannot run together, or when a flag has no effect
    because no method that knows it is on. Options that were not given get their defaults."""
    chosen = [method for method in known if method.enabled(args)]
    in_use = {option.name for method in chosen for option in method.options}
    for dest in vars(args):
        owners = [method.flag for method in known if any(option.name == dest for option in method.options)]
        if owners and dest not in in_use:
            raise UserError(f"--{dest} has no effect without {' or '.join(owners)}")
    for method in chosen:
        for option in method.options:
            if not hasattr(args, option.name):
                setattr(args, option.name, option.default)
        method.check(args)
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            if one.slot is not None and one.slot == other.slot:
                raise UserError(f"{one.flag} and {other.flag} both decide the {one.slot}: give one of them")
            if other.name in one.excludes or one.name in other.excludes:
                raise UserError(f"{one.flag} and {other.flag} cannot be combined: give one of them")
    return chosen


__all__ = ["Method", "Option", "Pretrainer", "add_method_arguments", "enabled_methods", "masked_mean"]
