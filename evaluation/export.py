"""Export of models to other libraries: timm, Hugging Face transformers (ViT, ViTMAE), ONNX, torch.export.

Each function `to_...` writes a model to `out` and returns an `Exported`, which loads the file with the other library.
`pool` is the model's feature: cls, or avg (the mean of the patches). `flags` are stored in the exported file; for a
classifier `label_names` are the names of its outputs, as in timm's configurations. Raises UserError for a model that
the format cannot represent, and for a package that is not installed.
"""

import copy
import functools
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evaluation.encoder import select_feature
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.architectures import ENCODERS
from util.data.transforms import default_crop_pct
from util.errors import UserError
from util.weights.file import save_state
from util.weights.names import to_hugging_face

EXAMPLES = 2  # images for the check and for tracing, which would treat a batch size of one as a constant
_ONNX_LARGEST = 2**31 - 2**20  # bytes of weights in one ONNX file, whose limit is 2 GiB


@dataclass
class Exported:
    """An exported file: code that loads it, a description of its outputs, and a function that loads and runs it.

    `run_exported` takes images (N, C, H, W) and returns the outputs of `PlainEncoder` as a list. For an autoencoder
    it also takes `noise` (N, L), which determines the masks, and returns the predictions.
    """

    code: str
    outputs: str
    run_exported: Callable[..., list[Tensor]]


class PlainEncoder(nn.Module):
    """A `VisionTransformer` as a function of images alone, for ONNX and torch.export.

    A classifier returns logits (N, classes) for images (N, C, H, W), an encoder with `fc_norm` the feature (N, D): one
    tensor. Another encoder returns a tuple: the feature and the normalised tokens (N, 1 + L, D), [cls] first.
    """

    def __init__(self, vit: VisionTransformer, pool: str):
        super().__init__()
        self.vit, self.pool = vit, pool
        if vit.num_classes:
            self.names = ["logits"]
        else:
            self.names = ["feature"] if vit.global_pool else ["feature", "tokens"]

    def forward(self, imgs):
        if self.names != ["feature", "tokens"]:
            return self.vit(imgs)
        tokens = self.vit.norm(self.vit.forward_tokens(imgs))
        return select_feature(tokens, self.pool), tokens


def as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of a `PlainEncoder` as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def need(package: str, target: str):
    """Import and return `package`. Raises UserError, with the command that installs it, if it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"--to {target} needs the package {error.name or package}, which is not installed: "
            "pip install -r requirements-dev.txt"
        ) from error


def _sizes(model) -> dict:
    block = model.blocks[0]
    return dict(
        patch_size=model.patch_embed.patch_size[0],
        embed_dim=model.cls_token.shape[-1],
        depth=len(model.blocks),
        num_heads=block.attn.num_heads,
    )


class _Norm(functools.partial):
    """A layer norm with epsilon `eps`, whose `repr` is the code that makes it."""

    def __new__(cls, eps: float):
        return super().__new__(cls, nn.LayerNorm, eps=eps)

    def __repr__(self):
        return f"functools.partial(torch.nn.LayerNorm, eps={self.keywords['eps']!r})"


def timm_arguments(model: VisionTransformer, pool: str) -> dict:
    """Return the arguments of `timm.create_model` for this model: timm's name for its sizes or, if there is none, the
    name of ViT-B/16 and the sizes that differ from it."""
    import timm

    known = {f"{name}_224": ENCODERS[name] for name in ENCODERS if timm.is_model(f"{name}_224")}
    sizes, image = _sizes(model), tuple(model.patch_embed.img_size)
    name = next((name for name in known if sizes.items() <= known[name].items()), "vit_base_patch16_224")
    arguments: dict[str, Any] = {"model_name": name}
    if image != (224, 224):
        arguments["img_size"] = image[0] if image[0] == image[1] else image
    arguments |= {key: value for key, value in sizes.items() if value != known[name][key]}
    block: Any = model.blocks[0]
    if block.norm1.eps != 1e-6:
        arguments["norm_layer"] = _Norm(block.norm1.eps)
    if model.patch_embed.proj.in_channels != 3:
        arguments["in_chans"] = model.patch_embed.proj.in_channels
    arguments["num_classes"] = model.num_classes
    if pool == "avg":
        arguments["global_pool"] = "avg"
        if not model.global_pool:  # each token is normalised before the mean is taken
            arguments["fc_norm"] = False
    return arguments


def to_timm(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write a file for `timm.create_model(..., checkpoint_path=out)`, or timm's own format if `out` has no ending.
    Tensor names are those of timm already."""
    import timm

    if not out.suffix:
        return to_timm_folder(model, out, pool, flags)

    arguments = timm_arguments(model, pool)
    save_state(model.state_dict(), out, as_metadata(flags))
    keywords = {key: value for key, value in arguments.items() if key != "model_name"}
    call = ", ".join(f"{key}={value!r}" for key, value in {"checkpoint_path": str(out), **keywords}.items())

    def run_exported(imgs):
        theirs = timm.create_model(**arguments, checkpoint_path=str(out)).eval()
        tokens = [] if model.num_classes or model.global_pool else [theirs.forward_features(imgs)]
        return [theirs(imgs), *tokens]

    outputs = "logits" if model.num_classes else "the feature; model.forward_features(imgs) gives all tokens"
    return Exported(f"model = timm.create_model({arguments['model_name']!r}, {call})", outputs, run_exported)


