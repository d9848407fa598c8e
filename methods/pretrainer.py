"""The autoencoder and the enabled methods as one module."""

from collections.abc import Hashable, ItemsView, Iterable, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from methods.base import RESERVED_NAMES, Method
from models_mae import MaskedAutoencoderViT, MaskedOutput
from util.data.sample_rng import redrawn


class _Methods(nn.ModuleDict):
    """The enabled methods by name."""

    if TYPE_CHECKING:

        def values(self) -> ValuesView[Method]: ...

        def items(self) -> ItemsView[str, Method]: ...


class Pretrainer(nn.Module):
    """The autoencoder and the enabled methods as one module, which the engine calls and which DDP or FSDP wraps.

    `pretrainer(imgs, mask_ratio, noise)` returns the terms of the loss; their sum is back-propagated.
    """

    def __init__(self, model: MaskedAutoencoderViT, methods: list[Method] | tuple = (), steps: int = 1):
        super().__init__()
        self.model = model
        self.methods = _Methods({method.name: method for method in methods})
        self._seen_a_batch = False
        for method in methods:
            method.begin(model, list(methods), steps)

    def forward(self, imgs, mask_ratio=0.75, noise=None) -> dict[str, torch.Tensor]:
        """Images (N, C, H, W) and noise (N, L), drawn here if None -> the weighted terms of the loss: scalars by name.
        The first one is the loss of the predictions."""
        return self.forward_with_output(imgs, mask_ratio, noise)[0]

    def forward_with_output(self, imgs, mask_ratio=0.75, noise=None) -> tuple[dict[str, torch.Tensor], MaskedOutput]:
        """Compute the terms of the loss, and return also the `MaskedOutput` that they were computed from."""
        methods = self.methods.values()
        self.first_batch(imgs)
        if noise is None:
            noise = torch.rand(len(imgs), self.model.patch_embed.num_patches, device=imgs.device)
        scores = self._scores(imgs, noise)
        blocks = tuple({block for method in methods for block in method.blocks()})
        owner = next((method for method in methods if method.head_in_use), None)  # of the prediction layer in use
        out = self.model.forward_pretrain(
            imgs,
            mask_ratio,
            scores,
            blocks,
            owner and owner.prediction_head(),
            any(method.needs_all_patches for method in methods),
        )
        out.head = owner.name if owner else ""
        out.redraw = lambda: self._scores(imgs, redrawn(noise))
        return self._losses(imgs, out), out

    def _scores(self, imgs, noise) -> torch.Tensor:
        """Return the scores (N, L) of the method that decides the mask, or else `noise` (N, L)."""
        scores = _first(method.scores(self.model, imgs, noise) for method in self.methods.values())
        return noise if scores is None else scores

    def _losses(self, imgs, out: MaskedOutput) -> dict[str, torch.Tensor]:
        """Return the loss of the predictions, then the terms of all methods."""
        methods = self.methods.values()
        replaced = [(method.loss_name, method.patch_loss(self.model, imgs, out)) for method in methods]
        parts = [(name, loss) for name, loss in replaced if loss is not None]
        parts = parts or [("pixels", self.model.reconstruction_loss(out))]
        parts += [item for method in methods for item in method.terms(self.model, imgs, out).items()]
        return _by_name(parts)

    def first_batch(self, imgs) -> None:
        """Call `first_batch` of all methods, once per process."""
        if not self._seen_a_batch:
            self._seen_a_batch = True
            for method in self.methods.values():
                method.first_batch(self.model, imgs)

    def attach(self, optimizer) -> None:
        for method in self.methods.values():
            method.attach(optimizer)

    def before_epoch(self, epoch: int) -> list[str]:
        """Call `before_epoch` of all methods; return their sentences about what changes."""
        sentences = [method.before_epoch(self.model, epoch) for method in self.methods.values()]
        return [sentence for sentence in sentences if sentence]

    def after_update(self, imgs, step: int, applied: torch.Tensor) -> None:
        """Call `scheduled_numbers` and `after_update` of all methods."""
        self.use(self.schedule(step))
        self.update(imgs, step, applied)

    def schedule(self, step: int) -> dict[str, float]:
        """Return the scheduled numbers of all methods, as "method.number"."""
        scheduled = [(name, method.scheduled_numbers(step)) for name, method in self.methods.items()]
        return {f"{method}.{name}": value for method, numbers in scheduled for name, value in numbers.items()}

    def use(self, numbers: dict[str, float | torch.Tensor]) -> None:
        """Give the methods the numbers of `schedule`, or scalars on the device of the same names."""
        for key, method in self.methods.items():
            mine = {name: value for name, value in numbers.items() if name.startswith(f"{key}.")}
            method.scheduled = {name.removeprefix(f"{key}."): value for name, value in mine.items()}

    def update(self, imgs, step: int, applied: torch.Tensor) -> None:
        """Call `after_update` of all methods."""
        for method in self.methods.values():
            method.after_update(self.model, imgs, step, applied)

    @torch.no_grad()
    def preview_scores(self, imgs, noise) -> torch.Tensor:
        """Return the scores (N, L) whose masks previews of images (N, C, H, W) show: those of the method that decides
        the mask, or else `noise` (N, L)."""
        was_training = self.training
        self.eval()
        scores = _first(method.preview_scores(self.model, imgs, noise) for method in self.methods.values())
        self.train(was_training)
        return noise if scores is None else scores

    def graph_obstacle(self) -> str:
        """Return why the steps cannot be recorded as a CUDA graph because of a method, "" if they can."""
        found = ((method.flag, method.graph_obstacle()) for method in self.methods.values())
        return next((f"{flag}: {obstacle}" for flag, obstacle in found if obstacle), "")

    def graph_branch(self) -> tuple[Hashable, ...]:
        return tuple(method.graph_branch() for method in self.methods.values())

    @property
    def shows_pixels(self) -> bool:
        """Whether the decoder is currently trained to predict pixels, so that reconstructions can be drawn."""
        return not any(method.head_in_use for method in self.methods.values())

    def metrics(self) -> dict[str, torch.Tensor | float | None]:
        return _by_name(item for method in self.methods.values() for item in method.metrics().items())

    def pictures(self, imgs, shown) -> dict[str, torch.Tensor]:
        return {k: v for method in self.methods.values() for k, v in method.pictures(self.model, imgs, shown).items()}

    def distributions(self, imgs) -> dict[str, torch.Tensor]:
        return {k: v for method in self.methods.values() for k, v in method.distributions(self.model, imgs).items()}

    def diagnostics_due(self, step: int) -> list[Method]:
        """Return the methods whose diagnostics are due after optimizer step `step`."""
        return [m for m in self.methods.values() if m.diagnostics_every and step % m.diagnostics_every == 0]

    def diagnostics(self, imgs, step: int) -> dict[str, torch.Tensor | None]:
        due = self.diagnostics_due(step)
        return _by_name(item for method in due for item in method.diagnostics(self, imgs, step).items())

    def no_weight_decay(self) -> set[str]:
        return {f"methods.{key}.{name}" for key, method in self.methods.items() for name in method.no_weight_decay()}

    def external_networks(self) -> list[nn.Module]:
        return [network for method in self.methods.values() for network in method.external_networks()]


def _first(values):
    """Return the first value that is not None. At most one is: `enabled_methods` allows one method per slot."""
    return next((value for value in values if value is not None), None)


def _by_name(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return `items` as a dict. Raises ValueError for a name that two of them have, or that the log uses itself: one
    value would replace the other."""
    items = list(items)
    names = [name for name, _ in items]
    if len(set(names)) < len(names) or RESERVED_NAMES & set(names):
        raise ValueError(f"what methods log needs names of its own, not {', '.join(names)}")
    return dict(items)
