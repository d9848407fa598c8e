"""Weights on the Hugging Face Hub, wherever a checkpoint is taken: `hf:OWNER/NAME`, `hf-hub:OWNER/NAME`, or a name such
as `facebook/vit-mae-base` that is no path here. huggingface_hub keeps them in its cache and reads its variables
(HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE)."""

import functools
import os
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from util.errors import UserError

# Also those of its HTTP client, which depends on its version.
NETWORK_ERRORS: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)
_PREFIXES = ("hf-hub:", "hf_hub:", "hf:")
_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:/(?P<file>[^@]+))?(?:@(?P<revision>[\w./-]+))?")
_NO_NAME = "no name on the Hugging Face Hub: give hf:OWNER/NAME or hf:OWNER/NAME/FILE"
_FILES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".dcp", ".pkl", ".npz", ".h5", ".onnx", ".pt2", ".tar")
_WEIGHTS = (["*.json", "*.safetensors"], ["*.json", "*.bin"])  # patterns of files, the better ones first


def from_hub(name: str) -> str:
    """Return the folder or file in the cache for a name on the Hub, downloaded if needed; any other path unchanged.

    `hf:OWNER/NAME/FILE` is one file, `@REVISION` at the end a branch, tag or commit. Raises UserError where it cannot
    be had.
    """
    plain = name
    for prefix in _PREFIXES:
        plain = plain.removeprefix(prefix)
    match = _NAME.fullmatch(plain)
    if plain == name and not _looks_like_a_repository(name, match):
        return name
    if match is None:
        raise UserError(f"{name} is {_NO_NAME}")
    return _download(name, match["repo"], match["file"], match["revision"])


def _looks_like_a_repository(name: str, match: re.Match | None) -> bool:
    """Whether `OWNER/NAME` without a prefix is meant: no path here, nor one of a file of weights."""
    bare = match is not None and match["file"] is None and not name.startswith((".", "~"))
    return bare and not os.path.exists(name) and not name.endswith(_FILES) and not Path(name).parent.exists()


@functools.cache
def _download(name: str, repo: str, file: str | None, revision: str | None) -> str:
    try:
        if file:
            return hf_hub_download(repo, file, revision=revision)
        for patterns in _WEIGHTS:
            folder = snapshot_download(repo, revision=revision, allow_patterns=patterns)
            if any(Path(folder).glob(patterns[-1])):
                return folder
    except GatedRepoError:
        raise UserError(f"{name}: access to this model must be asked for at https://huggingface.co/{repo}") from None
    except RevisionNotFoundError:
        raise UserError(f"{name}: the repository has no revision {revision}") from None
    except LocalEntryNotFoundError as error:  # a kind of EntryNotFoundError: no network, or none wanted
        raise UserError(f"{name} is not in the cache of the Hugging Face Hub, and {_why_not(error)}") from error
    except EntryNotFoundError:
        raise UserError(f"{name}: the repository has no file {file}") from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither here nor on the Hugging Face Hub (or it is private: set HF_TOKEN)"
        ) from None
    except HFValidationError:
        raise UserError(f"{name} is {_NO_NAME}") from None
    except NETWORK_ERRORS as error:
        raise UserError(f"{name} cannot be downloaded from the Hugging Face Hub: {_first_line(error)}") from error
    raise UserError(f"{name}: the repository has no weights (.safetensors or .bin): name a file, hf:{repo}/FILE")


def _why_not(error: Exception) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE forbids to download it"
    return "cannot be downloaded: the Hub does not answer (see HF_ENDPOINT, or give a local file)"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
