"""The seam between the engine and a pretraining method: what a method may do, and the module that the engine calls."""

import argparse

import torch
from torch import nn

from methods.options import Option
from models_mae import MaskedAutoencoderViT, MaskedOutput, masked_mean
from util.datasets import Images
from util.errors import UserError


class Method(nn.Module):
    """A pretraining method. Every hook is optional; a method overrides what it needs and nothing else.

    `switch` is the flag that turns it on; `options` are its other flags, which are refused when no method that has them
    is on. `slot` says what it decides alone: "target" (what is reconstructed), "mask" (what is removed) or None (it
    only adds terms); one method per slot.
    A method is a module so that its networks, buffers and schedule position are in the checkpoint, under `methods`.
    """

    name: str
    title: str  # of its group of flags in --help, with the paper's name
    summary = ""  # below the title: what it does, when to choose it
    switch: Option
    options: tuple[Option, ...] = ()
    flag: str  # of `switch`, as refusals name it
    slot: str | None = None
    excludes: tuple[str, ...] = ()  # names of methods it cannot run beside
    part = "reconstruction"  # name, in the log, of what `patch_loss` returns
    look_every = 0  # optimizer steps between two calls of `look` (0: never)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "switch" in vars(cls):
            cls.flag = f"--{cls.switch.name}"

    @classmethod
    def enabled(cls, args: argparse.Namespace) -> bool:
        """Whether the flags ask for it."""
        return getattr(args, cls.switch.name) != cls.switch.default

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """When it is enabled; UserError for a bad value or a flag without effect."""

    def divide(self, images) -> "tuple[object, Images] | None":
        """Once, before anything is made of the training images: those that may be pretrained on, and those to look at
        in place of the validation set, which then is not opened. None: all of them, and the validation set."""

    def begin(self, model: MaskedAutoencoderViT, methods: "list[Method]", steps: int) -> None:
        """Once, when all methods are made: the enabled ones, and the optimizer steps of the whole run."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Once: the optimizer of the autoencoder, for a method that needs to know what a step is."""

    def first_batch(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> None:
        """Once in this process, before the first forward pass: a look at what was loaded, say."""

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> None:
        """At the start of every epoch, once (a resume inside the epoch does not repeat it)."""

    def scores(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> torch.Tensor | None:
        """(N, L) that decide the mask, the highest removed; None leaves it to chance. Slot "mask"."""

    def prediction_head(self) -> nn.Module | None:
        """The layer from decoder tokens (N, L, d) to what is reconstructed in place of pixels, if it has one. Slot
        "target"."""

    @property
    def head_in_use(self) -> bool:
        """Whether the loss compares the output of `prediction_head` now, and not pixels."""
        return False

    def patch_loss(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor | None:
        """Reconstruction loss in place of the pixels', a scalar; None leaves the pixels'. Slot "target" or "mask"."""

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        """Weighted scalars to add to the loss, by the name they have in the log."""
        return {}

    def after_update(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, step: int, applied: torch.Tensor) -> None:
        """After optimizer step number `step` (from 0). `applied` is a device scalar: 0 where the step was skipped
        (a non-finite gradient), so that an average can be gated without waiting for the device."""

    def metrics(self) -> dict[str, torch.Tensor | float | None]:
        """Cheap values to log after every step, beside the parts of the loss. Names may depend on the step, but not on
        the images of a rank: None where this one has no value, which is left out of the mean."""
        return {}

    def look(self, pretrainer: "Pretrainer", imgs: torch.Tensor, step: int) -> dict[str, torch.Tensor | float | None]:
        """Costly values to log, every `look_every` steps, outside the time that is measured; names as of `metrics`."""
        return {}

    def pictures(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, shown: torch.Tensor) -> dict[str, torch.Tensor]:
        """RGB pictures (3, height, width) in [0, 1] of fixed images, whenever reconstructions are drawn. `shown` is
        `imgs` as colours in [0, 1]."""
        return {}

    def distributions(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Numbers whose histogram is worth a look, of the same fixed images."""
        return {}

    def rank_state(self) -> object:
        """What a checkpoint must hold of this process alone (its images, say): tensors on the CPU, in lists and
        dicts. None: nothing. All that is the same on every rank is in `state_dict`."""

    def load_rank_state(self, state: object) -> None:
        """Undo `rank_state`; not called when the checkpoint was written by another number of processes."""

    def networks_aside(self) -> list[nn.Module]:
        """Networks that it uses but does not own (they are in no checkpoint): compiled with the others."""
        return []

    def exported(self) -> dict[str, nn.Module]:
        """Whole models of its own that belong at the top of a checkpoint, beside `model`, in its tensor names."""
        return {}

    def no_weight_decay(self) -> set[str]:
        """Its parameters, by name, that the optimizer must not let decay (as of timm's models)."""
        return set()

    def blocks(self) -> tuple[int, ...]:
        """Encoder blocks (from 0) whose outputs `patch_loss` and `terms` read from `out.blocks`."""
        return ()

    # Whether `patch_loss` or `terms` reads predictions of visible patches too; the decoder makes none otherwise.
    needs_all_patches = False


class Pretrainer(nn.Module):
    """The autoencoder and the enabled methods as one module: what DDP wraps and the engine calls.

    `loss, pred, mask = pretrainer(imgs, mask_ratio=..., noise=...)`, like a bare MAE. `parts` then holds the
    detached, named parts of that loss.
    """

    def __init__(self, model: MaskedAutoencoderViT, methods: list[Method] | tuple = (), steps: int = 1):
        super().__init__()
        self.model = model
        self.methods = nn.ModuleDict({method.name: method for method in methods})
        self.parts: dict[str, torch.Tensor] = {}
        self._seen_a_batch = False
        for method in methods:
            method.begin(model, list(methods), steps)

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        """imgs (N, C, H, W), noise (N, L) or None -> loss (scalar), pred (N, P, F) of the patches that the loss
        compares (see `MaskedOutput`), mask (N, L)."""
        parts, out = self.losses(imgs, mask_ratio, noise)
        self.parts = {name: value.detach() for name, value in parts.items()}
        return sum(parts.values()), out.pred, out.mask

    def losses(self, imgs, mask_ratio=0.75, noise=None) -> tuple[dict[str, torch.Tensor], MaskedOutput]:
        """The parts of the loss by name, what is reconstructed first, and everything they were made from."""
        methods = self.methods.values()
        self.first_batch(imgs)
        scores = _first(method.scores(self.model, imgs) for method in methods)
        wanted = tuple({block for method in methods for block in method.blocks()})
        head = next((method for method in methods if method.head_in_use), None)
        out = self.model.forward_pretrain(
            imgs,
            mask_ratio,
            noise if scores is None else scores,
            wanted,
            head and head.prediction_head(),
            any(method.needs_all_patches for method in methods),
        )
        out.head = head.name if head else ""
        named = ((method.part, method.patch_loss(self.model, imgs, out)) for method in methods)
        parts = {name: loss for name, loss in named if loss is not None}
        parts = parts or {"reconstruction": self.model.reconstruction_loss(out)}
        for method in methods:
            parts |= method.terms(self.model, imgs, out)
        return parts, out

    def first_batch(self, imgs) -> None:
        """Let the methods look at the first batch, once in this process."""
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
        """Whether the decoder is trained to predict pixels now, so that pictures of them mean something."""
        return not any(method.head_in_use for method in self.methods.values())

    def metrics(self) -> dict[str, torch.Tensor | float | None]:
        return {name: value for method in self.methods.values() for name, value in method.metrics().items()}

    def pictures(self, imgs, shown) -> dict[str, torch.Tensor]:
        return {k: v for method in self.methods.values() for k, v in method.pictures(self.model, imgs, shown).items()}

    def distributions(self, imgs) -> dict[str, torch.Tensor]:
        return {k: v for method in self.methods.values() for k, v in method.distributions(self.model, imgs).items()}

    def looking(self, step: int) -> list[Method]:
        """The methods that want a closer look after this step."""
        return [m for m in self.methods.values() if m.look_every and step % m.look_every == 0]

    def no_weight_decay(self) -> set[str]:
        return {f"methods.{key}.{name}" for key, method in self.methods.items() for name in method.no_weight_decay()}


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
