"""The files that the image column of a list names: exactly, or after a repair that fits what other tools write."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.bands import ARRAY_ENDINGS
from util.data.leftovers import OTHER_ENDINGS, is_leftover
from util.errors import UserError

_IMAGES = (*IMG_EXTENSIONS, *ARRAY_ENDINGS)
_DEPTH = 3  # levels of subfolders that are searched: images/imgs_part_1/imgs_part_1/


class Names:
    """Turns a cell into the name of a file below `root`: `exact`; with `slashes` for the backslashes of Windows; also
    with an `ending` of images appended to an identifier such as ISIC_0024306; or also in a `subfolder`, whatever its
    name, as in the parts of HAM10000, ChestX-ray14 and PAD-UFES-20."""

    REPAIRS = ("exact", "slashes", "ending", "subfolder")
    ENDINGS = (*IMG_EXTENSIONS, *(ending.upper() for ending in IMG_EXTENSIONS), *ARRAY_ENDINGS)

    def __init__(self, root: Path, repair: str):
        self.root, self.repair = root, repair
        self.endings = list(self.ENDINGS)  # the last one that was right comes first
        self._below: dict[str, list[str]] | None = None  # names relative to the root, by file name and by stem

    def exists(self, cell: str) -> bool:
        if self.repair == "subfolder" and self._in_subfolders(cell):
            return True
        return bool(cell) and os.path.isfile(self.root / self.name(cell))

    def name(self, cell: str) -> str:
        """Return the repaired name. A cell with an ending, and one for which no file exists, stay unchanged. Raises
        UserError for a name that is in two subfolders."""
        if self.repair == "exact":
            return cell
        if "\\" in cell and not os.path.isfile(self.root / cell):
            cell = cell.replace("\\", "/")
        if self.repair == "slashes":
            return cell
        name = cell if has_ending(cell) else self._with_ending(cell)
        if self.repair == "ending" or os.path.isfile(self.root / name):
            return name
        found = self._in_subfolders(cell)
        other = next((name for name in found if not os.path.samefile(self.root / name, self.root / found[0])), None)
        if other is not None:
            raise UserError(
                f"a list names {cell}, which is both {found[0]} and {other} in {self.root}: remove one of them, or "
                f"list their paths"
            )
        return found[0] if found else name

    def _with_ending(self, cell: str) -> str:
        for ending in self.endings:
            if os.path.isfile(self.root / f"{cell}{ending}"):
                if ending != self.endings[0]:
                    self.endings.remove(ending)
                    self.endings.insert(0, ending)
                return cell + ending
        return cell

    def _in_subfolders(self, cell: str) -> list[str]:
        """Return the names, relative to the root, of the images called so in any subfolder."""
        if self._below is None:
            self._below = {}
            for path in _images_in_subfolders(self.root, _DEPTH):
                name = os.path.basename(path)
                for key in (name, os.path.splitext(name)[0]):
                    self._below.setdefault(key, []).append(os.path.relpath(path, self.root))
        return self._below.get(cell, [])


def has_ending(cell: str) -> bool:
    return cell.lower().endswith((*IMG_EXTENSIONS, *OTHER_ENDINGS))


def _images_in_subfolders(folder: str | Path, depth: int) -> Iterator[str]:
    """Yield the images in the folders below a folder, in a fixed order. Unlike `images_below`, this is a
    search: it ends at a depth, as the folder may be a whole disk, and passes over folders that cannot be read."""
    with suppress(OSError), os.scandir(folder) as entries:
        subfolders = sorted(entry.path for entry in entries if not is_leftover(entry.name) and entry.is_dir())
        for subfolder in subfolders:
            with suppress(OSError):
                names = (name for name in sorted(os.listdir(subfolder)) if not is_leftover(name))
                yield from (os.path.join(subfolder, name) for name in names if name.lower().endswith(_IMAGES))
            if depth > 1:
                yield from _images_in_subfolders(subfolder, depth - 1)
