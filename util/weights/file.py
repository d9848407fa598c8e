"""Files of weights: safe reading of untrusted files, and writing completely or not at all."""

import os
import re
import warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from util.errors import UserError
from util.weights.checksum import damage
from util.weights.hf_folder import folder_weights
from util.weights.metadata import SAFE_GLOBALS, without_stand_ins


def read_file(path, tensors: bool = True) -> dict:
    """Return the raw content of a checkpoint, on the CPU. Only tensors, plain containers and flags are unpickled
    (`util.weights.metadata`). Without `tensors` those of a file of torch.save stay on the disk until they are used, and
    their checksums are not compared.

    Raises UserError when the file cannot be read, is damaged, is not a checkpoint, or its pickle needs anything else.
    """
    path = folder_weights(os.fspath(path))
    head = first_bytes(path)
    archive = head.startswith(b"PK")
    problem = damage(path) if archive and tensors and not path.endswith((".onnx", ".pt2")) else ""
    if problem:
        raise UserError(f"{path} is truncated or damaged ({problem}): copy or download it again, or use an older one")
    try:
        # A safetensors file begins with the length of its header (8 bytes) and a JSON object.
        if path.endswith(".safetensors") or head[8:9] == b"{":
            return load_file(path)
        with torch.serialization.safe_globals(SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about odd pickles before it refuses them
            mapped = archive and not tensors
            content = without_stand_ins(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped))
    except Exception as error:  # a damaged file can raise any error, even a KeyError inside the unpickler
        raise UserError(_unreadable(path, head, str(error))) from error
    if not isinstance(content, dict):
        raise UserError(f"{path} contains a {type(content).__name__}, not a checkpoint: a dict of tensors is needed")
    return content


def first_bytes(path: str) -> bytes:
    """Return the first nine bytes. Raises UserError for a file that is missing, empty or cannot be read."""
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: a checkpoint (.pth or .safetensors) is needed") from None
    except IsADirectoryError:
        if path.rstrip("/").endswith(".dcp"):
            raise UserError(
                f"{path} is a folder that --fsdp wrote: convert it to one file with python tools/unshard.py {path}"
            ) from None
        files = sorted(name for name in os.listdir(path) if name.endswith((".pth", ".pt", ".safetensors", ".bin")))
        raise UserError(f"{path} is a directory: give a file in it ({', '.join(files) or 'it has no .pth'})") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): a checkpoint is needed") from error
    if not head:
        raise UserError(f"{path} is empty (0 bytes): copy or download the checkpoint again")
    return head


def _unreadable(path: str, head: bytes, message: str) -> str:
    """Return the message for a file that raised `message`; `head` are its first bytes."""
    forbidden = re.search(r"GLOBAL (\S+)", message)
    if forbidden:
        return (
            f"{path} is refused because its pickle refers to {forbidden[1]}, which may run code: save it again with "
            "only tensors, plain containers, argparse.Namespace, paths, dates and numbers of numpy"
        )
    if path.endswith((".onnx", ".pt2")):
        return f"{path} is a program for inference, not weights: give the checkpoint from which it was exported"
    if "TorchScript" in message:
        return f"{path} is a TorchScript program: save its state_dict() with torch.save instead"
    if path.endswith(".safetensors") or head[8:9] == b"{":
        return f"{path} is not a safetensors file or is damaged: copy or download it again"
    if head.startswith(b"PK"):
        return f"{path} is truncated or damaged, or not written by torch.save: copy or download it again"
    return f"{path} is not a checkpoint or is damaged: a file written by torch.save, or .safetensors, is needed"


def save_state(state: dict[str, Tensor], path, metadata: dict[str, str]) -> None:
    """Write `state` as safetensors, completely or not at all. Raises OSError when it cannot be written."""
    # Cloned because safetensors refuses tensors that share memory, and views of a larger tensor.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            mode = os.stat(file.fileno()).st_mode  # as the umask sets it; safetensors gives access to the owner only
        save_file(tensors, temporary, metadata=metadata)
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except SafetensorError as error:  # which replaces the OSError
        raise OSError(str(error)) from error
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
