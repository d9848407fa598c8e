"""WebDataset shards: the tar files of a data set, and the number of images in each.

Patterns, URLs and commands are those of the `webdataset` library (https://github.com/webdataset/webdataset). The index
is timm's `_info.json`, which tools/make_shards.py writes.
"""

import glob
import io
import json
import os
import re
import signal
import subprocess
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from tqdm import tqdm
from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from util.data.images import BROKEN_IMAGE, open_image, open_regular
from util.data.shard_members import (
    BAD_SHARD,
    LeftOut,
    Member,
    members_of,
    read_name,
    samples_of,
    warn_bad_shard,
)
from util.errors import MissingSplit, UserError
from util.parallel.distributed import from_main_process

_SPLITS = {True: ("train", "training"), False: ("validation", "val")}  # names that an index may use
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Shards:
    """Tar files of images, and the number of images in each. Image j of shard i has the number `offsets[i] + j`, which
    keys its random numbers."""

    urls: list[str]
    counts: list[int]
    classes: list[str] | None = None  # names of the labels, which are numbers; None if the index has none
    counted: tuple[str, ...] = ()  # shards whose images were counted: what they leave out has been reported

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def sampled(self, count: int) -> Iterator[tuple[str, Image.Image]]:
        """Yield names and images, not yet decoded, of up to `count` readable images of the first shard that has any."""
        for url in [url for url, images in zip(self.urls, self.counts) if images][:3]:  # the first may be damaged
            found, left_out = 0, LeftOut()  # what is left out is reported when the shard is read
            with suppress(*BAD_SHARD), open_shard(url) as stream:
                for sample in islice(samples_of(members_of(stream, url, left_out), left_out), count):
                    with suppress(*BROKEN_IMAGE):
                        yield f"{url}: {sample.name}", open_image(io.BytesIO(sample.image))
                        found += 1
            if found:
                return

    def name(self, number: int) -> str:
        """Return a name for image `number` that needs no reading: its shard, and its position there."""
        shard = bisect_right(self.offsets, number) - 1
        return f"{self.urls[shard]}: image {number - self.offsets[shard]}"


def find_shards(args, train: bool) -> Shards:
    """Return the shards of `--data_path`: a folder (or its URL) with an `_info.json`, or a pattern.

    The number of images per shard comes from the index beside the shards, else from `--shard_samples`, else the images
    of local shards are counted. The main process does this for all. Raises UserError for missing shards and for a bad
    index.
    """
    if not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder or the pattern of its shards")

    def find():
        try:
            return _find(args, train), None
        except UserError as error:
            return None, error

    shards, problem = from_main_process(find)
    if problem is not None:
        raise problem
    return shards


def _find(args, train: bool) -> Shards:
    location = args.data_path.removeprefix("file:")
    is_pattern = location.startswith("pipe:") or re.search(r"[{*]|::|\.(tar|tgz)(\.\w+)?$", location)
    urls, index, classes = _by_pattern(location, train) if is_pattern else _by_folder(location, train)
    if not urls:
        raise MissingSplit(
            f"--dataset {args.dataset}: --data_path {args.data_path} has no shards (*.tar) for {_SPLITS[train][0]}"
        )
    left_out = LeftOut()
    counts, counted = _counts(urls, index, args, left_out)
    if not any(counts):
        others = f"; they contain {left_out}" if left_out.counts else ""
        raise UserError(
            f"--data_path {args.data_path}: none of the {len(urls)} shards contains an image (a member that ends in "
            f".jpg, .png, …){others}"
        )
    if left_out.counts:
        print(f"note: left out of {len(counted)} shards: {left_out}")
    return Shards(urls, counts, classes, counted)


