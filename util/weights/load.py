"""The loader for weights of any origin: MAE, fine-tuned and timm ViT checkpoints, Hugging Face ViT and ViTMAE, plain
ViTs of torchvision and mmpretrain.

`read_weights` recognises a file and renames its tensors to our names, which are those of the released MAE checkpoints.
`load_into` fills a model and reports the fate of every tensor: the report lists each one that is not loaded.
"""

import os
import re
from dataclasses import dataclass, field, replace
from math import isqrt, prod
from typing import Any

from torch import Tensor, nn

from util.architectures import ENCODERS
from util.errors import UserError
from util.pos_embed import interpolate_grid
from util.weights.channels import RGB, for_channels
from util.weights.dialects import our_names
from util.weights.file import read_file, save_state
from util.weights.geometry import depth, geometry, is_sincos, patch_grids, source_grid
from util.weights.hf_folder import folder_weights
from util.weights.names import (
    DENSE_USES,
    ENCODER,
    ENCODER_AREA,
    HF_MASK_TOKEN,
    KNOWN,
    dense_model,
    from_hugging_face,
    is_decoder,
    without_wrappers,
)
from util.weights.prefixes import choose_prefix, encoder_prefixes, matching
from util.weights.report import LoadReport, some, summary, why_no_head, why_unused
from util.weights.stored import class_names, history, stored_args


@dataclass
class Weights:
    """The content of a recognised file; `state` has our names."""

    path: str
    origin: str
    state: dict[str, Tensor]
    args: dict = field(default_factory=dict)  # flags stored in the file
    dropped: list[str] = field(default_factory=list)  # entries of the file outside encoder, MAE decoder and head
    history: dict = field(default_factory=dict)  # provenance that its run stored (`util.report.ledger.Record.state`)
    classes: list[str] = field(default_factory=list)  # names of the classifier's outputs, if stored
    prefix: str = ""  # of the encoder's names in the file, wrappers included; removed from the names in `state`
    outside: dict[str, str] = field(default_factory=dict)  # {name: why} for those of `dropped` without this prefix
    notes: list[str] = field(default_factory=list)  # what the user should know of how the file was read
    # All tensors beside `state`, under the names in the file without wrappers; only if `allowed` was given.
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def dense_model(self) -> str:
        """What the file is, if it was trained on a dense task: "a segmenter of main_segment.py"; else ""."""
        return dense_model(name for name in self.dropped if name not in self.outside)

    @property
    def has_decoder(self) -> bool:
        return any(name.startswith("decoder_") for name in self.state)


def read_weights(path, key: str = "model", allowed: str = "") -> Weights:
    """Read and recognise a file. `key` is the entry with the weights, or a part of the names of a bare state dict
    (`teacher`). For a bare state dict, and for a file with one entry of weights, the default is right.

    Raises UserError for files that `read_file` refuses, for a key that is not in the file (and lists those that are),
    for a file without ViT weights, and for a ViT with parts that ours lacks (layer scale, register tokens, ...). Parts
    whose names have the part `allowed` are kept in `state`: the caller must load them, or refuse the file. `tensors`
    then has those of a head, too.
    """
    path = folder_weights(os.fspath(path))
    return recognise(read_file(path), path, key, allowed)


