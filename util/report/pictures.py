"""Pictures of what an autoencoder sees and makes of it."""

import textwrap

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchvision.utils import make_grid

from util.compute.precision import widened
from util.data.sample_rng import sample_noise

LINE, ROW_LABEL = 15, 56  # pixels: height of a line of text, width of the labels before rows
CAPTION = "columns: original, masked, reconstruction with the visible patches pasted"


def denormalized(imgs, mean, std) -> torch.Tensor:
    """Colours in [0, 1] of imgs (..., C, H, W) that were normalised by `mean` and `std`."""
    mean, std = (torch.tensor(values, device=imgs.device)[:, None, None] for values in (mean, std))
    return (imgs * std + mean).clamp(0, 1)


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio: float, noise, mean, std) -> torch.Tensor:
    """imgs (N, C, H, W), normalised by `mean` and `std` -> (N, 3, C, H, W) in [0, 1]: original, masked (removed patches
    grey), reconstruction with the visible patches pasted.

    A model with `norm_pix_loss` predicts patches without their mean and deviation; these are taken from the original
    to show them, so such a picture shows less error in colour and contrast than the model makes.
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
    grey = model.patchify((torch.full_like(imgs, 0.5) - means) / stds)
    columns = [patches, patches * (1 - mask) + grey * mask, patches * (1 - mask) + pred.to(patches.dtype) * mask]
    shown = torch.stack([model.unpatchify(column) for column in columns], dim=1)
    return denormalized(shown, mean, std)


def grid(pictures: torch.Tensor, per_row: int = 2, scale_to: int = 96) -> torch.Tensor:
    """(N, 3, C, H, W) -> one RGB picture (3, height, width): `per_row` triples side by side, small images enlarged."""
    columns, _, height, width = pictures.shape[1:]
    flat = pictures.flatten(0, 1)
    flat = rgb(flat)
    factor = max(1, scale_to // max(height, width))
    flat = flat.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return make_grid(flat, nrow=columns * per_row, padding=4, pad_value=1.0)


def heat_map(values: torch.Tensor) -> torch.Tensor:
    """(N, H, W) in [0, 1] -> colours (N, 3, H, W), dark (0) to bright (1)."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps["inferno"](widened(values).cpu().numpy())[..., :3]).permute(0, 3, 1, 2).float()


def overlay(colours: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """RGB images (N, 3, H, W) in [0, 1] under maps (N, rows, columns), each from its lowest value (dark) to its highest
    (bright); a map of one value is dark."""
    low, high = (limit(maps.flatten(1), dim=1)[:, None, None] for limit in (torch.amin, torch.amax))
    scaled = ((maps - low) / (high - low).clamp_min(1e-12)).float()[:, None]
    smooth = F.interpolate(scaled, size=colours.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return 0.4 * colours + 0.6 * heat_map(smooth)


def rgb(imgs: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, 3, H, W): the colours without alpha, or grey three times."""
    return imgs[:, :3] if imgs.shape[1] >= 3 else imgs[:, :1].expand(-1, 3, -1, -1)


def mask_picture(shown, scores, mask_ratio: float, model, per_row: int = 2) -> torch.Tensor:
    """Images (N, C, H, W) in [0, 1] and scores (N, L) of their patches, the highest to be removed -> one picture (3,
    height, width): each image, what is left of it, the same with a random mask, and the scores as a heat map, from the
    lowest (dark) to the highest (bright) of that image."""
    noise = fixed_noise(model, len(shown), 0, shown.device)
    masks = [model.choose_visible(values, mask_ratio)[1] for values in (scores, noise)]
    size = model.patch_embed.patch_size
    rows, columns = model.patch_embed.grid_size

    def pixels(values):  # (N, L) -> (N, 1, H, W)
        return values.view(-1, rows, columns).repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)[:, None]

    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    heat = heat_map(pixels((scores - low) / (high - low).clamp_min(1e-12))[:, 0])
    colours = rgb(shown).cpu()
    cut = [colours * (1 - mask) + 0.5 * mask for mask in (pixels(m).cpu() for m in masks)]
    return grid(torch.stack([colours, *cut, heat], dim=1), per_row)


def labelled(picture: Image.Image, columns: list[str], rows: list[str] = ()) -> Image.Image:
    """A picture of `grid` with a title above each of its columns, wrapped to it, and before each of its `rows`."""
    width = (picture.width - 4) // len(columns)
    titles = [textwrap.wrap(title.replace("/", "/ "), max(4, width // 7)) for title in columns]  # 7: a wide letter
    lines = max(map(len, titles))
    left, top = (ROW_LABEL if rows else 0), LINE * lines + 4
    whole = Image.new("RGB", (left + picture.width, top + picture.height), "white")
    whole.paste(picture, (left, top))
    draw = ImageDraw.Draw(whole)
    for i, title in enumerate(titles):
        for place, line in enumerate(title, lines - len(title)):  # at the lower edge
            draw.text((left + 4 + i * width, 2 + LINE * place), line, fill="black", font=_font())
    for i, title in enumerate(rows):
        draw.text(
            (4, top + (i + 0.5) * (picture.height - 4) / len(rows) - LINE // 2), title, fill="black", font=_font()
        )
    return whole


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture with a line of text below it, wrapped to its width."""
    draw = ImageDraw.Draw(picture)
    words, lines = caption.split(" "), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font=_font()) <= picture.width - 8 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    whole = Image.new("RGB", (picture.width, picture.height + LINE * len(lines) + 6), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for i, line in enumerate(lines):
        draw.text((4, picture.height + 2 + LINE * i), line, fill="black", font=_font())
    return whole


def _font():
    return ImageFont.load_default(12)  # smaller, its words run into each other


def fixed_noise(model, count: int, seed: int, device) -> torch.Tensor:
    """The same masks every time: (count, L)."""
    return sample_noise(seed, 0, torch.arange(count, device=device), model.patch_embed.num_patches, stream=1)
