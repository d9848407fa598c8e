"""Damaged and made-up input for every reader, by hypothesis: it is read, refused in a sentence, or counted; nothing
else is ever raised, and nothing takes long. The same examples in every run; `scripts/soak.sh` tries others."""

import contextlib
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.plain_images import PLAIN, flags
from helpers.strange import BAD, GOOD, NOISE, encoded, plain
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, features
from safetensors.torch import save_file
from torchvision import transforms as tvt

from tools import collect
from util.data.build import build_loader
from util.data.cache import Decoder
from util.data.file_lists import read_list
from util.data.images import BROKEN_IMAGE, read_image
from util.data.labels import read_vocabulary
from util.data.readers import read_images
from util.data.samples import KeyedDataset, UnreadableData
from util.data.sources import Files
from util.data.transforms import to_channels
from util.errors import UserError
from util.report import ledger
from util.weights.load import read_file, read_weights

SECONDS = 10  # that one example may take on a busy machine; the slowest take a tenth of one
FUZZ = dict(derandomize=True, deadline=SECONDS * 1000, database=None, suppress_health_check=list(HealthCheck))
BYTES = st.binary(max_size=12)


@st.composite
def damaged(draw, whole: bytes, most: int = 3) -> bytes:
    """With bytes replaced, put in or taken out, more likely near the beginning, and perhaps the end cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        near = st.integers(0, min(200, len(content)))
        place = draw(near | st.integers(0, len(content)))
        taken = draw(st.sampled_from((0, 1, 2, 4, 40)))
        content[place : place + taken] = draw(BYTES | st.sampled_from((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff")))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@contextlib.contextmanager
def silent():
    """Of names of unreadable images, here and in libtiff, which writes to the descriptor."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


# Images ---------------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    grey = NOISE.convert("L")
    made = {format: encoded(NOISE, format) for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "JPEG2000")}
    if features.check("avif"):
        made["AVIF"] = encoded(NOISE, "AVIF")
    made |= {"progressive": encoded(NOISE, "JPEG", progressive=True)}
    for how in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"TIFF {how}"] = encoded(NOISE, "TIFF", compression=how)
    made["TIFF group4"] = encoded(NOISE.convert("1"), "TIFF", compression="group4")
    made["16 bits"] = encoded(Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), "PNG")
    made["floats"] = encoded(Image.fromarray(np.asarray(grey).astype(np.float32)), "TIFF")
    return made | GOOD | {name: content for name, content in BAD.items() if len(content) < 10_000}


PICTURES = pictures()
PICTURE = st.sampled_from(sorted(PICTURES)).flatmap(lambda name: damaged(PICTURES[name]))


@settings(max_examples=400, **FUZZ)
@given(PICTURE, st.integers(1, 4))
def test_images(content, channels):
    try:
        found = to_channels(read_image(io.BytesIO(content)), channels)
    except BROKEN_IMAGE:
        return
    assert len(found.getbands()) == channels and np.asarray(found).dtype == np.uint8


@settings(max_examples=60, **FUZZ)
@given(
    st.lists(st.sampled_from(sorted(PICTURES)).flatmap(lambda name: damaged(PICTURES[name])), min_size=3, max_size=3)
)
def test_datasets_and_caches_count_alike(place, contents):
    """The loader's way, the cache's, and the one with drafts: what one cannot read, all cannot."""
    paths = [str(place / f"{number}.jpg") for number in range(3)]
    for path, content in zip(paths, contents):
        Path(path).write_bytes(content)
    images = Files(paths, [0] * 3, None)
    with silent():
        dataset = KeyedDataset(images, tvt.Compose([tvt.CenterCrop((8, 8)), PLAIN]), 0, 3, replace=False)
        bad = [dataset[number].bad for number in range(3)]
        drafts = KeyedDataset(images, tvt.Compose([tvt.RandomResizedCrop(8), PLAIN]), 0, 3, True, replace=False)
        assert [drafts[number].bad for number in range(3)] == bad
        try:
            decoder = Decoder(images, 3, 8)
        except UserError:
            assert all(bad)
        else:
            assert [int(decoder._decoded(number) is None) for number in range(3)] == bad


# Lists ----------------------------------------------------------------------------------------------------------------

LINES = b"0.png\tcat\n1.png\tdog\n2.png\tcat\n3.png\t10\n4.png\t9\n"
TEXT = st.text(st.characters(codec="utf-8"), max_size=40)
FIELD = st.sampled_from(["0.png", "1.png", "../0.png", "/etc/passwd", '"0.png"', "cat", "", " ", ".", "\x00"]) | TEXT
ROWS = st.lists(st.lists(FIELD, min_size=1, max_size=3).map("\t".join), max_size=8).map("\n".join).map(str.encode)


@settings(max_examples=120, **FUZZ)
@given(damaged(LINES) | ROWS)
def test_lists(place, content):
    """A label for every path, all of them below the folder; what is not there is counted."""
    root = place / "list"
    root.mkdir(exist_ok=True)
    for number in range(5):
        if not (root / f"{number}.png").exists():
            (root / f"{number}.png").write_bytes(encoded(plain(), "PNG"))
    (root / "list.txt").write_bytes(content)
    args = flags("--dataset", "filelist", "--data_path", root, "--train_list", root / "list.txt")
    try:
        images = read_images(args, True)
    except UserError:
        return
    lines = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    assert len(images) == sum(bool(line.strip()) for line in lines)
    with silent():
        dataset = KeyedDataset(images, PLAIN, args.seed, args.in_chans, replace=False)
        for number in range(len(images)):
            path = os.path.abspath(images.name(number))
            assert path.startswith(str(root))
            assert dataset[number].bad == 1 - (os.path.isfile(path) and path.endswith(".png"))


