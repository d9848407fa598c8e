"""The training step with each of our optimisations removed: the reference of benchmarks/step.py and of tests."""

import torch

from models_encoder import gather_tokens
from models_mae import MaskedAutoencoderViT, MaskedOutput, masked_mean, visible_patches

PIECES = ("embed", "order", "removed", "last")


class PlainMAE(MaskedAutoencoderViT):
    """The textbook autoencoder. It embeds every patch and then drops the removed ones (unless "embed" is in `pieces`),
    inserts mask tokens between the visible ones (unless "order"), and predicts every patch and then masks the errors
    (unless "removed"). With "last", the last decoder block computes only the tokens that the loss reads; this did not
    make the step faster."""

    pieces: tuple[str, ...] = ()

    def forward_pretrain(self, imgs, mask_ratio=0.75, scores=None, return_blocks=(), head=None, all_patches=False):
        patches = self.patchify(imgs)
        scores = torch.rand(patches.shape[:2], device=imgs.device) if scores is None else scores
        ids_keep, _, ids_restore = self.choose_visible(scores, mask_ratio)
        ids_removed = torch.argsort(ids_restore, dim=1)[:, visible_patches(scores.shape[1], mask_ratio) :]
        tokens = (
            self.embed_patches(patches, ids_keep)
            if "embed" in self.pieces
            else gather_tokens(self.embed(imgs), ids_keep)
        )
        latent, blocks = self.encode(tokens, return_blocks)
        removed = "removed" in self.pieces and not all_patches
        if "order" in self.pieces:
            decoded = (
                self.decode_removed(latent, ids_keep, ids_removed) if removed else self.decode(latent, ids_restore)
            )
        else:
            decoded = self._decode_in_order(latent, ids_restore)
            decoded = gather_tokens(decoded, ids_removed) if removed else decoded
        pred = (head or self.decoder_pred)(decoded)
        return MaskedOutput(
            latent, pred, patches, ids_keep, ids_removed, ids_removed, scores, decoded, mask_ratio, not removed, blocks
        )

    def _decode(self, latent, ids_keep, ids_removed, first=0):
        if "last" in self.pieces:
            return super()._decode(latent, ids_keep, ids_removed, first)
        x = self.decoder_tokens(latent, ids_keep, ids_removed)
        for block in self.decoder_blocks:
            x = self.run_block(block, x)
        return self.decoder_norm(x[:, 1 + first :])

    def _decode_in_order(self, latent, ids_restore):
        x = self.decoder_embed(latent)
        mask_tokens = self.mask_token.to(x.dtype).expand(len(x), ids_restore.shape[1] + 1 - x.shape[1], -1)
        patches = gather_tokens(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
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
    """Change `model` to use the textbook step except for the named pieces, and return it."""
    model.__class__ = PlainMAE
    model.pieces = pieces
    return model
