"""Export of models to other libraries: timm, Hugging Face transformers (ViT, ViTMAE), ONNX, torch.export.

Each `to_...` writes a model to `out` and returns an `Exported`, which loads it again with the other library. `pool` is
the feature that the model's output reads, cls or avg; `flags` are stored in the exported file. Raises UserError for a
model that the format cannot hold, and for a package that is not installed.
"""

import copy
import functools
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from evaluation.encoder import select_feature
from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.architectures import ENCODERS
from util.errors import UserError
from util.weights.file import save_state
from util.weights.names import to_hugging_face

EXAMPLES = 2  # images of the check and of the exporters' traces, which would treat a batch of one as a constant
_ONNX_LARGEST = 2**31 - 2**20  # bytes of one protobuf file; larger models keep their weights in a second file


@dataclass
class Exported:
    """An exported file: the code that loads it, a description of its outputs, and a function that runs it on images (N,
    C, H, W), with the outputs of `PlainEncoder` (for an autoencoder: its prediction for the masks of `noise`)."""

    code: str
    outputs: str
    again: Callable[..., list[Tensor]]


class PlainEncoder(nn.Module):
    """A `VisionTransformer` as a function of images alone, for ONNX and torch.export.

    Images (N, C, H, W) -> logits (N, classes) of a classifier; of an encoder the feature (N, D) and, if its final norm
    applies to tokens, the tokens (N, 1 + L, D), [cls] first.
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
            return (self.vit(imgs),)
        tokens = self.vit.norm(self.vit.forward_tokens(imgs))
        return select_feature(tokens, self.pool), tokens


def need(package: str, target: str):
    """Import a package. Raises UserError, with the command that installs it, if that fails."""
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
    """A layer norm with this epsilon, whose `repr` is code."""

    def __new__(cls, eps: float):
        return super().__new__(cls, nn.LayerNorm, eps=eps)

    def __repr__(self):
        return f"functools.partial(torch.nn.LayerNorm, eps={self.keywords['eps']!r})"


def timm_arguments(model: VisionTransformer, pool: str) -> dict:
    """Return the arguments of `timm.create_model` for this model: timm's name for its sizes, else that of ViT-B/16 and
    the sizes that differ."""
    import timm

    known = {f"{name}_224": ENCODERS[name] for name in ENCODERS if timm.is_model(f"{name}_224")}
    sizes, image = _sizes(model), tuple(model.patch_embed.img_size)
    name = next((name for name in known if sizes.items() <= known[name].items()), "vit_base_patch16_224")
    arguments = {"model_name": name}
    if image != (224, 224):
        arguments["img_size"] = image[0] if image[0] == image[1] else image
    arguments |= {key: value for key, value in sizes.items() if value != known[name][key]}
    if model.blocks[0].norm1.eps != 1e-6:
        arguments["norm_layer"] = _Norm(model.blocks[0].norm1.eps)
    if model.patch_embed.proj.in_channels != 3:
        arguments["in_chans"] = model.patch_embed.proj.in_channels
    arguments["num_classes"] = model.num_classes
    if pool == "avg":
        arguments["global_pool"] = "avg"
        if not model.global_pool:  # the encoder's own norm on every token, then the mean
            arguments["fc_norm"] = False
    return arguments


def to_timm(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write a file for `timm.create_model(..., checkpoint_path=out)`; tensor names are the same in timm."""
    import timm

    arguments = timm_arguments(model, pool)
    save_state(model.state_dict(), out, as_metadata(flags))
    keywords = {key: value for key, value in arguments.items() if key != "model_name"}
    text = ", ".join(f"{key}={value!r}" for key, value in {"checkpoint_path": str(out), **keywords}.items())

    def again(imgs):
        theirs = timm.create_model(**arguments, checkpoint_path=str(out)).eval()
        tokens = [] if model.num_classes or model.global_pool else [theirs.forward_features(imgs)]
        return [theirs(imgs), *tokens]

    outputs = "logits" if model.num_classes else "the feature; model.forward_features(imgs) gives all tokens"
    return Exported(f"model = timm.create_model({arguments['model_name']!r}, {text})", outputs, again)


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


