"""WebDataset shards: the tar files of a data set, and the number of images in each.

Patterns, URLs and commands are those of the `webdataset` library (https://github.com/webdataset/webdataset). The index
is timm's `_info.json`, which tools/make_shards.py writes.
"""

import glob
import io
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm
from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext, group_by_keys

from util.data.images import BROKEN_IMAGE, open_image, open_regular, printable
from util.errors import UserError
from util.parallel.distributed import from_main_process

# Errors of a shard that is missing, cut off or not a tar file; any other error is a bug and must surface.
BAD_SHARD = (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
IMAGE_ENDINGS = {ending[1:] for ending in IMG_EXTENSIONS}
_SPLITS = {True: ("train", "training"), False: ("validation", "val")}  # names that an index may use
LARGEST = 1 << 30  # bytes; larger images in a shard are skipped
_META = re.compile(r"__[^/]*__($|/)")  # members with metadata of the shard, by webdataset's convention
_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2}


@dataclass(frozen=True)
class Shards:
    """Tar files of images, and the number of images in each. Image j of shard i has the number `offsets[i] + j`, which
    keys its random numbers."""

    urls: list[str]
    counts: list[int]
    classes = None  # labels are numbers, and the number of classes is unknown

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def offsets(self) -> list[int]:
        return [0, *accumulate(self.counts)]

    def sampled(self, count: int) -> Iterator[tuple[str, Image.Image]]:
        """Yield names and images, not yet decoded, of up to `count` readable images of the first shard."""
        url = self.urls[0]
        with suppress(*BAD_SHARD), open_shard(url) as stream:
            for sample in islice(samples_of(members_of(stream, url)), count):
                ending = image_ending(sample)
                with suppress(*BROKEN_IMAGE):
                    yield f"{url}: {sample['__key__']}.{ending}", open_image(io.BytesIO(sample[ending]))

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
            return _find(args, train), ""
        except UserError as error:
            return None, str(error)

    shards, problem = from_main_process(find)
    if problem:
        raise UserError(problem)
    return shards


def _find(args, train: bool) -> Shards:
    location = args.data_path.removeprefix("file:")
    is_pattern = location.startswith("pipe:") or re.search(r"[{*]|::|\.(tar|tgz)(\.\w+)?$", location)
    urls, index = _by_pattern(location, train) if is_pattern else _by_folder(location, train)
    if not urls:
        raise UserError(
            f"--dataset {args.dataset}: --data_path {args.data_path} has no shards (*.tar) for {_SPLITS[train][0]}"
        )
    counts = _counts(urls, index, args)
    if not any(counts):
        raise UserError(
            f"--data_path {args.data_path}: none of the {len(urls)} shards contains an image (a member that ends in "
            f".jpg, .png, …)"
        )
    return Shards(urls, counts)


def _by_pattern(pattern: str, train: bool) -> tuple[list[str], dict[str, int]]:
    """Return the shards of a pattern with braces or a star, and the number of images in those that an index beside them
    lists. The pattern gives the training shards; the validation shards come from the index."""
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
    if train:
        return urls, _merged(base_lengths(base, index, split) for base, index in indices.items() for split in index)
    lengths = _merged(_split(base, index, train) for base, index in indices.items())
    if not lengths:
        raise UserError(f"--data_path {pattern} gives training shards, but no index beside them has validation shards")
    return list(lengths), lengths


def _by_folder(folder: str, train: bool) -> tuple[list[str], dict[str, int]]:
    """Return the shards that the index of a folder lists. Without an index, return those of a local folder with "train"
    or "val" in their path; for training all of them, if there is no such path."""
    base = folder.rstrip("/") if _scheme(folder) else str(Path(folder).expanduser().absolute())
    index = read_index(base)
    if index:
        lengths = _split(base, index, train)
        if not lengths:
            raise UserError(f"{base}/_info.json has the splits {' and '.join(index)}, but not {_SPLITS[train][0]}")
        return list(lengths), lengths
    if _scheme(base):
        raise UserError(
            f"{base}/_info.json cannot be read: give the shards by a pattern like {base}/x-{{000..012}}.tar"
        )
    if not os.path.isdir(base):
        raise UserError(f"--data_path {folder} is not a folder")
    paths = sorted(str(path) for path in Path(base).rglob("*.tar"))
    of_split = [path for path in paths if _SPLITS[train][-1][:5] in path[len(base) :]]
    return of_split or (paths if train else []), {}


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


