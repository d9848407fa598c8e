"""Files of weights: read safely, whatever their origin, and written completely or not at all."""

import argparse
import os
import pathlib
import re
import warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from util.errors import UserError
from util.weights.checksum import damage
from util.weights.hf_folder import folder_weights

# Official checkpoints hold their flags as a Namespace, some with a path in it. Python 3.13 pickles a path under another
# module than the versions around it, and torch allows globals by name: one stand-in for each name.
_SAFE_GLOBALS = [argparse.Namespace] + [
    type("PosixPath", (pathlib.PosixPath,), {"__module__": module}) for module in ("pathlib", "pathlib._local")
]


def read_file(path) -> dict:
    """The raw content of a checkpoint, on the CPU. Never unpickles more than tensors, plain containers and flags.

    Raises UserError when the file cannot be read, is damaged, is no checkpoint, or its pickle asks for anything else.
    """
    path = folder_weights(os.fspath(path))
    head = first_bytes(path)
    wrong = damage(path) if head.startswith(b"PK") and not path.endswith((".onnx", ".pt2")) else ""
    if wrong:
        raise UserError(f"{path} is truncated or damaged ({wrong}): copy or download it again, or take an older one")
    try:
        # A safetensors file is the length of its header, 8 bytes, and a JSON object.
        if path.endswith(".safetensors") or head[8:9] == b"{":
            return load_file(path)
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch muses on odd pickles before it refuses them: ours is the one line
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail with anything, down to a KeyError inside the unpickler
        raise UserError(_unreadable(path, head, str(error))) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint: a dict of tensors is needed")
    return content


def first_bytes(path: str) -> bytes:
    """The first nine. UserError for a file that is missing, empty or cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a checkpoint (.pth or .safetensors) is needed") from None
    except IsADirectoryError:
        if path.rstrip("/").endswith(".dcp"):
            raise UserError(
                f"{path} is a folder that --fsdp wrote: make one file of it: python tools/unshard.py {path}"
            ) from None
        files = sorted(name for name in os.listdir(path) if name.endswith((".pth", ".pt", ".safetensors", ".bin")))
        raise UserError(f"{path} is a directory: name a file in it ({', '.join(files) or 'it has no .pth'})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a checkpoint is needed") from error
    if not head:
        raise UserError(f"{path} is empty (0 bytes): copy or download the checkpoint again")
    return head


def _unreadable(path: str, head: bytes, message: str) -> str:
    forbidden = re.search(r"GLOBAL (\S+)", message)
    if forbidden:
        return (
            f"{path} is refused because its pickle asks for {forbidden[1]}, which may run code: save it again with "
            "only tensors, plain containers, argparse.Namespace and paths"
        )
    if path.endswith((".onnx", ".pt2")):
        return f"{path} is a program for inference, not weights: give the checkpoint that it was exported from"
    if "TorchScript" in message:
        return f"{path} is a TorchScript program: save its state_dict() with torch.save instead"
    if path.endswith(".safetensors") or head[8:9] == b"{":
        return f"{path} is not a safetensors file or is damaged: copy or download it again"
    if head.startswith(b"PK"):
        return f"{path} is truncated or damaged, or not written by torch.save: copy or download it again"
    return f"{path} is not a checkpoint or is damaged: a file written by torch.save, or .safetensors, is needed"


def save_state(state: dict[str, Tensor], path, metadata: dict[str, str]) -> None:
    """Write `state` as safetensors, whole or not at all. OSError when the disk does not take it."""
    # Clones: safetensors refuses tensors that share memory, and views of a larger one.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            mode = os.stat(file.fileno()).st_mode  # by the umask; safetensors gives the owner alone access
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except SafetensorError as error:  # its own error for what the system said
        raise OSError(str(error)) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