def to_hf_vit(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write a folder for `ViTForImageClassification.from_pretrained`, or `ViTModel` for an encoder.

    Raises UserError for a model with `fc_norm`: Hugging Face's ViT norms every token and classifies by [cls].
    """
    transformers = _transformers("hf-vit")
    if model.global_pool:
        raise UserError(
            "--to hf-vit: this model reads the mean of the patches before the norm (fc_norm), and Hugging Face's ViT "
            "only [cls] after it: use --to timm, or export a model that was fine-tuned with --cls_token"
        )
    class_name, labels, options, keywords = "ViTForImageClassification", {"num_labels": model.num_classes}, {}, ""
    if not model.num_classes:
        class_name, labels, options, keywords = (
            "ViTModel",
            {},
            {"add_pooling_layer": False},
            ", add_pooling_layer=False",
        )
    config = transformers.ViTConfig(**_hf_config(model), **labels)
    _save_hf(transformers, class_name, config, model, out, flags, **options)

    def again(imgs):
        theirs = getattr(transformers, class_name).from_pretrained(out, **options).eval()
        if model.num_classes:
            return [theirs(imgs).logits]
        tokens = theirs(imgs).last_hidden_state
        return [select_feature(tokens, pool), tokens]

    part = "last_hidden_state[:, 0]" if pool == "cls" else "last_hidden_state[:, 1:].mean(dim=1)"
    outputs = "model(imgs).logits" if model.num_classes else f"the feature is model(imgs).{part}"
    return Exported(f'model = transformers.{class_name}.from_pretrained("{out}"{keywords})', outputs, again)


def to_hf_vitmae(model, out: Path, pool: str, flags: dict) -> Exported:
    """Write a folder for `ViTMAEForPreTraining.from_pretrained`, or `ViTMAEModel` for an encoder.

    Raises UserError for images that are not square, for a model with `fc_norm` and for a decoder of cross-attention.
    """
    transformers = _transformers("hf-vitmae")
    height, width = model.patch_embed.img_size
    if height != width:
        raise UserError(f"--to hf-vitmae: Hugging Face's ViTMAE takes squares only, these images are {height}x{width}")
    if getattr(model, "global_pool", False):
        raise UserError("--to hf-vitmae: this model has no norm on its tokens (but fc_norm): use --to timm")
    whole = isinstance(model, MaskedAutoencoderViT)
    if whole and not len(model.decoder_blocks):
        raise UserError(
            "--to hf-vitmae: Hugging Face's ViTMAE has only MAE's decoder of self-attention: --encoder_only"
        )
    ratio = flags.get("mask_ratio", 0.75) if whole else 0.0
    config = transformers.ViTMAEConfig(**_hf_config(model), mask_ratio=ratio)
    if whole:
        config.update(_hf_decoder_config(model))
    class_name = "ViTMAEForPreTraining" if whole else "ViTMAEModel"
    _save_hf(transformers, class_name, config, model, out, flags)

    def again(imgs, noise=None):
        theirs = getattr(transformers, class_name).from_pretrained(out).eval()
        if whole:
            return [theirs(imgs, noise=noise).logits]
        order = torch.arange(model.patch_embed.num_patches, dtype=torch.float).expand(len(imgs), -1)
        tokens = theirs(imgs, noise=order).last_hidden_state
        return [select_feature(tokens, pool), tokens]

    outputs = "model(imgs).last_hidden_state, [cls] first, patches in the order of ids_restore (mask_ratio is 0)"
    if whole:
        outputs = f"model(imgs).loss and .logits, {ratio:.0%} removed"
    return Exported(f'model = transformers.{class_name}.from_pretrained("{out}")', outputs, again)


def to_safetensors(model, out: Path, pool: str, flags: dict) -> Exported:
    """Write all tensors under the names of the official MAE and timm, with the flags as metadata."""
    save_state(model.state_dict(), out, as_metadata(flags))

    def again(imgs, noise=None):
        theirs = copy.deepcopy(model)
        theirs.load_state_dict(load_file(out))
        return (
            [theirs(imgs, flags.get("mask_ratio", 0.75), noise)[1]]
            if noise is not None
            else list(PlainEncoder(theirs, pool)(imgs))
        )

    return Exported(f'state = safetensors.torch.load_file("{out}")', "tensors in the official MAE's names", again)


def _example(model) -> Tensor:
    return torch.randn(EXAMPLES, model.patch_embed.proj.in_channels, *model.patch_embed.img_size)


def _program(model: VisionTransformer, pool: str) -> tuple[torch.export.ExportedProgram, list[str]]:
    plain = PlainEncoder(model, pool).eval()
    shapes = {"imgs": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(plain, (_example(model),), dynamic_shapes=shapes), plain.names


def to_onnx(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write an ONNX file for any batch size, with the flags in its metadata. Weights beyond the 2 GiB of one file are
    written beside it (`.data`)."""
    runtime = [need(package, "onnx") for package in ("onnx", "onnxscript", "onnxruntime")][-1]
    program, names = _program(model, pool)
    made = torch.onnx.export(program, input_names=["imgs"], output_names=names, verbose=False, dynamo=True)
    made.model.metadata_props.update(as_metadata(flags))
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    made.save(out, external_data=size > _ONNX_LARGEST)

    def again(imgs):
        session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        return [torch.from_numpy(value) for value in session.run(None, {"imgs": imgs.numpy()})]

    code = f'model = onnxruntime.InferenceSession("{out}")'
    return Exported(code, f'model.run(None, {{"imgs": imgs}}) gives {", ".join(names)}', again)


def to_torch_export(model: VisionTransformer, out: Path, pool: str, flags: dict) -> Exported:
    """Write a file for `torch.export.load`, for any batch size, with the flags in it as `flags.json`."""
    program, names = _program(model, pool)
    torch.export.save(program, out, extra_files={"flags.json": json.dumps(flags, default=str)})

    def again(imgs):
        return list(torch.export.load(out).module()(imgs))

    return Exported(f'model = torch.export.load("{out}").module()', f"model(imgs) gives {', '.join(names)}", again)


def as_metadata(flags: dict) -> dict[str, str]:
    """Return flags as the strings of a safetensors or ONNX header, which `util.weights.load` reads back."""
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
    """Return the largest difference between the outputs of `model` and of the file for two random images, divided by
    the largest output, or by 1 if that is smaller. Rounding is at most 1e-5."""
    imgs = _example(model)
    if isinstance(model, MaskedAutoencoderViT):
        noise = torch.rand(len(imgs), model.patch_embed.num_patches)
        ours, theirs = [model(imgs, mask_ratio, noise)[1]], exported.again(imgs, noise)
    else:
        ours, theirs = PlainEncoder(model, pool)(imgs), exported.again(imgs)
    assert [value.shape for value in ours] == [value.shape for value in theirs]
    return max(((a - b).abs().max() / a.abs().max().clamp(min=1)).item() for a, b in zip(ours, theirs))