def to_timm_folder(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write timm's own format, a folder for `timm.create_model("local-dir:...")` or the Hub, with sizes, mean and
    standard deviation, and names of the classes. Raises UserError for an epsilon of the norms that it cannot hold."""
    import timm

    arguments = timm_arguments(model, pool)
    if "norm_layer" in arguments:
        raise UserError(
            f"--to timm: timm's folder cannot hold this model's epsilon of the norms, {model.blocks[0].norm1.eps:g}: "
            "give --out a name that ends in .safetensors"
        )
    theirs = timm.create_model(**arguments)
    theirs.load_state_dict(model.state_dict())
    images = {name: tuple(flags[name]) for name in ("mean", "std") if flags.get(name)}
    size = tuple(model.patch_embed.img_size)
    images |= dict(input_size=(model.patch_embed.proj.in_channels, *size), interpolation="bicubic")
    images["crop_pct"] = flags.get("crop_pct") or default_crop_pct(size)
    theirs.pretrained_cfg.update(images | dict(tag="", license=""))  # not those of timm's weights of this name
    names = {"label_names": flags["label_names"]} if flags.get("label_names") else {}
    own = {name: value for name, value in arguments.items() if name not in ("model_name", "num_classes")}
    timm.models.save_for_hf(theirs, str(out), model_config=names, model_args=own, safe_serialization=True)

    def run_exported(imgs):
        loaded = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        tokens = [] if model.num_classes or model.global_pool else [loaded.forward_features(imgs)]
        return [loaded(imgs), *tokens]

    outputs = "logits" if model.num_classes else "the feature; model.forward_features(imgs) gives all tokens"
    return Exported(f"model = timm.create_model('local-dir:{out}', pretrained=True)", outputs, run_exported)


def _hf_config(model) -> dict:
    image = list(model.patch_embed.img_size)
    return dict(
        image_size=image[0] if image[0] == image[1] else image,
        patch_size=model.patch_embed.patch_size[0],
        num_channels=model.patch_embed.proj.in_channels,
        hidden_size=model.cls_token.shape[-1],
        num_hidden_layers=len(model.blocks),
        num_attention_heads=model.blocks[0].attn.num_heads,
        intermediate_size=model.blocks[0].mlp.fc1.out_features,
        layer_norm_eps=model.blocks[0].norm1.eps,
        qkv_bias=True,
    )


def _hf_decoder_config(model: MaskedAutoencoderViT) -> dict:
    block = model.decoder_blocks[0]
    return dict(
        decoder_hidden_size=model.mask_token.shape[-1],
        decoder_num_hidden_layers=len(model.decoder_blocks),
        decoder_num_attention_heads=block.attn.num_heads,
        decoder_intermediate_size=block.mlp.fc1.out_features,
        norm_pix_loss=model.norm_pix_loss,
    )


def _save_hf(transformers, class_name: str, config, model, out: Path, flags: dict, **options) -> None:
    theirs = getattr(transformers, class_name)(config, **options)
    theirs.load_state_dict(to_hugging_face(model.state_dict(), theirs.state_dict()))
    theirs.save_pretrained(out)
    if config.num_channels == 3 and flags.get("mean"):
        size = dict(zip(("height", "width"), model.patch_embed.img_size))
        transformers.ViTImageProcessor(
            size=size,
            resample=3,  # bicubic
            image_mean=list(flags["mean"]),
            image_std=list(flags["std"]),
        ).save_pretrained(out)


def _transformers(target: str):
    transformers = need("transformers", target)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _hf_labels(model, flags: dict) -> dict:
    """Return the number and, if they are known, the names of the classes in Hugging Face's configuration."""
    names = flags.get("label_names", [])
    known = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}} if names else {}
    several = "multi_label_classification" if flags.get("multilabel_loss") == "bce" else "single_label_classification"
    problem = {"regression": "regression", "multilabel": several}.get(
        flags.get("targets"), "single_label_classification"
    )
    return {"num_labels": model.num_classes, "problem_type": problem, **known}


