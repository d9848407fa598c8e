"""Encoders of timm by name, from a file of weights, from timm's own folders, or untrained: `timm:NAME` (downloaded),
`timm:ARCHITECTURE=FILE`, `timm:ARCHITECTURE=random`, `timm:FOLDER`."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import timm
import torch
from torch import Tensor, nn

from util.errors import UserError
from util.parser import closest, did_you_mean
from util.weights.file import read_file
from util.weights.hf_folder import folder_weights
from util.weights.hub import from_hub
from util.weights.load import models_that_fit, recognise
from util.weights.names import without_wrappers

PREFIX = "timm:"
UNTRAINED = "random"
SYNTAX = f"{PREFIX}NAME, {PREFIX}ARCHITECTURE=FILE or {PREFIX}ARCHITECTURE={UNTRAINED}"


@dataclass(frozen=True)
class TimmModel:
    """One of timm's models and where its weights are. `config` and `arguments` are those of timm's own folder."""

    name: str  # as it was given
    architecture: str
    weights: str = ""  # a file, UNTRAINED, or "": downloaded by timm
    key: str = "model"  # of the file
    config: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)

    @property
    def untrained(self) -> bool:
        return self.weights == UNTRAINED

    def like_untrained(self) -> "TimmModel":
        """Return the untrained model of the same architecture."""
        return replace(self, name=f"{PREFIX}{self.architecture}={UNTRAINED}", weights=UNTRAINED)

    @property
    def takes_any_size(self) -> bool:
        """Whether the architecture has no image size, as convolutional networks do."""
        config = timm.get_pretrained_cfg(self.architecture)
        return not (config and config.fixed_input_size)

    def create(self, size: Sequence[int] | None = None, in_chans: int | None = None) -> nn.Module:
        """Build the model in eval mode, with its weights, for images of `size` (H, W) (None: its own), as timm resizes
        its positions. An untrained one is drawn from torch's generator. Raises UserError if the weights cannot be
        downloaded or do not fit, and if the architecture cannot be built for that size."""
        arguments = dict(self.arguments)
        if in_chans is not None:
            arguments["in_chans"] = in_chans
        if size is not None and not self.takes_any_size:
            arguments["img_size"] = tuple(size)
        if self.config:
            arguments["pretrained_cfg"] = dict(self.config)
        if self.untrained:
            return self._built(**arguments)
        if not self.weights:
            return self._built(pretrained=True, **arguments)
        state = self._state()
        classes = self._classes(state)
        overlay = {"state_dict": state, "num_classes": classes, "source": "", "custom_load": False}
        arguments |= {"pretrained": True, "num_classes": classes, "pretrained_cfg_overlay": overlay}
        model: Any = self._built(**arguments)
        model.pretrained_cfg = {name: value for name, value in model.pretrained_cfg.items() if name != "state_dict"}
        return model

    def _built(self, **arguments) -> nn.Module:
        try:
            return timm.create_model(self.architecture, **arguments).eval()
        except Exception as error:  # of the network, of torch's loader, or of an assertion in timm
            raise UserError(self._why(error, arguments)) from error

    def _why(self, error: Exception, arguments: dict[str, Any]) -> str:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        if "loading state_dict" in lines[0]:
            reason = shorten(" ".join(lines[1:]), 200, placeholder=" ...")
            return f"{self.name}: the weights do not fit timm's {self.architecture}: {reason}"
        if arguments.get("pretrained") and not self.weights:
            return f"{self.name}: its weights could not be downloaded: {lines[0]}"
        size = arguments.get("img_size")
        at = f" for images of {size[0]}x{size[1]} pixels (--input_size)" if size else ""
        return f"{self.name}: timm cannot build {self.architecture}{at}: {shorten(lines[0], 200, placeholder=' ...')}"

    def _state(self) -> dict[str, Tensor]:
        """Return the tensors of the file, without prefixes of wrappers and of a larger model around the encoder."""
        raw = read_file(self.weights)
        entries = {name: value for name, value in raw.items() if isinstance(value, dict)}
        entry = entries.get(self.key) or next(filter(_tensors, map(entries.get, _ENTRIES)), raw)
        state = {without_wrappers(name): tensor for name, tensor in _tensors(entry).items()}
        if not state:
            raise UserError(
                f"{self.weights} contains no tensors: a file with the weights of {self.architecture} is needed"
            )
        config = timm.get_pretrained_cfg(self.architecture)
        first = config.first_conv if config else None
        ending = f"{first if isinstance(first, str) else (first or ('',))[0]}.weight"
        prefixes = sorted((name.removesuffix(ending) for name in state if name.endswith(f".{ending}")), key=len)
        if f"{ending}" in state or not prefixes:
            return state
        return {name.removeprefix(prefixes[0]): state[name] for name in state if name.startswith(prefixes[0])}

    def _classes(self, state: dict[str, Tensor]) -> int:
        """Return the number of classes of the classifier in `state`, 0 without one."""
        config = timm.get_pretrained_cfg(self.architecture)
        names = self.config.get("classifier") or (config.classifier if config else None) or ()
        for name in (names,) if isinstance(names, str) else names:
            if f"{name}.weight" in state:
                return len(state[f"{name}.weight"])
        return 0


_ENTRIES = ("state_dict", "model", "target_encoder", "encoder", "model_ema", "state_dict_ema", "teacher")


def _tensors(entry: dict | None) -> dict[str, Tensor]:
    named = (entry or {}).items()
    return {name: value for name, value in named if isinstance(name, str) and isinstance(value, Tensor)}


def timm_model(checkpoint: str, key: str = "model") -> TimmModel | None:
    """Return the model of timm's that a checkpoint's name means: one with the prefix `timm:`, or timm's own folder
    (also on the Hub) with an architecture that is no plain ViT of ours; None for anything else. `key` is the entry of a
    file with the weights. Raises UserError for a malformed name and an unknown architecture."""
    if checkpoint.startswith(PREFIX):
        rest = checkpoint.removeprefix(PREFIX)
        if (Path(rest) / "config.json").is_file():
            found = _of_folder(checkpoint, rest, key)
            if found is None:
                raise UserError(f"{checkpoint}: the config.json in {rest} names no architecture of timm's")
            return found
        architecture, sign, weights = rest.partition("=")
        if not architecture or (sign and not weights):
            raise UserError(f"{checkpoint} must be {SYNTAX}")
        _check_architecture(checkpoint, architecture)
        if sign and weights != UNTRAINED and not os.path.exists(weights):
            raise UserError(f"{checkpoint}: {weights} does not exist: give {SYNTAX}")
        return TimmModel(checkpoint, architecture, weights, key)
    if timm.is_model(checkpoint.removeprefix("timm/")):  # a plain ViT of ours: `evaluation.checkpoint`
        return None
    folder = from_hub(checkpoint)
    found = _of_folder(checkpoint, folder, key)
    return None if found is None or _is_plain(folder) else found


def _check_architecture(checkpoint: str, architecture: str) -> None:
    if not timm.is_model(architecture.split(".")[0]):
        close = did_you_mean(closest(architecture, timm.list_models()))
        raise UserError(f"{checkpoint}: timm {timm.__version__} has no architecture {architecture}{close}")


def _of_folder(name: str, folder: str, key: str) -> TimmModel | None:
    """Return the model in timm's own folder, None if `folder` is none."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:
        return None  # refused where the weights are read
    architecture = config.get("architecture") if isinstance(config, dict) else None
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        return None
    own = {name: config[name] for name in ("num_classes", "label_names") if config.get(name) is not None}
    images = config.get("pretrained_cfg") or {}
    known = timm.get_pretrained_cfg(architecture)
    full = (known.to_dict() if known else {}) | images | own | {"architecture": architecture}
    return TimmModel(name, architecture, folder_weights(folder), key, full, dict(config.get("model_args") or {}))


def _is_plain(folder: str) -> bool:
    """Whether the weights in a folder are those of one of our encoders."""
    path = folder_weights(folder)
    try:
        weights = recognise(read_file(path), path)
    except UserError:
        return False
    return "cls_token" in weights.state and bool(models_that_fit(weights))


def state_sha256(model: nn.Module) -> str:
    """Return the SHA-256 of all tensors of a model, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