def _by_pattern(pattern: str, train: bool) -> tuple[list[str], dict[str, int], list[str] | None]:
    """Return the shards of a pattern with braces or a star, the number of images in those that an index beside them
    lists, and the classes. The pattern gives the training shards; the validation shards come from the index."""
    try:
        urls = [url for part in expand_urls(pattern) for url in _local(part)]
    except (AssertionError, ValueError) as error:
        raise UserError(f"--data_path {pattern} is not a pattern like shard-{{000..012}}.tar: {error}") from None
    known = ", ".join(sorted(scheme for scheme in gopen_schemes if scheme[0] != "_"))
    unknown = next((scheme for scheme in map(_scheme, urls) if scheme and scheme not in gopen_schemes), None)
    if unknown is not None:
        raise UserError(f"--data_path {pattern}: the scheme {unknown}: is not known; known are {known}")
    bases = dict.fromkeys(url.rpartition("/")[0] for url in urls if not url.startswith("pipe:"))
    indices = {base: read_index(base) for base in bases}
    names = [index.classes for index in indices.values()]
    classes = names[0] if names and all(other == names[0] for other in names) else None
    if train:
        every = ((base, index, split) for base, index in indices.items() for split in index.splits)
        return urls, _merged(base_lengths(*entry) for entry in every), classes
    lengths = _merged(_split(base, index, train) for base, index in indices.items())
    if not lengths:
        raise MissingSplit(
            f"--data_path {pattern} gives training shards, but no index beside them has validation shards"
        )
    return list(lengths), lengths, classes


def _by_folder(folder: str, train: bool) -> tuple[list[str], dict[str, int], list[str] | None]:
    """Return the shards that the index of a folder lists, their numbers of images, and the classes. Without an index,
    return those of a local folder with "train" or "val" in their path; for training all of them, if there is no such
    path."""
    base = folder.rstrip("/") if _scheme(folder) else str(Path(folder).expanduser().absolute())
    index = read_index(base)
    if index.splits:
        lengths = _split(base, index, train)
        if not lengths:
            splits = " and ".join(index.splits)
            raise MissingSplit(f"{base}/_info.json has the splits {splits}, but not {_SPLITS[train][0]}")
        return list(lengths), lengths, index.classes
    if _scheme(base):
        raise UserError(
            f"{base}/_info.json cannot be read: give the shards by a pattern like {base}/x-{{000..012}}.tar"
        )
    if not os.path.isdir(base):
        raise UserError(f"--data_path {folder} is not a folder")
    paths = sorted(str(path) for path in Path(base).rglob("*.tar"))
    of_split = [path for path in paths if _SPLITS[train][-1][:5] in path[len(base) :]]
    return of_split or (paths if train else []), {}, None


def _scheme(url: str) -> str:
    """Return the scheme of a URL ("pipe" for a command), "" for a local path."""
    match = re.match(r"([a-z][a-z0-9+.-]*):(//)?", url)
    return match[1] if match and (match[2] or match[1] == "pipe") else ""


def _local(url: str) -> list[str]:
    """Return a URL unchanged, or the absolute paths that a local path or pattern stands for."""
    if _scheme(url):
        return [url]
    path = str(Path(url.removeprefix("file:")).expanduser().absolute())
    return sorted(glob.glob(path)) if "*" in path else [path]


def _merged(dictionaries) -> dict[str, int]:
    return {key: value for one in dictionaries for key, value in one.items()}


