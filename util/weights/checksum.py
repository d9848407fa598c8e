"""Checksums of checkpoints: a byte that has changed on a disk is found before anything is made of it.

torch.save writes a zip archive with a CRC-32 of every record, the official code's and all our older files included, and
torch.load does not look at it. So no file needs a second checksum, and `python -m zipfile -t FILE` can check one, too.
"""

import functools
import os
import zipfile
import zlib

_CHUNK = 1 << 20


def damage(path: str | os.PathLike) -> str:
    """What is wrong with a file of torch.save, "" when all its checksums hold. Reads the file once (about 2 GB/s), and
    no more in this process as long as it does not change."""
    status = os.stat(path)
    return _damage(os.fspath(path), status.st_ino, status.st_size, status.st_mtime_ns)


@functools.lru_cache
def _damage(path: str, *_version: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            broken = [record.filename for record in records if not _holds(archive, record)]
    except Exception as error:  # a damaged list of records fails with anything
        return f"it is cut off, or no archive of torch.save ({error})"
    # With torch.serialization.set_crc32_options(False) no record has one.
    return f"the checksum of {broken[0]} does not hold" if broken and len(broken) < len(records) else ""


_A_FOLDER = 0x10  # attribute of a record, which makes torch.load take memory that nobody has written for its content


def _holds(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    if record.external_attr & _A_FOLDER:
        return False
    try:
        with archive.open(record) as content:
            while content.read(_CHUNK):
                pass
    except Exception:  # a damaged header as well as a damaged record
        return False
    return True


def crc32(path: str | os.PathLike) -> int:
    """Of a whole file."""
    total = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            total = zlib.crc32(chunk, total)
    return total
