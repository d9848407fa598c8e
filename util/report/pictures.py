"""Pictures of masks, reconstructions and saliency maps."""

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
    """Undo the normalisation of imgs (..., C, H, W) by `mean` and `std`; return colours in [0, 1]."""
    mean, std = (torch.tensor(values, device=imgs.device)[:, None, None] for values in (mean, std))
    return (imgs * std + mean).clamp(0, 1)


@torch.no_grad()
def reconstruct(model, imgs, mask_ratio: float, noise, mean, std) -> torch.Tensor:
    """Draw originals, masked images and reconstructions: normalised imgs (N, C, H, W) -> (N, 3, C, H, W) in [0, 1].

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
    grey = model.patchify((torch.full_like(imgs, 0.5) - means) / stds)
    columns = [patches, patches * (1 - mask) + grey * mask, patches * (1 - mask) + pred.to(patches.dtype) * mask]
    pictures = torch.stack([model.unpatchify(column) for column in columns], dim=1)
    return denormalized(pictures, mean, std)


def grid(pictures: torch.Tensor, per_row: int = 2, scale_to: int = 96) -> torch.Tensor:
    """Arrange (N, 3, C, H, W) as one RGB picture (3, height, width) with `per_row` triples side by side; small images
    are enlarged."""
    columns, _, height, width = pictures.shape[1:]
    flat = pictures.flatten(0, 1)
    flat = rgb(flat)
    factor = max(1, scale_to // max(height, width))
    flat = flat.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return make_grid(flat, nrow=columns * per_row, padding=4, pad_value=1.0)


def heat_map(values: torch.Tensor) -> torch.Tensor:
    """Return values (N, H, W) in [0, 1] as colours (N, 3, H, W), from dark (0) to bright (1)."""
    from matplotlib import colormaps

    return torch.from_numpy(colormaps["inferno"](widened(values).cpu().numpy())[..., :3]).permute(0, 3, 1, 2).float()


def overlay(colours: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Blend RGB images (N, 3, H, W) in [0, 1] with maps (N, rows, columns), each scaled from its lowest value (dark) to
    its highest (bright); a constant map is dark."""
    low, high = (limit(maps.flatten(1), dim=1)[:, None, None] for limit in (torch.amin, torch.amax))
    scaled = ((maps - low) / (high - low).clamp_min(1e-12)).float()[:, None]
    smooth = F.interpolate(scaled, size=colours.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    return 0.4 * colours + 0.6 * heat_map(smooth)


def rgb(imgs: torch.Tensor) -> torch.Tensor:
    """Return images (N, C, H, W) as RGB (N, 3, H, W): without alpha, or with the grey channel three times."""
    return imgs[:, :3] if imgs.shape[1] >= 3 else imgs[:, :1].expand(-1, 3, -1, -1)


def mask_picture(shown, scores, mask_ratio: float, model, per_row: int = 2) -> torch.Tensor:
    """Draw masks by score: images (N, C, H, W) in [0, 1] and scores (N, L) -> one picture (3, height, width).

    The columns are the image, its visible part under the scores' mask (the highest scores are removed), its visible
    part under a random mask, and the scores as a heat map from the image's lowest (dark) to its highest (bright).
    """
    noise = fixed_noise(model, len(shown), 0, shown.device)
    masks = [model.choose_visible(values, mask_ratio)[1] for values in (scores, noise)]
    size = model.patch_embed.patch_size
    rows, columns = model.patch_embed.grid_size

    def pixels(values):  # (N, L) -> (N, 1, H, W)
        return values.view(-1, rows, columns).repeat_interleave(size[0], 1).repeat_interleave(size[1], 2)[:, None]

    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    heat = heat_map(pixels((scores - low) / (high - low).clamp_min(1e-12))[:, 0])
    colours = rgb(shown).cpu()
    visible = [colours * (1 - mask) + 0.5 * mask for mask in (pixels(m).cpu() for m in masks)]
    return grid(torch.stack([colours, *visible, heat], dim=1), per_row)


def labelled(picture: Image.Image, columns: list[str], rows: list[str] = ()) -> Image.Image:
    """Add wrapped titles above the columns of a picture from `grid`, and titles before its `rows`."""
    width = (picture.width - 4) // len(columns)
    titles = [
        textwrap.wrap(title.replace("/", "/ "), max(4, width // 7)) for title in columns
    ]  # pixels of a wide letter
    lines = max(map(len, titles))
    left, top = (ROW_LABEL if rows else 0), LINE * lines + 4
    whole = Image.new("RGB", (left + picture.width, top + picture.height), "white")
    whole.paste(picture, (left, top))
    draw = ImageDraw.Draw(whole)
    for i, title in enumerate(titles):
        for row, line in enumerate(title, lines - len(title)):  # aligned at the bottom
            draw.text((left + 4 + i * width, 2 + LINE * row), line, fill="black", font=_font())
    for i, title in enumerate(rows):
        draw.text(
            (4, top + (i + 0.5) * (picture.height - 4) / len(rows) - LINE // 2), title, fill="black", font=_font()
        )
    return whole


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """Add a caption below the picture, wrapped to its width."""
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
    return ImageFont.load_default(12)  # with a smaller size, words are not separated


def fixed_noise(model, count: int, seed: int, device) -> torch.Tensor:
    """Return noise (count, L) that depends only on `seed` and the image's number, for the same masks every time."""
    return sample_noise(seed, 0, torch.arange(count, device=device), model.patch_embed.num_patches, stream=1)
