"""Tensor names of other trainers' plain ViTs, converted to ours: torchvision's and mmpretrain's.

Names of torchvision: `torchvision.models.vision_transformer`. Names of mmpretrain, which mmselfsup shares:
`mmpretrain.models.backbones.VisionTransformer` and its heads `VisionTransformerClsHead` and `LinearClsHead`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from util.errors import UserError


@dataclass(frozen=True)
class Dialect:
    """The names that one library gives to the tensors of a ViT. A file has them if both `kernel` and `norm` are among
    its names, below the same prefix. `replacements` of the part after the prefix are made in order."""

    library: str
    kernel: str
    norm: str
    replacements: tuple[tuple[str, str], ...]
    part: str = ""  # name of the encoder beside its head, which is then outside the encoder's prefix

    def prefixes(self, names: set[str]) -> list[str]:
        """Return the prefixes ("" for none, else with the last dot) of the encoders with these names."""
        starts = (name.removesuffix(self.kernel) for name in names if name.endswith(self.kernel))
        return sorted(p for p in starts if (not p or p.endswith(".")) and p + self.norm in names)

    def renamed(self, name: str, prefix: str) -> str:
        """Return our name of a tensor, below the same prefix; names outside the encoder and its head are unchanged."""
        parent = prefix.removesuffix(self.part)
        if self.part and name.startswith(f"{parent}head."):
            head = re.fullmatch(r"head\.(?:layers\.head|fc)\.(weight|bias)", name.removeprefix(parent))
            return f"{prefix}head.{head[1]}" if head else name
        if not name.startswith(prefix):
            return name
        rest = name.removeprefix(prefix)
        for pattern, ours in self.replacements:
            rest = re.sub(pattern, ours, rest)
        return prefix + rest


_TORCHVISION = Dialect(
    "torchvision",
    "conv_proj.weight",
    "encoder.layers.encoder_layer_0.ln_1.weight",
    (
        (r"^class_token$", "cls_token"),
        (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^conv_proj\.", "patch_embed.proj."),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "head."),
        (r"^heads\.", "head."),  # a second layer of the head, which is refused where a head is loaded
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
        (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
    ),
)
_MMPRETRAIN = Dialect(
    "mmpretrain",
    "patch_embed.projection.weight",
    "layers.0.ln1.weight",
    (
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^pre_norm\.", "norm_pre."),
        (r"^ln1\.", "norm."),
        (r"^ln2\.", "fc_norm."),  # out_type="avg_featmap"
        (r"^layers\.(\d+)\.", r"blocks.\1."),
        (r"^(blocks\.\d+)\.ln([12])\.", r"\1.norm\2."),
        (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
        (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    ),
    part="backbone.",
)
DIALECTS = (_TORCHVISION, _MMPRETRAIN)


def our_names(names: Iterable[str], path: str) -> tuple[dict[str, str], str]:
    """Return {name in the file: our name} of all tensors, and the library whose names were converted ("" for none).

    Raises UserError if two tensors would get one name, and for mmpretrain's encoders with two final norms: they
    normalise the patches before their mean and the mean itself, ours only one of them.
    """
    known = set(names)
    for dialect in DIALECTS:
        prefixes = dialect.prefixes(known)
        if not prefixes:
            continue
        renamed = {name: name for name in known}
        for prefix in prefixes:
            renamed |= {name: dialect.renamed(ours, prefix) for name, ours in renamed.items()}
            if {f"{prefix}norm.weight", f"{prefix}fc_norm.weight"} <= set(renamed.values()):
                raise UserError(
                    f"{path} has two final norms ({prefix}ln1 and {prefix}ln2), one before and one after the mean of "
                    "the patches: a ViT with one of them is needed"
                )
        if len(set(renamed.values())) < len(renamed):
            raise UserError(f"{path} has tensors with names of ours and of {dialect.library}: keep one of the models")
        return renamed, dialect.library
    return {name: name for name in known}, ""