# The index -----------------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """The content of an `_info.json`: (names of the shards, numbers of images) by split, and the names of the labels
    (None: not listed)."""

    splits: dict[str, tuple[list[str], list[int]]]
    classes: list[str] | None = None


def read_index(base: str) -> Index:
    """Return the content of `base`/_info.json, an index without splits when there is no file."""
    path = f"{base}/_info.json"
    try:
        with open_shard(path) as file:
            text = file.read()
    except OSError:
        return Index({})
    try:
        content = json.loads(text)
        index = {split: (entry["filenames"], entry["shard_lengths"]) for split, entry in content["splits"].items()}
        valid = all(
            len(names) == len(lengths) and all(isinstance(n, str) for n in names) and all(int(n) >= 0 for n in lengths)
            for names, lengths in index.values()
        )
        classes = content.get("classes")  # of tools/make_shards.py; timm and older revisions write none
        valid &= classes is None or (isinstance(classes, list) and all(isinstance(name, str) for name in classes))
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        if not text and _scheme(base):
            return Index({})  # the output of curl for a missing file
        raise UserError(
            f"{path} is not an index: it needs splits, each with filenames and shard_lengths (tools/make_shards.py)"
        )
    for name in (name for names, _ in index.values() for name in names):
        # Commands and paths elsewhere may only come from the user, not from a file that comes with the data.
        if ":" in name or name.startswith(("/", "~")) or ".." in name.split("/"):
            raise UserError(f"{path} lists {name!r}, which is not a file beside it")
    return Index(index, classes or None)


def base_lengths(base: str, index: Index, split: str) -> dict[str, int]:
    """Return {path or URL: number of images} of the shards of one split."""
    names, lengths = index.splits[split]
    return {f"{base}/{name}": int(length) for name, length in zip(names, lengths)}


def _split(base: str, index: Index, train: bool) -> dict[str, int]:
    split = next((name for name in _SPLITS[train] if name in index.splits), None)
    return base_lengths(base, index, split) if split else {}


# Counting ------------------------------------------------------------------------------------------------------------


def _counts(urls: list[str], index: dict[str, int], args, left_out: LeftOut) -> tuple[list[int], tuple[str, ...]]:
    """Return the number of images in each shard, and the shards that were read to count them."""
    counts: list[Any] = [index.get(url, args.shard_samples) for url in urls]
    unknown = [number for number, count in enumerate(counts) if count is None]
    remote = next((urls[number] for number in unknown if _scheme(urls[number])), None)
    if remote is not None:
        raise UserError(
            f"no _info.json has the number of images in {remote}: give --shard_samples N, the number in every shard "
            f"(a larger shard is read up to image N, the missing images of a smaller one count as unreadable)"
        )
    if unknown:
        for number in tqdm(unknown, desc="counting images", unit=" shards", disable=None):
            counts[number] = count_images(urls[number], left_out)
        print(f"{sum(counts[number] for number in unknown)} images counted in {len(unknown)} shards without an index")
    return counts, tuple(urls[number] for number in unknown)


def count_images(path: str, left_out: LeftOut | None = None) -> int:
    """Return the number of images in a local shard, from its headers; `left_out` counts its other members. In a damaged
    shard the images before the damage count, and the damage is reported."""
    count, left_out = 0, LeftOut() if left_out is None else left_out
    try:
        for _ in samples_of(_headers(path, left_out), left_out):
            count += 1
    except BAD_SHARD as error:
        warn_bad_shard(path, f"{str(error).splitlines()[0].rstrip(':')}; only its first {count} images are read")
    return count


def _headers(path: str, left_out: LeftOut) -> Iterator[Member]:
    """Yield members without their content, each after the header of the next one: a member before it is complete."""
    previous = None
    with open_regular(path) as file, tarfile.open(fileobj=file) as tar:
        for info in tar:
            if previous is not None:
                yield previous
            previous = read_name(info, path, left_out)
            tar.members = []
    if previous is not None:
        yield previous


# Opening -------------------------------------------------------------------------------------------------------------


@contextmanager
def open_shard(url: str):
    """Open a stream of bytes from a file, a URL (by curl) or a command; the process of these ends with the block.

    A scheduler sends its signals to every process of a job; they must not interrupt the reading of a shard.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the child process inherits this mask
    try:
        stream: Any = gopen(url) if _scheme(url) else open_regular(url)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    process = getattr(stream, "proc", None)
    try:
        yield stream
    except BAD_SHARD as error:
        raise OSError(_reason(error, process)) from error
    finally:
        if process is None:
            stream.close()
        else:  # it may still be writing
            stream.stream.close()
            process.kill()
            stream.status = process.wait()


def _reason(error: Exception, process) -> str:
    """Return why a shard could not be read: the exit code of its command if it failed, else the error."""
    try:
        code = process.wait(1) if process else 0
    except subprocess.TimeoutExpired:
        code = 0
    if code:
        return f"{'curl' if isinstance(process.args, list) else process.args} ended with exit code {code}"
    return str(error.args[0] if error.args else error).split(" @ ")[0]
