"""Small models of timm's architectures, in timm's own folder format."""

import json

import timm
import torch
from safetensors.torch import save_file

# Sizes that make each architecture small; the image has 32 pixels where the architecture has an image size.
VIT = dict(img_size=32, embed_dim=48, depth=2, num_heads=3)
STAGES = dict(img_size=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), window_size=2)
SMALL = {
    "vit_tiny_patch16_224": VIT,
    "deit3_small_patch16_224": VIT,
    "beitv2_base_patch16_224": VIT,
    "eva02_tiny_patch14_224": VIT | dict(patch_size=16),
    "vit_small_patch14_reg4_dinov2": VIT | dict(patch_size=16),
    "vit_small_patch16_dinov3": VIT,
    "vit_base_patch32_clip_224": VIT | dict(patch_size=16),
    "vit_base_patch16_siglip_224": VIT,
    "aimv2_large_patch14_224": VIT | dict(patch_size=16),
    "hiera_tiny_224": dict(img_size=64, embed_dim=16, stages=(1, 1, 1, 1)),
    "convnext_atto": dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)),
    "swin_tiny_patch4_window7_224": STAGES | dict(embed_dim=16),
    "resnet10t": {},
}
SMALL = {name: sizes for name, sizes in SMALL.items() if timm.is_model(name)}  # timm 1.0.20 may lack the newest


def small_model(architecture: str, **more):
    """Return an untrained model whose tensors all differ, in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, **{**SMALL[architecture], "num_classes": 10, **more})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def saved_folder(folder, architecture: str, **more):
    """Write a small model as timm does; return it."""
    model, sizes = small_model(architecture, **more), {**SMALL[architecture], **more}
    size = sizes.get("img_size", 32)
    images = {"input_size": [3, size, size], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "crop_pct": 0.8}
    images |= {"interpolation": "bilinear"}
    config = {"architecture": architecture, "num_classes": model.num_classes, "pretrained_cfg": images}
    folder.mkdir(parents=True, exist_ok=True)
    config["model_args"] = {name: value for name, value in sizes.items() if name != "num_classes"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({n: t.clone().contiguous() for n, t in model.state_dict().items()}, folder / "model.safetensors")
    return model
