"""Monitoring a pretraining run between epochs: reconstructions of preview images, and kNN accuracy."""

from contextlib import nullcontext

import torch

from evaluation.features import extract, knn_accuracy
from methods.pretrainer import Pretrainer
from models_encoder import mae_features
from util.data.build import build_loader
from util.data.image_format import image_shape, mean_std
from util.data.shards import Shards
from util.data.sources import Subset
from util.data.transforms import eval_transform
from util.parallel.distributed import barrier, from_main_process, is_main_process
from util.parallel.fsdp import whole
from util.report.pictures import (
    CAPTION,
    NORM_PIX,
    denormalized,
    fixed_noise,
    reconstruct,
    reconstruction_sheet,
    shown_channels,
)
from util.training.run import Run


class Monitor:
    """Reconstruction pictures and kNN accuracy of fixed images, between epochs: the same images under the same masks on
    any number of processes. The masks are those of the method that decides them, or else random and fixed. Only the
    main process reads the preview images and draws the pictures."""

    COUNT = 8  # preview images
    NEIGHBOURS = 20  # of the kNN accuracy; tools/knn.py gives it the same name

    def __init__(self, args, run: Run, pretrainer: Pretrainer, images, held_out):
        self.args, self.run, self.pretrainer = args, run, pretrainer
        self.mean, self.std = mean_std(args.dataset, args.in_chans, args.mean, args.std)
        self.channels = shown_channels(args.in_chans, args.show_channels)
        self.transform = eval_transform(image_shape(args.input_size), self.mean, self.std, args.crop_pct)
        self.images, self.held_out = images, held_out
        self._loaders = None
        self.fixed = self._fixed_images() if args.vis_freq and is_main_process() else None

    def _fixed_images(self):
        images = self.held_out or self.images
        if hasattr(images, "load"):
            images = self._evenly_spaced(images, self.COUNT)
        elif not isinstance(images, Shards):
            return None  # a stream of timm's
        # Without workers: starting them takes longer than reading a few images.
        loader = build_loader(images, self.transform, self.args, self.COUNT, train=False, num_workers=0, split=False)
        batch = next(iter(loader.begin(0)))
        imgs = batch.image[batch.bad == 0].to(self.run.device)
        return (imgs, fixed_noise(self.pretrainer.model, len(imgs), 0, self.run.device)) if len(imgs) else None

    @staticmethod
    def _evenly_spaced(images, count: int):
        """Return `count` images, evenly spaced over the set, which is usually sorted by class."""
        if len(images) <= count:
            return images
        return Subset(images, torch.linspace(0, len(images) - 1, count).long().tolist())

    def after_epoch(self, epoch: int) -> dict[str, float]:
        """Draw previews and compute metrics if they are due after `epoch`; return the metrics by name."""
        row = {}
        last = self.run.ended
        preview_due = self.args.vis_freq and (last or epoch % self.args.vis_freq == 0)
        knn_due = self.args.knn_freq and (last or (epoch + 1) % self.args.knn_freq == 0)
        with whole(self.pretrainer) if preview_due or knn_due else nullcontext():
            if preview_due and self.fixed and self.pretrainer.shows_pixels:
                row["eval/fixed_images_loss"] = self._preview(epoch + 1)
            if knn_due:
                row |= self._knn()
            barrier()
        return row

    def _preview(self, epoch: int) -> float:
        """Write pictures and histograms of the fixed images; return their reconstruction loss."""
        (imgs, noise), ratio = self.fixed, self.args.mask_ratio
        scores = self.pretrainer.preview_scores(imgs, noise)
        pictures = reconstruct(self.pretrainer.model, imgs, ratio, scores, self.mean, self.std, self.channels)
        caption = f"{ratio:.0%} removed; {CAPTION}{NORM_PIX * self.pretrainer.model.norm_pix_loss}"
        self.run.board.image("reconstruction", reconstruction_sheet([pictures], caption=caption).tensor(), epoch)
        pixels = denormalized(imgs, self.mean, self.std, self.channels)
        for name, picture in self.pretrainer.pictures(imgs, pixels).items():
            self.run.board.image(name, picture.cpu(), epoch)
        for name, values in self.pretrainer.distributions(imgs).items():
            self.run.board.histogram(name, values, epoch)
        return evaluate_reconstruction(self.pretrainer, imgs, scores, ratio)

    def _knn(self) -> dict[str, float]:
        """Return the kNN accuracy by name, computed by the main process; nothing if no image of a split is readable."""
        if self._loaders is None:
            splits = [self._evenly_spaced(images, self.args.knn_images) for images in (self.images, self.held_out)]
            self._loaders = [build_loader(i, self.transform, self.args, self.args.batch_size, False) for i in splits]
        model = self.pretrainer.model.eval()
        device, dtype = self.run.device, self.run.amp_dtype
        splits = [extract(lambda x: mae_features(model, x, "avg"), loader, device, dtype) for loader in self._loaders]
        model.train()
        if not all(len(labels) for _, labels in splits):
            print("note: no kNN accuracy, because none of the --knn_images of a split could be read")
            return {}
        k = self.NEIGHBOURS
        accuracy = from_main_process(lambda: knn_accuracy(*splits[0], *splits[1], k=k, device=device))
        return {f"eval/knn{k}_acc1": accuracy}


@torch.no_grad()
def evaluate_reconstruction(pretrainer: Pretrainer, imgs, scores, mask_ratio: float) -> float:
    """Return MAE's loss on images (N, C, H, W) whose patches with the highest `scores` (N, L) are removed."""
    pretrainer.eval()
    loss, _, _ = pretrainer.model(imgs, mask_ratio=mask_ratio, noise=scores)
    pretrainer.train()
    return loss.item()
