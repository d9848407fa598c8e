"""Files and folders in a data set that are not part of it: those that operating systems, notebooks, file managers,
network storage and archive tools leave behind, and images in formats that are not read."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.bands import ARRAY_ENDINGS
from util.data.images import printable

# Endings of images and of containers of images that are skipped: we read the same endings as torchvision's ImageFolder.
OTHER_ENDINGS = (".gif", ".jfif", ".jpe", ".jp2", ".avif", ".heic", ".heif", ".dng", ".tga", ".psd", ".svg", ".dcm")
OTHER_ENDINGS += (".nii", ".nii.gz", ".npy", ".npz", ".h5", ".hdf5", ".mat", ".exr", ".icloud", ".mdb", ".parquet")
OTHER_ENDINGS += (".arrow", ".tfrecord", ".zip", ".tar", ".gz")

# Names in lower case. Everything hidden is a leftover, too: .DS_Store, .ipynb_checkpoints, .git, .nfs*, .@__thumb, and
# the ._* companions in which macOS stores attributes on other file systems.
_LEFTOVERS = {
    "__macosx",  # macOS, in zip archives
    "@eadir",  # Synology: thumbnails, which are images
    "#recycle",
    "#snapshot",
    "@recycle",  # QNAP
    "@recently-snapshot",
    "~snapshot",  # NetApp
    "lost+found",
    "$recycle.bin",  # Windows
    "system volume information",
    "thumbs.db",
    "desktop.ini",
    "__pycache__",
    "network trash folder",  # netatalk
    "temporary items",
}
# On which the list of a folder's images depends.
RULES = repr((IMG_EXTENSIONS, ARRAY_ENDINGS, OTHER_ENDINGS, sorted(_LEFTOVERS)))


def is_leftover(name: str) -> bool:
    """Whether a file or folder of this name is no part of a data set."""
    return name.startswith((".", "~$")) or name.lower() in _LEFTOVERS


def in_leftover(path: str) -> bool:
    """Whether a path, such as the name of a member of an archive, is or lies in a leftover."""
    return any(is_leftover(part) for part in path.split("/") if part not in (".", ".."))


@dataclass
class Skipped:
    """What was left out while a folder was read."""

    endings: Counter = field(default_factory=Counter)  # of images in other formats
    leftovers: list[str] = field(default_factory=list)

    def note(self, folder: Path) -> None:
        """Print what was left out, in a line for either kind."""
        where = printable(str(folder))
        if self.leftovers:
            shown = ", ".join(printable(name) for name in dict.fromkeys(self.leftovers[:50]))
            print(
                f"note: {len(self.leftovers)} files and folders below {where} are left out, because an operating "
                f"system or another program left them there: {_shortened(shown)}"
            )
        if self.endings:
            print(
                f"note: {self.endings.total()} files below {where} are skipped because of their endings "
                f"({' '.join(self.endings)}); supported endings are {' '.join(IMG_EXTENSIONS)}"
            )


def _shortened(text: str, length: int = 120) -> str:
    return text if len(text) <= length else text[:length].rsplit(",", 1)[0] + ", ..."
