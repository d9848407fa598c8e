"""An encoder for transfer: which model a checkpoint is, its weights in a `VisionTransformer`, or a random one."""

import re
from math import isqrt

import torch

import models_mae
import models_vit
from util.data.image_format import image_shape
from util.errors import UserError
from util.weights.load import Weights, load_into, models_that_fit, read_weights
from util.weights.report import some

DEFAULT_MODEL = "vit_large_patch16"


def settle_model(args, source: str | Weights) -> Weights | None:
    """Read the weights at `source` ("" means a random encoder), if they are not yet, and fill in the model flags that
    were not given: from the file where it says, else the model's own. Sets args.model, patch_size, in_chans,
    input_size, and layer_norm_eps where the file says it (Hugging Face's do)."""
    weights = source or None
    if isinstance(weights, str):
        weights = read_weights(weights, args.checkpoint_key)
    stored = _stored_flags(args, weights) if weights else {}
    args.model = args.model or stored.get("model") or _only_fit(weights) or DEFAULT_MODEL
    args.model = args.model.removeprefix("mae_").removesuffix("_dec512d8b")
    config = models_vit.look_up(models_vit.MODELS, args.model).config
    args.patch_size = args.patch_size or stored.get("patch_size") or config["patch_size"]
    args.in_chans = args.in_chans or stored.get("in_chans") or 3
    size = args.input_size or stored.get("input_size") or config["img_size"]
    size = [size] if isinstance(size, int) else list(size)
    args.input_size = size[0] if len(size) == 1 or size[0] == size[1] else size
    if "layer_norm_eps" in stored:
        args.layer_norm_eps = stored["layer_norm_eps"]
    return weights


def _stored_flags(args, weights: Weights) -> dict:
    """The model flags that the file was written with; UserError where one is needed and makes no sense."""
    kinds = {"model": str, "patch_size": int, "in_chans": int, "input_size": (int, list), "layer_norm_eps": float}
    stored = {name: weights.args[name] for name in kinds if weights.args.get(name) is not None}
    for name, value in stored.items():
        if not getattr(args, name, None) and not isinstance(value, kinds[name]):
            raise UserError(f"{weights.path} says that its --{name} was {value!r}, which makes no sense: give --{name}")
    return stored


def _only_fit(weights: Weights | None) -> str | None:
    fitting = models_that_fit(weights) if weights else []
    return fitting[0] if len(fitting) == 1 else None


def infer_config_from_shapes(weights: Weights) -> dict:
    """The model flags as far as the tensors alone tell them: for files that store none."""
    kernel, table = weights.state["patch_embed.proj.weight"], weights.state.get("pos_embed")
    flags = {"model": _only_fit(weights), "in_chans": kernel.shape[1], "patch_size": kernel.shape[-1]}
    side = isqrt(table.shape[1] - 1) if table is not None and table.ndim == 3 and table.shape[1] else 0
    if side and side**2 + 1 == table.shape[1]:
        flags["input_size"] = side * kernel.shape[-1]
    if weights.has_decoder and "decoder_embed.weight" in weights.state:
        flags["decoder_embed_dim"] = len(weights.state["decoder_embed.weight"])
        blocks = {tuple(name.split(".")[:2]) for name in weights.state if re.match(r"decoder_(cross_)?blocks\.", name)}
        flags["decoder"] = "cross" if any("cross" in block for block, _ in blocks) else "self"
        flags["decoder_depth"] = len(blocks)
    return {name: value for name, value in flags.items() if value is not None}


def load_encoder(args, source: str | Weights, head: bool = True):
    """The encoder in a checkpoint (its path, or what was read of it) as a `VisionTransformer` in eval mode, with the
    feature that it was trained for: `fc_norm` over the mean of the patches where the file has that, else `norm`; with
    its classifier, unless `head` is False or it has none. A probe's BatchNorm becomes part of its linear layer, which
    computes the same.

    Settles the model flags in `args`. UserError for a file without a final norm or with a head that is not linear, and
    when neither the flags nor the file say which model it is. -> the model, the `Weights`.
    """
    weights = read_weights(source, args.checkpoint_key) if isinstance(source, str) else source
    path = weights.path
    weights.args = infer_config_from_shapes(weights) | {
        key: value for key, value in weights.args.items() if value is not None
    }
    if not (args.model or weights.args.get("model")):
        raise UserError(f"{path} does not say which model it is: give --model")
    settle_model(args, weights)
    linear = _fold_head(weights) if head else None
    args.global_pool = "fc_norm.weight" in weights.state
    if not args.global_pool and "norm.weight" not in weights.state:
        raise UserError(f"{path} has neither norm nor fc_norm, so its features are not defined: a whole ViT is needed")
    model = build_encoder(args, weights, len(linear[0]) if linear else 0, ignore_head=linear is None)
    return model.eval(), weights


