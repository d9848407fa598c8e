"""Folders of Hugging Face transformers (`save_pretrained`) and of timm (`save_for_hf`), also on the Hub: their file of
weights, and their configuration as flags."""

import json
from pathlib import Path

from util.architectures import ENCODERS
from util.errors import UserError
from util.weights.hub import from_hub

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_FLAGS = {
    "image_size": "input_size",
    "patch_size": "patch_size",
    "num_channels": "in_chans",
    "num_attention_heads": "num_heads",
    "layer_norm_eps": "layer_norm_eps",
}
_MAE_FLAGS = {
    "decoder_hidden_size": "decoder_embed_dim",
    "decoder_num_hidden_layers": "decoder_depth",
    "decoder_num_attention_heads": "decoder_num_heads",
    "norm_pix_loss": "norm_pix_loss",
    "mask_ratio": "mask_ratio",
}


def folder_weights(path: str) -> str:
    """Return the file of weights in a folder that has a configuration, or of a repository on the Hub; any other path is
    returned unchanged.

    Raises UserError for a folder whose weights are split into several files, and for a repository that cannot be read.
    """
    path = from_hub(path)
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return path
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return str(folder / name)
    raise UserError(
        f"{path} has a config.json but no {' or '.join(_WEIGHTS)}: save the model in one file "
        "(save_pretrained with a larger max_shard_size)"
    )


def folder_flags(path: str) -> dict:
    """Return our flags from the configuration beside the weights at `path`, {} unless it is timm's or that of a ViT or
    ViTMAE. Raises UserError for an invalid epsilon of the layer norms."""
    config = _json(Path(path).with_name("config.json")) if Path(path).name in _WEIGHTS else {}
    if isinstance(config.get("pretrained_cfg"), dict):
        return _timm_flags(config)
    if config.get("model_type") not in ("vit", "vit_mae"):
        return {}
    names = {**_FLAGS, **(_MAE_FLAGS if config["model_type"] == "vit_mae" else {})}
    flags = {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}
    flags |= _label_names(config.get("id2label"))
    eps = flags.get("layer_norm_eps", 1e-6)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(f"{Path(path).with_name('config.json')} has a layer_norm_eps of {eps!r}: it must be in (0, 1)")
    if isinstance(flags.get("patch_size"), list) and len(set(flags["patch_size"])) == 1:
        flags["patch_size"] = flags["patch_size"][0]
    images = _json(Path(path).with_name("preprocessor_config.json"))
    if images.get("image_mean") and images.get("image_std"):
        flags |= {"mean": images["image_mean"], "std": images["image_std"]}
    return flags


def _timm_flags(config: dict) -> dict:
    """Return our flags from timm's configuration."""
    images, given = config["pretrained_cfg"], config.get("model_args") or {}
    named = ENCODERS.get(str(config.get("architecture")).removesuffix("_224"), {})
    size = images.get("input_size") or (None, None, None)
    size = given.get("img_size") or list(size[1:])
    flags = {
        "input_size": size[0] if isinstance(size, list) and len({*size}) == 1 else size,
        "in_chans": given.get("in_chans") or (images.get("input_size") or [None])[0],
        "num_heads": given.get("num_heads") or named.get("num_heads"),
        "label_names": config.get("label_names"),
        "global_pool": config.get("global_pool") == "avg",
        **{name: images.get(name) for name in ("mean", "std", "crop_pct")},
    }
    return {name: value for name, value in flags.items() if value and value != [None, None]}


def _label_names(labels) -> dict[str, list[str]]:
    """Return the names of the classes in order; {} if there are none, or only the placeholders LABEL_0, LABEL_1, ..."""
    names = [labels.get(str(i)) for i in range(len(labels))] if isinstance(labels, dict) else []
    known = all(isinstance(name, str) for name in names) and any(name != f"LABEL_{i}" for i, name in enumerate(names))
    return {"label_names": names} if known else {}


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): copy or download it again") from error
    return content if isinstance(content, dict) else {}
