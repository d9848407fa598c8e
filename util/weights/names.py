"""Conversion of tensor names: from those of wrappers and Hugging Face (ViT, ViTMAE) to ours, which are those of the
released MAE checkpoints, and back to Hugging Face."""

import re
from collections.abc import Iterable

import torch

# Wrappers (DDP, torch.compile, FSDP, gradient checkpointing) add these parts to names, at any depth; ours have none.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}

# Replacements in order; they cover the names in files of the hub, in transformers 5, and in files that it writes.
_HUGGING_FACE = [
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^decoder\.decoder_(?:encoder\.)?layers?\.(\d+)\.", r"decoder_blocks.\1."),
    (r"^decoder\.(mask_token|decoder_)", r"\1"),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.q."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.k."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.v."),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
]

ENCODER = re.compile(r"(cls_token|pos_embed)$|patch_embed\.|blocks\.|norm\.")
KNOWN = re.compile(
    r"(cls_token|pos_embed|mask_token)$|(patch_embed\.proj|norm|fc_norm)\.(weight|bias)$|head\.|decoder_"
    r"|blocks\.\d+\.(norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)$"
)
# An unknown tensor with such a name means that the file's encoder computes something ours does not.
ENCODER_AREA = re.compile(r"(blocks|patch_embed|pos_embed|embeddings|encoder|layers?|norm_pre|rope|rel_pos_bias)\.")
# Models of dense tasks, by what the names of their heads' tensors start with.
DENSE_MODELS = {"decode_head.": "a segmenter of main_segment.py", "roi_heads.": "a detector of main_detect.py"}
DENSE_USES = "evaluate it with --eval of that command, draw its predictions with tools/visualize_dense.py"
HF_MASK_TOKEN = "embeddings.mask_token"  # of masked image modelling on pixels; unused for complete images


def without_wrappers(name: str) -> str:
    """Return a name without the parts that wrappers add, and without a leading `mae.`."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "mae":
        parts = parts[1:]
    return ".".join(parts)


def _from_hugging_face(name: str) -> str:
    """Return our name of a tensor. Query, key and value, which we keep in one tensor, become `attn.q`, `attn.k` and
    `attn.v`."""
    for pattern, ours in _HUGGING_FACE:
        name = re.sub(pattern, ours, name)
    return name


def from_hugging_face(state: dict) -> tuple[dict, bool]:
    """Return the state in our names, and whether it had names of Hugging Face."""
    plain = {name.removeprefix("vit."): tensor for name, tensor in state.items()}
    if "embeddings.patch_embeddings.projection.weight" not in plain:
        return state, False
    renamed = {_from_hugging_face(name): tensor for name, tensor in plain.items()}
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in renamed for part in parts):
            renamed[name.replace(".q.", ".qkv.")] = torch.cat([renamed.pop(part) for part in parts])
    return renamed, True


def to_hugging_face(state: dict, names) -> dict:
    """Return the tensors of `state`, which has our names, under the `names` of a Hugging Face model. Raises KeyError
    for a name without a tensor in `state`."""
    renamed = {}
    for name in names:
        ours = _from_hugging_face(name.removeprefix("vit."))
        part = re.search(r"\.attn\.([qkv])\.", ours)
        if part:
            renamed[name] = state[ours.replace(part[0], ".attn.qkv.")].chunk(3)["qkv".index(part[1])]
        else:
            renamed[name] = state[ours]
    return renamed


def dense_model(names: Iterable[str]) -> str:
    """Return the model of a dense task to which tensors with these names belong, one of `DENSE_MODELS`; "" if none."""
    heads = {name.split(".")[0] + "." for name in names}
    return next((model for head, model in DENSE_MODELS.items() if head in heads), "")


def is_decoder(name: str) -> bool:
    return name.startswith("decoder_") or name == "mask_token"
