"""Fixtures that many tests share: recorded results of reference implementations, a small image folder, and the
fixtures of tests/helpers/refusals.py, tests/helpers/sweeps.py and tests/helpers/teachers.py."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import set_fused_attn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from helpers.refusals import original_listing as original_listing  # noqa: E402  fixtures
from helpers.refusals import refusal_dir as refusal_dir  # noqa: E402
from helpers.refusals import shared_refusal_dir as shared_refusal_dir  # noqa: E402
from helpers.sweeps import sweep as sweep  # noqa: E402
from helpers.teachers import teacher as teacher  # noqa: E402


@pytest.fixture(autouse=True)
def fused_attention():
    """Restore fused attention, which a main that runs in this process may have switched off."""
    yield
    set_fused_attn(True)


class Golden:
    """The recorded results in a file of tests/fixtures: arrays as tensors, `meta` as a dict, {} without one."""

    def __init__(self, name):
        self.arrays = np.load(ROOT / "tests" / "fixtures" / f"{name}.npz", allow_pickle=False)
        self.meta = json.loads(str(self.arrays["meta"])) if "meta" in self.arrays.files else {}

    def __getitem__(self, key):
        return torch.from_numpy(self.arrays[key])

    def json(self, key):
        """Return the content of an array that contains JSON."""
        return json.loads(str(self.arrays[key]))

    def group(self, prefix):
        """Return the arrays whose names begin with `prefix`, as tensors by the rest of the name."""
        return {key[len(prefix) :]: self[key] for key in self.arrays.files if key.startswith(prefix)}


@pytest.fixture
def golden():
    return Golden


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """An image folder with four classes of noisy colours: 96 training and 20 validation images of 16x16 pixels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 5)):
        for label, colour in enumerate(((200, 40, 40), (40, 200, 40), (40, 40, 200), (128, 128, 128))):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + rng.normal(0, 40, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return root
