"""Pictures of masks, reconstructions and saliency maps."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from util.data.bands import many_bands
from util.data.sample_rng import sample_noise
from util.errors import UserError
from util.report.sheet import Bar, Row, Sheet, draw_sheet, heat_map

COLUMNS = ["original", "masked", "reconstruction"]
MASK_COLUMNS = ["image", "learned mask", "random mask", "probability of removal"]
CAPTION = "removed patches are grey; visible patches are pasted into the reconstruction"
NORM_PIX = "; patches de-normalised with the original's mean and standard deviation"


def shown_channels(in_chans: int, given: Sequence[int] | None) -> tuple[int, ...] | None:
    """Return the channels that are red, green and blue in pictures: those `given` by --show_channels, the first three
    of more than four channels, else None: images of one to four channels are shown in their own colours. Raises
    UserError for a channel that the images do not have."""
    wrong = next((channel for channel in given or () if not 0 <= channel < in_chans), None)
    if wrong is not None:
        raise UserError(f"--show_channels {wrong}: the images have {in_chans} channels, from 0 to {in_chans - 1}")
    return tuple(given) if given else (0, 1, 2) if many_bands(in_chans) else None


def denormalized(imgs, mean, std, channels: Sequence[int] | None = None) -> torch.Tensor:
    """Undo the normalisation of imgs (..., C, H, W) by `mean` and `std`; return colours in [0, 1]. Of chosen `channels`
    (`shown_channels`) two standard deviations below the mean are black, and two above it white: (..., 3, H, W)."""
    if channels is not None:
        return (imgs[..., list(channels), :, :] * 0.25 + 0.5).clamp(0, 1)
    mean, std = (torch.tensor(values, device=imgs.device)[:, None, None] for values in (mean, std))
    return (imgs * std + mean).clamp(0, 1)


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio: float, noise, mean, std, channels=None) -> torch.Tensor:
    """Draw originals, masked images and reconstructions: normalised imgs (N, C, H, W) -> (N, 3, C, H, W) in [0, 1], or
    with `channels` (N, 3, 3, H, W), see `denormalized`.

    Removed patches are grey in the second column; visible patches are pasted into the reconstruction. A model with
    `norm_pix_loss` predicts normalised patches; the mean and standard deviation of the original patches are put back,
    so errors of colour and contrast do not show.
    """
    was_training = model.training
    model.eval()
    _, pred, mask = model(imgs, mask_ratio=mask_ratio, noise=noise)
    model.train(was_training)
    patches = model.patchify(imgs)
    if model.norm_pix_loss:
        pred = pred * (patches.var(dim=-1, keepdim=True) + 1e-6) ** 0.5 + patches.mean(dim=-1, keepdim=True)
    mask = mask[..., None]
    means, stds = (torch.tensor(values, device=imgs.device)[:, None, None] for values in (mean, std))
    grey = (torch.full_like(imgs, 0.5) - means) / stds if channels is None else torch.zeros_like(imgs)
    grey = model.patchify(grey)
    columns = [patches, patches * (1 - mask) + grey * mask, patches * (1 - mask) + pred.to(patches.dtype) * mask]
    pictures = torch.stack([model.unpatchify(column) for column in columns], dim=1)
    return denormalized(pictures, mean, std, channels)


def overlay(colours: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Blend RGB images (N, 3, H, W) in [0, 1] with maps (N, rows, columns), each scaled from its lowest value (dark) to
    its highest (bright). An image whose map is constant is pale grey, for there is nothing to compare."""
    low, high = (limit(maps.flatten(1), dim=1)[:, None, None] for limit in (torch.amin, torch.amax))
    scaled = ((maps - low) / (high - low).clamp_min(1e-12)).float()[:, None]
    smooth = F.interpolate(scaled, size=colours.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    blended = 0.4 * colours + 0.6 * heat_map(smooth)
    pale = (0.7 + 0.3 * colours.mean(dim=1, keepdim=True)).expand_as(colours)
    return torch.where((high > low)[..., None], blended, pale)


def rgb(imgs: torch.Tensor, channels: Sequence[int] | None = None) -> torch.Tensor:
    """Return images (N, C, H, W) as RGB (N, 3, H, W): three `channels`, else without alpha, or with the grey channel
    three times."""
    if channels is not None:
        return imgs[:, list(channels)]
    return imgs[:, :3] if imgs.shape[1] >= 3 else imgs[:, :1].expand(-1, 3, -1, -1)


def rows_of_images(pictures: list[torch.Tensor], labels=("",), notes=None, per_row: int = 2, marks=None) -> list[Row]:
    """Arrange pictures (N, columns, C, H, W), one tensor for each label, as rows of `per_row` images with their columns
    side by side. Rows of the same images follow each other, one for each label. `notes` and `marks` have, for each
    label and image, a note and a list of marks for each column."""
    rows = []
    for first in range(0, len(pictures[0]), per_row):
        for number, (own, label) in enumerate(zip(pictures, labels)):
            below, over = (
                [one for image in of[number][first : first + per_row] for one in image] if of else []
                for of in (notes, marks)
            )
            opens = len(labels) > 1 and number == 0 and first > 0
            rows.append(Row(rgb(own[first : first + per_row].flatten(0, 1)), label, below, opens, over))
    return rows


def reconstruction_sheet(pictures: list[torch.Tensor], labels=("",), caption: str = CAPTION, side=None) -> Sheet:
    """Draw pictures of `reconstruct`, one tensor for each of several models, with their labels."""
    per_row = 2 if len(pictures[0]) > 1 else 1
    rows = rows_of_images([own.cpu() for own in pictures], labels, None, per_row)
    return draw_sheet(rows, COLUMNS, caption, None, side, per_row)


def mask_tiles(shown, logits, mask_ratio: float, model) -> tuple[torch.Tensor, list[list[str]]]:
    """Draw masks by logits of removal: images (N, C, H, W) in [0, 1] and logits (N, L) -> tiles (N, 4, 3, H, W), and
    their notes: the range of the probabilities.

    The columns are the image, its visible part under the logits' mask (the highest are removed), its visible part under
    a random mask, and the probabilities as a heat map from the image's lowest (dark) to its highest (bright).
    """
    noise = fixed_noise(model, len(shown), 0, shown.device)
    masks = [model.choose_visible(values, mask_ratio)[1] for values in (logits, noise)]
    size = model.patch_embed.patch_size
    rows, columns = model.patch_embed.grid_size

    def pixels(values):  # (N, L) -> (N, 1, H, W)
        return values.view(-1, rows, columns).repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)[:, None]

    probabilities = logits.float().sigmoid()
    low, high = probabilities.amin(1, keepdim=True), probabilities.amax(1, keepdim=True)
    heat = heat_map(pixels((probabilities - low) / (high - low).clamp_min(1e-12))[:, 0])
    colours = rgb(shown).cpu()
    visible = [colours * (1 - mask) + 0.5 * mask for mask in (pixels(m).cpu() for m in masks)]
    notes = [["", "", "", shown_range(values)] for values in probabilities.cpu()]
    return torch.stack([colours, *visible, heat], dim=1), notes


def mask_sheet(tiles: list, labels=("",), caption: str = "", side=None) -> Sheet:
    """Draw what `mask_tiles` returns, for each of several models, with their labels."""
    pictures, notes = zip(*tiles)
    per_row = 2 if len(pictures[0]) > 1 else 1
    rows = rows_of_images(list(pictures), labels, list(notes), per_row)
    bar = Bar("lowest", "highest of the image", "probability of removal; its range in the image is below each map")
    return draw_sheet(rows, MASK_COLUMNS, caption, bar, side, per_row)


def shown_range(values: torch.Tensor) -> str:
    """Return the lowest and the highest value as text, with the digits that tell them apart."""
    low, high = values.min().item(), values.max().item()
    digits = next((n for n in range(2, 6) if f"{low:.{n}g}" != f"{high:.{n}g}"), 2)
    return f"{low:.{digits}g} to {high:.{digits}g}" if low < high else f"{low:.{digits}g} everywhere"


def fixed_noise(model, count: int, seed: int, device) -> torch.Tensor:
    """Return noise (count, L) that depends only on `seed` and the image's number, for the same masks every time."""
    return sample_noise(seed, 0, torch.arange(count, device=device), model.patch_embed.num_patches, stream=1)
