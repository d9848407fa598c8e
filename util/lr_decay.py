"""Layer-wise learning-rate decay for fine-tuning (Clark et al. 2020, ELECTRA; Bao et al. 2022, BEiT)."""


def get_layer_id_for_vit(name: str, num_layers: int) -> int:
    """Return the layer of a ViT parameter: 0 before the blocks, i + 1 for block i, `num_layers` after the blocks."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return num_layers


def param_groups_lrd(model, weight_decay=0.05, no_weight_decay_list=(), layer_decay=0.75) -> list[dict]:
    """Return AdamW groups with `lr_scale` = layer_decay ** (distance from the head).

    Vectors, biases and the names in `no_weight_decay_list` get no weight decay; frozen parameters are left out.
    """
    num_layers = len(model.blocks) + 1
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim == 1 or name in no_weight_decay_list else weight_decay
        layer = get_layer_id_for_vit(name, num_layers)
        scale = layer_decay ** (num_layers - layer)
        group = groups.setdefault((layer, decay), {"lr_scale": scale, "weight_decay": decay, "params": []})
        group["params"].append(parameter)
    return list(groups.values())
