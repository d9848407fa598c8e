"""Locked-image tuning (LiT, Zhai et al., CVPR 2022, arXiv 2111.07991): a text tower learns to meet a frozen encoder.

Images and captions are compared by the cosine of their embeddings, with CLIP's symmetric loss (Radford et al. 2021)
over the images of all processes. MAE's features have a large common part, so they are standardised first, as for its
linear probe (BatchNorm without affine); LiT's encoders need no such step.

Shapes: N images of this process, M of all processes, D width of the encoder, W of the text tower, T tokens of a text.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from util.compute.precision import widened
from util.errors import UserError
from util.parallel.distributed import gather_with_gradients
from util.weights.timm_models import state_sha256

MAX_SCALE = 100.0  # of the cosines, CLIP's limit


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor | float) -> Tensor:
    """Return the mean of the cross-entropies of finding the text of each image and the image of each text, by
    `scale` times the cosine: unit vectors (M, D) of both, of which row i belongs to row i -> a scalar."""
    logits, own = scale * images @ texts.T, torch.arange(len(images), device=images.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class TextTower(nn.Module):
    """A text encoder of Hugging Face's; the feature is the mean of its tokens. Its dropout is off."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.width = network, network.config.hidden_size
        for name, parameter in network.named_parameters():
            parameter.requires_grad_("pooler" not in name)  # of another feature: it would get no gradient
        self.eval()

    def train(self, mode: bool = True):
        return super().train(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Ids and attention mask (N, 2, T) int64 -> features (N, W)."""
        ids, mask = tokens.unbind(dim=1)
        hidden = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def read_text_tower(folder: str):
    """Return a `TextTower` and its tokenizer from a folder in Hugging Face's format. Raises UserError without the
    library transformers, and for a folder that is no text encoder. Nothing is downloaded."""
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise UserError("--text_model needs the library transformers: pip install transformers") from error
    disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"--text_model {folder} is no folder with a text encoder of Hugging Face's: {reason}"
        ) from error
    if network.config.is_encoder_decoder or not isinstance(getattr(network.config, "hidden_size", None), int):
        raise UserError(f"--text_model {folder} is a {type(network).__name__}: a text encoder alone is needed")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return TextTower(network.float()), tokenizer


def tokenize(tokenizer, texts: Sequence[str], length: int) -> Tensor:
    """Return ids and attention mask (len(texts), 2, T) int64, T at most `length`; longer texts are cut."""
    tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return torch.stack([tokens["input_ids"], tokens["attention_mask"]], dim=1)


class Learned(nn.Module):
    """All that is trained and stored: the projection of texts to the encoder's width, the scale of the cosines, the
    statistics of the images' features and, unless it is frozen, the text tower."""

    def __init__(self, width: int, tower: TextTower, frozen: bool, encoder_hash: str):
        super().__init__()
        self.projection = nn.Linear(tower.width, width, bias=False)
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))  # LiT's
        self.tower = None if frozen else tower
        self.hash = encoder_hash

    def get_extra_state(self) -> dict:
        return {"encoder_sha256": self.hash}

    def set_extra_state(self, state: dict) -> None:
        if state["encoder_sha256"] != self.hash:
            raise UserError("--finetune is not the encoder that this run began with: give that one")


class LiT(nn.Module):
    """A frozen encoder, which has `feature(imgs, pool)`, and the part that is learned."""

    def __init__(self, encoder: nn.Module, pool: str, width: int, tower: TextTower, frozen_text: bool):
        super().__init__()
        self.encoder, self.pool = encoder.requires_grad_(False), pool
        self.frozen_tower = tower.requires_grad_(False) if frozen_text else None
        self.learned = Learned(width, tower, frozen_text, state_sha256(encoder))

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def image_features(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> features of the encoder (N, D), at least float32."""
        return widened(self.encoder.feature(imgs, self.pool))

    def embed_images(self, features: Tensor) -> Tensor:
        """Features (N, D) -> unit vectors (N, D)."""
        return F.normalize(self.learned.norm(features), dim=-1)

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Tokens (N, 2, T), or features (N, W) of the frozen text tower -> unit vectors (N, D)."""
        features = texts if texts.is_floating_point() else (self.learned.tower or self.frozen_tower)(texts)
        return F.normalize(widened(self.learned.projection(features)), dim=-1)

    @property
    def scale(self) -> Tensor:
        return self.learned.log_scale.clamp(max=math.log(MAX_SCALE)).exp()

    def forward(self, imgs: Tensor, texts: Tensor) -> Tensor:
        """Images (N, C, H, W) and their texts, as `embed_texts` takes them -> the loss over all processes: a scalar."""
        features, texts = self.image_features(imgs), self.embed_texts(texts)
        with torch.autocast(imgs.device.type, enabled=False):
            images = self.embed_images(gather_with_gradients(features))
            return contrastive_loss(images, gather_with_gradients(texts), self.scale)

    @torch.no_grad()
    def embed_classes(self, prompts: Tensor) -> Tensor:
        """Return the unit vectors (classes, D) of classes: the normalised mean over their templates. `prompts` are
        (classes, templates, ...), of texts as `embed_texts` takes them."""
        return F.normalize(torch.stack([self.embed_texts(own).mean(dim=0) for own in prompts]), dim=-1)


class ZeroShot(nn.Module):
    """A classifier by the texts of the classes, unit vectors (classes, D)."""

    def __init__(self, lit: LiT, classes: Tensor):
        super().__init__()
        self.lit, self.classes = lit, classes

    def forward(self, imgs: Tensor) -> Tensor:
        """Images (N, C, H, W) -> logits (N, classes)."""
        images = self.lit.embed_images(self.lit.image_features(imgs))
        with torch.autocast(imgs.device.type, enabled=False):
            return self.lit.scale * images @ self.classes.T
