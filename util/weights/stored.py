"""What a file stores beside its weights: flags, names of classes, and the history of the run that wrote it."""

import argparse
import json
import os

from safetensors import safe_open
from torch import Tensor

from util.weights.file import first_bytes
from util.weights.hf_folder import folder_flags


def class_names(value) -> list[str]:
    """Return names of classes: of a list, or of a dict {name: index}. Anything else, such as a count, has none."""
    if isinstance(value, dict) and all(isinstance(index, int) for index in value.values()):
        return [str(name) for name in sorted(value, key=value.__getitem__)]
    return [str(name) for name in value] if isinstance(value, (list, tuple)) else []


def stored_args(raw: dict, path: str) -> dict:
    """Return the flags stored in a file. In a safetensors file they are the metadata, with numbers and lists as JSON;
    for weights in a Hugging Face folder they also come from its configuration."""
    args = raw.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    if isinstance(args, dict):
        return {name: value.tolist() if isinstance(value, Tensor) else value for name, value in args.items()}
    stored = folder_flags(path)
    if os.path.isfile(path) and first_bytes(path)[8:] == b"{":
        with safe_open(path, framework="pt") as file:
            stored |= {key: _parsed(value) for key, value in (file.metadata() or {}).items() if key != "format"}
    return stored


def history(raw: dict, args: dict) -> dict:
    """Return the provenance that our runs write beside the weights; in a safetensors file it is in the metadata."""
    origin = args.pop("origin", None) or raw.get("origin")
    known = ("epoch", "revision", "images_seen", "seconds", "data", "source", "hardware", "earlier")
    stored = {name: origin[name] for name in known if name in origin} if isinstance(origin, dict) else {}
    return {"epoch": raw.get("epoch"), **stored}


def _parsed(value: str):
    try:
        return json.loads(value)
    except ValueError:
        return value
