"""Which model a checkpoint holds: its name, sizes and epsilon from flags, the file's flags, tensor shapes and defaults.

Mains, tools and methods all build their models from the `ModelConfig` that `resolve_config` returns.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from util.architectures import ENCODERS, look_up, own_config
from util.errors import UserError
from util.weights.load import Weights, models_that_fit

DEFAULT_ENCODER = "vit_large_patch16"  # of a run with neither --model nor weights

# What may be inferred from tensor shapes. Transfer leaves the image size to the flags: positions are interpolated.
NAME = ("model",)
ENCODER = (*NAME, "patch_size", "in_chans", "input_size")
AUTOENCODER = (*ENCODER, "decoder", "decoder_embed_dim", "decoder_depth")

_DECODER_SIZES = ("decoder_embed_dim", "decoder_depth", "decoder_num_heads")
_TYPES = {
    "model": str,
    "patch_size": int,
    "in_chans": int,
    "input_size": (int, list, tuple),
    "layer_norm_eps": float,
    "decoder": str,
    **dict.fromkeys(_DECODER_SIZES, int),
}


@dataclass(frozen=True)
class ModelConfig:
    """A model with all its sizes. `model` is the name without the prefix `mae_`; sizes are in pixels."""

    model: str
    patch_size: int
    in_chans: int
    input_size: tuple[int, int]
    layer_norm_eps: float | None  # None: 1e-6, as in MAE and timm
    norm_pix_loss: bool
    decoder: str  # self or cross
    decoder_embed_dim: int
    decoder_depth: int
    decoder_num_heads: int

    @property
    def encoder_name(self) -> str:
        """The name in `models_vit`."""
        return _encoder_name(self.model)

    @property
    def autoencoder_name(self) -> str:
        """The name in `models_mae`."""
        return f"mae_{self.model}"

    def encoder_arguments(self) -> dict[str, Any]:
        """Return the constructor arguments of the encoder."""
        return dict(img_size=self.input_size, patch_size=self.patch_size, in_chans=self.in_chans)

    def autoencoder_arguments(self) -> dict[str, Any]:
        """Return the constructor arguments of the autoencoder."""
        names = ("norm_pix_loss", "decoder", *_DECODER_SIZES)
        return self.encoder_arguments() | {name: getattr(self, name) for name in names}

    def encoder_flags(self) -> dict[str, Any]:
        """Return the flags that describe the encoder, as the mains record them: a square's `input_size` as one number,
        `layer_norm_eps` only if the file states it."""
        height, width = self.input_size
        flags = {
            "model": self.encoder_name,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "input_size": height if height == width else [height, width],
        }
        return flags | ({} if self.layer_norm_eps is None else {"layer_norm_eps": self.layer_norm_eps})


def resolve_config(
    weights: Weights | None,
    given: Mapping[str, Any],
    inferred: Collection[str] = NAME,
    default: str | None = None,
    model_flag: str = "--model",
) -> ModelConfig:
    """Resolve the model of `weights` (None: an untrained one). Each value is the flag in `given`, else the flag stored
    in the file, else what the tensor shapes tell, for the names in `inferred`, else the model's own.

    `default` is the model if nothing names one, `model_flag` the flag that error messages refer to. Raises UserError if
    nothing names the model, for an unknown name, and for a stored flag that is needed and has a wrong type.
    """
    flags = {name: value for name, value in given.items() if name in _TYPES and value not in (None, "")}
    if weights is not None:
        shapes = infer_config_from_shapes(weights)
        inferable = {name: value for name, value in shapes.items() if name in inferred}
        flags = inferable | _stored_flags(weights, flags, model_flag, "decoder" in inferred) | flags
        if default is None and "model" not in flags:
            raise UserError(f"{weights.path} does not name its model: give {model_flag} ({_candidates(weights)})")
    name = _known_name(flags.get("model") or default, model_flag)
    own = own_config(name)
    size = flags.get("input_size", own["img_size"])
    size = (size, size) if isinstance(size, int) else (size[0], size[-1])
    return ModelConfig(
        model=name,
        patch_size=flags.get("patch_size", own["patch_size"]),
        in_chans=flags.get("in_chans", 3),
        input_size=size,
        layer_norm_eps=flags.get("layer_norm_eps"),
        norm_pix_loss=bool(weights is not None and weights.args.get("norm_pix_loss")),
        decoder=flags.get("decoder", "self"),
        **{name: flags.get(name, own[name]) for name in _DECODER_SIZES},
    )


def _stored_flags(weights: Weights, given: Mapping[str, Any], model_flag: str, decoder: bool) -> dict[str, Any]:
    """Return the flags that the file was written with and that are not `given`. Without a `decoder` to be built, flags
    of a decoder that other code stores as another type are left out."""
    stored = {name: weights.args[name] for name in _TYPES if weights.args.get(name) is not None and name not in given}
    for name, value in list(stored.items()):
        if name.startswith("decoder") and not decoder and type(value) is not _TYPES[name]:
            del stored[name]
            continue
        sides = value if name == "input_size" and isinstance(value, (list, tuple)) else [0]
        if not isinstance(value, _TYPES[name]) or not sides or not all(isinstance(side, int) for side in sides):
            flag = model_flag if name == "model" else f"--{name}"
            raise UserError(f"{weights.path} stores {value!r} for --{name}, which is not a valid value: give {flag}")
    return {name: value for name, value in stored.items() if value}


def _encoder_name(name: str) -> str:
    return name.removeprefix("mae_").removesuffix("_dec512d8b")


def _known_name(name: str, flag: str) -> str:
    """Return `name` without its prefix. Raises UserError, with the known names, if there is no such model."""
    prefix = "mae_" if name.startswith("mae_") else ""
    short = name.removeprefix("mae_")
    if not own_config(short):
        look_up({f"{prefix}{known}": None for known in ENCODERS}, name, flag)
    return short


def _candidates(weights: Weights) -> str:
    names = [f"mae_{name}" for name in models_that_fit(weights)]
    return ", ".join(names) or "no known model has its width, depth and patch size"


def infer_config_from_shapes(weights: Weights) -> dict[str, Any]:
    """Return the model flags that the tensor shapes determine: all but the numbers of heads and the epsilon."""
    kernel, table = weights.state["patch_embed.proj.weight"], weights.state.get("pos_embed")
    fitting = models_that_fit(weights)
    flags = {"in_chans": kernel.shape[1], "patch_size": kernel.shape[-1]}
    if len(fitting) == 1:
        flags["model"] = fitting[0]
    side = isqrt(table.shape[1] - 1) if table is not None and table.ndim == 3 and table.shape[1] else 0
    if side and side**2 + 1 == table.shape[1]:
        flags["input_size"] = side * kernel.shape[-1]
    if weights.has_decoder and "decoder_embed.weight" in weights.state:
        flags["decoder_embed_dim"] = len(weights.state["decoder_embed.weight"])
        blocks = {tuple(name.split(".")[:2]) for name in weights.state if re.match(r"decoder_(cross_)?blocks\.", name)}
        flags["decoder"] = "cross" if any("cross" in block for block, _ in blocks) else "self"
        flags["decoder_depth"] = len(blocks)
    return flags
