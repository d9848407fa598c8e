"""Weights for RGB images in models of other channels."""

import pytest
import timm
import torch
from helpers.small_models import mae, vit

from util.errors import UserError
from util.weights.channels import for_channels
from util.weights.load import Weights, load_into


def weights_of(model):
    return Weights("file.pth", "MAE", {name: tensor.clone() for name, tensor in model.state_dict().items()})


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_channels_that_repeat_rgb_give_the_same_output(copies):
    """Tokens, features and predictions, up to the order of sums in float32."""
    imgs, source = torch.randn(2, 3, 16, 16), mae().eval()
    repeated = imgs.repeat(1, copies, 1, 1)
    model = mae(in_chans=3 * copies).eval()
    report = load_into(model, weights_of(source), adapt_channels=True)
    noise = torch.rand(2, 16)
    with torch.no_grad():
        expected_loss, expected, _ = source(imgs, noise=noise)
        loss, pred, _ = model(repeated, noise=noise)
    expected = source.unpatchify(expected).repeat(1, copies, 1, 1)
    torch.testing.assert_close(model.unpatchify(pred), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=1e-5)
    said = f"kernel for 3 channels was repeated and scaled by 3/{3 * copies} for --in_chans {3 * copies}"
    for shown in (report.shown(False), report.shown(True)):
        assert (said in shown and "its prediction of pixels repeated" in shown) == (copies > 1)


def test_one_channel_is_the_grey_image():
    """A grey image gives the tokens of its RGB copy, and is predicted as the mean of the predicted colours."""
    grey, source, model = torch.randn(2, 1, 16, 16), mae().eval(), mae(in_chans=1).eval()
    report = load_into(model, weights_of(source), adapt_channels=True)
    noise = torch.rand(2, 16)
    with torch.no_grad():
        _, expected, _ = source(grey.expand(-1, 3, -1, -1), noise=noise)
        _, pred, _ = model(grey, noise=noise)
    expected = source.unpatchify(expected).mean(1, keepdim=True)
    torch.testing.assert_close(model.unpatchify(pred), expected, atol=1e-5, rtol=1e-5)
    assert "summed over the colours for --in_chans 1, its prediction of pixels averaged" in report.shown(False)


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13])
def test_kernel_equals_timm(channels):
    kernel = torch.randn(8, 3, 4, 4)
    state, _ = for_channels({"patch_embed.proj.weight": kernel}, channels)
    expected = timm.models.adapt_input_conv(channels, kernel)
    torch.testing.assert_close(state["patch_embed.proj.weight"], expected)


def test_an_encoder_is_told_nothing_of_a_decoder():
    model = vit(in_chans=5)
    report = load_into(model, weights_of(mae()), adapt_channels=True)
    assert "repeated and scaled by 3/5" in report.note and "prediction" not in report.note


def test_only_where_it_is_asked_for_and_only_from_rgb():
    with pytest.raises(UserError, match="--in_chans 3 is needed"):
        load_into(vit(in_chans=5), weights_of(vit()))
    for source, channels in ((5, 3), (1, 3), (5, 13)):
        with pytest.raises(UserError, match=f"--in_chans {source} is needed"):
            load_into(vit(in_chans=channels), weights_of(vit(in_chans=source)), adapt_channels=True)
    with pytest.raises(UserError, match="width 48"):
        load_into(vit(in_chans=5), weights_of(vit(embed_dim=48)), adapt_channels=True)
