"""WebDataset shards: which tar files a data set has, and how many images each of them holds.

Names, addresses and commands are those of the `webdataset` library (https://github.com/webdataset/webdataset); the
index is timm's `_info.json`, which tools/make_shards.py writes.
"""

import glob
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm
from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys

from util.data.images import open_regular, shown
from util.errors import UserError
from util.parallel.distributed import from_main_process

# What a shard raises that is not there, cut off, or no tar file; anything else is a bug and must surface.
BAD_SHARD = (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
IMAGE_ENDINGS = {ending[1:] for ending in IMG_EXTENSIONS}
_SPLITS = {True: ("train", "training"), False: ("validation", "val")}  # names that an index may use
LARGEST = 1 << 30  # bytes of an image in a shard
_META = re.compile(r"__[^/]*__($|/)")  # members that say something of the shard, by webdataset's convention
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Shards:
    """Tar files of images, and how many each holds. Image j of shard i has the number `offsets[i] + j`, which is the
    key of its random numbers."""

    urls: list[str]
    counts: list[int]
    classes = None  # labels are numbers, which nobody counted

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.counts)]


def find_shards(args, train: bool) -> Shards:
    """The shards of `--data_path`: a folder (or its URL) with an `_info.json`, or a pattern.

    How many images each holds says the index beside them, else `--shard_samples`; local shards are looked through.
    The main process does that for all. UserError for what is not there and for a bad index.
    """
    if not args.data_path:
        raise UserError(f"--dataset {args.dataset} needs --data_path, the folder or the pattern of its shards")

    def find():
        try:
            return _find(args, train), ""
        except UserError as error:
            return None, str(error)

    found, problem = from_main_process(find)
    if problem:
        raise UserError(problem)
    return found


def _find(args, train: bool) -> Shards:
    place = args.data_path.removeprefix("file:")
    pattern = place.startswith("pipe:") or re.search(r"[{*]|::|\.(tar|tgz)(\.\w+)?$", place)
    urls, index = _by_pattern(place, train) if pattern else _by_folder(place, train)
    if not urls:
        raise UserError(
            f"--dataset {args.dataset}: --data_path {args.data_path} holds no shards (*.tar) for {_SPLITS[train][0]}"
        )
    counts = _counts(urls, index, args)
    if not any(counts):
        raise UserError(
            f"--data_path {args.data_path}: none of the {len(urls)} shards holds an image (a member that ends in "
            f".jpg, .png, …)"
        )
    return Shards(urls, counts)


def _by_pattern(place: str, train: bool) -> tuple[list[str], dict[str, int]]:
    """Shards by braces or a star, and what the indices beside them know. The pattern names the training shards, an
    index beside them the others."""
    try:
        urls = [url for part in expand_urls(place) for url in _local(part)]
    except (AssertionError, ValueError) as error:
        raise UserError(f"--data_path {place} is not a pattern like shard-{{000..012}}.tar: {error}") from None
    known = ", ".join(sorted(scheme for scheme in gopen_schemes if scheme[0] != "_"))
    unknown = next((scheme for scheme in map(_scheme, urls) if scheme and scheme not in gopen_schemes), None)
    if unknown is not None:
        raise UserError(f"--data_path {place}: {unknown}: is not known; known are {known}")
    bases = dict.fromkeys(url.rpartition("/")[0] for url in urls if not url.startswith("pipe:"))
    indices = {base: read_index(base) for base in bases}
    if train:
        return urls, _merged(base_lengths(base, index, split) for base, index in indices.items() for split in index)
    lengths = _merged(_split(base, index, train) for base, index in indices.items())
    if not lengths:
        raise UserError(f"--data_path {place} names training shards, and no index beside them names validation shards")
    return list(lengths), lengths


def _by_folder(place: str, train: bool) -> tuple[list[str], dict[str, int]]:
    """Shards of a folder as its index has them, else all of a local folder whose names say train or val."""
    base = place.rstrip("/") if _scheme(place) else str(Path(place).expanduser().absolute())
    index = read_index(base)
    if index:
        lengths = _split(base, index, train)
        if not lengths:
            raise UserError(f"{base}/_info.json knows {' and '.join(index)}, and nothing of {_SPLITS[train][0]}")
        return list(lengths), lengths
    if _scheme(base):
        raise UserError(
            f"{base}/_info.json cannot be read: give the shards by a pattern like {base}/x-{{000..012}}.tar"
        )
    if not os.path.isdir(base):
        raise UserError(f"--data_path {place} is not a folder")
    found = sorted(str(path) for path in Path(base).rglob("*.tar"))
    named = [path for path in found if _SPLITS[train][-1][:5] in path[len(base) :]]
    return named or (found if train else []), {}


def _scheme(url: str) -> str:
    match = re.match(r"([a-z][a-z0-9+.-]*):(//)?", url)
    return match[1] if match and (match[2] or match[1] == "pipe") else ""


def _local(url: str) -> list[str]:
    """A URL as it is, a local path as the absolute paths it stands for."""
    if _scheme(url):
        return [url]
    path = str(Path(url.removeprefix("file:")).expanduser().absolute())
    return sorted(glob.glob(path)) if "*" in path else [path]


def _merged(dictionaries) -> dict[str, int]:
    return {key: value for one in dictionaries for key, value in one.items()}


# The index -----------------------------------------------------------------------------------------------------------


