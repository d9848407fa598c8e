"""The encoder inside a larger model: the prefix that its tensor names have in the file (`backbone.`, `student.`,
`module.base_encoder.`, ...)."""

import re
from collections.abc import Iterable

from util.errors import UserError

_KERNEL, _BLOCK = "patch_embed.proj.weight", "blocks.0.norm1.weight"  # of ours and timm's
_HUGGING_FACE_KERNEL = "embeddings.patch_embeddings.projection.weight"
# Parts of the names of networks that no gradient trains: moving averages of the trained one.
_AVERAGE = re.compile(r"teacher|momentum|target|(^|_)ema($|_)|averaged?($|_)|shadow|_k$")


def encoder_prefixes(names: Iterable[str]) -> list[str]:
    """Return the prefixes ("" for none, else with the last dot) of the encoders among tensor names without wrappers,
    trained networks before moving averages, short prefixes before long ones."""
    names, found = set(names), set()
    for name in names:
        for kernel in (_KERNEL, _HUGGING_FACE_KERNEL):
            prefix = name.removesuffix(kernel)
            if prefix == name or not (prefix == "" or prefix.endswith(".")):
                continue
            if kernel == _HUGGING_FACE_KERNEL:
                found.add(re.sub(r"(^|\.)vit\.$", r"\1", prefix))  # part of Hugging Face's own names
            elif prefix + _BLOCK in names:
                found.add(prefix)
    return sorted(found, key=lambda prefix: (*_rank(prefix), prefix))


def _rank(prefix: str) -> tuple[bool, int]:
    return any(_AVERAGE.search(part) for part in prefix.split(".")), prefix.count(".")


def matching(prefixes: list[str], part: str) -> list[str]:
    """Return the prefixes that contain the part `part` of names; all for ""."""
    return [prefix for prefix in prefixes if not part or f".{part}." in f".{prefix}"]


def choose_prefix(prefixes: list[str], part: str, path: str) -> str:
    """Return the prefix of the encoder to load from those of `encoder_prefixes`: the trained network rather than its
    moving average, then the one with the shortest prefix. `part` (`--checkpoint_key`) limits the choice. Raises
    UserError when two are equal in this order."""
    first, *others = matching(prefixes, part)
    if others and _rank(others[0]) == _rank(first):
        raise UserError(
            f"{path} contains several encoders ({', '.join([first, *others])}): choose one, "
            f"for example by --checkpoint_key {first.rstrip('.')}"
        )
    return first
