"""Encoders for transfer: the weights of a checkpoint in a `VisionTransformer`, or an untrained one."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, overload

import torch

import models_mae
import models_vit
from util.data.list_flags import note_other_split
from util.errors import UserError
from util.weights.load import Weights, load_into, read_weights
from util.weights.model_config import (
    DEFAULT_ENCODER,
    ENCODER,
    ModelConfig,
    infer_config_from_shapes,
    resolve_config,
)
from util.weights.names import DENSE_USES
from util.weights.report import some


@overload
def settle_model(args, source: Weights) -> Weights: ...


@overload
def settle_model(args, source: str | Weights | None) -> Weights | None: ...


def settle_model(args, source: str | Weights | None) -> Weights | None:
    """Read the weights at `source` (a path or weights already read; "" or None for an untrained encoder) and set the
    model flags of `args`: model, patch_size, in_chans, input_size and, if the file states it (as Hugging Face's do),
    layer_norm_eps. Return the weights, None without any."""
    weights = read_weights(source, args.checkpoint_key) if source and isinstance(source, str) else source or None
    vars(args).update(resolve_config(weights, vars(args), default=DEFAULT_ENCODER).encoder_flags())
    if weights is not None:
        note_other_split(args, weights.path, weights.args)
    return weights


def load_encoder(
    weights: Weights, given: Mapping[str, Any], head: bool = True
) -> tuple[models_vit.VisionTransformer, ModelConfig]:
    """Build the encoder in `weights`, in eval mode, with the feature that it was trained for: `fc_norm` over the mean
    of the patches if the file has one, else `norm`. `given` are the model flags that were given.

    With `head` it has the file's classifier, if there is one; a probe's BatchNorm is folded into its linear layer.
    Raises UserError for a file without a final norm or with a head that is not linear, and if neither the flags nor the
    file determine the model.
    """
    config = resolve_config(weights, given, inferred=ENCODER)
    state, classes = _fold_head(weights) if head else (weights.state, 0)
    if not {"fc_norm.weight", "norm.weight"} & state.keys():
        if weights.dense_model:
            raise UserError(
                f"{weights.path} is {weights.dense_model}, whose encoder has no norm after its last block: {DENSE_USES}"
            )
        raise UserError(
            f"{weights.path} has neither norm nor fc_norm, so its features are not defined: a whole ViT is needed"
        )
    weights = replace(weights, state=state)
    verbose = given.get("verbose", False)
    model = build_vit(config, "fc_norm.weight" in state, weights, classes, ignore_head=not classes, verbose=verbose)
    return model.eval(), config


def with_inferred_flags(weights: Weights) -> Weights:
    """Return `weights` with the model flags that the file lacks and its tensor shapes determine."""
    stored = {name: value for name, value in weights.args.items() if value is not None}
    return replace(weights, args=infer_config_from_shapes(weights) | stored)


def _fold_head(weights: Weights) -> tuple[dict[str, torch.Tensor], int]:
    """Return the tensors with the head as one linear layer, weight (classes, D) and bias (classes,), and the number of
    classes, 0 without a head. Raises UserError for any other head."""
    state = dict(weights.state)
    names = sorted(name for name in state if name.startswith("head."))
    if not names:
        return state, 0
    probe = "head.0.running_mean head.0.running_var head.0.num_batches_tracked head.1.weight head.1.bias".split()
    if set(names) == set(probe):
        mean, var, _, weight, bias = (state.pop(name).double() for name in probe)
        weight = weight * (var + 1e-6) ** -0.5  # BatchNorm of main_linprobe.probe_head
        state |= {"head.weight": weight.float(), "head.bias": (bias - weight @ mean).float()}
    elif names != ["head.bias", "head.weight"]:
        raise UserError(f"{weights.path} has a head of {some(names)}, which is not one linear layer: leave it out")
    return state, len(state["head.weight"])


def build_encoder(args, weights: Weights | None, num_classes: int = 0, drop_path=0.0, ignore_head=True, like_mae=True):
    """Build the `VisionTransformer` of flags that `settle_model` has set; see `build_vit`."""
    config = resolve_config(None, vars(args), default=DEFAULT_ENCODER)
    verbose = getattr(args, "verbose", False)
    return build_vit(config, args.global_pool, weights, num_classes, drop_path, ignore_head, like_mae, verbose)


def build_vit(
    config: ModelConfig,
    global_pool: bool,
    weights: Weights | None,
    num_classes: int = 0,
    drop_path=0.0,
    ignore_head=True,
    like_mae=True,
    verbose: bool = False,
) -> models_vit.VisionTransformer:
    """Build a `VisionTransformer` and load `weights`, reporting what became of its tensors (`LoadReport.shown`).

    Without weights and with `like_mae` it starts as an untrained autoencoder of that name does (sine-cosine positions,
    Xavier), so that a random encoder differs from a pretrained one only in training; else as a fresh ViT. Raises
    UserError if the weights do not fit, and for a missing classifier unless `ignore_head`.
    """
    model = models_vit.build_model(
        config.encoder_name,
        **config.encoder_arguments(),
        num_classes=num_classes,
        drop_path_rate=drop_path,
        global_pool=global_pool,
    )
    set_norm_eps(model, config.layer_norm_eps)
    if weights is not None:
        report = load_into(model, weights, ignore_head=ignore_head, adapt_channels=ignore_head)
        print(report.shown(verbose))
        if not ignore_head and "head.weight" in report.missing:
            raise UserError(f"{weights.path} has no classifier for this model: {report.head or 'no head in the file'}")
    elif like_mae:
        _initialize_like_mae(model, config)
    return model


def set_norm_eps(model: torch.nn.Module, eps: float | None) -> None:
    """Set the epsilon of all layer norms; None leaves 1e-6, that of MAE and timm."""
    for module in model.modules() if eps is not None else ():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps


def _initialize_like_mae(model, config: ModelConfig) -> None:
    mae = models_mae.build_model(f"mae_{config.encoder_name}", **config.encoder_arguments())
    own = model.state_dict()
    state = {key: value for key, value in mae.state_dict().items() if key in own}
    model.load_state_dict(state, strict=False)  # head and fc_norm keep their initial values: the only missing ones


def count_classes(args, *splits) -> int:
    """Return the number of classes. Raises UserError if there are none, or if the splits or --nb_classes disagree."""
    counts = [_classes_of(args, images) for images in splits if images is not None]
    if len(set(counts)) > 1:
        raise UserError(f"--dataset {args.dataset} has {counts[0]} classes in training and {counts[1]} in validation")
    return counts[0]


def _classes_of(args, images) -> int:
    classes = getattr(images, "classes", None)
    if classes is None:
        numbers = images.targets if hasattr(images, "load") else [0]  # of a stream they are not known in advance
        if args.nb_classes is None or min(numbers) < 0:
            raise UserError(f"--dataset {args.dataset} has no labels, or their number is not known: give --nb_classes")
        if max(numbers) >= args.nb_classes:
            raise UserError(f"--nb_classes {args.nb_classes}: --dataset {args.dataset} has the label {max(numbers)}")
        return args.nb_classes
    if args.nb_classes is not None and args.nb_classes != len(classes):
        raise UserError(f"--nb_classes {args.nb_classes} contradicts the data set, which has {len(classes)} classes")
    return len(classes)


@torch.no_grad()
def token_feature(model, imgs: torch.Tensor, pool: str) -> torch.Tensor:
    """Encode images (N, C, H, W) into features (N, D) by `feature` of a `VisionTransformer` or a `TimmEncoder`."""
    return model.feature(imgs, pool)


def select_feature(tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """Return [cls] (`pool` cls) or the mean of the patches (avg) of tokens (N, 1 + L, D), [cls] first: (N, D)."""
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