def recognise(raw: dict, path: str, key: str = "model", allowed: str = "") -> Weights:
    """Return the weights in the content `raw` of a file. `key`, `allowed` and errors are those of `read_weights`;
    `path` is used in messages."""
    entry, part = _select(raw, key, path)
    named, others = _split(raw if entry is None else raw[entry])
    library_names, library = our_names(map(without_wrappers, named), path)
    original = {}  # names in the file by ours below the encoder's prefix
    for name in named:
        plain = library_names[without_wrappers(name)]
        if plain in original:
            raise UserError(f"{path} has {plain} twice, with and without a prefix: keep one of the two models in it")
        original[plain] = name
    weights = Weights(path, "", {}, stored_args(raw, path), others)
    inside = _inside(weights, original, part)
    state, converted = from_hugging_face({name: named[original[full]] for name, full in inside.items()})
    if not {"patch_embed.proj.weight", "blocks.0.norm1.weight"} <= state.keys():
        raise UserError(
            f"{path} contains no ViT weights (its tensors: {summary(list(named), 6) or 'none'}): "
            "a ViT with the names of MAE, timm, Hugging Face, torchvision or mmpretrain is needed"
        )
    _refuse_other_encoders(state, path, allowed)
    weights.state = {name: tensor for name, tensor in state.items() if KNOWN.match(name) or _extra(name, allowed)}
    weights.dropped += [name for name in state if name not in weights.state] + list(weights.outside)
    weights.tensors = {name: named[original[name]] for name in original} if allowed else {}
    weights.history = history(raw, weights.args)
    names = weights.args.pop("label_names", None)  # of an export
    weights.classes = class_names(raw.get("classes")) or class_names(names)
    library = library or "Hugging Face" * converted
    weights.origin = _origin(weights) + (f", {library} names" if library else "")
    if entry not in (None, key):
        weights.notes.append(f"the weights are its entry {entry!r}")
    return weights


