"""From the members of a shard (a tar file) to samples: which members belong together, and which are left out.

The files of a sample have one key and stand beside each other. By the convention of webdataset the key ends at the
first dot of the file name, so that `7.seg.png` is a further file of sample 7. File names with dots of their own, such
as `scan_2024.01.00.png`, do not follow it: there the key ends at the last dot. `samples_of` decides between the two by
the members beside them.
"""

import lzma
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

from util.data.images import printable
from util.data.leftovers import in_leftover

# Errors of a shard that is missing, cut off or not a tar file; any other error is a bug and must surface.
BAD_SHARD = (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError)
IMAGE_ENDINGS = {ending[1:] for ending in IMG_EXTENSIONS}
LABEL_ENDING = "cls"
LARGEST = 1 << 30  # bytes; larger images in a shard are skipped
LOOKAHEAD = 32  # members of one webdataset key that are held until it is clear which convention their names follow
SHOWN = 8  # reasons in a note about members that are left out
_META = re.compile(r"__[^/]*__($|/)")  # members with metadata of the shard, by webdataset's convention
_ENDING = re.compile(r"[a-z][a-z0-9_]{0,11}")

# Reasons that concern images and labels; the others concern members that are neither.
TWICE = "that occur twice (perhaps in different case)"
FURTHER = "further images or labels of a sample"
NOT_PLAIN = "images of a sample that has no image of its plain name"
NO_LABEL = "images without a label where others have one"
NO_IMAGE = "labels without an image"
TOO_LARGE = "sparse or above 1 GiB"
CUT_OFF = "before the damage, of an unfinished sample"
SAMPLE_REASONS = {TWICE, FURTHER, NOT_PLAIN, NO_LABEL, NO_IMAGE, TOO_LARGE, CUT_OFF}


class LeftOut:
    """Counts of the members that are not used, by reason, with the first few names."""

    NAMES = 3

    def __init__(self):
        self.counts, self.names = Counter(), {}

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < self.NAMES:
            names.append(printable(name))

    def samples_only(self) -> "LeftOut":
        """Return the part that concerns images and labels: what else a shard has may be no loss."""
        part = LeftOut()
        part.counts.update({reason: count for reason, count in self.counts.items() if reason in SAMPLE_REASONS})
        part.names = self.names
        return part

    def __str__(self) -> str:
        parts = []
        for reason, count in self.counts.most_common(SHOWN):
            names = self.names[reason]
            parts.append(f"{count} {reason} ({', '.join(names)}{', …' * (count > len(names))})")
        rest = self.counts.total() - sum(count for _, count in self.counts.most_common(SHOWN))
        return ", ".join([*parts, *([f"{rest} others"] if rest else [])])


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    key: str  # the name up to the first dot of the file name: webdataset's key
    stem: str  # the name up to the last dot
    ending: str  # after the last dot, in lower case; "" when the member is not read
    data: bytes = b""

    @property
    def is_plain(self) -> bool:
        """Whether the file name has one dot, so that there is no doubt about its key."""
        return self.key == self.stem

    @property
    def is_image(self) -> bool:
        return self.ending in IMAGE_ENDINGS


class ShardSample(NamedTuple):
    """An image as stored, and its label."""

    name: str  # of the image's member
    image: bytes
    label: bytes | None


# Members --------------------------------------------------------------------------------------------------------------


def members_of(stream, url: str, left_out: LeftOut) -> Iterator[Member]:
    """Yield the files of a shard, with the content of images and labels. The names are never used as paths: content
    stays in memory, and links are not followed."""
    with tarfile.open(fileobj=stream, mode="r|*") as tar:
        for info in tar:
            member = read_name(info, url, left_out)
            if member is not None:
                yield member._replace(data=tar.extractfile(info).read()) if member.ending else member
            tar.members = []


def read_name(info: tarfile.TarInfo, url: str, left_out: LeftOut) -> Member | None:
    """Return the member that a header describes, still without content; None for one that belongs to no sample. What
    is not an image or a label is counted in `left_out`."""
    folder, slash, file = info.name.rpartition("/")
    stem, dot, ending = file.rpartition(".")
    ending = ending.lower()
    is_read = bool(stem) and (ending in IMAGE_ENDINGS or ending == LABEL_ENDING)
    reason = _reason(info, file, ending if dot else None, is_read)
    if reason == TOO_LARGE:
        warn_bad_shard(url, f"{info.name} has {info.size} bytes; it is skipped")
    if reason and not info.isdir():
        left_out.add(reason, info.name)
    if not info.isreg() or in_leftover(info.name) or not dot:
        return None
    path = f"{folder}{slash}"
    return Member(info.name, path + file.split(".", 1)[0], path + stem, "" if reason else ending)


