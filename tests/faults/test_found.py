"""Data sets and files as people have them, varied at random: folders, tables, pixel ranges, strips, shards, weights.
The examples are the same in every run; scripts/soak.sh tries others."""

import contextlib
import io
import tempfile
from pathlib import Path
from random import Random

import pytest
from helpers.found import KINDS


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("seed", range(25))
def test_read_as_it_was_meant(kind, seed):
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        KINDS[kind](Random(f"{kind} {seed}"), Path(folder))
