"""The seam between the engine and a pretraining method: what a method may do, and the module that the engine calls."""

import argparse

import torch
from torch import nn

from models_mae import MaskedAutoencoderViT, MaskedOutput, masked_mean
from util.errors import UserError


class Method(nn.Module):
    """A pretraining method. Every hook is optional; a method overrides what it needs and nothing else.

    `flag` is the switch that turns it on and is named in refusals. `slot` says what it decides alone: "target" (what
    is reconstructed), "mask" (what is removed) or None (it only adds terms); one method per slot.
    A method is a module so that its networks, buffers and schedule position are in the checkpoint, under `methods`.
    """

    name: str
    title: str  # of its group of flags in --help, with the paper's name
    flag: str
    slot: str | None = None
    excludes: tuple[str, ...] = ()  # names of methods it cannot run beside

    @staticmethod
    def add_arguments(group: argparse._ArgumentGroup) -> None:
        """Its flags."""

    @staticmethod
    def enabled(args: argparse.Namespace) -> bool:
        """Whether the flags ask for it."""
        return False

    @staticmethod
    def check(args: argparse.Namespace) -> None:
        """Called for every method, enabled or not; UserError for a bad value or a flag without effect."""

    def before_epoch(self, model: MaskedAutoencoderViT, epoch: int) -> None:
        """At the start of every epoch, once (a resume inside the epoch does not repeat it)."""

    def scores(self, model: MaskedAutoencoderViT, imgs: torch.Tensor) -> torch.Tensor | None:
        """(N, L) that decide the mask, the highest removed; None leaves it to chance. Slot "mask"."""

    def patch_loss(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> torch.Tensor | None:
        """Reconstruction loss in place of the pixels', a scalar; None leaves the pixels'. Slot "target" or "mask"."""

    def terms(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, out: MaskedOutput) -> dict[str, torch.Tensor]:
        """Weighted scalars to add to the loss, by the name they have in the log."""
        return {}

    def after_update(self, model: MaskedAutoencoderViT, imgs: torch.Tensor, step: int, applied: torch.Tensor) -> None:
        """After optimizer step number `step` (from 0). `applied` is a device scalar: 0 where the step was skipped
        (a non-finite gradient), so that an average can be gated without waiting for the device."""

    def blocks(self) -> tuple[int, ...]:
        """Encoder blocks (from 0) whose outputs `patch_loss` and `terms` read from `out.blocks`."""
        return ()


class Pretrainer(nn.Module):
    """The autoencoder and the enabled methods as one module: what DDP wraps and the engine calls.

    `loss, pred, mask = pretrainer(imgs, mask_ratio=..., noise=...)`, like a bare MAE. `parts` then holds the
    detached, named parts of that loss.
    """

    def __init__(self, model: MaskedAutoencoderViT, methods: list[Method] | tuple = ()):
        super().__init__()
        self.model = model
        self.methods = nn.ModuleDict({method.name: method for method in methods})
        self.parts: dict[str, torch.Tensor] = {}

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        """imgs (N, C, H, W), noise (N, L) or None -> loss (scalar), pred (N, L, p * p * C), mask (N, L)."""
        methods = self.methods.values()
        scores = _first(method.scores(self.model, imgs) for method in methods)
        wanted = tuple({block for method in methods for block in method.blocks()})
        out = self.model.forward_pretrain(imgs, mask_ratio, noise if scores is None else scores, wanted)
        reconstruction = _first(method.patch_loss(self.model, imgs, out) for method in methods)
        if reconstruction is None:
            reconstruction = self.model.forward_loss(imgs, out.pred, out.mask)
        parts = {"reconstruction": reconstruction}
        for method in methods:
            parts |= method.terms(self.model, imgs, out)
        self.parts = {name: value.detach() for name, value in parts.items()}
        return sum(parts.values()), out.pred, out.mask

    def before_epoch(self, epoch: int) -> None:
        for method in self.methods.values():
            method.before_epoch(self.model, epoch)

    def after_update(self, imgs, step: int, applied: torch.Tensor) -> None:
        for method in self.methods.values():
            method.after_update(self.model, imgs, step, applied)


def _first(values):
    """The first value that is not None: slots guarantee that there is at most one."""
    return next((value for value in values if value is not None), None)


def add_method_arguments(parser: argparse.ArgumentParser, known: list[type[Method]]) -> None:
    """One titled group of flags per method."""
    for method in known:
        method.add_arguments(parser.add_argument_group(method.title))


def enabled_methods(args: argparse.Namespace, known: list[type[Method]]) -> list[type[Method]]:
    """The methods that the flags ask for; UserError when two of them cannot run together."""
    for method in known:
        method.check(args)
    chosen = [method for method in known if method.enabled(args)]
    for i, one in enumerate(chosen):
        for other in chosen[i + 1 :]:
            if one.slot is not None and one.slot == other.slot:
                raise UserError(f"{one.flag} and {other.flag} both decide the {one.slot}: give one of them")
            if other.name in one.excludes or one.name in other.excludes:
                raise UserError(f"{one.flag} and {other.flag} cannot be combined: give one of them")
    return chosen


__all__ = ["Method", "Pretrainer", "add_method_arguments", "enabled_methods", "masked_mean"]
