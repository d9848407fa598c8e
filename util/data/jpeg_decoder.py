"""JPEG files decoded on a device (nvJPEG on a GPU), by torchcodec or by torchvision."""

import io
import threading
from collections.abc import Callable

import torch
from PIL import Image

from util.data.images import printable
from util.errors import UserError

MODES = {1: "GRAY", 3: "RGB"}


def _from_torchcodec() -> Callable:
    from torchcodec.decoders import decode_jpeg  # optional; 0.16 and later

    return lambda content, mode, device: decode_jpeg(content, mode=mode, device=device)


def _from_torchvision() -> Callable:
    from torchvision.io import decode_jpeg  # deprecated since 0.29

    return lambda content, mode, device: decode_jpeg(content, mode, device)


LIBRARIES = {"torchcodec": _from_torchcodec, "torchvision": _from_torchvision}


def choose_library(mode: str, device: torch.device) -> tuple[str, Callable]:
    """Return the name and the decoder of the first library that decodes a small JPEG on `device`. Raises UserError when
    none does: nvJPEG is missing or does not run, and every file would be decoded by pillow instead."""
    file, problems = io.BytesIO(), []
    Image.new("RGB", (16, 16), (200, 100, 50)).save(file, "JPEG")
    content = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    for name, load in LIBRARIES.items():
        try:
            decode = load()
            if tuple(decode(content, mode, device).shape[1:]) != (16, 16):
                raise RuntimeError("it returns no image of the file's size")
            return name, decode
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            problems.append(f"{name}: {_first_line(error)}")
    raise UserError(
        f"--nvjpeg: no JPEG can be decoded on {device} ({'; '.join(problems)}): remove the flag, and pillow decodes"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class JpegDecoder:
    """Decodes the bytes of JPEG files on `device` to `channels` channels, from several threads. Counts the files that
    it `decoded` and those that it `refused`. Raises UserError when no library can decode on the device."""

    def __init__(self, channels: int, device: torch.device):
        self.mode, self.device = MODES.get(channels), device
        self.library, self._decode = choose_library(self.mode, device) if self.mode else ("", None)
        self.decoded, self.refused, self.example = 0, 0, ""
        self._lock = threading.Lock()

    def decode(self, content: bytes, name: str) -> torch.Tensor | None:
        """Return the pixels (C, H, W) uint8 on the device; None for a file that the library cannot decode, such as CMYK
        and damaged ones, or for channels other than grey and RGB."""
        if self.mode is None or self._decode is None:
            return None
        try:
            pixels = self._decode(torch.frombuffer(bytearray(content), dtype=torch.uint8), self.mode, self.device)
        except (RuntimeError, ValueError) as error:
            with self._lock:
                self.refused += 1
                self.example = self.example or f"{printable(name)}: {printable(_first_line(error))}"
            return None
        with self._lock:
            self.decoded += 1
        return pixels