def read_index(base: str) -> dict[str, tuple[list[str], list[int]]]:
    """Return {split: (names of the shards, numbers of images)} from `base`/_info.json, {} when there is none."""
    path = f"{base}/_info.json"
    try:
        with open_shard(path) as file:
            text = file.read()
    except OSError:
        return {}
    try:
        splits = json.loads(text)["splits"]
        index = {split: (entry["filenames"], entry["shard_lengths"]) for split, entry in splits.items()}
        valid = all(
            len(names) == len(lengths) and all(isinstance(n, str) for n in names) and all(int(n) >= 0 for n in lengths)
            for names, lengths in index.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        if not text and _scheme(base):
            return {}  # the output of curl for a missing file
        raise UserError(
            f"{path} is not an index: it needs splits, each with filenames and shard_lengths (tools/make_shards.py)"
        )
    for name in (name for names, _ in index.values() for name in names):
        # Commands and paths elsewhere may only come from the user, not from a file that comes with the data.
        if ":" in name or name.startswith(("/", "~")) or ".." in name.split("/"):
            raise UserError(f"{path} lists {name!r}, which is not a file beside it")
    return index


def base_lengths(base: str, index, split: str) -> dict[str, int]:
    """Return {path or URL: number of images} of the shards of one split."""
    names, lengths = index[split]
    return {f"{base}/{name}": int(length) for name, length in zip(names, lengths)}


def _split(base: str, index, train: bool) -> dict[str, int]:
    split = next((name for name in _SPLITS[train] if name in index), None)
    return base_lengths(base, index, split) if split else {}


# Counting ------------------------------------------------------------------------------------------------------------


def _counts(urls: list[str], index: dict[str, int], args) -> list[int]:
    counts = [index.get(url, args.shard_samples) for url in urls]
    unknown = [index for index, count in enumerate(counts) if count is None]
    remote = next((urls[index] for index in unknown if _scheme(urls[index])), None)
    if remote is not None:
        raise UserError(
            f"no _info.json has the number of images in {remote}: give --shard_samples N, the number in every shard "
            f"(a larger shard is read up to image N, the missing images of a smaller one count as unreadable)"
        )
    if unknown:
        for index in tqdm(unknown, desc="counting images", unit=" shards", disable=None):
            counts[index] = count_images(urls[index])
        print(f"{sum(counts[index] for index in unknown)} images counted in {len(unknown)} shards without an index")
    return counts


def count_images(path: str) -> int:
    """Return the number of images in a local shard, from its headers. In a damaged shard the images before the damage
    count, and the damage is reported."""
    count = 0
    try:
        for _ in samples_of(_headers(path)):
            count += 1
    except BAD_SHARD as error:
        warn_bad_shard(path, f"{str(error).splitlines()[0].rstrip(':')}; only its first {count} images are read")
    return count


def _headers(path: str) -> Iterator[dict]:
    """Yield members without their content, each after the header of the next one: a member before it is complete."""
    previous = None
    with open_regular(path) as file, tarfile.open(fileobj=file) as tar:
        for member in tar:
            if previous is not None:
                yield previous
            previous = dict(fname=member.name, data=b"", __url__=path) if _is_read(member, path) else None
            tar.members = []
    if previous is not None:
        yield previous


def members_of(stream, url: str) -> Iterator[dict]:
    """Yield the images and labels of a shard with their content, in the form of webdataset's `tar_file_iterator`. The
    names are never used as paths: content stays in memory, and links are not followed."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for member in tar:
            if _is_read(member, url):
                yield dict(fname=member.name, data=tar.extractfile(member).read(), __url__=url)
            tar.members = []


def _is_read(member: tarfile.TarInfo, url: str) -> bool:
    """Whether a member is a regular file with an image or a label. One that would fill the memory is reported."""
    if not member.isreg() or _META.match(member.name) or not is_wanted(member.name):
        return False
    if member.issparse() or member.size > LARGEST:  # a few bytes of a sparse one can be any number of zeros
        warn_bad_shard(url, f"{member.name} has {member.size} bytes; it is skipped")
        return False
    return True


def warn_bad_shard(url: str, problem: str) -> None:
    """Report a damaged shard on stderr; `print` is silent on all ranks but the first."""
    sys.stderr.write(f"bad shard {printable(url)}: {printable(problem)}\n")
    sys.stderr.flush()


def samples_of(members: Iterator[dict]) -> Iterator[dict]:
    """Group the members of a shard into samples, webdataset's dictionaries by ending, and yield those with an image.
    In a damaged shard raises BAD_SHARD after the last complete sample."""
    problem, last = [], {}

    def before_damage():
        try:
            for member in members:
                last.update(member)
                yield member
        except BAD_SHARD as error:
            problem.append(error)

    def skip_duplicate(_) -> bool:
        warn_bad_shard(last["__url__"], f"{last['fname']} occurs twice, perhaps in different case; it is skipped")
        return True

    labelled = None
    for sample in group_by_keys(before_damage(), handler=skip_duplicate):
        if image_ending(sample) is not None:
            labelled = "cls" in sample if labelled is None else labelled
            if "cls" in sample or not labelled:  # else the shard was cut off before the label
                yield sample
    if problem:
        raise problem[0]


def image_ending(sample: dict) -> str | None:
    """Return the key of a sample's image, None when it has no image."""
    return next((key for key in sample if key in IMAGE_ENDINGS), None)


def is_wanted(name: str) -> bool:
    """Whether a member of this name is an image or a label; others are not read."""
    ending = (base_plus_ext(name)[1] or "").lower()
    return ending in IMAGE_ENDINGS or ending == "cls"


# Opening -------------------------------------------------------------------------------------------------------------


@contextmanager
def open_shard(url: str):
    """Open a stream of bytes from a file, a URL (by curl) or a command; the process of these ends with the block.

    A scheduler sends its signals to every process of a job; they must not interrupt the reading of a shard.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # the child process inherits this mask
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
