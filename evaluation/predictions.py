"""Predictions and features of images without labels: the rows, and the files they are written to as they come.

No file is held in memory: a csv file grows row by row, and the arrays of an .npz file batch by batch.
"""

import csv
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import numpy as np
import torch

from util.compute.precision import autocast
from util.data.build import build_loader
from util.data.samples import NamedSample
from util.data.shards import Shards

# Rows -----------------------------------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Some images in the order of the data set: their names, why each is unreadable ("" if it is not), and the outputs
    (N, outputs) float32 on the CPU; those of unreadable images mean nothing."""

    names: list[str]
    errors: list[str]
    outputs: torch.Tensor


@torch.no_grad()
def predict(encode: Callable, images, options, batch_size: int, device, amp_dtype) -> Iterator[Rows]:
    """Yield `encode(imgs)` of every image of `images` (an `Images` or `Shards`), in the order of the data set.
    `options` is the `ImageOptions` of the model."""
    for part in _parts(images, options.num_workers):
        loader = build_loader(part, options.transform(), options, batch_size, train=False, named=True)
        arrived = []
        for batch in loader.on(device).begin(0):
            with autocast(device, amp_dtype):
                outputs = encode(batch.image).float().cpu()
            arrived.append((batch.index, _rows(batch, outputs)))
            if not _out_of_order(part, options.num_workers):
                yield arrived.pop()[1]
        if arrived:
            yield _sorted(arrived)


def _parts(images, workers: int) -> Iterator:
    """Yield the data set in parts, of which each is read by a loader of its own: shards in groups of one for each
    worker, as each worker reads a section of its own. So only the outputs of one group wait for their turn."""
    if not _out_of_order(images, workers):
        yield images
        return
    for first in range(0, len(images.urls), workers):
        group = slice(first, first + workers)
        if sum(images.counts[group]):
            yield Shards(images.urls[group], images.counts[group])


def _out_of_order(images, workers: int) -> bool:
    return isinstance(images, Shards) and workers > 1


def _rows(batch: NamedSample, outputs: torch.Tensor) -> Rows:
    # The address of pillow's file in memory would make every output different.
    errors = [re.sub(r" <_io\.BytesIO object at 0x\w+>", "", error) for error in batch.error]
    return Rows(list(batch.name), errors, outputs)


def _sorted(arrived: list[tuple[torch.Tensor, Rows]]) -> Rows:
    order = torch.cat([index for index, _ in arrived]).argsort()
    names, errors = ([text for _, rows in arrived for text in rows[column]] for column in (0, 1))
    outputs = torch.cat([rows.outputs for _, rows in arrived])[order]
    return Rows([names[i] for i in order], [errors[i] for i in order], outputs)


def relative_names(rows: Iterable[Rows], folder: str | os.PathLike) -> Iterator[Rows]:
    """Yield the rows with names relative to `folder`, where they are below it."""
    given, absolute = (os.path.join(path, "") for path in (folder, os.path.abspath(folder)))
    for part in rows:
        yield part._replace(names=[name.removeprefix(given).removeprefix(absolute) for name in part.names])


def readable(text: str) -> str:
    """Return a text that can be written as UTF-8: a file name with other bytes becomes Python's literal of its bytes,
    such as b'caf\\xe9.png', which `ast.literal_eval` reads back."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return repr(os.fsencode(text))
    return text


# Columns --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """The columns of predictions, and the function that turns outputs (N, outputs) into N rows of their cells."""

    names: list[str]
    cells: Callable[[torch.Tensor], list[list[str]]]


def columns_of(stored: Mapping[str, Any], classes: list[str] | None, outputs: int, topk: int | None) -> Columns:
    """Return the columns of a model with the `stored` flags and so many `outputs`, whose names are `classes` (None:
    their indices): the values of a regression, else the `topk` most probable classes (None: the probabilities of all).
    """
    if is_regression(stored):
        return _values(stored, classes, outputs)
    names, probabilities = classes or [str(index) for index in range(outputs)], _activation(stored)
    if topk is None:
        return Columns([f"probability_{name}" for name in names], lambda logits: _numbers(probabilities(logits)))
    topk = min(topk, outputs)

    def best(logits: torch.Tensor) -> list[list[str]]:
        indices = logits.topk(topk, dim=1).indices  # of the logits: after rounding, probabilities may be equal
        shares = _numbers(probabilities(logits).gather(1, indices))
        labels = [[names[index] for index in row] for row in indices.tolist()]
        return [[cell for pair in zip(*row) for cell in pair] for row in zip(labels, shares)]

    return Columns([f"{title}_{rank}" for rank in range(1, topk + 1) for title in ("label", "probability")], best)


def is_regression(stored: Mapping[str, Any]) -> bool:
    """Whether a model with the `stored` flags predicts values instead of classes."""
    return stored.get("targets") == "regression"


