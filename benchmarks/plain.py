"""The step without what it need not do, piece by piece: what benchmarks/step.py times and tests compare with."""

import torch
import torch.nn.functional as F

from models_mae import MaskedAutoencoderViT, MaskedOutput, masked_mean, pick, visible_patches

PIECES = ("embed", "order", "removed", "last")


def block_from(block, x, first: int):
    """A timm block's output for the tokens from `first` on alone: all of them are keys and values, those ask."""
    attention, y = block.attn, block.norm1(x)
    width, heads = x.shape[-1], attention.num_heads
    weight, bias = attention.qkv.weight, attention.qkv.bias
    queries = F.linear(y[:, first:], weight[:width], bias[:width]).unflatten(-1, (heads, -1)).transpose(1, 2)
    keys, values = F.linear(y, weight[width:], bias[width:]).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    if attention.fused_attn:
        found = F.scaled_dot_product_attention(queries, keys, values)
    else:
        found = (queries * attention.scale @ keys.transpose(-2, -1)).softmax(dim=-1) @ values
    x = x[:, first:] + attention.proj(found.transpose(1, 2).flatten(2))
    return x + block.mlp(block.norm2(x))


class PlainMAE(MaskedAutoencoderViT):
    """The same autoencoder, by the book: embeds every patch and then drops the removed ones (without "embed" in
    `pieces`), puts mask tokens between the visible ones (without "order"), predicts and compares every patch and then
    masks the errors (without "removed"). And what did not pay: a last decoder block that computes only what the loss
    reads ("last")."""

    pieces: tuple[str, ...] = ()

    def forward_pretrain(self, imgs, mask_ratio=0.75, scores=None, return_blocks=(), head=None, all_patches=False):
        patches = self.patchify(imgs)
        scores = torch.rand(patches.shape[:2], device=imgs.device) if scores is None else scores
        ids_keep, _, ids_restore = self.choose_visible(scores, mask_ratio)
        ids_removed = torch.argsort(ids_restore, dim=1)[:, visible_patches(scores.shape[1], mask_ratio) :]
        tokens = self.embed_patches(patches, ids_keep) if "embed" in self.pieces else pick(self.embed(imgs), ids_keep)
        latent, blocks = self.encode(tokens, return_blocks)
        removed = "removed" in self.pieces and not all_patches
        if "order" in self.pieces:
            decoded = (
                self.decode_removed(latent, ids_keep, ids_removed) if removed else self.decode(latent, ids_restore)
            )
        else:
            decoded = self._decode_in_order(latent, ids_restore)
            decoded = pick(decoded, ids_removed) if removed else decoded
        pred = (head or self.decoder_pred)(decoded)
        return MaskedOutput(
            latent, pred, patches, ids_keep, ids_removed, scores, decoded, mask_ratio, not removed, blocks
        )

    def _decode(self, latent, ids_keep, ids_removed, first=0):
        if "last" not in self.pieces or not first:
            return super()._decode(latent, ids_keep, ids_removed, first)
        *before, last = self.decoder_blocks
        x = self.decoder_tokens(latent, ids_keep, ids_removed)
        for block in before:
            x = self.run_block(block, x)
        return self.decoder_norm(block_from(last, x, 1 + first))

    def _decode_in_order(self, latent, ids_restore):
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = pick(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        return self.decoder_norm(x)[:, 1:]

    def reconstruction_loss(self, out):
        if not out.all_patches:
            return super().reconstruction_loss(out)
        errors = ((out.pred - self.patch_target(out.patches)) ** 2).mean(dim=-1)
        return masked_mean(errors, out.mask)


def plain(model: MaskedAutoencoderViT, *pieces: str) -> MaskedAutoencoderViT:
    """`model` itself, made to work without the pieces that are not named."""
    model.__class__ = PlainMAE
    model.pieces = pieces
    return model