def to_hf_vit(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write a folder for `from_pretrained` of `ViTForImageClassification` or, for an encoder, of `ViTModel`.

    Raises UserError for a model with `fc_norm`: Hugging Face's ViT normalises every token and classifies by [cls].
    """
    transformers = _transformers("hf-vit")
    if model.global_pool:
        raise UserError(
            "--to hf-vit: the feature of this model is the mean of the patches, normalised afterwards (fc_norm), but "
            "Hugging Face's ViT uses [cls]: use --to timm, or export a model that was fine-tuned with --cls_token"
        )
    class_name, labels, options, keywords = "ViTForImageClassification", _hf_labels(model, flags), {}, ""
    if not model.num_classes:
        class_name, labels, options, keywords = (
            "ViTModel",
            {},
            {"add_pooling_layer": False},
            ", add_pooling_layer=False",
        )
    config = transformers.ViTConfig(**_hf_config(model), **labels)
    _save_hf(transformers, class_name, config, model, out, flags, **options)

    def run_exported(imgs):
        theirs = getattr(transformers, class_name).from_pretrained(out, **options).eval()
        if model.num_classes:
            return [theirs(imgs).logits]
        tokens = theirs(imgs).last_hidden_state
        return [select_feature(tokens, pool), tokens]

    part = "last_hidden_state[:, 0]" if pool == "cls" else "last_hidden_state[:, 1:].mean(dim=1)"
    outputs = "model(imgs).logits" if model.num_classes else f"the feature is model(imgs).{part}"
    return Exported(f'model = transformers.{class_name}.from_pretrained("{out}"{keywords})', outputs, run_exported)


def to_hf_vitmae(model, out: Path, pool: str, flags: dict) -> Exported:
    """Write a folder for `from_pretrained` of `ViTMAEForPreTraining` or, for an encoder, of `ViTMAEModel`.

    Raises UserError for images that are not square, for a model with `fc_norm`, and for a cross-attention decoder.
    """
    transformers = _transformers("hf-vitmae")
    height, width = model.patch_embed.img_size
    if height != width:
        raise UserError(f"--to hf-vitmae: Hugging Face's ViTMAE accepts only square images, not {height}x{width}")
    if getattr(model, "global_pool", False):
        raise UserError("--to hf-vitmae: this model normalises only the mean of its patches (fc_norm): use --to timm")
    is_autoencoder = isinstance(model, MaskedAutoencoderViT)
    if is_autoencoder and not len(model.decoder_blocks):
        raise UserError(
            "--to hf-vitmae: Hugging Face's ViTMAE has only MAE's self-attention decoder: give --encoder_only"
        )
    ratio = flags.get("mask_ratio", 0.75) if is_autoencoder else 0.0
    config = transformers.ViTMAEConfig(**_hf_config(model), mask_ratio=ratio)
    if is_autoencoder:
        config.update(_hf_decoder_config(model))
    class_name = "ViTMAEForPreTraining" if is_autoencoder else "ViTMAEModel"
    _save_hf(transformers, class_name, config, model, out, flags)

    def run_exported(imgs, noise=None):
        theirs = getattr(transformers, class_name).from_pretrained(out).eval()
        if is_autoencoder:
            return [theirs(imgs, noise=noise).logits]
        order = torch.arange(model.patch_embed.num_patches, dtype=torch.float).expand(len(imgs), -1)
        tokens = theirs(imgs, noise=order).last_hidden_state
        return [select_feature(tokens, pool), tokens]

    outputs = (
        "out = model(imgs) gives out.last_hidden_state: [cls], then all patches (mask_ratio is 0) in shuffled order; "
        "gather them with out.ids_restore for the order of the image"
    )
    if is_autoencoder:
        outputs = f"model(imgs).loss and .logits, with {ratio:.0%} of the patches removed"
    return Exported(f'model = transformers.{class_name}.from_pretrained("{out}")', outputs, run_exported)


def to_safetensors(model, out: Path, pool: str, flags: dict) -> Exported:
    """Write all tensors, under the names that the official MAE and timm use, with the flags as metadata."""
    save_state(model.state_dict(), out, as_metadata(flags))

    def run_exported(imgs, noise=None):
        theirs = copy.deepcopy(model)
        theirs.load_state_dict(load_file(out))
        if noise is None:
            return as_list(PlainEncoder(theirs, pool)(imgs))
        return [theirs(imgs, flags.get("mask_ratio", 0.75), noise)[1]]

    return Exported(
        f'state = safetensors.torch.load_file("{out}")', "tensors under the names of the official MAE", run_exported
    )


def _example(model) -> Tensor:
    return torch.randn(EXAMPLES, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def _program(model: VisionTransformer, pool: str) -> tuple[torch.export.ExportedProgram, list[str]]:
    plain = PlainEncoder(model, pool).eval()
    shapes = {"imgs": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(plain, (_example(model),), dynamic_shapes=shapes), plain.names


def to_onnx(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write an ONNX file for any batch size, with the flags in its metadata. If the weights exceed the 2 GiB of one
    file, all of them are written to a second file beside it (`.data`)."""
    runtime = [need(package, "onnx") for package in ("onnx", "onnxscript", "onnxruntime")][-1]
    program, names = _program(model, pool)
    exported = torch.onnx.export(program, input_names=["imgs"], output_names=names, verbose=False, dynamo=True)
    exported.model.metadata_props.update(as_metadata(flags))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    exported.save(out, external_data=size > _ONNX_LARGEST)

    def run_exported(imgs):
        session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(value) for value in session.run(None, {"imgs": imgs.numpy()})]

    code = f'model = onnxruntime.InferenceSession("{out}")'
    return Exported(code, f'model.run(None, {{"imgs": imgs}}) gives the list [{", ".join(names)}]', run_exported)


