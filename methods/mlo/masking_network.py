"""The network that decides which patches are removed, and its loading from another run's checkpoint."""

import torch
from torch import nn

from util.compute.ema import Frozen
from util.errors import UserError
from util.weights.file import read_file
from util.weights.geometry import is_sincos


class PatchTokens(nn.Module):
    """A patch embedding with positions, separate from the autoencoder's: the input of a masking network that was
    loaded."""

    def __init__(self, model):
        super().__init__()
        encoder = model.encoder_copy(depth=0)
        self.patch_embed, self.pos_embed = encoder.patch_embed, encoder.pos_embed

    def forward(self, imgs):
        return self.patch_embed(imgs) + self.pos_embed[:, 1:]


class MaskingNetwork(nn.Module):
    """Patch tokens (N, L, D) with positions -> logits (N, L) of being removed (Section 4.1). For one grid only."""

    def __init__(self, patches: int, width: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(patches * width, hidden), nn.ReLU(), nn.Linear(hidden, patches))
        for layer in self.linear_layers():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens):
        return self.layers(tokens.flatten(1))

    def linear_layers(self) -> list[nn.Linear]:
        return [layer for layer in self.layers if isinstance(layer, nn.Linear)]

    def groups(self) -> list[dict]:
        """Return parameter groups for AdamW.

        AdamW's step has about the same size in every weight. With tens of thousands of inputs, such a step would move a
        logit from one extreme to the other. The learning rate of a layer is therefore divided by its number of inputs
        (as in Yang et al. 2021, Tensor Programs V, Table 3), so that one rate suits every grid and width.
        """
        linear = self.linear_layers()
        return [{"params": [layer.weight], "lr_scale": 1 / layer.in_features} for layer in linear] + [
            {"params": [layer.bias for layer in linear]}
        ]


def load_mask_net(path: str, model, method: str = "mlo_mae") -> tuple[MaskingNetwork, Frozen]:
    """Load the masking network of a checkpoint, and the patch embedding that it was trained on. `method` is the prefix
    of its tensors. Raises UserError if the checkpoint has none, or one of another grid than `model`."""
    content = read_file(path)
    prefix = f"{method}.net."
    state = {k.removeprefix(prefix): v for k, v in content.get("methods", {}).items() if k.startswith(prefix)}
    if not state:
        raise UserError(f"{path} holds no masking network: give a checkpoint of a run with --mlo_mae")
    hidden, inputs = state["layers.0.weight"].shape
    patches = state["layers.2.weight"].shape[0]
    own = f"{method}.embedding.network."
    embedding = {k.removeprefix(own): v for k, v in content["methods"].items() if k.startswith(own)} or {
        k: v for k, v in content["model"].items() if k.startswith("patch_embed.") or k == "pos_embed"
    }
    kernel, needed = embedding["patch_embed.proj.weight"], model.patch_embed.proj.weight
    grid = tuple(model.patch_embed.grid_size)
    fits = patches == model.patch_embed.num_patches and kernel.shape[1:] == needed.shape[1:]
    # 8 x 8 patches are as many as 4 x 16: only the table of positions tells them apart.
    if not fits or not is_sincos(embedding["pos_embed"], grid):
        raise UserError(
            f"the masking network of {path} is for {patches} patches of {kernel.shape[-1]} pixels in {kernel.shape[1]} "
            f"channels, this run has {grid[0]}x{grid[1]} of {needed.shape[-1]} in {needed.shape[1]}: give the same "
            f"--input_size, --patch_size and --in_chans"
        )
    net = MaskingNetwork(patches, inputs // patches, hidden)
    net.load_state_dict(state)
    tokens = PatchTokens(model)
    tokens.patch_embed.proj = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[-2:], kernel.shape[-2:])
    tokens.pos_embed = nn.Parameter(torch.empty_like(embedding["pos_embed"]))
    tokens.load_state_dict(embedding)
    return net, Frozen(tokens)