def _values(stored: Mapping[str, Any], names: list[str] | None, outputs: int) -> Columns:
    """Return the columns of a regression. Its outputs are standardised by the mean and the standard deviation of the
    training targets, if the checkpoint stores them: a number each, or one for each output."""
    given = {name: stored[name] for name in _STANDARD if stored.get(name) is not None}
    mean, std = (torch.as_tensor(value, dtype=torch.float32) for value in (_STANDARD | given).values())
    titles = ["value"] if outputs == 1 else [f"value_{name}" for name in names or range(outputs)]
    return Columns(titles, lambda values: _numbers(values * std + mean))


_STANDARD = {"target_mean": 0.0, "target_std": 1.0}  # stored flags of a regression, and their values if they are not


def _activation(stored: Mapping[str, Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from logits to the probabilities that the loss of the training was computed from."""
    independent = stored.get("targets") == "multilabel" and stored.get("multilabel_loss") == "bce"
    return torch.sigmoid if independent else lambda logits: logits.softmax(dim=1)


def _numbers(values: torch.Tensor) -> list[list[str]]:
    return [[f"{value:.6g}" for value in row] for row in values.tolist()]


# Files ----------------------------------------------------------------------------------------------------------------


class _Lines:
    """A text file for csv.writer with the line end \\n. The writer's own is \\r\\n, as it quotes only what contains a
    character of its line end, and readers of csv files end a row at either."""

    def __init__(self, file: io.TextIOWrapper):
        self.file = file

    def write(self, row: str) -> None:
        self.file.write(row.removesuffix("\r\n") + "\n")


def write_csv(file: BinaryIO, rows: Iterable[Rows], columns: Columns) -> None:
    """Write a table: `image`, the `columns`, `error`. An unreadable image has only its name and its error."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(_Lines(text))
    writer.writerow(map(readable, ["image", *columns.names, "error"]))
    for part in rows:
        for name, error, cells in zip(part.names, part.errors, columns.cells(part.outputs)):
            cells = [""] * len(columns.names) if error else cells
            writer.writerow(map(readable, [name, *cells, error]))
        text.flush()
    text.detach()  # which would be closed otherwise


def write_npz(file: BinaryIO, rows: Iterable[Rows], count: int) -> None:
    """Write the arrays `images` (N,), `features` (N, D) float32 and `error` (N,) of `count` images. The features of an
    unreadable image are NaN."""
    waiting = partial(tempfile.TemporaryFile, "w+", encoding="utf-8", dir=Path(file.name).parent)
    with zipfile.ZipFile(file, "w") as archive, waiting() as names_file, waiting() as errors_file:
        names, errors = _Texts(names_file), _Texts(errors_file)
        with archive.open("features.npy", "w", force_zip64=True) as member:
            for part in rows:
                if not names.count:
                    _write_header(member, np.dtype(np.float32), (count, part.outputs.shape[1]))
                member.write(_features(part).tobytes())
                names.extend(part.names)
                errors.extend(part.errors)
        assert names.count == count, f"{names.count} of {count} images"
        names.write(archive, "images.npy")
        errors.write(archive, "error.npy")


def write_parquet(file: BinaryIO, rows: Iterable[Rows]) -> None:
    """Write the columns `image`, `feature` (a list of D float32) and `error` (null where there is none). The features
    of an unreadable image are NaN. Needs pyarrow."""
    import pyarrow
    import pyarrow.parquet

    writer = None
    for part in rows:
        features = _features(part)
        columns = {
            "image": pyarrow.array([readable(name) for name in part.names], pyarrow.string()),
            "feature": pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(features.ravel()), features.shape[1]),
            "error": pyarrow.array([readable(error) or None for error in part.errors], pyarrow.string()),
        }
        table = pyarrow.table(columns)
        writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _features(part: Rows) -> np.ndarray:
    """Return the outputs (N, D) as an array, NaN for unreadable images."""
    features = part.outputs.numpy()
    features[[bool(error) for error in part.errors]] = np.nan
    return features


def _write_header(member, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(member, header)


class _Texts:
    """Texts that wait in a temporary file for the array they become: its type depends on the longest."""

    AT_ONCE = 4096  # texts that are in memory

    def __init__(self, file: TextIO):
        self.file, self.count, self.longest = file, 0, 1

    def extend(self, texts: Iterable[str]) -> None:
        for text in map(readable, texts):
            self.file.write(json.dumps(text) + "\n")
            self.count, self.longest = self.count + 1, max(self.longest, len(text))

    def write(self, archive: zipfile.ZipFile, name: str) -> None:
        dtype = np.dtype(f"<U{self.longest}")
        self.file.seek(0)
        with archive.open(name, "w", force_zip64=True) as member:
            _write_header(member, dtype, (self.count,))
            while lines := list(islice(self.file, self.AT_ONCE)):
                member.write(np.array([json.loads(line) for line in lines], dtype).tobytes())