def to_torch_export(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write a file for `torch.export.load`, for any batch size. It contains the flags as `flags.json`."""
    program, names = _program(model, pool)
    torch.export.save(program, out, extra_files={"flags.json": json.dumps(flags, default=str)})

    def run_exported(imgs):
        return as_list(torch.export.load(out).module()(imgs))

    outputs = names[0] if len(names) == 1 else f"the tuple ({', '.join(names)})"
    return Exported(f'model = torch.export.load("{out}").module()', f"model(imgs) gives {outputs}", run_exported)


def as_metadata(flags: dict) -> dict[str, str]:
    """Return flags as strings for the metadata of a safetensors or ONNX file. `util.weights.load` reads them back from
    safetensors."""
    return {name: json.dumps(value, default=str) for name, value in flags.items()}


EXPORTERS = {
    "timm": to_timm,
    "hf-vit": to_hf_vit,
    "hf-vitmae": to_hf_vitmae,
    "safetensors": to_safetensors,
    "onnx": to_onnx,
    "torch-export": to_torch_export,
}


@torch.no_grad()
def largest_difference(model, exported: Exported, pool: str, mask_ratio: float) -> float:
    """Return the largest difference between the outputs of `model` and of the exported file for two random images,
    relative to the largest output, or to 1 if that is smaller. Rounding errors are at most 1e-5."""
    imgs = _example(model)
    if isinstance(model, MaskedAutoencoderViT):
        noise = torch.rand(len(imgs), model.patch_embed.num_patches)
        ours, theirs = [model(imgs, mask_ratio, noise)[1]], exported.run_exported(imgs, noise)
    else:
        ours, theirs = as_list(PlainEncoder(model, pool)(imgs)), exported.run_exported(imgs)
    assert [value.shape for value in ours] == [value.shape for value in theirs]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in zip(ours, theirs))
