"""Images that activate a channel: gradient ascent on an image's Fourier coefficients (Olah et al. 2017, "Feature
visualization"), for the channels that Ghiasi et al. 2022 ("What do vision transformers learn?") study.

N images, C channels of an image, L patches, F channels of a layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from tqdm import tqdm

LAYERS = ["mlp", "block"]
_PULL = 0.01  # of logits to grey: colours end between 0.04 and 0.96, where the sigmoid does not saturate


class FourierImages(nn.Module):
    """Images (N, C, H, W) in [0, 1], parametrised by Fourier coefficients. Low frequencies have more weight, as in
    natural images, so that a step changes whole shapes, not single pixels."""

    def __init__(self, shape: tuple[int, int, int, int], generator: torch.Generator):
        super().__init__()
        *self.first, self.height, self.width = shape
        frequencies = torch.fft.fftfreq(self.height)[:, None].hypot(torch.fft.rfftfreq(self.width))
        self.register_buffer("scale", 1 / frequencies.clamp_min(1 / max(self.height, self.width)))
        start = torch.randn(*self.first, *self.scale.shape, 2, generator=generator)
        self.coefficients = nn.Parameter(0.01 * start)

    def logits(self) -> Tensor:
        """Return the images (N, C, H, W) before the sigmoid."""
        spectrum = torch.view_as_complex(self.coefficients) * self.scale
        return torch.fft.irfft2(spectrum, s=(self.height, self.width), norm="ortho")

    def forward(self) -> Tensor:
        return self.logits().sigmoid()


def total_variation(imgs: Tensor) -> Tensor:
    """Return the mean absolute difference of vertical and horizontal neighbours in images (N, C, H, W): (N,)."""
    down, across = imgs.diff(dim=2).abs(), imgs.diff(dim=3).abs()
    return down.flatten(1).mean(dim=1) + across.flatten(1).mean(dim=1)


def channel_activation(model, block: int, layer: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of normalised images (N, C, H, W) and channel indices (N,) that computes, for each image, the
    mean of its channel over the patches (N,): in the output of `block` (`layer` block, F = D) or in its MLP after the
    activation function (mlp, F = 4 D). Later blocks are not computed."""
    observed = model.blocks[block].mlp.act if layer == "mlp" else model.blocks[block]

    def activation(imgs, channels):
        blocks, outputs = model.blocks, []
        hook = observed.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        model.blocks = blocks[: block + 1]
        try:
            model.forward_tokens(imgs)
        finally:
            model.blocks = blocks
            hook.remove()
        return outputs[0][:, 1:].mean(dim=1).gather(1, channels[:, None])[:, 0]

    return activation


def excite(activation, images: FourierImages, normalise, steps: int, lr: float, tv: float, jitter: int, generator):
    """Optimise `images` for a large `activation(imgs)`, a function of (N, C, H, W) to (N,) -> the images in [0, 1], and
    their activations before and after (2, N).

    `normalise` maps colours in [0, 1] to the model's input. Each step rolls the images by up to `jitter` pixels and
    follows the gradient of the activation minus `tv` times that of the total variation, both scaled to the same norm in
    each image, so that `tv` has the same effect at any depth.
    """
    # With Adam's default eps, a frequency whose gradient is only rounding would take full steps.
    optimizer = torch.optim.Adam(images.parameters(), lr=lr, eps=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    @torch.no_grad()
    def measure():
        return activation(normalise(images()))

    before = measure()
    for _ in tqdm(range(steps), unit=" steps", disable=None, leave=False):
        shift = torch.randint(-jitter, jitter + 1, (2,), generator=generator).tolist()
        with torch.enable_grad():
            logits = images.logits()
            leaf = logits.detach().sigmoid().requires_grad_(True)
            value = activation(normalise(leaf.roll(shift, dims=(2, 3)))).sum()
            (up,) = torch.autograd.grad(value, leaf)
            (rough,) = torch.autograd.grad(total_variation(leaf).sum(), leaf)
        colours, slope = leaf.detach(), tv * _scaled(rough) - _scaled(up)
        optimizer.zero_grad()
        logits.backward(slope * colours * (1 - colours) + _PULL * logits.detach())
        optimizer.step()
        schedule.step()
    return images().detach(), torch.stack([before, measure()])


def _scaled(gradient: Tensor) -> Tensor:
    """Scale the gradient (N, C, H, W) to a root mean square of one in each image."""
    size = gradient.flatten(1).square().mean(dim=1).sqrt().clamp_min(1e-20)
    return gradient / size[:, None, None, None]