def read_index(base: str) -> dict[str, tuple[list[str], list[int]]]:
    """Names and lengths of the shards by split, from `base`/_info.json; empty where there is none."""
    path = f"{base}/_info.json"
    try:
        with open_shard(path) as file:
            text = file.read()
    except OSError:
        return {}
    try:
        splits = json.loads(text)["splits"]
        index = {split: (entry["filenames"], entry["shard_lengths"]) for split, entry in splits.items()}
        whole = all(
            len(names) == len(lengths) and all(isinstance(n, str) for n in names) and all(int(n) >= 0 for n in lengths)
            for names, lengths in index.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        if not text and _scheme(base):
            return {}  # curl found nothing
        raise UserError(f"{path} is no index: splits, each with filenames and shard_lengths (tools/make_shards.py)")
    for name in (name for names, _ in index.values() for name in names):
        # Only the user may name commands and other places, not a file that came with the data.
        if ":" in name or name.startswith(("/", "~")) or ".." in name.split("/"):
            raise UserError(f"{path} names {name!r}, which is not a file beside it")
    return index


def base_lengths(base: str, index, split: str) -> dict[str, int]:
    """Lengths by address of one split."""
    names, lengths = index[split]
    return {f"{base}/{name}": int(length) for name, length in zip(names, lengths)}


def _split(base: str, index, train: bool) -> dict[str, int]:
    split = next((name for name in _SPLITS[train] if name in index), None)
    return base_lengths(base, index, split) if split else {}


# Counting ------------------------------------------------------------------------------------------------------------


def _counts(urls: list[str], index: dict[str, int], args) -> list[int]:
    counts = [index.get(url, args.shard_samples) for url in urls]
    unknown = [place for place, count in enumerate(counts) if count is None]
    remote = next((urls[place] for place in unknown if _scheme(urls[place])), None)
    if remote is not None:
        raise UserError(
            f"no _info.json says how many images {remote} holds: give --shard_samples N, the number in every shard "
            f"(of larger ones the first N are taken, what a smaller one lacks counts as unreadable)"
        )
    if unknown:
        for place in tqdm(unknown, desc="looking through shards", unit=" shards", disable=None):
            counts[place] = count_images(urls[place])
        print(f"{sum(counts[place] for place in unknown)} images found in {len(unknown)} shards without an index")
    return counts


def count_images(path: str) -> int:
    """Images of a local shard, by its headers alone; what a damaged one has before the damage, which is named."""
    count = 0
    try:
        for _ in samples_of(_headers(path)):
            count += 1
    except BAD_SHARD as error:
        say_bad_shard(path, f"{str(error).splitlines()[0].rstrip(':')}; {count} images are read from it")
    return count


def _headers(path: str) -> Iterator[dict]:
    """Members without their content, each when the next has been found: then it is whole."""
    found = None
    with open_regular(path) as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            if found is not None:
                yield found
            found = dict(fname=member.name, data=b"", __url__=path) if _is_read(member, path) else None
            tar.members = []
    if found is not None:
        yield found


def members_of(stream, url: str) -> Iterator[dict]:
    """Images and labels of a shard, with their content, as webdataset's `tar_file_iterator` gives them. A name is no
    path: what is read stays in memory, and a link leads nowhere."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            if _is_read(member, url):
                yield dict(fname=member.name, data=tar.extractfile(member).read(), __url__=url)
            tar.members = []


def _is_read(member: tarfile.TarInfo, url: str) -> bool:
    """Images and labels, and no links or devices; nor what would fill the memory, which is named."""
    if not member.isreg() or _META.match(member.name) or not is_wanted(member.name):
        return False
    if member.issparse() or member.size > LARGEST:  # a sparse one holds any number of zeros in a few bytes
        say_bad_shard(url, f"{member.name} has {member.size} bytes; it is left out")
        return False
    return True


def say_bad_shard(url: str, problem: str) -> None:
    """On stderr, and not by `print`, which is silent on all ranks but one."""
    sys.stderr.write(f"bad shard {shown(url)}: {shown(problem)}\n")
    sys.stderr.flush()


def samples_of(members: Iterator[dict]) -> Iterator[dict]:
    """Members of a shard as samples that have an image: webdataset's dictionaries by ending. Raises BAD_SHARD at the
    damage of a shard, after the last whole sample."""
    problem, last = [], {}

    def whole():
        try:
            for member in members:
                last.update(member)
                yield member
        except BAD_SHARD as error:
            problem.append(error)

    def twice(_) -> bool:
        say_bad_shard(last["__url__"], f"{last['fname']} is there twice, perhaps in another case; it is left out")
        return True

    labelled = None
    for sample in group_by_keys(whole(), handler=twice):
        if image_ending(sample) is not None:
            labelled = "cls" in sample if labelled is None else labelled
            if "cls" in sample or not labelled:  # else the shard was cut off before the label
                yield sample
    if problem:
        raise problem[0]


def image_ending(sample: dict) -> str | None:
    return next((key for key in sample if key in IMAGE_ENDINGS), None)


def is_wanted(name: str) -> bool:
    """Images and labels; other members of a shard are not read."""
    ending = (base_plus_ext(name)[1] or "").lower()
    return ending in IMAGE_ENDINGS or ending == "cls"


# Opening -------------------------------------------------------------------------------------------------------------


@contextmanager
def open_shard(url: str):
    """A stream of bytes from a file, an address (by curl) or a command; what runs for it ends with the block.

    A scheduler's signal reaches every process of a job, but a shard in the middle of being read must not end by it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # which the child inherits
    try:
        stream = gopen(url) if _scheme(url) else open_regular(url)
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
        else:  # it may have more to say than is wanted
            stream.stream.close()
            process.kill()
            stream.status = process.wait()


def _reason(error: Exception, process) -> str:
    """What is wrong with a shard; if its command failed, that."""
    try:
        code = process.wait(1) if process else 0
    except subprocess.TimeoutExpired:
        code = 0
    if code:
        return f"{'curl' if isinstance(process.args, list) else process.args} ended with exit code {code}"
    return str(error.args[0] if error.args else error).split(" @ ")[0]