def _inside(weights: Weights, original: dict[str, str], part: str) -> dict[str, str]:
    """Return {name without the encoder's prefix: name without wrappers} of one of the encoders among the `original`
    names (choose_prefix). Sets `prefix`, `outside` and `notes` of the weights."""
    prefixes = encoder_prefixes(original)
    if not prefixes:
        return {name: name for name in original}
    chosen = choose_prefix(prefixes, part, weights.path)
    inside = {}
    for full in original:
        owner = max((prefix for prefix in prefixes if full.startswith(prefix)), key=len, default="")
        if full.startswith(chosen) and owner in (chosen, ""):
            inside[full.removeprefix(chosen)] = full
        elif owner:
            weights.outside[full] = f"of another encoder, --checkpoint_key {owner.rstrip('.')}"
        else:
            weights.outside[full] = f"outside {chosen}"
    kernel = next(n for n in inside if n.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")))
    name = original[inside[kernel]]
    weights.prefix = name.removesuffix(kernel) if name.endswith(kernel) else chosen
    if weights.prefix:
        weights.notes.append(f"the prefix {weights.prefix} of its names was removed")
    if len(prefixes) > 1:
        others = ", ".join(prefix or "no prefix" for prefix in prefixes if prefix != chosen)
        weights.notes.append(f"of several encoders in it, that of {chosen or 'no prefix'} is loaded, not of {others}")
    return inside


def _select(raw: dict, key: str, path: str) -> tuple[str | None, str]:
    """Return the entry of the file with the weights, None for a bare state dict, and the part of its tensor names to
    which `key` limits the choice ("": any)."""
    if isinstance(raw.get(key), dict):
        return key, ""
    bare = any(isinstance(value, Tensor) for value in raw.values())
    prefixes = {None: _prefixes(raw)} | {name: _prefixes(value) for name, value in raw.items() if type(name) is str}
    holders = [entry for entry, found in prefixes.items() if found]
    if key not in raw and len(holders) == 1:
        part = "" if key == "model" else key
        if matching(prefixes[holders[0]], part):
            return holders[0], part
    if bare and key == "model":
        return None, ""
    if key in raw:
        raise UserError(f"{path} has a {type(raw[key]).__name__} under {key!r}, not weights: {_keys(raw)}")
    if bare:
        raise UserError(f"{path} has no key {key!r}: it is a bare state dict, leave --checkpoint_key at its default")
    raise UserError(f"{path} has no key {key!r}: {_keys(raw)}")


def _prefixes(entry) -> list[str]:
    """Return the prefixes of the encoders in an entry of a file, [] if it is no state dict."""
    if not isinstance(entry, dict):
        return []
    return encoder_prefixes(our_names(map(without_wrappers, _split(entry)[0]), "the file")[0].values())


def _keys(raw: dict) -> str:
    """Return the end of a message: the keys of a file that have weights, or all keys when none has."""
    prefixes = {str(key): _prefixes(value) for key, value in raw.items()}
    keys = [key for key in prefixes if "" in prefixes[key]] or [key for key in prefixes if prefixes[key]]
    keys = keys or [str(key) for key, value in raw.items() if isinstance(value, dict) and _split(value)[0]]
    if keys:
        return f"--checkpoint_key must be one of its keys with weights ({', '.join(keys)})"
    return f"it contains no weights, only the keys {some([str(key) for key in raw], 8) or '(none)'}"


def _split(content: dict) -> tuple[dict[str, Tensor], list[str]]:
    """Return the named tensors, and the names of all other entries."""
    named = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    return named, [str(key) for key in content if key not in named]


def _extra(name: str, allowed: str) -> bool:
    """Whether a tensor is a part of the encoder that only some models have, and that the caller knows."""
    return bool(allowed) and allowed in name and bool(ENCODER_AREA.match(name))


def _refuse_other_encoders(state: dict, path: str, allowed: str) -> None:
    """Raise UserError for an unknown tensor inside the encoder whose name has not the part `allowed`, or an unknown
    token beside it: without it every feature would change."""

    def is_extra(name):
        is_token = "." not in name and state[name].ndim >= 2
        return not KNOWN.match(name) and name != HF_MASK_TOKEN and (is_token or ENCODER_AREA.match(name))

    extra = [name for name in state if is_extra(name) and not _extra(name, allowed)]
    trained = dense_model(state)
    if trained and extra:
        raise UserError(f"{path} is {trained}; its encoder has {some(extra)}, which other models lack: {DENSE_USES}")
    if extra:
        raise UserError(
            f"{path} is not a plain ViT: it has {some(extra)}, which our encoder lacks and which cannot be left out; "
            "a ViT without layer scale, query-key norms, register or distillation tokens is needed"
        )
    kernel = state["patch_embed.proj.weight"]
    if kernel.ndim != 4 or not all(tensor.is_floating_point() for tensor in encoder_state(state).values()):
        raise UserError(
            f"{path} has patch kernels of shape {tuple(kernel.shape)} and type {kernel.dtype}: "
            "a ViT for images (D, C, p, p) with floating-point weights is needed"
        )


def _refuse_no_cls(weights: Weights) -> None:
    """Raise UserError for an encoder without [cls], such as I-JEPA's. Every patch would attend to a [cls] of zeros,
    which would change all features."""
    table = weights.state.get("pos_embed")
    if "cls_token" in weights.state or table is None or table.ndim != 3 or isqrt(table.shape[1]) ** 2 != table.shape[1]:
        return
    raise UserError(
        f"{weights.path} is a ViT without [cls], as I-JEPA's are, and ours has one: judge it as timm's architecture "
        f"without [cls], for example timm:vit_huge_patch14_gap_224={weights.path}"
    )


def _origin(weights: Weights) -> str:
    if weights.has_decoder:
        return "MAE (encoder and decoder)"
    if any(name.startswith("head.") for name in weights.state):
        return "ViT classifier"
    # Only MAE has the fixed sine-cosine positions; other encoders with these names train them.
    table = weights.state.get("pos_embed")
    fixed = any(is_sincos(table, grid) for grid in patch_grids(weights.state, weights.args))
    return "MAE encoder" if fixed and "fc_norm.weight" not in weights.state else "ViT encoder"


def load_into(
    model: nn.Module,
    weights: Weights,
    ignore_head: bool = False,
    model_flag: str = "--model",
    adapt_channels: bool = False,
) -> LoadReport:
    """Fill `model` (MaskedAutoencoderViT or VisionTransformer) and report the fate of every tensor.

    The encoder must be complete and of the model's shape; positions are interpolated to the model's patch grid. A
    decoder must be complete if the file has one. A head is loaded when it fits and `ignore_head` is not set. With
    `adapt_channels` weights for RGB images are adapted to the model's channels (`util.weights.channels`). Raises
    UserError, with the model unchanged, when the encoder or the decoder does not fit; it names the flag `model_flag`.
    """
    own = model.state_dict()
    _refuse_no_cls(weights)
    if adapt_channels:
        weights = _adapted(own, weights)
    _check_geometry(own, weights, model_flag)
    _check_heads(model, weights, model_flag)
    notes = [*weights.notes, *filter(None, [_other_eps(model, weights)])]
    report = LoadReport(weights.path, weights.origin, note="; ".join(notes))
    report.head = why_no_head(own, weights.state, ignore_head)
    chosen = {name: tensor for name, tensor in weights.state.items() if name in own}
    if report.head:
        report.head += f" (its {len(weights.classes)} labels: {some(weights.classes)})" if weights.classes else ""
        report.skipped = [name for name in weights.state if name.startswith("head.")]
        chosen = {name: tensor for name, tensor in chosen.items() if name not in report.skipped}
    if not weights.has_decoder:
        chosen.pop("mask_token", None)  # of masked image modelling inside the encoder, not of an MAE decoder
    _interpolate(model, chosen, weights, report)
    _check_complete(own, chosen, weights, model_flag)

    report.taken = [name for name in own if name in chosen and name not in report.interpolated]
    report.missing = [name for name in own if name not in chosen]
    unused = [name for name in weights.state if name not in chosen and name not in report.skipped]
    report.unexpected = unused + weights.dropped
    for name in report.unexpected:
        report.reasons.setdefault(weights.outside.get(name) or why_unused(name, own), []).append(name)
    model.load_state_dict({**own, **chosen})
    return report


def models_that_fit(weights: Weights) -> list[str]:
    """Return the names of the known encoders with the width, depth and patch size of these weights."""
    shape = geometry(weights.state)[:3]
    return [
        name
        for name, config in ENCODERS.items()
        if (config["embed_dim"], config["depth"], (config["patch_size"],) * 2) == shape
    ]


def _adapted(own: dict, weights: Weights) -> Weights:
    """Return weights for RGB images for the channels of the model, if they differ from it in nothing else."""
    theirs, ours = geometry(weights.state), geometry(own)
    if theirs.channels != RGB or theirs == ours or theirs._replace(channels=ours.channels) != ours:
        return weights
    decoder = {name for name in weights.state if is_decoder(name) and name not in own}
    kept = {name: tensor for name, tensor in weights.state.items() if name not in decoder}
    changed, note = for_channels(kept, ours.channels)
    state = {name: changed.get(name, tensor) for name, tensor in weights.state.items()}
    return replace(weights, state=state, notes=[*weights.notes, note])


def _check_geometry(own: dict, weights: Weights, flag: str) -> None:
    theirs, ours = geometry(weights.state), geometry(own)
    if theirs == ours:
        return
    fitting = models_that_fit(weights)
    advice = ""
    if len(fitting) == 1:
        advice = f"; {flag} {'mae_' if 'mask_token' in own else ''}{fitting[0]} fits the file"
    if theirs.channels != ours.channels:
        advice += f"; --in_chans {theirs.channels} is needed" if not advice else f" with --in_chans {theirs.channels}"
    raise UserError(f"{weights.path} is a ViT of {theirs}, but the model ({flag}) has {ours}{advice}")


def _check_heads(model: nn.Module, weights: Weights, flag: str) -> None:
    """Raise UserError when the file's flags give another number of attention heads than the model has: the shapes of
    the tensors do not depend on it."""
    name = str(weights.args.get("model")).removeprefix("mae_").removesuffix("_dec512d8b")
    stored = {"num_heads": ENCODERS.get(name, {}).get("num_heads"), **weights.args}
    for prefix in ("", "decoder_"):
        heads = stored.get(f"{prefix}num_heads")
        blocks: Any = getattr(model, f"{prefix}blocks", ())
        if not isinstance(heads, int) or not len(blocks) or (prefix and not weights.has_decoder):
            continue
        if blocks[0].attn.num_heads != heads:
            raise UserError(
                f"{weights.path} was trained with {heads} attention heads, but the model has "
                f"{blocks[0].attn.num_heads} (--{prefix}num_heads or {flag})"
            )


def _other_eps(model: nn.Module, weights: Weights) -> str:
    """Return a note when the file's layer norms have another epsilon than the model's, else "". A bare state dict does
    not store its epsilon; ours, MAE's and timm's is 1e-6."""
    stored = weights.args.get("layer_norm_eps")
    eps = next((module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)), stored)
    if stored in (None, eps):
        return ""
    return (
        f"its layer norms have an epsilon of {stored:g}, the model's have {eps:g}: features differ slightly from the "
        f"file's"
    )


