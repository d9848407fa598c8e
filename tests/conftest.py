"""Shared helpers: fixtures of the reference implementations, small image folders, launching the mains."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Golden:
    """One file of `tests/fixtures`: arrays as tensors, `meta` as a dict, groups of arrays by prefix."""

    def __init__(self, name):
        self.arrays = np.load(ROOT / "tests" / "fixtures" / f"{name}.npz", allow_pickle=False)
        self.meta = json.loads(str(self.arrays["meta"]))

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def json(self, key):
        return json.loads(str(self.arrays[key]))

    def group(self, prefix):
        return {key[len(prefix) :]: self[key] for key in self.arrays.files if key.startswith(prefix)}


@pytest.fixture
def golden():
    return Golden


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)
