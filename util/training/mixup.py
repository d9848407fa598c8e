"""Mixup and cutmix with other parameters for each image, without a host that waits."""

import numpy as np
import timm.data
import torch
from timm.data.mixup import cutmix_bbox_and_lam


class Mixup(timm.data.Mixup):
    """timm's `Mixup`, with the same random numbers and values. Its modes `elem` and `pair` change one image after the
    other, and copy the shares to the device while the host waits; here all images are mixed at once."""

    def _mix_elem(self, x: torch.Tensor) -> torch.Tensor:
        return _mix_all(x, *self._drawn(x, len(x)))

    def _mix_pair(self, x: torch.Tensor) -> torch.Tensor:
        drawn = self._drawn(x, len(x) // 2)
        return _mix_all(x, *(np.concatenate([values, values[::-1]]) for values in drawn))

    def _drawn(self, x: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw for `count` images -> their own shares in the mixed labels (count,); those in pixels outside the box
        (count,); and the box of the partner's pixels (count, 4): top, bottom, left, right, all 0 without one."""
        labels, cut = self._params_per_elem(count)
        cut &= labels != 1
        pixels, boxes = np.where(cut, np.float32(1), labels), np.zeros((count, 4), np.float32)
        for i in np.flatnonzero(cut):
            boxes[i], labels[i] = cutmix_bbox_and_lam(
                x.shape[1:], labels[i], ratio_minmax=self.cutmix_minmax, correct_lam=self.correct_lam
            )
        return labels, pixels, boxes


def _mix_all(x: torch.Tensor, labels: np.ndarray, pixels: np.ndarray, boxes: np.ndarray) -> torch.Tensor:
    """Mix images (N, C, H, W) in place with those of the reversed batch, their partners; return `labels` (N, 1)."""
    numbers = torch.from_numpy(np.stack([labels, pixels, 1 - pixels, *boxes.T]))
    mixed, own, other, top, bottom, left, right = numbers.to(x.device, non_blocking=True)[..., None]  # (N, 1) each
    row, column = (torch.arange(side, device=x.device) for side in x.shape[2:])
    rows, columns = (row >= top) & (row < bottom), (column >= left) & (column < right)  # (N, H), (N, W)
    box = (rows[:, :, None] & columns[:, None, :])[:, None]  # (N, 1, H, W)
    partner, wide = x.flip(0), (..., None, None)
    x.copy_(torch.where(box, partner, x * own[wide] + partner * other[wide]))
    return mixed.to(x.dtype)
