"""Opening any encoder of timm's for a judging command, with the images in the form that it was trained on."""

from dataclasses import replace

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config
from torchvision.transforms import InterpolationMode

from evaluation.image_options import ImageOptions, image_options
from models_timm import TimmEncoder
from util.data.bands import many_bands
from util.data.image_format import image_shape
from util.data.sample_rng import seeded
from util.errors import UserError
from util.weights.load import Weights
from util.weights.timm_models import TimmModel

IMAGENET_CLASSES = 1000


def load_timm_encoder(args, source: TimmModel) -> tuple[TimmEncoder, ImageOptions, Weights | None]:
    """Build the model of `source` for the flags --input_size and --in_chans, else for its own size and 3 channels.

    Returns the encoder, how its images are read (its own mean, standard deviation, crop and interpolation, unless
    flags give others), and what records name as its source (None: untrained). Raises UserError as `TimmModel.create`
    and for flags that describe a ViT of ours.
    """
    for flag in ("model", "patch_size"):
        if getattr(args, flag, None):
            raise UserError(f"--{flag} has no effect with {source.name}, which names the architecture: leave it out")
    given = image_shape(args.input_size) if args.input_size else None
    in_chans = args.in_chans or 3
    with seeded(args.seed):
        network = source.create(given, in_chans)
    config = resolve_model_data_config(network)
    encoder = TimmEncoder(network, source.name, given or tuple(config["input_size"][1:]), in_chans)
    _check_size(encoder)
    names = () if many_bands(in_chans) else ("mean", "std")  # bands have none in common with RGB images
    stored = {name: _for_channels(config[name], in_chans) for name in names}
    images = image_options(args, in_chans, encoder.img_size, stored)
    images = replace(
        images,
        crop_pct=images.crop_pct or config["crop_pct"],
        interpolation=InterpolationMode(config["interpolation"] if config["interpolation"] != "random" else "bicubic"),
        squash=config["crop_mode"] == "squash",
    )
    count = sum(parameter.numel() for parameter in network.parameters())
    what = "untrained" if source.untrained else f"weights of {source.weights or 'timm'}"
    size = " x ".join(map(str, encoder.img_size))
    print(f"{source.name}: timm's {source.architecture}, {what}, {count / 1e6:.2f} M parameters, {size} px")
    if source.untrained:
        return encoder, images, None
    return encoder, images, Weights(source.weights or source.name, "timm's model", {}, classes=_classes(network))


@torch.no_grad()
def _check_size(encoder: TimmEncoder) -> None:
    """Raise UserError if the encoder does not take images of its size, tried with an empty one."""
    try:
        encoder.forward_features(torch.zeros(1, encoder.in_chans, *encoder.img_size))
    except Exception as error:  # whatever an architecture raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        size = "x".join(map(str, encoder.img_size))
        raise UserError(
            f"{encoder.name} does not take images of {size} pixels ({reason}): give another --input_size"
        ) from error


def _for_channels(values, in_chans: int) -> list[float]:
    """Return one value for each channel: the average one unless there are three channels."""
    return list(values) if len(values) == in_chans else [sum(values) / len(values)] * in_chans


def _classes(network) -> list[str]:
    """Return the names of the classes that timm's configuration states, or the WordNet identifiers of ImageNet-1k."""
    names = network.pretrained_cfg.get("label_names")
    if names and len(names) == network.num_classes:
        return [str(name) for name in names]
    if network.num_classes == IMAGENET_CLASSES and infer_imagenet_subset(network):
        return ImageNetInfo(infer_imagenet_subset(network)).label_names()
    return []