def _fold_head(weights: Weights) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Bring the head in `weights` to one linear layer: weight (classes, D) and bias (classes,); None without a head."""
    state = weights.state
    found = sorted(name for name in state if name.startswith("head."))
    if not found:
        return None
    probe = "head.0.running_mean head.0.running_var head.0.num_batches_tracked head.1.weight head.1.bias".split()
    if set(found) == set(probe):
        mean, var, _, weight, bias = (state.pop(name).double() for name in probe)
        weight = weight * (var + 1e-6) ** -0.5  # BatchNorm of main_linprobe.probe_head
        state |= {"head.weight": weight.float(), "head.bias": (bias - weight @ mean).float()}
    elif found != ["head.bias", "head.weight"]:
        raise UserError(f"{weights.path} has a head of {some(found)}, which is not one linear layer: leave it out")
    return state["head.weight"], state["head.bias"]


def build_encoder(args, weights: Weights | None, num_classes: int = 0, drop_path=0.0, ignore_head=True, like_mae=True):
    """A `VisionTransformer` of these flags with `weights`.

    Without weights it is, `like_mae`, what an untrained autoencoder of that name would be (sine-cosine positions,
    Xavier), so that a random encoder differs from a pretrained one in nothing but the training; else a fresh ViT.
    """
    model = models_vit.build_model(
        args.model,
        img_size=image_shape(args.input_size),
        patch_size=args.patch_size,
        in_chans=args.in_chans,
        num_classes=num_classes,
        drop_path_rate=drop_path,
        global_pool=args.global_pool,
    )
    set_norm_eps(model, getattr(args, "layer_norm_eps", None))
    if weights is not None:
        report = load_into(model, weights, ignore_head=ignore_head)
        print(report)
        if not ignore_head and "head.weight" in report.missing:
            raise UserError(f"{weights.path} has no classifier for this model: {report.head or 'no head in the file'}")
    elif like_mae:
        _like_an_untrained_autoencoder(model, args)
    return model


def set_norm_eps(model: torch.nn.Module, eps: float | None) -> None:
    """Of all layer norms; None leaves them as they are (1e-6, as in MAE and timm)."""
    for module in model.modules() if eps is not None else ():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = eps


def _like_an_untrained_autoencoder(model, args) -> None:
    mae = models_mae.build_model(
        f"mae_{args.model}", img_size=image_shape(args.input_size), patch_size=args.patch_size, in_chans=args.in_chans
    )
    own = model.state_dict()
    state = {key: value for key, value in mae.state_dict().items() if key in own}
    model.load_state_dict(state, strict=False)  # head and fc_norm keep their initial values: the only missing ones


def count_classes(args, *splits) -> int:
    """Classes of the data set; UserError when there are none, or when the splits or --nb_classes disagree."""
    counts = [_classes_of(args, images) for images in splits if images is not None]
    if len(set(counts)) > 1:
        raise UserError(f"--dataset {args.dataset} has {counts[0]} classes in training and {counts[1]} in validation")
    return counts[0]


def _classes_of(args, images) -> int:
    classes = getattr(images, "classes", None)
    if classes is None:
        if args.nb_classes is None or getattr(images, "load", None) is not None:
            raise UserError(f"--dataset {args.dataset} has no labels (or does not say how many classes: --nb_classes)")
        return args.nb_classes
    if args.nb_classes is not None and args.nb_classes != len(classes):
        raise UserError(f"--nb_classes {args.nb_classes} contradicts the data set, which has {len(classes)} classes")
    return len(classes)


@torch.no_grad()
def token_feature(model, imgs: torch.Tensor, pool: str) -> torch.Tensor:
    """(N, C, H, W) -> (N, D): [cls] or the mean of the patches, both after the encoder's final norm. For a model built
    with global_pool=False."""
    tokens = model.norm(model.forward_tokens(imgs))
    return tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