def _reason(info: tarfile.TarInfo, file: str, ending: str | None, is_read: bool) -> str:
    """Return why a member is neither image nor label, "" for an image or a label."""
    if not info.isreg():
        return "links, pipes or devices"
    if _META.match(info.name):
        return "webdataset metadata"
    if in_leftover(info.name):
        return "hidden files or leftovers of other programs"
    if not is_read:
        return f".{ending}" if ending and _ENDING.fullmatch(ending) else "without a known ending"
    if info.issparse() or info.size > LARGEST:  # a few bytes of a sparse one can be any number of zeros
        return TOO_LARGE
    return ""


def warn_bad_shard(url: str, problem: str) -> None:
    """Report a damaged shard on stderr; `print` is silent on all ranks but the first."""
    sys.stderr.write(f"bad shard {printable(url)}: {printable(problem)}\n")
    sys.stderr.flush()


# Samples --------------------------------------------------------------------------------------------------------------


def samples_of(members: Iterator[Member], left_out: LeftOut) -> Iterator[ShardSample]:
    """Group the members of a shard into samples, and yield those with an image. When the first one has a label, those
    without a label are left out. In a damaged shard raises BAD_SHARD after the last complete sample."""
    labelled = None
    for sample in _grouped(members, left_out):
        labelled = sample.label is not None if labelled is None else labelled
        if labelled and sample.label is None:  # perhaps the shard was cut off before the label
            left_out.add(NO_LABEL, sample.name)
        else:
            yield sample


def _grouped(members: Iterator[Member], left_out: LeftOut) -> Iterator[ShardSample]:
    group, unread, problem, follows = None, "", None, False
    try:
        for member in members:
            if not member.ending:  # its name still shows which convention the names follow
                unread = member.key if member.is_plain else unread
                if group is not None and group.key == unread:
                    group.one_sample = not group.by_stem
                continue
            if group is None or member.key != group.key:
                yield from group.rest() if group is not None else ()
                follows |= group is not None and group.has_plain_image
                group = _Group(member.key, member.key == unread, follows, left_out)
            yield from group.add(member)
    except BAD_SHARD as error:
        problem = error
    if group is not None:
        yield from group.rest(is_complete=problem is None)
    if problem is not None:
        raise problem


class _Group:
    """The images and labels of one webdataset key: one sample if a member has the plain name `key.ending`, else one
    sample for each stem. `follows`: whether earlier members of the shard follow webdataset's convention."""

    def __init__(self, key: str, one_sample: bool, follows: bool, left_out: LeftOut):
        self.key, self.one_sample, self.follows, self.left_out = key, one_sample, follows, left_out
        self.by_stem = self.has_plain_image = False
        self.members: list[Member] = []

    def add(self, member: Member) -> Iterator[ShardSample]:
        """Add a member; yield the samples that are complete."""
        if any((member.stem, member.ending) == (other.stem, other.ending) for other in self.members):
            self.left_out.add(TWICE, member.name)
            return
        self.one_sample |= member.is_plain and not self.by_stem
        self.has_plain_image |= member.is_plain and member.is_image
        if self.one_sample and not member.is_plain and any(other.is_image for other in self.members):
            member = member._replace(data=b"")  # not used: only one image has to be held
        self.members.append(member)
        self.by_stem |= not self.one_sample and len(self.members) > LOOKAHEAD
        if self.by_stem:
            complete = [other for other in self.members if other.stem != member.stem]
            self.members = [other for other in self.members if other.stem == member.stem]
            yield from self._by_stem(complete)

    def rest(self, is_complete: bool = True) -> Iterator[ShardSample]:
        """Yield the samples that remain when the group has ended, or is cut off if not `is_complete`."""
        if self.one_sample:
            yield from self._sample()
        elif is_complete or self.by_stem or not self.follows:
            yield from self._by_stem(self.members)
        else:  # the plain image may have been cut off
            for member in self.members:
                self.left_out.add(CUT_OFF, member.name)

    def _sample(self) -> Iterator[ShardSample]:
        images = [member for member in self.members if member.is_image]
        image = next((member for member in images if member.is_plain), None)
        if image is None and len(images) == 1 and not self.follows:
            image = images[0]  # KEY.img.png beside KEY.cls, say
        stems = {self.key, image.stem} if image else set()
        label = next((m for m in self.members if not m.is_image and m.stem in stems), None)
        for member in self.members:
            if member is not image and member is not label:
                reason = FURTHER if image else NOT_PLAIN if member.is_image else NO_IMAGE
                self.left_out.add(reason, member.name)
        if image:
            yield ShardSample(image.name, image.data, label.data if label else None)

    def _by_stem(self, members: list[Member]) -> Iterator[ShardSample]:
        for stem in dict.fromkeys(member.stem for member in members):
            part = _Group(stem, True, False, self.left_out)
            part.members = [member._replace(key=stem) for member in members if member.stem == stem]
            yield from part._sample()
