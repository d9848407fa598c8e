"""An encoder for transfer: which model a checkpoint is, its weights in a `VisionTransformer`, or a random one."""

import torch

import models_mae
import models_vit
from util.datasets import input_size
from util.errors import UserError
from util.weights import Weights, load_into, read_weights

DEFAULT_MODEL = "vit_large_patch16"


def settle_model(args, path: str) -> Weights | None:
    """Read the weights at `path` ("" means a random encoder) and fill in the model flags that were not given: from the
    file where it says, else the model's own. Sets args.model, patch_size, in_chans, input_size."""
    weights = read_weights(path, args.checkpoint_key) if path else None
    stored = _stored_flags(args, weights) if weights else {}
    args.model = args.model or stored.get("model") or DEFAULT_MODEL
    args.model = args.model.removeprefix("mae_").removesuffix("_dec512d8b")
    config = models_vit.look_up(models_vit.MODELS, args.model).config
    args.patch_size = args.patch_size or stored.get("patch_size") or config["patch_size"]
    args.in_chans = args.in_chans or stored.get("in_chans") or 3
    size = args.input_size or stored.get("input_size") or config["img_size"]
    size = [size] if isinstance(size, int) else list(size)
    args.input_size = size[0] if len(size) == 1 or size[0] == size[1] else size
    return weights


def _stored_flags(args, weights: Weights) -> dict:
    """The model flags that the file was written with; UserError where one is needed and makes no sense."""
    kinds = {"model": str, "patch_size": int, "in_chans": int, "input_size": (int, list)}
    stored = {name: weights.args[name] for name in kinds if weights.args.get(name) is not None}
    for name, value in stored.items():
        if not getattr(args, name) and not isinstance(value, kinds[name]):
            raise UserError(f"{weights.path} says that its --{name} was {value!r}, which makes no sense: give --{name}")
    return stored


def build_encoder(args, weights: Weights | None, num_classes: int = 0, drop_path=0.0, ignore_head=True, like_mae=True):
    """A `VisionTransformer` of these flags with `weights`.

    Without weights it is, `like_mae`, what an untrained autoencoder of that name would be (sine-cosine positions,
    Xavier), so that a random encoder differs from a pretrained one in nothing but the training; else a fresh ViT.
    """
    model = models_vit.build_model(
        args.model,
        img_size=input_size(args),
        patch_size=args.patch_size,
        in_chans=args.in_chans,
        num_classes=num_classes,
        drop_path_rate=drop_path,
        global_pool=args.global_pool,
    )
    if weights is not None:
        report = load_into(model, weights, ignore_head=ignore_head)
        print(report)
        if not ignore_head and "head.weight" in report.missing:
            raise UserError(f"{weights.path} has no classifier for this model: {report.head or 'no head in the file'}")
    elif like_mae:
        _like_an_untrained_autoencoder(model, args)
    return model


def _like_an_untrained_autoencoder(model, args) -> None:
    mae = models_mae.build_model(
        f"mae_{args.model}", img_size=input_size(args), patch_size=args.patch_size, in_chans=args.in_chans
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
