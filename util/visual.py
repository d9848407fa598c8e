"""Pictures of what an autoencoder sees and makes of it."""

import torch
from PIL import Image, ImageDraw
from torchvision.utils import make_grid

from util.rng import sample_noise

CAPTION = "columns: original, masked, reconstruction with the visible patches pasted"


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
    mean, std = (torch.tensor(values, device=imgs.device)[:, None, None] for values in (mean, std))
    mask = mask[..., None]
    grey = model.patchify((torch.full_like(imgs, 0.5) - mean) / std)
    columns = [patches, patches * (1 - mask) + grey * mask, patches * (1 - mask) + pred.to(patches.dtype) * mask]
    shown = torch.stack([model.unpatchify(column) for column in columns], dim=1)
    return (shown * std + mean).clamp(0, 1)


def grid(pictures: torch.Tensor, per_row: int = 2, scale_to: int = 96) -> torch.Tensor:
    """(N, 3, C, H, W) -> one RGB picture (3, height, width): `per_row` triples side by side, small images enlarged."""
    columns, channels, height, width = pictures.shape[1:]
    flat = pictures.flatten(0, 1)
    flat = flat[:, :3] if channels >= 3 else flat[:, :1].expand(-1, 3, -1, -1)
    factor = max(1, scale_to // max(height, width))
    flat = flat.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    return make_grid(flat, nrow=columns * per_row, padding=4, pad_value=1.0)


def captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture with a line of text below it, wrapped to its width."""
    draw = ImageDraw.Draw(picture)
    words, lines = caption.split(" "), [""]
    for word in words:
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= picture.width - 8 or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    height = 14 * len(lines) + 6
    whole = Image.new("RGB", (picture.width, picture.height + height), "white")
    whole.paste(picture)
    ImageDraw.Draw(whole).multiline_text((4, picture.height + 2), "\n".join(lines), fill="black", spacing=3)
    return whole


def fixed_noise(model, count: int, seed: int, device) -> torch.Tensor:
    """The same masks every time: (count, L)."""
    return sample_noise(seed, 0, torch.arange(count, device=device), model.patch_embed.num_patches, stream=1)
