"""Checksums of checkpoints: damage on a disk is detected before a file is used.

torch.save writes a zip archive with a CRC-32 of every record, also in the official code's checkpoints and in all our
older ones, but torch.load does not check it. So files need no second checksum. `python -m zipfile -t FILE` makes the
same check.
"""

import functools
import os
import zipfile
import zlib

_CHUNK = 1 << 20


def damage(path: str | os.PathLike) -> str:
    """Return what is wrong with a file of torch.save, "" when all its checksums match. The file is read once (about
    2 GB/s), and not again by this process unless it changes."""
    status = os.stat(path)
    return _damage(os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _damage(path: str, *_version: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            broken = [record.filename for record in records if not _matches(archive, record)]
    except Exception as error:  # a damaged list of records can raise any error
        return f"it is truncated, or not an archive of torch.save ({error})"
    # If all fail, the file has none: it was written with torch.serialization.set_crc32_options(False).
    return f"the checksum of {broken[0]} does not match" if broken and len(broken) < len(records) else ""


_FOLDER = 0x10  # attribute with which torch.load would return uninitialised memory as the content of a record


def _matches(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    if record.external_attr & _FOLDER:
        return False
    try:
        with archive.open(record) as content:
            while content.read(_CHUNK):
                pass
    except Exception:  # a damaged header as well as a damaged record
        return False
    return True


def crc32(path: str | os.PathLike) -> int:
    """Return the CRC-32 of a file."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total
