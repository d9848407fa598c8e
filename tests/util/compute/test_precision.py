"""Types that depend on the device."""

import torch

from util.compute.precision import choose_amp_dtype, widest


def test_apples_gpus_have_no_float64():
    """They cannot be had here; their type of device can. Sums on other devices are float64."""
    assert (
        widest(torch.device("mps")) is torch.float32 and choose_amp_dtype("auto", torch.device("mps")) is torch.float32
    )
    assert widest(torch.device("cpu")) is widest(torch.device("cuda")) is torch.float64