@settings(max_examples=200, **FUZZ)
@given(damaged(b"cat\ndog\nbird\n10\n") | TEXT.map(str.encode))
def test_vocabularies(place, content):
    (place / "vocabulary").write_bytes(content)
    with contextlib.suppress(UserError):
        names = read_vocabulary(str(place / "vocabulary"))
        assert len(set(names)) == len(names) >= 2


@settings(max_examples=100, **FUZZ)
@given(damaged(b"0.png\tcat, dog\n1.png\tdog\n"))
def test_label_sets(place, content):
    (place / "0.png").touch()
    (place / "sets.txt").write_bytes(content)
    with contextlib.suppress(UserError):
        paths, labels = read_list(str(place / "sets.txt"), place)
        assert labels is None or len(labels) == len(paths)


# Shards ---------------------------------------------------------------------------------------------------------------


def shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(6):
            for ending, content in (("png", encoded(plain((number, 0, 0)), "PNG")), ("cls", str(number % 3).encode())):
                member = tarfile.TarInfo(f"{number:03d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


SHARD = shard()


@settings(max_examples=150, **FUZZ)
@given(damaged(SHARD), st.booleans())
def test_shards(place, content, train):
    """As many come as are said to be there, or as are counted; what is not whole is counted, and the rest as it was."""
    (place / "x.tar").write_bytes(content)
    for known in (("--shard_samples", "6"), ()):
        args = flags("--dataset", "wds", "--data_path", place / "x.tar", "--num_workers", 0, *known)
        with silent():
            try:
                images = read_images(args, True)
                batches = list(build_loader(images, PLAIN, args, 1, train).begin(0))
            except (UserError, UnreadableData):
                continue
        assert len(batches) == len(images) and (not known or len(batches) == 6)
        for batch in batches:
            if not batch.bad:  # a changed name, label or pixel without a checksum cannot be told
                assert batch.image.shape[:2] == (1, 3)


@settings(max_examples=150, **FUZZ)
@given(damaged(b'{"splits": {"train": {"filenames": ["x.tar"], "shard_lengths": [6]}}}', 2))
def test_indices(place, content):
    (place / "index").mkdir(exist_ok=True)
    (place / "index" / "_info.json").write_bytes(content)
    with contextlib.suppress(UserError), silent():
        read_images(flags("--dataset", "wds", "--data_path", place / "index"), True)


# Checkpoints ----------------------------------------------------------------------------------------------------------

STATE = {"model": {"w": torch.arange(60.0).reshape(5, 12)}, "epoch": 3}


def saved(**options) -> bytes:
    file = io.BytesIO()
    torch.save(STATE, file, **options)
    return file.getvalue()


@settings(max_examples=200, **FUZZ)
@given(damaged(saved()))
def test_checkpoints(place, content):
    """Refused, or what was written."""
    (place / "checkpoint.pth").write_bytes(content)
    with contextlib.suppress(UserError):
        found = read_file(place / "checkpoint.pth")
        assert torch.equal(found["model"]["w"], STATE["model"]["w"]) and found["epoch"] == 3


@settings(max_examples=200, **FUZZ)
@given(damaged(saved(_use_new_zipfile_serialization=False)) | damaged(pickle.dumps({"a": [1, {"b": 2.5}]})))
def test_old_checkpoints(place, content):
    """Without checksums: refused, or a dictionary."""
    (place / "old.pth").write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(read_file(place / "old.pth"), dict)


@pytest.fixture(scope="module")
def tensors(place):
    save_file({"w": torch.arange(60.0), "b": torch.ones(3)}, place / "whole.safetensors", {"args": "{}"})
    return (place / "whole.safetensors").read_bytes()


@settings(max_examples=200, **FUZZ)
@given(st.data())
def test_safetensors(place, tensors, data):
    (place / "x.safetensors").write_bytes(data.draw(damaged(tensors)))
    for read in (read_file, read_weights):
        with contextlib.suppress(UserError):
            read(place / "x.safetensors")


@settings(max_examples=150, **FUZZ)
@given(damaged(b'{"model_type": "vit", "image_size": 224, "layer_norm_eps": 1e-12, "patch_size": [16, 16]}', 2))
def test_configurations(place, tensors, content):
    """Of a Hugging Face folder."""
    folder = place / "hf"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(content)
    (folder / "model.safetensors").write_bytes(tensors)
    with contextlib.suppress(UserError):
        read_weights(folder)


# The ledger -----------------------------------------------------------------------------------------------------------

ROW = {"command": "main_pretrain", "flags": {"seed": 0, "epochs": 2}, "metrics": {"test_acc1": 50.5}, "data": {}}
ROW |= {"source": None, "seed": 0, "revision": "abc", "finished": "2026-01-01", "images_seen": 3, "seconds": 1.5}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(sorted(ROW)) | TEXT, inner),
    max_leaves=5,
)


@settings(max_examples=120, **FUZZ)
@given(
    damaged((json.dumps(ROW) + "\n").encode() * 2)
    | st.fixed_dictionaries(
        {"command": JSON, "flags": JSON, "metrics": JSON},
        optional={name: JSON for name in ROW if name not in ("command", "flags", "metrics")},
    )
    .map(json.dumps)
    .map(str.encode)
)
def test_ledgers(place, content):
    """A line is read or named; a table is made of what is left, or refused."""
    folder = place / "ledger"
    folder.mkdir(exist_ok=True)
    (folder / "results.jsonl").write_bytes(content)
    with silent():
        rows = ledger.read(folder / "results.jsonl")
        assert all(isinstance(row["metrics"], dict) and isinstance(row["flags"], dict) for row in rows)
        with contextlib.suppress(UserError):
            collect.main(collect.get_args_parser().parse_args([str(folder)]))
