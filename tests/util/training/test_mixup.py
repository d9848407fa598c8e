"""Mixup and cutmix of whole batches against timm's, image by image."""

import numpy as np
import pytest
import timm.data
import torch

from util.training.mixup import Mixup

FLAGS = {
    "both": dict(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.7),
    "mixup": dict(mixup_alpha=0.8),
    "cutmix": dict(mixup_alpha=0.0, cutmix_alpha=1.0),
    "sides": dict(mixup_alpha=0.0, cutmix_minmax=(0.2, 0.8)),
    "rarely": dict(mixup_alpha=0.2, cutmix_alpha=0.2, prob=0.1),
    "shares as drawn": dict(mixup_alpha=0.5, cutmix_alpha=0.5, correct_lam=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_as_timm(flags, mode, dtype):
    """The same random numbers; images and labels to the last bit in float32. timm keeps the shares in float32, too."""
    for seed in range(5):
        results, drawn = [], []
        for kind in (timm.data.Mixup, Mixup):
            np.random.seed(seed)
            imgs = torch.randn(6, 3, 9, 12, generator=torch.Generator().manual_seed(seed), dtype=dtype)
            mixed = kind(mode=mode, num_classes=5, label_smoothing=0.1, **flags)
            results.append(mixed(imgs, torch.arange(6) % 5))
            drawn.append(np.random.rand())
        (ours, labels), (theirs, other) = results[1], results[0]
        assert torch.allclose(ours, theirs, rtol=0, atol=0 if dtype is torch.float32 else 1e-6)
        assert torch.equal(labels, other) and drawn[0] == drawn[1]