def _interpolate(model: Any, chosen: dict, weights: Weights, report: LoadReport) -> None:
    """Interpolate the positions in `chosen` to the model's patch grid, and note it in the report."""
    target = tuple(model.patch_embed.grid_size)
    source = source_grid(weights.state, weights.args, target, weights.path)
    if source == target:
        return
    report.grids = " -> ".join(f"{rows}x{columns}" for rows, columns in (source, target))
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in chosen and chosen[name].ndim == 3 and chosen[name].shape[1] == prod(source) + 1:
            chosen[name] = interpolate_grid(chosen[name].float(), source, target)
            report.interpolated.append(name)


def _check_complete(own: dict, chosen: dict, weights: Weights, flag: str) -> None:
    """Raise UserError when the encoder, or the decoder of a file with one, is incomplete or has other shapes than the
    model's."""
    wrong = [name for name in own if name in chosen and chosen[name].shape != own[name].shape]
    missing = [name for name in own if name not in chosen]
    decoder = [name for name in weights.state if name.startswith("decoder_") and name not in own]
    if "mask_token" in own and weights.has_decoder:
        decoder += [name for name in wrong + missing if is_decoder(name)]
        if decoder:
            raise UserError(
                f"{weights.path} has a decoder of {_decoder(weights.state)}, but the model has one of {_decoder(own)}, "
                f"and they differ in {some(decoder)} (--decoder, --decoder_embed_dim, --decoder_depth)"
            )
    # Relative positions are zero in a new model, which computes the same as the file's encoder without them.
    optional = re.compile(r"norm\.|.*\.rel_pos_(bias\.|h$|w$)")
    lost = [name for name in missing if ENCODER.match(name) and not optional.match(name)]
    if lost:
        raise UserError(f"{weights.path} lacks {some(lost)} of the encoder: a complete ViT with [cls] is needed")
    if wrong:
        shapes = f"{tuple(chosen[wrong[0]].shape)} in the file and {tuple(own[wrong[0]].shape)} in the model"
        raise UserError(f"{weights.path} does not fit the model ({flag}): {wrong[0]} is {shapes}")


def _decoder(state: dict) -> str:
    embed = state.get("decoder_embed.weight")
    width = "unknown width" if embed is None else f"width {embed.shape[0]}"
    crosses = depth(state, "decoder_cross_blocks")
    return f"{width}, depth {crosses} (cross)" if crosses else f"{width}, depth {depth(state, 'decoder_blocks')}"


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder of a state in our names: [cls], positions, patch embedding, blocks and norm."""
    return {name: tensor for name, tensor in state.items() if ENCODER.match(name)}


def save_encoder(state: dict[str, Tensor], path, metadata: dict[str, str]) -> None:
    """Write the encoder of `state` as safetensors, completely or not at all; `metadata` becomes `Weights.args`."""
    save_state(encoder_state(state), path, metadata)
